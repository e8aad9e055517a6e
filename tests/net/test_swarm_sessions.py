"""Who may hold a session, who makes way, what their limits remember, and what happens when an item goes."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import trio
from trio.testing import MockClock

from paris_p2p.core.visits import GRACE_S
from paris_p2p.net.limits import SwarmLimits
from paris_p2p.net.swarm import Swarm
from paris_p2p.wire import messages as m
from paris_p2p.wire.content import ContentRef
from tests.net.memory_network import PIECE, MemoryNetwork, World
from tests.net.test_swarm import ScriptedStream, greeting

T = TypeVar("T")


class Caller(ScriptedStream):
    """A stranger of a network of its own; `told`: the codes of the goodbyes it was sent."""

    def __init__(self, ref: ContentRef, place: str) -> None:
        super().__init__(greeting(ref) + m.encode(m.Interested()))
        self.place = place

    @property
    def told(self) -> list[int]:
        return [code for code in range(8) if self._bye(code) in bytes(self.written)]

    def _bye(self, code: int) -> bytes:
        return m.encode(m.Bye(code, ""))[5:].split(b"text")[0]


async def call(world: World, target: MemoryNetwork, caller: Caller, nursery: trio.Nursery) -> None:
    assert target._handler is not None
    nursery.start_soon(target._handler, world.network().node_id, caller)
    await trio.sleep(1.0)


async def test_one_place_gets_so_many_sessions_and_others_are_let_in(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory network has no direct streams: these are sessions as libp2p brings them."""
    monkeypatch.setattr("paris_p2p.net.swarm.MAX_SESSIONS_PER_PLACE", 2)
    seed, target = world.store("seed"), world.network()
    ref = world.content(seed)
    callers = [Caller(ref, place) for place in ("a", "a", "a", "b", "", "", "")]
    async with world.node(seed, target), trio.open_nursery() as nursery:
        for caller in callers:
            await call(world, target, caller, nursery)
        assert [caller.told for caller in callers] == [[], [], [m.BYE_BUSY], [], [], [], []]
        nursery.cancel_scope.cancel()


async def test_when_all_sessions_are_taken_the_idlest_makes_way_and_is_told(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_p2p.net.swarm.MAX_SESSIONS", 2)
    seed, mine, target = world.store("seed"), world.store("mine"), world.network()
    ref = world.content(seed)
    idle, early, late = (Caller(ref, "") for _ in range(3))
    slow = SwarmLimits(up_bytes_per_s=40_000)
    async with (
        world.node(seed, target, True, slow) as swarm,
        world.node(mine) as leecher,
        trio.open_nursery() as nursery,
    ):
        await begun(ref, leecher, nursery)
        for caller in (idle, early):
            await call(world, target, caller, nursery)
        assert early.told == [m.BYE_BUSY] and idle.told == []  # nobody is old enough to make way
        await trio.sleep(GRACE_S)
        await call(world, target, late, nursery)
        assert idle.told == [m.BYE_BUSY] and late.told == []
        assert len(swarm._visits) == 2 and len(swarm._items[ref.info_hash].connections) == 2
        await leecher.fetch(ref)
        nursery.cancel_scope.cancel()


async def begun(ref: ContentRef, mine: Swarm, nursery: trio.Nursery) -> None:
    """Starts a fetch, and returns when a part of it is here."""
    nursery.start_soon(mine.fetch, ref)
    with trio.fail_after(60):
        while mine.rates().down_bytes < 5 * PIECE:
            await trio.sleep(0.05)


async def test_a_limit_per_peer_counts_over_all_its_sessions_and_is_forgotten_after_the_last(
    world: World, autojump_clock: MockClock
) -> None:
    """Neither a second item nor a second session gives a peer a fresh allowance."""
    seed, mine = world.store("seed"), world.store("mine")
    refs = [world.content(seed, pieces=pieces) for pieces in (30, 60)]
    rate = 100_000
    limits = SwarmLimits(per_peer_up_bytes_per_s=rate)
    async with world.node(seed, holder=True, limits=limits) as source, world.node(mine) as swarm:
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for ref in refs:
                nursery.start_soon(swarm.fetch, ref)
        took = trio.current_time() - start
        assert took > 0.9 * sum(ref.length for ref in refs) / rate - 1.0
        with trio.fail_after(60):
            while source._shared.sessions:
                await trio.sleep(1.0)
        assert not source._shared.up_limit._peers


async def test_an_item_removed_while_it_is_served_is_gone_without_harm_to_anyone(
    world: World, autojump_clock: MockClock
) -> None:
    first, second, third = world.store("first"), world.store("second"), world.store("mine")
    ref = world.content(first, pieces=100)
    assert world.content(second, pieces=100) == ref
    slow = SwarmLimits(up_bytes_per_s=200_000)
    async with world.node(first, holder=True, limits=slow) as one, world.node(third) as mine:
        async with trio.open_nursery() as nursery:
            await begun(ref, mine, nursery)
            first.remove(ref.info_hash)
            await trio.sleep(2.0)
            assert ref.info_hash not in one._items
            (job,) = mine._fetches.values()
            assert job.download is not None
            assert "no longer here" in " ".join(job.download.sources.reasons())
            async with world.node(second, holder=True):
                with trio.fail_after(120):
                    await mine.fetch(ref)
        for swarm, other in ((one, mine), (mine, one)):
            assert not swarm._shared.bans.banned(other._network.node_id, trio.current_time())
    assert third.verify(ref.info_hash) == []


async def test_who_asks_for_an_item_that_was_removed_is_told_so_though_others_still_hold_sessions(
    world: World, autojump_clock: MockClock
) -> None:
    seed, target = world.store("seed"), world.network()
    ref = world.content(seed)
    before, after = Caller(ref, ""), Caller(ref, "")
    async with world.node(seed, target), trio.open_nursery() as nursery:
        await call(world, target, before, nursery)
        seed.remove(ref.info_hash)
        await call(world, target, after, nursery)
        assert before.told == after.told == [m.BYE_UNKNOWN_ITEM]
        nursery.cancel_scope.cancel()


async def test_a_fetch_that_begins_while_its_removed_item_is_looked_for_is_the_item_from_then_on(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy disk the answer that the old one has gone comes when the new one is there."""
    mine, other, target = world.store("mine"), world.store("other"), world.network()
    ref = world.content(mine, pieces=50)
    assert world.content(other, pieces=50) == ref
    async with world.node(mine, target) as swarm, trio.open_nursery() as nursery:
        await call(world, target, Caller(ref, ""), nursery)
        old, at_once = swarm._items[ref.info_hash], swarm._blocking

        async def slowly(job: Callable[[], T]) -> T:
            answer = await at_once(job)
            if job == old.is_here:
                await trio.sleep(0.2)
            return answer

        monkeypatch.setattr(swarm, "_blocking", slowly)
        mine.remove(ref.info_hash)
        late = Caller(ref, "")
        nursery.start_soon(call, world, target, late, nursery)
        await trio.sleep(0.05)
        nursery.start_soon(swarm.fetch, ref)
        await trio.sleep(1.0)
        assert swarm._items[ref.info_hash].download is not None and late.told == []
        async with world.node(other, holder=True):
            with trio.fail_after(60):
                await swarm.fetch(ref)
        nursery.cancel_scope.cancel()
    assert mine.verify(ref.info_hash) == []
