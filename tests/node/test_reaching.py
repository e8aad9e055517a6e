"""What a node does about how others reach it: what it tells people and others, whom it dials."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from rich.console import Console

from paris_node.announcer import Announcer
from paris_node.reaching import MAX_OFFERS, OFFER_S, RELAY_TTL_S, UNREACHABLE, Reaching
from paris_node.snapshot import Snapshot
from paris_node.views import member_table
from paris_p2p import clock
from paris_p2p.errors import TransportError
from paris_p2p.ids import InfoHash
from paris_p2p.net.swarm import Peer
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import ProvideRecord

STATES = ("direct", "mapped", "punched", "relayed", "outbound-only")
PLAIN = "/ip4/203.0.113.4/tcp/4001/tls/p2p/12D3KooW"
CIRCUIT = "/ip4/198.51.100.1/tcp/4001/tls/p2p-circuit/p2p/12D3KooW"


class Found:
    """Stands in for `net.reachability`."""

    def __init__(self, state: str, certain: bool) -> None:
        self.state = state
        self.certain = certain


class Reached:
    """A node whose reachability the test sets: `modes` the DHT was put in, `offered` peers, of whom those
    not in `answers` cannot be dialled."""

    def __init__(self, world: Any, *, relay: bool = True) -> None:
        self.world = world
        self.network = replace(world.network("alice", seeds=True), relay=relay)
        self.node, self.events = world.run_node(self.network)
        self.modes: list[bool] = []
        self.offered: list[Peer] = []
        self.answers: set[Any] = set()
        self.network.dht.only_ask = self.modes.append
        self.network.swarm.offer = self.offer
        self.is_now("unknown", PLAIN)

    def is_now(self, state: str, address: str, *, certain: bool = True) -> None:
        self.network.swarm.reachability = Found(state, certain)
        self.network.swarm.addresses = (address,)

    def provides(self) -> InfoHash:
        """It serves this from now on."""
        item: InfoHash = self.world.signed.manifest.clusters[0].train.info_hash
        self.announcer.provide([item])
        return item

    async def offer(self, item: InfoHash, peer: Peer) -> bool:
        self.offered.append(peer)
        await trio.sleep(1)
        if peer.node_id not in self.answers:
            raise TransportError("nobody there")
        return True

    def reaching(self) -> Reaching:
        reaching: Reaching = self.node.reaching
        return reaching

    @property
    def announcer(self) -> Announcer:
        announcer: Announcer = self.node.announcer
        return announcer

    def states_said(self) -> list[str]:
        return [event["state"] for event in self.events() if event["event"] == "reachability"]


@asynccontextmanager
async def running(*loops: Any) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for loop in loops:
            nursery.start_soon(loop)
        yield
        nursery.cancel_scope.cancel()


async def test_each_state_is_told_once_and_decides_whether_the_dht_may_send_others_here(
    world: Any, autojump_clock: Any
) -> None:
    it = Reached(world)
    async with running(it.reaching().run):
        await trio.sleep(5)
        assert not it.states_said() and not it.modes
        for state in STATES:
            it.is_now(state, PLAIN)
            await trio.sleep(5)
    assert it.states_said() == list(STATES)
    assert it.modes == [False, True]


async def test_strangers_word_alone_drives_nobody_out_of_the_dht(world: Any, autojump_clock: Any) -> None:
    it = Reached(world)
    async with running(it.reaching().run):
        for state in ("direct", "relayed", "outbound-only"):
            it.is_now(state, PLAIN, certain=False)
            await trio.sleep(5)
        assert it.modes == [False]
        it.is_now("outbound-only", PLAIN)
        await trio.sleep(5)
    assert it.modes == [False, True]


async def test_status_shows_how_each_member_is_reached(world: Any, autojump_clock: Any) -> None:
    it = Reached(world)
    it.is_now("unknown", PLAIN)
    shown = []
    async with running(it.node.announce_loop):
        await trio.sleep(5)
        for state in ("", *STATES):
            if state:
                it.is_now(state, PLAIN)
                await trio.sleep(20)
            (member,) = world.live("member", world.signed.run_id)
            assert member.payload.reach == state
            shown.append(table_of(member.payload))
    assert ["–" in shown[0]] + [s in text for s, text in zip(STATES, shown[1:], strict=True)] == [True] * 6


def table_of(record: Any) -> str:
    snapshot: Any = type("Members", (), {})()
    snapshot.members, snapshot.peers, snapshot.now_unix = (("12D3KooWpeer", record),), 1, clock.unix()
    console = Console(width=120)
    with console.capture() as captured:
        seen: Snapshot = snapshot
        console.print(member_table(seen, {}))
    return captured.get()


@pytest.mark.parametrize("relay", [True, False])
async def test_only_who_can_be_dialled_says_that_it_relays_and_takes_it_back(
    world: Any, autojump_clock: Any, relay: bool
) -> None:
    it = Reached(world, relay=relay)

    def told() -> list[tuple[str, ...]]:
        return [record.payload.addresses for record in world.live("relay", b"")]

    async with running(it.node.announce_loop):
        it.is_now("direct", PLAIN)
        await trio.sleep(RELAY_TTL_S + 60)
        assert told() == ([(PLAIN,)] if relay else [])
        it.is_now("relayed", CIRCUIT)
        await trio.sleep(RELAY_TTL_S + 5)
        assert told() == []


async def test_who_changes_its_address_is_found_at_the_new_one_within_seconds(
    world: Any, autojump_clock: Any
) -> None:
    it = Reached(world)
    item = it.provides()
    await it.announcer.flush()
    async with running(it.reaching().run):
        it.is_now("relayed", CIRCUIT)
        await trio.sleep(3)
    (record,) = world.live("provide", item)
    assert record.payload.addresses == (CIRCUIT,)


def fetchers(world: Any, item: InfoHash, count: int, first: int = 0) -> Sequence[Identity]:
    everyone = [Identity(bytes([1, number]) * 16) for number in range(first, first + count)]
    for number, who in enumerate(everyone, first):
        world.says(who, ProvideRecord(False, (f"/ip4/192.0.2.1/tcp/{4000 + number}/tls",)), item, 290.0)
    return everyone


async def test_who_cannot_be_dialled_dials_those_who_fetch_what_it_has_and_nobody_else(
    world: Any, autojump_clock: Any
) -> None:
    it = Reached(world)
    item = it.provides()
    (wants,) = fetchers(world, item, 1)
    world.says(Identity(b"h" * 32), ProvideRecord(True, (PLAIN,)), item)
    world.says(Identity(b"a" * 32), ProvideRecord(False, ()), item)
    world.says(it.network.identity, ProvideRecord(False, (PLAIN,)), item)
    it.answers = {wants.node_id}
    async with running(it.reaching().run):
        for state, dials in (("direct", False), ("mapped", False), *((s, True) for s in UNREACHABLE)):
            it.is_now(state, PLAIN)
            await trio.sleep(OFFER_S + 3)
            it.offered.clear()
            await trio.sleep(3 * OFFER_S)
            assert {peer.node_id for peer in it.offered} == ({wants.node_id} if dials else set()), state


async def test_many_who_are_gone_keep_nobody_from_being_dialled(world: Any, autojump_clock: Any) -> None:
    it = Reached(world)
    item = it.provides()
    everyone = {who.node_id for who in fetchers(world, item, 3 * MAX_OFFERS)}
    it.is_now("outbound-only", PLAIN)
    async with running(it.reaching().run):
        await trio.sleep(20 * OFFER_S)
    assert {peer.node_id for peer in it.offered} == everyone
    assert len(it.offered) <= 20 * MAX_OFFERS


async def test_a_dht_that_is_away_stops_neither_watching_nor_offering(
    world: Any, autojump_clock: Any
) -> None:
    it = Reached(world)
    item = it.provides()
    fetchers(world, item, 1)
    it.is_now("relayed", CIRCUIT)
    it.network.dht.down = True
    async with running(it.reaching().run):
        await trio.sleep(120)
        assert it.states_said() == ["relayed"] and not it.offered
        it.network.dht.down = False
        await trio.sleep(60)
        assert it.offered
