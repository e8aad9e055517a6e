"""A node that nobody can dial gives what it has by dialling those who fetch it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from paris_p2p.core.session import Session
from paris_p2p.errors import TransportError
from paris_p2p.ids import InfoHash, NodeId
from paris_p2p.net.connection import GREETING_S
from paris_p2p.net.swarm import Peer, Swarm
from paris_p2p.net.transport import ByteStream
from paris_p2p.wire.content import ContentRef
from tests.net.memory_network import MemoryNetwork, World


@asynccontextmanager
async def hidden_seeder(world: World) -> AsyncIterator[tuple[Swarm, ContentRef, Peer]]:
    """A seeder that others know and cannot dial."""
    store, network = world.store("seed"), world.network()
    ref = world.content(store)
    async with world.node(store, network, holder=True) as seeder:
        del world.hub.nodes[network.node_id]
        yield seeder, ref, network.peer


async def test_who_is_offered_an_item_gets_it_and_asks_nobody_twice(
    world: World, autojump_clock: MockClock
) -> None:
    mine, network = world.store("mine"), world.network()
    async with hidden_seeder(world) as (seeder, ref, _), world.node(mine, network) as leecher:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leecher.fetch, ref)
            await trio.sleep(1)
            assert not leecher.rates().down_bytes and await seeder.offer(ref.info_hash, network.peer)
            assert not await seeder.offer(ref.info_hash, network.peer)  # the session there is will do
            assert seeder.in_use() == {ref.info_hash}
        assert mine.has(ref.info_hash)
        assert leecher.rates().down_bytes == seeder.rates().up_bytes


async def test_an_offer_that_is_not_wanted_or_of_nothing_leaves_nothing_behind(
    world: World, autojump_clock: MockClock
) -> None:
    other, network = world.store("other"), world.network()
    async with hidden_seeder(world) as (seeder, ref, _), world.node(other, network):
        assert not await seeder.offer(InfoHash(b"?" * 32), network.peer)
        with pytest.raises(TransportError, match="no such item"):
            await seeder.offer(ref.info_hash, network.peer)
        nobody = Peer(NodeId(b"!" * 32), ("/memory/99",))
        with pytest.raises(TransportError, match="nobody there"):
            await seeder.offer(ref.info_hash, nobody)
        assert not seeder.in_use() and not seeder.rates().peers


async def test_two_offers_at_once_make_one_session(world: World, autojump_clock: MockClock) -> None:
    mine, network = world.store("mine"), world.network()
    async with hidden_seeder(world) as (seeder, ref, _), world.node(mine, network) as leecher:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leecher.fetch, ref)
            await trio.sleep(1)
            for _ in range(5):
                nursery.start_soon(seeder.offer, ref.info_hash, network.peer)
        assert mine.has(ref.info_hash) and leecher.rates().down_bytes == seeder.rates().up_bytes


async def silent(stream: ByteStream) -> None:
    await trio.sleep_forever()


async def talks_garbage(stream: ByteStream) -> None:
    await stream.send_all(b"\xff" * 100_000)
    await trio.sleep_forever()


async def wants_another(stream: ByteStream) -> None:
    session = Session(trio.current_time())
    await stream.send_all(session.hello(InfoHash(b"?" * 32), (), ()))
    await trio.sleep_forever()


async def hangs_up(stream: ByteStream) -> None:
    await stream.aclose()


@pytest.mark.parametrize("behaviour", [silent, talks_garbage, wants_another, hangs_up])
async def test_an_offer_to_a_peer_that_means_ill_ends_in_time(
    world: World, autojump_clock: MockClock, behaviour: Callable[[ByteStream], Awaitable[None]]
) -> None:
    bad: MemoryNetwork = world.network()

    async def serve(_: NodeId, stream: ByteStream) -> None:
        await behaviour(stream)

    bad.serve(serve)
    async with hidden_seeder(world) as (seeder, ref, _):
        began = trio.current_time()
        with pytest.raises(TransportError):
            await seeder.offer(ref.info_hash, bad.peer)
        assert trio.current_time() - began <= GREETING_S + 5 and not seeder.in_use()
        if behaviour in (talks_garbage, wants_another):
            dials = world.hub.dials
            assert not await seeder.offer(ref.info_hash, bad.peer)  # banned for now
            assert world.hub.dials == dials
