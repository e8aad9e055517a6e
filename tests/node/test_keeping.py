"""Tests of `paris_node.keeping`: what stays, what goes, what others are told of a fetch."""

import os
from typing import Any

import pytest
import trio

from paris_node import keeping
from paris_node.announcer import OVERDUE_S, PROVIDE_TTL_S, RENEW_AT, Announcer, is_overdue
from paris_node.keeping import (
    ABANDONED_S,
    PASSING_TTL_S,
    abandoned,
    announce_fetches,
    announce_for_now,
    give_up_abandoned,
    pinned_items,
)
from paris_p2p.core.quota import Holding
from paris_p2p.errors import TransportError
from paris_p2p.ids import ROUTER, InfoHash, Role
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.content import ContentRef

ITEM = InfoHash(b"\1" * 32)


@pytest.fixture
def network(world: Any) -> Any:
    return world.network("alice")


def items(refs: Any) -> set[InfoHash]:
    return {ref.info_hash for ref in refs}


def test_components_and_the_roles_shards_are_pinned_and_other_shards_are_not(world: Any) -> None:
    manifest = world.signed.manifest
    components, one = items(manifest.components.values()), items(manifest.shards(Role("expert-0")))
    assert pinned_items(manifest, None, [], []) == components
    assert pinned_items(manifest, Role("expert-0"), [], [ITEM]) == components | one | {ITEM}
    assert pinned_items(manifest, ROUTER, [], []) == components | items(manifest.shards(ROUTER))


def test_only_half_fetched_items_that_nothing_needs_for_long_are_given_up() -> None:
    def held(number: int, *, complete: bool = False, age: float = ABANDONED_S) -> Holding:
        return Holding(InfoHash(bytes([number]) * 32), 1, complete, 1000.0 - age)

    holdings = [held(1), held(2, complete=True), held(3, age=ABANDONED_S - 1), held(4)]
    assert [one[0] for one in abandoned(holdings, {held(4).info_hash}, 1000.0)] == [1]


async def test_the_store_loses_what_newer_ones_replaced_but_no_live_transfer(network: Any) -> None:
    store: ContentStore = network.store
    refs = [ContentRef(InfoHash(bytes([number]) * 32), 5, 1 << 14) for number in range(3)]
    for ref in refs:
        store.begin(ref).close()
        os.utime(store.root / "partial" / ref.info_hash.hex(), (1.0, 1.0))
    network.swarm.under_way.add(refs[0].info_hash)
    await give_up_abandoned(network, [refs[1]])
    assert store.partial() == refs[:2]


async def test_a_fetch_is_told_of_at_once_and_again_when_it_is_complete(
    world: Any, network: Any, autojump_clock: Any
) -> None:
    announcer = Announcer(network)
    ref = ContentRef(ITEM, 5, 1 << 14)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announce_fetches, network, announcer)
        with trio.move_on_after(10):
            await network.swarm.fetch(ref)
        (record,) = world.live("provide", ITEM)
        assert not record.payload.complete and record.payload.addresses == network.swarm.addresses
        announcer.provide([ITEM])
        await announcer.flush()
        (record,) = world.live("provide", ITEM)
        assert record.payload.complete
        nursery.cancel_scope.cancel()


async def test_a_command_tells_of_what_it_fetches_and_has_fetched_and_not_for_long(
    world: Any, network: Any, autojump_clock: Any
) -> None:
    ref = next(iter(world.signed.manifest.components.values()))
    item = ref.info_hash
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announce_for_now, network)
        network.swarm.under_way.add(item)
        await trio.sleep(2)
        assert [record.payload.complete for record in world.live("provide", item)] == [False]
        world.network("publisher", seeds=True)
        network.swarm.under_way.clear()
        await network.swarm.fetch(ref)
        await trio.sleep(10 * PASSING_TTL_S)
        assert [record.payload.complete for record in world.live("provide", item)] == [True]
        nursery.cancel_scope.cancel()
    await trio.sleep(PASSING_TTL_S)
    assert world.live("provide", item) == []


async def test_what_is_being_fetched_is_not_forgotten(network: Any, autojump_clock: Any) -> None:
    announcer = Announcer(network)
    network.swarm.under_way.add(ITEM)
    announcer.provide_parts([ITEM])
    announcer.forget_refused()
    await announcer.flush()
    assert len(network.dht.published) == 1
    network.swarm.under_way.clear()
    announcer.forget_refused()
    await trio.sleep(2 * PROVIDE_TTL_S)
    await announcer.flush()
    assert len(network.dht.published) == 1


async def test_telling_fails_while_the_network_is_away_and_works_again(
    world: Any, network: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    announcer = Announcer(network)

    async def away() -> int:
        raise TransportError("away")

    other = InfoHash(b"\2" * 32)
    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as patch:
            patch.setattr(announcer, "flush", away)
            nursery.start_soon(announce_fetches, network, announcer)
            network.swarm.under_way.add(ITEM)
            await trio.sleep(3 * keeping.FETCHES_PERIOD_S)
        assert world.live("provide", ITEM) == []
        network.swarm.under_way.add(other)
        await trio.sleep(2 * keeping.FETCHES_PERIOD_S)
        assert len(world.live("provide", ITEM)) == len(world.live("provide", other)) == 1
        nursery.cancel_scope.cancel()


def test_a_record_is_overdue_some_time_after_it_should_have_been_renewed() -> None:
    renewed_at = (1 - RENEW_AT) * PROVIDE_TTL_S
    assert not is_overdue(PROVIDE_TTL_S, PROVIDE_TTL_S, renewed_at + OVERDUE_S - 1)
    assert is_overdue(PROVIDE_TTL_S, PROVIDE_TTL_S, renewed_at + OVERDUE_S + 1)


async def test_an_announcer_counts_what_it_could_not_renew(network: Any, autojump_clock: Any) -> None:
    from paris_p2p import clock

    announcer = Announcer(network)
    announcer.provide([ITEM])
    assert announcer.overdue(clock.unix()) == 0, "what was never written is new, not overdue"
    await announcer.flush()
    assert announcer.overdue(clock.unix()) == 0
    assert announcer.overdue(clock.unix() + PROVIDE_TTL_S / 2 + OVERDUE_S) == 1
