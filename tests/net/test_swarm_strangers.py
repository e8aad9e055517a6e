"""What strangers may cost: slow metadata, floods of interest, the same metadata again and again."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock

from paris_p2p.core.choker import Choker
from paris_p2p.core.session import Event as SessionEvent
from paris_p2p.core.session import Session
from paris_p2p.errors import RemoteProtocolError, TransportError
from paris_p2p.ids import FileIndex, NodeId
from paris_p2p.net.connection import receive_hello
from paris_p2p.net.limits import SwarmLimits
from paris_p2p.net.transport import ByteStream
from paris_p2p.wire import messages as m
from paris_p2p.wire.content import ContentRef
from tests.net.memory_network import MemoryNetwork, World

Answer = Callable[[SessionEvent, Session], Awaitable[bytes]]


async def converse(stream: ByteStream, session: Session, answer: Answer) -> None:
    """Answers events until the stream ends."""
    while True:
        while (event := session.next_event(trio.current_time())) is not None:
            await stream.send_all(await answer(event, session))
        data = await stream.receive_some(1 << 17)
        if not data:
            return
        session.feed(data, trio.current_time())


def serve(network: MemoryNetwork, ref: ContentRef, answer: Answer) -> None:
    """Whoever dials is greeted as by a holder of the item, and answered."""

    async def handle(node_id: NodeId, stream: ByteStream) -> None:
        session = Session(trio.current_time())
        with suppress(TransportError, RemoteProtocolError):
            await receive_hello(stream, session)
            await stream.send_all(session.hello(ref.info_hash, (), ()))
            await converse(stream, session, answer)

    network.serve(handle)


def slow_holder(network: MemoryNetwork, ref: ContentRef, chunk: int, total: int) -> None:
    """It seems to have the info dictionary and gives a chunk of it shortly before each deadline."""

    async def answer(event: SessionEvent, session: Session) -> bytes:
        if not isinstance(event, m.InfoRequest):
            return b""
        await trio.sleep(4.5)
        return session.info(event.offset, total, bytes(chunk), trio.current_time())

    serve(network, ref, answer)


@pytest.mark.parametrize(
    ("slow", "chunk", "total", "banned"), [(6, 1, 1 << 20, True), (4, m.MAX_CHUNK_BYTES, 4 << 20, False)]
)
async def test_slow_peers_do_not_stop_a_fetch_beside_an_honest_seeder(
    world: World, autojump_clock: MockClock, slow: int, chunk: int, total: int, banned: bool
) -> None:
    seed = world.store("seed")
    ref = world.content(seed)
    networks = [world.network() for _ in range(slow)]
    for network in networks:
        slow_holder(network, ref, chunk, total)
        world.hub.holders.append(network.peer)
    strikes = 0
    async with world.node(seed, holder=True):
        for number in range(3):
            start = trio.current_time()
            async with world.node(world.store(f"mine{number}")) as swarm:
                await swarm.fetch(ref, stall_timeout_s=10.0)
                assert trio.current_time() - start < (slow + 1) * 8.0
                strikes += sum(swarm._shared.bans.banned(n.node_id, start) for n in networks)
    assert (strikes > 0) == banned


async def test_a_slow_seeder_alone_is_waited_for(world: World, autojump_clock: MockClock) -> None:
    """Slower than others should be, but there are no others: a layer of 131 KiB at 14 KiB/s."""
    seed, mine, slow = world.store("seed"), world.store("mine"), world.network()
    ref = world.content(seed, pieces=4200)
    stored = seed.open(ref.info_hash)
    given = 0

    async def answer(event: SessionEvent, session: Session) -> bytes:
        nonlocal given
        now = trio.current_time()
        if isinstance(event, m.InfoRequest):
            return session.info(0, len(stored.info), stored.info, now)
        if not isinstance(event, m.LayerRequest):
            return b""
        await trio.sleep(4.5)
        layer = stored.layer(event.file)
        chunk = layer[event.offset : event.offset + m.MAX_CHUNK_BYTES]
        given += len(chunk)
        return session.layer(event.file, event.offset, len(layer), chunk, trio.current_time())

    serve(slow, ref, answer)
    async with world.node(mine) as swarm:
        with pytest.raises(
            TransportError, match="no source delivered"
        ):  # of the content, of which it gives none
            await swarm.fetch(ref, peers=[slow.peer], stall_timeout_s=10.0)
    assert given == len(stored.layer(FileIndex(0)))


async def test_a_flood_of_interest_ranks_the_peers_seldom_and_others_are_served(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, mine, target, stranger = world.store("seed"), world.store("mine"), world.network(), world.network()
    ref = world.content(seed)
    ranked: list[float] = []
    choose = Choker.choose

    def counted(choker, candidates, now, rng):  # type: ignore[no-untyped-def]
        ranked.append(now)
        return choose(choker, candidates, now, rng)

    monkeypatch.setattr(Choker, "choose", counted)
    async with world.node(seed, target) as source, world.node(mine) as swarm:
        stream = await stranger.dial(target.peer)
        session = Session(trio.current_time())
        await stream.send_all(session.hello(ref.info_hash, (), ()))
        await receive_hello(stream, session)
        start = trio.current_time()
        for _ in range(20):
            await stream.send_all((m.encode(m.Interested()) * 5 + m.encode(m.NotInterested())) * 50)
        await stream.send_all(m.encode(m.Interested()))
        took = trio.current_time() - start
        assert len(ranked) <= 10 * took + 3
        await trio.sleep(0.2)  # the last change counts, late as it was
        (connection,) = source._items[ref.info_hash].connections.values()
        assert not connection.session.am_choking
        with trio.fail_after(30.0):  # pieces shown to the stranger alone come late
            await swarm.fetch(ref, peers=[target.peer])


async def test_who_asks_for_the_same_metadata_again_and_again_waits_for_it_and_is_left(
    world: World, autojump_clock: MockClock
) -> None:
    seed, target, stranger = world.store("seed"), world.network(), world.network()
    ref = world.content(seed, pieces=2000)
    limits = SwarmLimits(up_bytes_per_s=50_000)
    got = 0

    async def again(event: SessionEvent, session: Session) -> bytes:
        nonlocal got
        if not isinstance(event, m.Layer):
            return b""
        got += len(event.data)
        return session.layer_request(FileIndex(0), 0, trio.current_time())

    async with world.node(seed, target, limits=limits) as source:
        stream = await stranger.dial(target.peer)
        session = Session(trio.current_time())
        await stream.send_all(session.hello(ref.info_hash, (), ()))
        await receive_hello(stream, session)
        await stream.send_all(session.layer_request(FileIndex(0), 0, trio.current_time()))
        began = trio.current_time()
        with trio.fail_after(60.0):
            await converse(stream, session, again)
        assert got <= 2 * m.MAX_CHUNK_BYTES + 25_000 * (trio.current_time() - began)
        await trio.sleep(1.0)  # the stream ends before the session's end is dealt with
        assert source._shared.bans.banned(stranger.node_id, trio.current_time())
    stored = seed.open(ref.info_hash)
    length = len(stored.info) + sum(len(stored.layer(file)) for file in stored.layout.layered())
    assert 2 * length < got <= 3 * length
