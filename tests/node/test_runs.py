"""Tests of `paris_node.runs`."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import trio

from paris_node.runs import (
    FETCH_STALL_S,
    FIND_DEADLINE_S,
    MANIFEST_FILE,
    MANIFEST_TRIES,
    MAX_LISTED,
    find_run,
    load_manifest,
    matching,
    save_manifest,
)
from paris_p2p.errors import ConfigError, NetworkError, StoreError, TransportError
from paris_p2p.ids import InfoHash, RunId
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import SignedManifest
from paris_p2p.wire.records import RunRecord

PUBLISHER = Identity(b"p" * 32)
REF = ContentRef(InfoHash(b"i" * 32), 100, 1 << 14)


def record(name: str, first: int) -> RunRecord:
    return RunRecord(name, RunId(bytes([first]) * 32), REF)


ONE, TWO = record("digits", 0x11), record("emoji", 0x12)


def test_any_run_is_meant_without_a_selector() -> None:
    assert matching([ONE, TWO], None) == [ONE, TWO]


@pytest.mark.parametrize("selector", ["111111", "11" * 32, "digits"])
def test_a_run_is_selected_by_the_beginning_of_its_id_or_by_name(selector: str) -> None:
    assert matching([ONE, TWO], selector) == [ONE]


def test_upper_case_ids_are_ids_too() -> None:
    assert matching([record("a", 0xAB)], "ABABAB") == [record("a", 0xAB)]


def test_a_beginning_too_short_to_mean_anything_is_a_name() -> None:
    assert matching([ONE, TWO], "11111") == [] and matching([record("11111", 0x22)], "11111") != []


def test_an_id_goes_before_a_strangers_run_named_like_it() -> None:
    assert matching([ONE, record("111111", 0x33)], "111111") == [ONE]


def published(world: Any, owner: Identity = PUBLISHER) -> ContentRef:
    """Put the manifest into a seeding store and announce it."""
    ref: ContentRef = world.prepared.add(world.folder / "prepared" / MANIFEST_FILE, mode="copy")
    world.stores.append(world.prepared)
    world.announces_run(owner, world.signed, ref)
    return ref


def newcomer(world: Any) -> Any:
    """A node that knows nothing yet."""
    network = world.network("newcomer")
    shutil.rmtree(network.home.path / "runs")
    return network


async def test_the_only_run_is_found_fetched_checked_and_kept(world: Any, autojump_clock: Any) -> None:
    published(world)
    network = newcomer(world)
    assert await find_run(network, None) == world.signed
    assert load_manifest(network.home, world.signed.run_id) == world.signed


async def test_a_run_announced_a_little_later_is_waited_for(world: Any, autojump_clock: Any) -> None:
    network = newcomer(world)
    async with trio.open_nursery() as nursery:

        async def later() -> None:
            await trio.sleep(FIND_DEADLINE_S / 2)
            published(world)

        nursery.start_soon(later)
        assert (await find_run(network, "digits")).run_id == world.signed.run_id


async def test_nothing_announced_is_a_network_error_that_says_so(world: Any, autojump_clock: Any) -> None:
    with pytest.raises(NetworkError, match="paris-node publish"):
        await find_run(newcomer(world), None)
    assert trio.current_time() < FIND_DEADLINE_S + 5


async def test_another_run_announced_is_named(world: Any, autojump_clock: Any) -> None:
    published(world)
    with pytest.raises(NetworkError, match=r"'emoji'.*digits"):
        await find_run(newcomer(world), "emoji")


def second_run(world: Any, name: str, owner: Identity) -> SignedManifest:
    """A stranger's run with a manifest to show, announced."""
    signed: SignedManifest = world.make_run(name)
    world.announces_run(
        owner, signed, world.prepared.add(world.folder / "prepared" / MANIFEST_FILE, mode="copy")
    )
    return signed


async def test_several_runs_are_listed_with_what_to_do(world: Any, autojump_clock: Any) -> None:
    published(world)
    other = second_run(world, "emoji", Identity(b"q" * 32))
    with pytest.raises(ConfigError) as caught:
        await find_run(newcomer(world), None)
    listed = [f"{one.manifest.name} ({one.run_id.hex()[:12]})" for one in (world.signed, other)]
    assert f"several runs are announced: {', '.join(listed)}. Choose one with --run" in str(caught.value)
    assert await find_run(newcomer(world), "emoji") == other


async def test_a_run_that_has_no_manifest_to_show_is_none(world: Any, autojump_clock: Any) -> None:
    """Nor is one whose id begins like that of the run asked for."""
    published(world)
    for number in range(9):
        like = RunId(world.signed.run_id[:6] + bytes([number]) * 26)
        world.says(Identity(bytes([number + 1]) * 32), RunRecord("digits", like, REF), b"")
    for selector in (None, world.signed.run_id.hex()[:12], "digits"):
        assert await find_run(newcomer(world), selector) == world.signed


