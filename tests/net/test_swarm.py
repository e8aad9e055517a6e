"""Whole swarms on memory streams and virtual time: the same driver as over libp2p, with bad peers."""

import logging
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from paris_p2p.core.session import Session
from paris_p2p.errors import RemoteProtocolError, StoreError, TransportError
from paris_p2p.ids import InfoHash, NodeId, PieceIndex
from paris_p2p.net.connection import GREETING_S, MAX_BACKLOG_BYTES, Connection, receive_hello
from paris_p2p.net.item import Item
from paris_p2p.net.metadata import GRACE_S
from paris_p2p.net.swarm import Peer, Progress, Swarm, swarm_over
from paris_p2p.net.transport import ByteStream
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire import messages as m
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import peer_id_text
from tests.net.memory_network import MemoryNetwork, World, at_once


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


async def test_an_item_is_fetched_from_two_sources_at_once(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, mine = world.store("first"), world.store("second"), world.store("mine")
    ref = world.content(first)
    assert world.content(second) == ref
    seen: list[Progress] = []
    async with (
        world.node(first, holder=True) as a,
        world.node(second, holder=True) as b,
        world.node(mine) as c,
    ):
        path = await c.fetch(ref, on_progress=seen.append)
        assert a.rates().up_bytes and b.rates().up_bytes
        assert c.rates().down_bytes - seen[-1].wasted_bytes == ref.length
    assert (path / "item" / "small" if (path / "item").is_dir() else path / "small").stat().st_size == 500
    assert mine.verify(ref.info_hash) == []
    assert seen[-1].bytes_done == ref.length and seen[-1].pieces_done == seen[-1].pieces == 40
    assert not lines(caplog, logging.WARNING)


async def test_leechers_serve_each_other_while_they_fetch(world: World, autojump_clock: MockClock) -> None:
    seed_store = world.store("seed")
    ref = world.content(seed_store, pieces=500)
    async with world.node(seed_store, holder=True) as seed:
        stores = [world.store(f"leech{i}") for i in range(3)]
        async with world.node(stores[0], holder=True) as a, world.node(stores[1], holder=True) as b:
            async with world.node(stores[2], holder=True) as c, trio.open_nursery() as nursery:
                for swarm in (a, b, c):
                    nursery.start_soon(swarm.fetch, ref)
            assert sum(swarm.rates().up_bytes for swarm in (a, b, c)) > 0
        assert seed.rates().up_bytes < 2.5 * ref.length
    assert all(store.verify(ref.info_hash) == [] for store in stores)


async def test_two_callers_share_one_download(world: World, autojump_clock: MockClock) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed)
    paths: list[Path] = []
    async with world.node(seed, holder=True) as source, world.node(mine) as swarm:

        async def fetch() -> None:
            paths.append(await swarm.fetch(ref))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            nursery.start_soon(fetch)
        assert source.rates().up_bytes == ref.length
        assert await swarm.fetch(ref) == paths[0] == paths[1]


async def test_a_complete_leecher_serves_the_next_one(world: World, autojump_clock: MockClock) -> None:
    seed, middle, last = world.store("seed"), world.store("middle"), world.store("last")
    ref = world.content(seed)
    network = world.network()
    async with world.node(middle, network) as relay, world.node(last) as swarm:
        seed_network = world.network()
        async with world.node(seed, seed_network):
            await relay.fetch(ref, peers=[seed_network.peer])
        seed_network.vanish()
        await swarm.fetch(ref, peers=[network.peer])
    assert last.verify(ref.info_hash) == []


