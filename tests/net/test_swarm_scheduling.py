"""Limits, priorities and the seeder's first copy, through the real driver on virtual time."""

from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from paris_p2p.errors import StoreError, TransportError
from paris_p2p.ids import InfoHash
from paris_p2p.net.swarm import Progress, Swarm, SwarmLimits
from paris_p2p.store.partial import PartialItem
from paris_p2p.wire.content import ContentRef
from tests.net.memory_network import PIECE, World


async def timed(swarm: Swarm, ref: ContentRef) -> float:
    start = trio.current_time()
    await swarm.fetch(ref)
    return trio.current_time() - start


@pytest.mark.parametrize("name", ["up_bytes_per_s", "per_peer_up_bytes_per_s"])
async def test_uploads_keep_to_their_limit(world: World, autojump_clock: MockClock, name: str) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed, pieces=100)
    limits = SwarmLimits(**{name: 200_000})
    async with world.node(seed, holder=True, limits=limits), world.node(mine) as swarm:
        took = await timed(swarm, ref)
    assert 0.8 * ref.length / 200_000 < took < 1.3 * ref.length / 200_000


@pytest.mark.parametrize("name", ["down_bytes_per_s", "per_peer_down_bytes_per_s"])
async def test_downloads_keep_to_their_limit(world: World, autojump_clock: MockClock, name: str) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed, pieces=100)
    limits = SwarmLimits(**{name: 200_000})
    async with world.node(seed, holder=True), world.node(mine, limits=limits) as swarm:
        took = await timed(swarm, ref)
    assert 0.8 * ref.length / 200_000 < took < 1.3 * ref.length / 200_000


async def test_limits_change_while_a_fetch_runs(world: World, autojump_clock: MockClock) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed, pieces=100)
    slow = SwarmLimits(up_bytes_per_s=10_000)
    async with world.node(seed, holder=True, limits=slow) as source, world.node(mine) as swarm:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swarm.fetch, ref)
            await trio.sleep(20.0)
            assert swarm.rates().down_bytes < 500_000
            source.set_limits(SwarmLimits())
            start = trio.current_time()
        assert trio.current_time() - start < 30.0


async def test_uploads_yield_to_the_trainer_and_come_back(world: World, autojump_clock: MockClock) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed, pieces=100)
    limits = SwarmLimits(yielded_up_bytes_per_s=20_000)
    async with world.node(seed, holder=True, limits=limits) as source, world.node(mine) as swarm:
        source.yield_uploads(True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swarm.fetch, ref)
            await trio.sleep(10.0)
            assert swarm.rates().down_bytes < 600_000
            source.yield_uploads(False)
            start = trio.current_time()
        assert trio.current_time() - start < 20.0


async def test_an_urgent_fetch_goes_before_the_others(world: World, autojump_clock: MockClock) -> None:
    seed, other, mine = world.store("seed"), world.store("other"), world.store("mine")
    bulk, urgent = world.content(seed, pieces=300), world.content(other, pieces=100)
    done: list[str] = []
    async with (
        world.node(seed, holder=True),
        world.node(other, holder=True),
        world.node(mine, limits=SwarmLimits(down_bytes_per_s=300_000)) as swarm,
        trio.open_nursery() as nursery,
    ):

        async def fetch(name: str, ref: ContentRef, priority: int) -> None:
            await swarm.fetch(ref, priority=priority)
            done.append(name)

        nursery.start_soon(fetch, "bulk", bulk, 0)
        await trio.sleep(3.0)
        start = trio.current_time()
        nursery.start_soon(fetch, "urgent", urgent, 1)
        while not done:
            await trio.sleep(0.5)
        assert done == ["urgent"]
        assert trio.current_time() - start < 1.5 * urgent.length / 300_000 + 3.0
    assert done == ["urgent", "bulk"]


