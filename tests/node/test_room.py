"""Tests of `paris_node.room`."""

from collections import namedtuple
from typing import Any

import pytest

from paris_node.room import check_room
from paris_p2p.errors import StoreError
from paris_p2p.ids import Role

Usage = namedtuple("Usage", "total used free")
WEIGHTS = 6 * 4  # the elements of the world's expert, 4 bytes each
CHECKPOINTS = WEIGHTS * 5 * 4


def items(world: Any, role: str) -> int:
    manifest = world.signed.manifest
    return sum(ref.length for ref in {*manifest.shards(Role(role)), *manifest.components.values()})


@pytest.mark.parametrize("seeds", [False, True])
def test_room_is_needed_for_what_is_to_be_fetched_and_four_checkpoints(
    world: Any, monkeypatch: pytest.MonkeyPatch, seeds: bool
) -> None:
    network = world.network("alice", seeds=seeds)
    needed = CHECKPOINTS + (0 if seeds else items(world, "expert-0"))
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(10**9, 0, needed))
    check_room(network, world.signed.manifest, None)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(10**9, 0, needed - 1))
    with pytest.raises(StoreError):
        check_room(network, world.signed.manifest, None)


def test_the_message_says_how_much_is_missing_where_and_what_to_do(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = world.network("alice")
    monkeypatch.setattr("paris_node.room.CHECKPOINTS_ON_DISK", 50_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(10**12, 0, 1_234_567_890))
    with pytest.raises(StoreError) as caught:
        check_room(network, world.signed.manifest, Role("expert-0"))
    said = str(caught.value)
    assert (
        str(network.home.path) in said and "1.23 GB free" in said and "6.00 GB" in said and "--home" in said
    )


@pytest.mark.parametrize("seeds", [False, True])
def test_a_quota_must_hold_what_is_here_already_too(world: Any, seeds: bool) -> None:
    network = world.network("alice", seeds=seeds)
    needed = CHECKPOINTS + items(world, "expert-0")
    check_room(network, world.signed.manifest, None, needed)
    with pytest.raises(StoreError, match="--max-disk"):
        check_room(network, world.signed.manifest, None, needed - 1)