async def test_peers_of_peers_are_found_by_peer_exchange(world: World, autojump_clock: MockClock) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed, pieces=400)
    hidden, relay_network, relay_store = world.network(), world.network(), world.store("relay")
    met: set[NodeId] = set()

    def look(progress: Progress) -> None:
        if ref.info_hash in swarm._items:
            met.update(swarm._items[ref.info_hash].connections)

    async with (
        world.node(seed, hidden),
        world.node(relay_store, relay_network) as relay,
        world.node(mine) as swarm,
        trio.open_nursery() as nursery,
    ):
        # the relay knows the hidden seeder; we know the relay only
        nursery.start_soon(lambda: relay.fetch(ref, peers=[hidden.peer]))
        await trio.sleep(0.5)
        await swarm.fetch(ref, peers=[relay_network.peer], on_progress=look)
        nursery.cancel_scope.cancel()
    assert met == {hidden.node_id, relay_network.node_id}


async def serve_badly(
    network: MemoryNetwork,
    store: ContentStore,
    ref: ContentRef,
    corrupt: Callable[[int, bytes], bytes | None],
) -> None:
    """Makes `network` a seeder whose blocks pass through `corrupt` (None: never answered)."""
    stored = store.open(ref.info_hash)

    async def handle(node_id: NodeId, stream: ByteStream) -> None:
        with suppress(TransportError, RemoteProtocolError):
            await talk(stream)

    async def talk(stream: ByteStream) -> None:
        session = Session(trio.current_time())
        await receive_hello(stream, session)
        now = trio.current_time()
        await stream.send_all(session.hello(ref.info_hash, (), ()))
        await stream.send_all(session.bitfield(stored.bitfield(), now) + session.unchoke(now))
        while True:
            while (event := session.next_event(trio.current_time())) is not None:
                now = trio.current_time()
                if isinstance(event, m.InfoRequest):
                    await stream.send_all(session.info(0, len(stored.info), stored.info, now))
                if isinstance(event, m.LayerRequest):
                    layer = stored.layer(event.file)
                    await stream.send_all(session.layer(event.file, 0, len(layer), layer, now))
                if isinstance(event, m.Request):
                    data = stored.read_block(event.piece, event.offset, event.length)
                    wrong = corrupt(event.piece, data)
                    if wrong is not None:
                        header = session.answer(event.piece, event.offset, event.length, now)
                        await stream.send_all(header + wrong)
            data = await stream.receive_some(1 << 16)
            if not data:
                return
            session.feed(data, trio.current_time())

    network.serve(handle)


async def test_a_liar_is_banned_by_name_and_the_honest_one_completes(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed)
    liar = world.network()
    await serve_badly(liar, seed, ref, lambda piece, data: bytes(len(data)))
    async with world.node(mine) as swarm, world.node(seed, honest := world.network()):
        seen: list[Progress] = []
        await swarm.fetch(ref, peers=[liar.peer, honest.peer], on_progress=seen.append)
        assert seen[-1].wasted_bytes > 0
    assert mine.verify(ref.info_hash) == []
    named = [line for line in lines(caplog, logging.WARNING) if peer_id_text(liar.node_id) in line]
    assert len(named) == 1 and "bad piece" in named[0]
    assert not any(peer_id_text(honest.node_id) in line for line in lines(caplog, logging.WARNING))


async def test_the_last_holder_is_tried_again_although_it_lied(
    world: World, autojump_clock: MockClock
) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed)
    moody = world.network()
    lies = [True]  # its first block is bad, all others are good

    def once(piece: int, data: bytes) -> bytes:
        return bytes(len(data)) if lies and lies.pop() else data

    await serve_badly(moody, seed, ref, once)
    async with world.node(mine) as swarm:
        await swarm.fetch(ref, peers=[moody.peer])
    assert mine.verify(ref.info_hash) == []


async def test_a_silent_peer_is_given_up_after_its_deadline(world: World, autojump_clock: MockClock) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed)
    mute = world.network()
    await serve_badly(mute, seed, ref, lambda piece, data: None)
    start = trio.current_time()
    async with world.node(mine) as swarm, world.node(seed, honest := world.network()):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: swarm.fetch(ref, peers=[mute.peer]))
                await trio.sleep(1.0)  # the mute one holds the first requests
                await swarm.fetch(ref, peers=[honest.peer])
                scope.cancel()
    assert trio.current_time() - start < 40.0
    assert mine.verify(ref.info_hash) == []