async def test_a_fetch_that_is_held_back_does_not_stall(world: World, autojump_clock: MockClock) -> None:
    seed, other, mine = world.store("seed"), world.store("other"), world.store("mine")
    bulk, urgent = world.content(seed, pieces=50), world.content(other, pieces=150)
    limits = SwarmLimits(down_bytes_per_s=100_000)
    async with (
        world.node(seed, holder=True),
        world.node(other, holder=True),
        world.node(mine, limits=limits) as swarm,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(lambda: swarm.fetch(urgent, priority=1))
        nursery.start_soon(lambda: swarm.fetch(bulk, stall_timeout_s=10.0))
    assert mine.verify(bulk.info_hash) == mine.verify(urgent.info_hash) == []


async def test_a_crowd_gets_each_piece_from_the_seeder_about_once(
    world: World, autojump_clock: MockClock
) -> None:
    seed = world.store("seed")
    ref = world.content(seed, pieces=300)
    stores = [world.store(f"leech{n}") for n in range(4)]
    limits = SwarmLimits(up_bytes_per_s=400_000)  # its line is what everyone waits for
    async with world.node(seed, holder=True, limits=limits) as source, trio.open_nursery() as nursery:
        waste: list[int] = []

        async def leech(number: int) -> None:
            seen: list[Progress] = []
            async with world.node(stores[number], holder=True) as swarm:
                await swarm.fetch(ref, on_progress=seen.append)
                waste.append(seen[-1].wasted_bytes)
                await trio.sleep(3.0)

        for number in range(len(stores)):
            nursery.start_soon(leech, number)
        while len(waste) < len(stores):
            await trio.sleep(0.5)
        assert source.rates().up_bytes < 1.4 * ref.length
        assert sum(waste) < 0.03 * len(stores) * ref.length
    assert all(store.verify(ref.info_hash) == [] for store in stores)


async def test_an_item_is_no_longer_served_when_its_ratio_is_reached(
    world: World, autojump_clock: MockClock
) -> None:
    seed, first, second = world.store("seed"), world.store("first"), world.store("second")
    ref = world.content(seed)
    limits = SwarmLimits(seed_ratio=1.0)
    async with world.node(seed, holder=True, limits=limits) as source:
        async with world.node(first) as swarm:
            await swarm.fetch(ref)
        async with world.node(second) as swarm:
            with pytest.raises(TransportError, match="no source delivered"):
                await swarm.fetch(ref, stall_timeout_s=10.0)
        assert source.refuses(ref.info_hash)
        source.set_limits(replace(limits, seed_ratio=None))
        async with world.node(second) as swarm:
            await swarm.fetch(ref)


async def test_what_others_count_on_is_served_whatever_its_ratio(
    world: World, autojump_clock: MockClock
) -> None:
    """A checkpoint that counts as held here must be had from here: a take-over may come to need it."""
    seed, first, second = world.store("seed"), world.store("first"), world.store("second")
    ref, kept = world.content(seed), set[InfoHash]()
    async with world.node(seed, holder=True, limits=SwarmLimits(seed_ratio=1.0)) as source:
        source.keep_serving(lambda: kept)
        kept.add(ref.info_hash)
        for store in (first, second):
            async with world.node(store) as swarm:
                await swarm.fetch(ref, stall_timeout_s=10.0)
        assert not source.refuses(ref.info_hash)
        kept.clear()
        assert source.refuses(ref.info_hash)


async def test_pieces_found_on_disk_once_the_layer_is_known_are_served(
    world: World, autojump_clock: MockClock, tmp_path: Path
) -> None:
    """A download whose layer file was lost finds its pieces when a peer brings the layer."""
    seed, mine, last = world.store("seed"), world.store("mine"), world.store("last")
    ref = world.content(seed)
    partial = mine.begin(ref)
    stored = seed.open(ref.info_hash)
    partial.set_info(stored.info)
    for file in stored.layout.layered():
        partial.set_layer(file, stored.layer(file))
    for piece in range(20):
        length = stored.layout.piece_span(piece)[2]
        assert partial.write_piece(piece, stored.read_block(piece, 0, length))
    partial.close()
    for layer in mine.root.rglob("layers/*"):
        layer.unlink()
    seed_network, relay_network = world.network(), world.network()
    async with (
        world.node(seed, seed_network),
        world.node(mine, relay_network) as relay,
        world.node(last) as swarm,
    ):
        await relay.fetch(ref, peers=[seed_network.peer])
        assert relay.rates().down_bytes <= ref.length - 20 * PIECE
        await swarm.fetch(ref, peers=[relay_network.peer])
    assert last.verify(ref.info_hash) == []


async def test_a_bug_while_storing_ends_the_fetch_and_not_the_node(
    world: World,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref, good = world.content(seed), PartialItem.write_piece

    def broken(partial: PartialItem, piece: int, data: bytes, *, checked: bool) -> bool:
        raise ValueError("a bug")

    async with world.node(seed, holder=True), world.node(mine) as swarm:
        monkeypatch.setattr(PartialItem, "write_piece", broken)
        with pytest.raises(StoreError, match="internal error"):
            await swarm.fetch(ref)
        assert "a bug" in caplog.text
        caplog.clear()
        monkeypatch.setattr(PartialItem, "write_piece", good)
        await swarm.fetch(ref)
    assert mine.verify(ref.info_hash) == []
