"""Tests of `paris_node.in_use`, and of what it keeps on a node whose store is limited."""

import os
from pathlib import Path
from typing import Any

import pytest
import trio

from paris_node.in_use import ItemsInUse
from paris_p2p.errors import StoreError
from paris_p2p.ids import InfoHash, Role
from paris_p2p.wire.identity import Identity

A, B = InfoHash(b"a" * 32), InfoHash(b"b" * 32)
ROLE = Role("expert-0")
TRAINER = Identity(b"t" * 32)
NOISE_BYTES = 50_000


def test_an_item_is_in_use_until_its_last_user_is_done() -> None:
    items = ItemsInUse()
    with items.using(A) as use:
        with items.using(A):
            use(B)
        assert items.items() == {A, B}
    assert items.items() == frozenset()


def test_an_unwanted_item_is_given_once_and_only_when_nobody_uses_it() -> None:
    items = ItemsInUse()
    items.unwanted(A)
    with items.using(A):
        assert items.take_unwanted() == frozenset()
    assert items.take_unwanted() == {A}
    assert items.take_unwanted() == frozenset()


async def test_the_quota_spares_what_is_in_use_and_what_is_gone_is_not_held(
    world: Any, autojump_clock: Any
) -> None:
    node, _ = world.run_node(world.network("alice"))
    store = node.network.store
    data, statement = world.checkpoint(TRAINER, ROLE, 50, store=store)
    used = sum(holding.bytes_on_disk for holding in store.holdings())
    store.limit(used + NOISE_BYTES - 1, node.pinned)
    with node.in_use.using(statement.weights.info_hash):
        store.add(noise(world, "one"), mode="copy")
        assert store.has(statement.weights.info_hash) and not store.has(statement.resume.info_hash)
    with pytest.raises(StoreError, match="no longer here"):
        await node.hold(data, statement)
    assert data not in node.ledger


async def test_what_is_added_is_in_use_from_its_first_moment(world: Any, autojump_clock: Any) -> None:
    node, _ = world.run_node(world.network("alice"))
    store, seen = node.network.store, []
    with node.in_use.using() as use:

        def foresee(item: InfoHash) -> None:
            seen.append(store.has(item))
            use(item)

        ref = store.add(noise(world, "one"), mode="copy", foresee=foresee)
        assert seen == [False] and ref.info_hash in node.pinned()
    await trio.lowlevel.checkpoint()


def noise(world: Any, name: str) -> Path:
    folder: Path = world.folder / "noise" / name
    folder.mkdir(parents=True)
    (folder / "bytes").write_bytes(os.urandom(NOISE_BYTES))
    return folder