async def test_only_silent_peers_end_in_a_transport_error_that_says_so(
    world: World, autojump_clock: MockClock
) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed)
    mute = world.network()
    await serve_badly(mute, seed, ref, lambda piece, data: None)
    start = trio.current_time()
    async with world.node(mine) as swarm:
        with pytest.raises(TransportError, match="no source delivered anything"):
            await swarm.fetch(ref, peers=[mute.peer], stall_timeout_s=30.0)
    assert 30.0 <= trio.current_time() - start < 45.0


async def test_a_peer_that_says_nothing_at_all_does_not_hold_the_fetch(
    world: World, autojump_clock: MockClock
) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed)
    deaf = world.network()

    async def nothing(node_id: NodeId, stream: ByteStream) -> None:
        await trio.sleep_forever()

    deaf.serve(nothing)
    start = trio.current_time()
    async with world.node(mine) as swarm, world.node(seed, honest := world.network()):
        await swarm.fetch(ref, peers=[deaf.peer, honest.peer])
        assert trio.current_time() - start < GREETING_S / 2
    assert mine.verify(ref.info_hash) == []


async def test_of_peers_that_say_nothing_at_all_each_is_waited_for_a_while_and_no_longer(
    world: World, autojump_clock: MockClock
) -> None:
    mine, ref = world.store("mine"), world.content(world.store("seed"))
    deaf = world.network()

    async def nothing(node_id: NodeId, stream: ByteStream) -> None:
        await trio.sleep_forever()

    deaf.serve(nothing)
    async with world.node(mine) as swarm:
        with pytest.raises(TransportError, match=f"no hello within {GREETING_S:.0f} s"):
            await swarm.fetch(ref, peers=[deaf.peer], stall_timeout_s=2 * GREETING_S)


async def test_a_stranger_sending_garbage_is_banned_and_nobody_else_notices(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed)
    stranger, target = world.network(), world.network()
    async with world.node(seed, target), world.node(mine) as swarm:
        for garbage in (b"\xff" * 100, m.encode(m.Have(PieceIndex(1))), b""):
            try:
                stream = await stranger.dial(target.peer)
                await stream.send_all(garbage)
                await stream.aclose()
            except TransportError:
                continue
            await trio.sleep(1.0)
        await swarm.fetch(ref, peers=[target.peer])
    assert any(peer_id_text(stranger.node_id) in line for line in lines(caplog, logging.WARNING))
    assert not lines(caplog, logging.ERROR)


async def test_a_seeder_that_vanishes_midway_is_replaced_by_another(
    world: World, autojump_clock: MockClock
) -> None:
    seed, spare, mine = world.store("seed"), world.store("spare"), world.store("mine")
    ref = world.content(seed, pieces=200)
    world.content(spare, pieces=200)
    leaving = world.network()
    vanished = trio.Event()
    async with world.node(mine) as swarm, trio.open_nursery() as nursery:
        nursery.start_soon(run_until, world, seed, leaving, vanished)

        def watch(progress: Progress) -> None:
            if progress.pieces_done > 20 and not vanished.is_set():
                leaving.vanish()
                vanished.set()

        async def appear_later() -> None:
            await vanished.wait()
            await trio.sleep(5.0)
            async with world.node(spare, holder=True):
                await trio.sleep_forever()

        nursery.start_soon(appear_later)
        await swarm.fetch(ref, peers=[leaving.peer], on_progress=watch)
        nursery.cancel_scope.cancel()
    assert vanished.is_set() and mine.verify(ref.info_hash) == []


async def run_until(world: World, store: ContentStore, network: MemoryNetwork, end: trio.Event) -> None:
    async with world.node(store, network):
        await end.wait()