async def test_a_crowd_of_runs_is_cut_and_cannot_steer_the_terminal(world: Any, autojump_clock: Any) -> None:
    published(world)
    world.announces_run(Identity(b"q" * 32), world.signed, REF)
    for number in range(12):
        second_run(world, f"\x1b[2Jrun{number}", Identity(bytes([number]) * 32))
    with pytest.raises(ConfigError) as caught:
        await find_run(newcomer(world), None)
    assert "\x1b" not in str(caught.value) and str(caught.value).count("(") == MAX_LISTED


async def test_a_run_this_home_knows_by_its_whole_id_needs_nobody_else(
    world: Any, autojump_clock: Any
) -> None:
    """The members of a run can come back although the publisher has gone."""
    network = world.network("alice")
    network.dht.down = True
    assert await find_run(network, world.signed.run_id.hex()) == world.signed


async def test_a_network_that_does_not_answer_is_a_transport_error(world: Any, autojump_clock: Any) -> None:
    network = newcomer(world)
    network.dht.down = True
    with pytest.raises(TransportError):
        await find_run(network, None)


async def test_a_strangers_manifest_item_is_passed_over(world: Any, autojump_clock: Any) -> None:
    ref = published(world)
    world.announces_run(Identity(b"q" * 32), world.signed, ref)
    folder = world.folder / "strange" / "item"
    (folder / MANIFEST_FILE).mkdir(parents=True)  # a folder where a file belongs
    (folder / MANIFEST_FILE / "x").write_bytes(b"x")
    strange = world.prepared.add(folder)
    nonsense = world.folder / "nonsense" / MANIFEST_FILE
    nonsense.parent.mkdir()
    nonsense.write_bytes(b"nonsense")
    for owner, item in ((b"r", strange), (b"s", world.prepared.add(nonsense)), (b"t", REF)):
        world.announces_run(Identity(owner * 32), world.signed, item)
    assert await find_run(newcomer(world), None) == world.signed


async def test_many_keys_that_name_false_items_do_not_displace_the_manifest(
    world: Any, autojump_clock: Any
) -> None:
    """Four items that nobody serves, of six keys each, and eleven that are something else."""
    ref = published(world)
    for number in range(4):
        world.announces_run(Identity(bytes([number + 1]) * 32), world.signed, ref)
    nonsense = world.folder / "nonsense" / MANIFEST_FILE
    nonsense.parent.mkdir()
    for number in range(15):
        nonsense.write_bytes(bytes([number]) * 100)
        item = ContentRef(InfoHash(bytes([number]) * 32), 100, 1 << 14)
        item = item if number < 4 else world.prepared.add(nonsense, mode="copy")
        for key in range(6):
            world.announces_run(Identity(bytes([50 + 6 * number + key]) * 32), world.signed, item)
    began = trio.current_time()
    for seed in range(5):
        found = await find_run(newcomer(world), world.signed.run_id.hex(), random.Random(seed))
        assert found == world.signed
    assert trio.current_time() - began < 5 * 2 * FETCH_STALL_S


async def test_only_so_many_false_manifests_are_tried(world: Any, autojump_clock: Any) -> None:
    for number in range(30):
        ref = ContentRef(InfoHash(bytes([number]) * 32), 100, 1 << 14)
        world.announces_run(Identity(bytes([number]) * 32), world.signed, ref)
    network = newcomer(world)
    with pytest.raises(NetworkError, match="could not be had"):
        await find_run(network, None)
    assert len(network.swarm.asked) == MANIFEST_TRIES


async def test_a_manifest_that_is_too_large_is_not_fetched(world: Any, autojump_clock: Any) -> None:
    world.announces_run(PUBLISHER, world.signed, ContentRef(InfoHash(b"i" * 32), 1 << 30, 1 << 20))
    network = newcomer(world)
    with pytest.raises(NetworkError, match="too large"):
        await find_run(network, None)
    assert network.swarm.asked == []


def test_a_damaged_manifest_in_the_home_counts_as_none(world: Any) -> None:
    home = world.network("alice").home
    path = home.run_folder(world.signed.run_id) / MANIFEST_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert load_manifest(home, world.signed.run_id) is None


def test_a_disk_that_refuses_the_manifest_is_a_store_error(world: Any) -> None:
    home = newcomer(world).home
    Path(home.path / "runs").write_bytes(b"")
    with pytest.raises(StoreError):
        save_manifest(home, world.signed)