async def test_a_cancelled_fetch_resumes_and_fetches_only_what_is_missing(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed, pieces=400)
    done_before: list[Progress] = []
    async with world.node(seed, holder=True) as source:
        async with world.node(mine) as swarm:
            with trio.CancelScope() as scope:

                def watch(progress: Progress) -> None:
                    done_before.append(progress)
                    if progress.pieces_done > 100:
                        scope.cancel()

                await swarm.fetch(ref, on_progress=watch)
            assert scope.cancelled_caught and not mine.has(ref.info_hash)
        sent = source.rates().up_bytes
        async with world.node(mine) as swarm:
            await swarm.fetch(ref)
            assert swarm.rates().down_bytes <= ref.length - done_before[-1].bytes_done
        assert source.rates().up_bytes - sent <= ref.length - done_before[-1].bytes_done
    assert not lines(caplog, logging.WARNING)  # leaving midway is no breach of the protocol
    assert mine.verify(ref.info_hash) == []


async def test_nobody_holds_the_item(world: World, autojump_clock: MockClock) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed)
    async with world.node(world.store("empty"), holder=True), world.node(mine) as swarm:
        with pytest.raises(TransportError, match="no such item here"):
            await swarm.fetch(ref, stall_timeout_s=20.0)


async def test_a_failing_look_up_is_named_when_the_fetch_stalls(
    world: World, autojump_clock: MockClock
) -> None:
    ref = world.content(world.store("seed"))

    async def broken(info_hash: InfoHash) -> Sequence[Peer]:
        raise TransportError("the DHT is gone")

    async with swarm_over(
        world.network(), world.store("mine"), find_peers=broken, rng=random.Random(1), blocking=at_once
    ) as swarm:
        with pytest.raises(TransportError, match="the DHT is gone"):
            await swarm.fetch(ref, stall_timeout_s=10.0)


async def test_more_leechers_than_upload_slots_are_all_served(
    world: World, autojump_clock: MockClock
) -> None:
    seed = world.store("seed")
    ref = world.content(seed, pieces=30)
    stores = [world.store(f"leech{i}") for i in range(12)]
    target = world.network()
    async with world.node(seed, target), trio.open_nursery() as nursery:

        async def leech(store: ContentStore) -> None:
            async with world.node(store) as swarm:
                await swarm.fetch(ref, peers=[target.peer])

        for store in stores:
            nursery.start_soon(leech, store)
    assert all(store.has(ref.info_hash) for store in stores)


async def test_an_item_without_bytes_is_fetched_too(
    world: World, autojump_clock: MockClock, tmp_path: Path
) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    (tmp_path / "nothing").write_bytes(b"")
    ref = seed.add(tmp_path / "nothing")
    async with world.node(seed, holder=True), world.node(mine) as swarm:
        path = await swarm.fetch(ref)
    assert (path / "nothing").stat().st_size == 0


async def test_honest_peers_that_meet_in_the_middle_of_a_fetch_never_ban_each_other(
    world: World,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sessions that open while pieces arrive: a Have must not overtake the bitfield."""
    read = Connection._read

    async def read_later(connection: Connection) -> None:
        await trio.sleep(0.05)  # a busy node: much happens between a session's opening and its first turn
        await read(connection)

    monkeypatch.setattr(Connection, "_read", read_later)
    seed = world.store("seed")
    ref = world.content(seed, pieces=300)
    stores = [world.store(f"leech{i}") for i in range(6)]
    async with world.node(seed, holder=True), trio.open_nursery() as nursery:

        async def leech(number: int) -> None:
            await trio.sleep(0.1 * number)
            async with world.node(stores[number], holder=True) as swarm:
                await swarm.fetch(ref)
                await trio.sleep(5)

        for number in range(len(stores)):
            nursery.start_soon(leech, number)
    assert all(store.has(ref.info_hash) for store in stores)
    assert not [line for line in lines(caplog, logging.WARNING) if "banned" in line]


# -- faults found by review ----------------------------------------------------------------------


class ScriptedStream:
    """A stranger's end: says `first`, then `then` as often as it is read; takes `takes` writes, if given."""

    place = ""

    def __init__(
        self, first: bytes, then: bytes = b"", takes: int | None = None, delay_s: float = 0.0
    ) -> None:
        self._first = first
        self._then = then
        self._takes = takes
        self._delay_s = delay_s
        self.reads = 0
        self.written = bytearray()

    async def send_all(self, data: bytes) -> None:
        if self._takes == 0:
            await trio.sleep_forever()
        self._takes = self._takes and self._takes - 1
        await trio.sleep(self._delay_s)
        self.written += data

    async def receive_some(self, max_bytes: int) -> bytes:
        await trio.sleep(0.01)
        self.reads += 1
        if self.reads > 1 and not self._then:
            await trio.sleep_forever()
        return self._first if self.reads == 1 else self._then

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def greeting(ref: ContentRef) -> bytes:
    return Session(0.0).hello(ref.info_hash, (), ())


async def test_nothing_is_said_on_a_session_that_has_ended(world: World, autojump_clock: MockClock) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed, pieces=400)
    async with (
        world.node(seed, holder=True) as source,
        world.node(mine) as swarm,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(swarm.fetch, ref)
        await trio.sleep(0.3)
        for node in (source, swarm):
            item = node._items[ref.info_hash]
            connection = next(iter(item.connections.values()))
            connection.session.bye(m.BYE_LEAVING, "")  # as while the goodbye is being written
            said = list(connection._control)
            connection.bitfield_sent = False
            connection.known_peers.add(world.network().node_id)
            item._peers_sent = -1000.0
            item.opened(connection)
            item.housekeep()
            connection.choke(not connection.session.am_choking)
            node._rechoke()
            if item.download is not None:
                assert item.download._scheduler is not None
                item.download._scheduler.picker.peer_lacks(connection, PieceIndex(0))
                connection.bitfield_sent = True
                item.download._tell(connection, PieceIndex(0), trio.current_time())
                item.download.fill_all()
            assert list(connection._control) == said
        nursery.cancel_scope.cancel()


async def test_an_error_in_housekeeping_is_logged_and_the_node_goes_on(
    world: World,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(item: Item) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Item, "housekeep", broken)
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed, pieces=400)
    async with world.node(seed, holder=True), world.node(mine) as swarm:
        await swarm.fetch(ref)
    assert "housekeeping failed" in lines(caplog, logging.ERROR)
    caplog.clear()


async def test_a_stranger_who_asks_and_never_reads_is_left(world: World, autojump_clock: MockClock) -> None:
    seed, target = world.store("seed"), world.network()
    ref = world.content(seed)
    ask = m.encode(m.InfoRequest(0)) * 100
    stream = ScriptedStream(greeting(ref), ask, takes=1)
    async with world.node(seed, target):
        assert target._handler is not None
        with trio.fail_after(60.0):
            await target._handler(world.network().node_id, stream)
    answer = len(m.encode(m.Info(0, 1, b"x")))
    assert stream.reads < MAX_BACKLOG_BYTES / answer / 100


async def test_a_flood_in_one_read_lets_others_have_their_turn(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, target = world.store("seed"), world.network()
    ref = world.content(seed)
    handled: list[int] = []
    begun = trio.Event()

    def handle(item: Item, connection: Connection, event: object) -> None:
        handled.append(1)
        begun.set()

    monkeypatch.setattr(Item, "handle", handle)
    stream = ScriptedStream(greeting(ref) + m.encode(m.Interested()) * 2000)
    turns = 0
    async with world.node(seed, target), trio.open_nursery() as nursery:
        assert target._handler is not None
        nursery.start_soon(target._handler, world.network().node_id, stream)
        await begun.wait()
        while len(handled) < 2000:
            await trio.lowlevel.checkpoint()
            turns += 1
        nursery.cancel_scope.cancel()
    assert turns > 10


async def test_a_fetch_waits_for_the_other_process_that_fetches_into_the_same_store(
    world: World, autojump_clock: MockClock
) -> None:
    seed, mine, same = world.store("seed"), world.store("mine"), world.store("mine")
    ref = world.content(seed, pieces=200)
    paths: list[Path] = []
    async with world.node(seed, holder=True), world.node(mine) as one, world.node(same) as two:

        async def fetch(swarm: Swarm) -> None:
            paths.append(await swarm.fetch(ref))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, one)
            nursery.start_soon(fetch, two)
    assert len(paths) == 2 and paths[0] == paths[1]


async def test_a_fetch_goes_on_when_the_other_process_gives_up(
    world: World, autojump_clock: MockClock
) -> None:
    seed, mine, same = world.store("seed"), world.store("mine"), world.store("mine")
    ref = world.content(seed)
    partial = same.begin(ref)
    async with world.node(seed, holder=True), world.node(mine) as swarm:
        with pytest.raises(StoreError, match="in use by process"):
            await swarm.fetch(ref, stall_timeout_s=10.0)
        assert 10.0 <= trio.current_time() < 12.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swarm.fetch, ref)
            await trio.sleep(3.0)
            partial.close()
    assert mine.verify(ref.info_hash) == []


async def test_an_item_is_not_dropped_while_a_peer_is_being_greeted(
    world: World, autojump_clock: MockClock
) -> None:
    seed, target, stranger = world.store("seed"), world.network(), world.network()
    ref = world.content(seed)
    stream = ScriptedStream(greeting(ref) + m.encode(m.Interested()), delay_s=1.0)
    async with world.node(seed, target) as swarm, trio.open_nursery() as nursery:
        assert target._handler is not None
        nursery.start_soon(target._handler, stranger.node_id, stream)
        await trio.sleep(0.5)
        swarm._forget_unused(swarm._items[ref.info_hash])  # as when its last connection closes now
        await trio.sleep(5.0)
        assert not swarm._items[ref.info_hash].connections[stranger.node_id].session.am_choking
        nursery.cancel_scope.cancel()


async def test_what_is_here_is_known_while_an_item_is_being_completed(world: World) -> None:
    ref = world.content(world.store("seed"))
    partial = world.store("mine").begin(ref)
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(partial.bitfield()))
    with partial._mutex:  # `finish` holds it while it flushes
        thread.start()
        await trio.to_thread.run_sync(thread.join, 5.0)
        assert got == [b""]
    partial.close()


async def test_what_a_stranger_says_at_the_end_cannot_steer_a_terminal(
    world: World, autojump_clock: MockClock
) -> None:
    rude, ref = world.network(), world.content(world.store("seed"))

    async def refuse(node_id: NodeId, stream: ByteStream) -> None:
        await stream.receive_some(1 << 16)
        await stream.send_all(Session(0.0).bye(m.BYE_BUSY, "\x1b[2Jgone\n"))
        await trio.sleep(1.0)

    rude.serve(refuse)
    async with world.node(world.store("mine")) as swarm:
        with pytest.raises(TransportError, match="gone") as caught:
            await swarm.fetch(ref, peers=[rude.peer], stall_timeout_s=10.0)
    assert str(caught.value).isprintable()


async def test_a_source_frozen_before_the_metadata_costs_little_of_the_stall_timeout(
    world: World, autojump_clock: MockClock
) -> None:
    seed, mine = world.store("seed"), world.store("mine")
    ref = world.content(seed)
    frozen = world.network()

    async def freeze(node_id: NodeId, stream: ByteStream) -> None:
        session = Session(trio.current_time())
        await receive_hello(stream, session)
        await stream.send_all(session.hello(ref.info_hash, (), ()))
        await trio.sleep_forever()

    frozen.serve(freeze)
    async with world.node(mine) as swarm, world.node(seed, honest := world.network()):
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: swarm.fetch(ref, peers=[frozen.peer], stall_timeout_s=12.0))
            await trio.sleep(1.0)
            assert frozen.node_id in swarm._items[ref.info_hash].connections  # and it is what is asked
            await swarm.fetch(ref, peers=[honest.peer])
        assert GRACE_S <= trio.current_time() - start < GRACE_S + 3.0
    assert mine.verify(ref.info_hash) == []
