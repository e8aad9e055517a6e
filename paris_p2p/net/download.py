"""Fetching one item: metadata, picking, requesting, verifying, completing.

Owns: the decisions of a download, driven by its connections' events. Does not own: checking and writing whole
pieces (`net.verifier`), finding and dialling peers (`net.discovery`).
"""

import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from paris_p2p.core.flushing import FlushPace
from paris_p2p.core.picker import read_bitfield
from paris_p2p.core.scheduler import Scheduler
from paris_p2p.core.session import Event as SessionEvent
from paris_p2p.core.session import RequestTimedOut, WastedBlock
from paris_p2p.errors import RemoteProtocolError, TransportError
from paris_p2p.ids import NodeId, PieceIndex
from paris_p2p.net.connection import Connection, farewell_text
from paris_p2p.net.metadata import MetadataFetch
from paris_p2p.net.sources import Sources
from paris_p2p.net.transport import Peer
from paris_p2p.net.verifier import Arrival, Verifier
from paris_p2p.store.partial import PartialItem
from paris_p2p.wire import messages as m
from paris_p2p.wire.bep52 import Layout

if TYPE_CHECKING:
    from paris_p2p.net.item import Item

_log = logging.getLogger(__name__)

MAX_REJECTIONS = 256  # a seeder among many leechers takes back what it showed us and gave to another
PACE_S = 0.1
FLUSH_LOOK_S = 1.0
MAX_EARLY_HAVES = 10_000


@dataclass(frozen=True, slots=True)
class Progress:
    """`pieces` and `bytes_total` count the whole item, 0 before its info is known; `peers`: connected now."""

    pieces_done: int
    pieces: int
    bytes_done: int
    bytes_total: int
    peers: int
    wasted_bytes: int


class Download:
    """`item` serves what is already here; `partial` is the same item's write side."""

    def __init__(self, item: "Item", partial: PartialItem, rng: random.Random, *, priority: int = 0) -> None:
        self.priority = priority
        self._item = item
        self._partial = partial
        self._rng = rng
        self._layout: Layout | None = None
        self._scheduler: Scheduler[Connection] | None = None
        self._changed: set[Connection] = set()  # since they were last asked
        self._held_back = False  # a fetch that matters more is getting on
        self._metadata = MetadataFetch(rng)
        self._storing = False  # metadata is being checked and stored
        self._early: dict[Connection, tuple[bytes, list[PieceIndex]]] = {}  # before the layout is known
        self._work: deque[Callable[[], Awaitable[None]]] = deque()
        self._working = trio.Event()
        self._verifier: Verifier[Connection] = Verifier(
            partial, item.shared.blocking, good=self._on_good, bad=self._on_bad, room=self.fill_all
        )
        self._complete = trio.Event()
        self._bytes_done = 0
        self._wasted = 0
        self.last_progress = trio.current_time()
        self.sources = Sources(item.shared.node_id, rng, item.shared.asked_first)
        self.sources_changed = trio.Event()

    def progress(self) -> Progress:
        pieces = 0 if self._layout is None else self._layout.pieces
        done = 0 if self._scheduler is None else self._scheduler.picker.done
        return Progress(
            done,
            pieces,
            self._bytes_done,
            0 if self._layout is None else self._layout.length,
            len(self._item.connections),
            self._wasted,
        )

    @property
    def ready(self) -> bool:
        """Whether all metadata is here, so that it is known which pieces are."""
        return self._scheduler is not None

    def has_layer(self, file: int) -> bool:
        layout = self._partial.layout
        if layout is None or not 0 <= file < len(layout.files):
            return False
        return file not in self._partial.missing_layers()

    # -- the task --------------------------------------------------------------------------------

    async def run(self) -> Path:
        """Until the item is complete on disk; the folder of its files. Raises `StoreError`."""
        self._after_metadata()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._store_metadata)
            nursery.start_soon(self._verifier.run)
            nursery.start_soon(self._pace)
            nursery.start_soon(self._flush)
            await self._complete.wait()
            nursery.cancel_scope.cancel()
        return await self._item.shared.blocking(self._partial.finish)

    async def _pace(self) -> None:
        """With a download limit nothing may be under way, so that no event would ask for more."""
        while True:
            await trio.sleep(PACE_S)
            if not self._item.shared.down_limit.unlimited:
                self.fill_all()

    async def _flush(self) -> None:
        """What is on the disk for good and noted there is not hashed again after a crash."""
        pace = FlushPace()
        while True:
            await trio.sleep(FLUSH_LOOK_S)
            began = trio.current_time()
            if pace.due(self._partial.unflushed_bytes, began):
                await self._item.shared.blocking(self._partial.flush)
                pace.flushed(began, trio.current_time())

    async def _store_metadata(self) -> None:
        """One thing after the other."""
        while True:
            while self._work:
                await self._work.popleft()()
            self._working = trio.Event()
            await self._working.wait()

    def _submit(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work.append(work)
        self._working.set()

    # -- connections -----------------------------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        self.sources.add([Peer(connection.node_id, connection.addresses)])
        self.sources.connected(connection.node_id)
        self._add_peer(connection)
        self._next_metadata()

    def _add_peer(self, connection: Connection) -> None:
        if self._scheduler is not None:
            self._scheduler.add_peer(
                connection, connection.block_bytes, trio.current_time(), max_block=connection.max_block
            )

    def closed(self, connection: Connection) -> None:
        replaced = connection.node_id in self._item.connections  # by a newer session, or a faster one
        self._metadata.forget(connection, failed=not replaced)
        self._early.pop(connection, None)
        self._changed.discard(connection)
        if self._scheduler is not None:
            liar = isinstance(connection.failure, RemoteProtocolError)
            self._wasted += self._scheduler.remove_peer(connection, distrust=liar)
        bye = connection.ended_by_peer
        if not replaced and (connection.failure is not None or bye is not None):
            reason = str(connection.failure) if bye is None else f"it said goodbye ({farewell_text(bye)})"
            self.sources.failed(connection.node_id, reason, trio.current_time())
        self.sources_changed.set()
        self._next_metadata()
        self.fill_all()

    def idle(self, connection: Connection) -> None:
        """Asks for more if anything came that may have made room, or something new to ask for."""
        if connection in self._changed:
            self._changed.discard(connection)
            self.fill(connection)

    def handle(self, connection: Connection, event: SessionEvent) -> None:
        if isinstance(event, m.Have):
            self._on_have(connection, event.piece)
            return
        self._changed.add(connection)
        match event:
            case m.Block():
                self._on_block(connection, event)
            case m.Bitfield():
                self._on_bitfield(connection, event.bits)
            case m.Reject():
                self._on_reject(connection, event)
            case RequestTimedOut():
                self._on_timeout(connection, event)
            case WastedBlock(length):
                self._wasted += length
                self._item.shared.down.add(length, trio.current_time())
                connection.snubbed_since = None
            case m.Info() | m.Layer():
                self._on_metadata(connection, event)
            case m.Peers():
                self._on_peers(event)
            case _:
                pass  # Choke, Unchoke and the like: `fill` follows every event, rejects follow a choke

    def _on_peers(self, event: m.Peers) -> None:
        peers = [Peer(NodeId(entry.node_id), entry.addresses) for entry in event.added]
        if self.sources.add(peers, exchanged=True, now=trio.current_time()):
            self.sources_changed.set()

    # -- metadata --------------------------------------------------------------------------------

    def _next_metadata(self) -> None:
        usable = [c for c in self._item.connections.values() if self._metadata.usable(c)]
        if self._scheduler is not None or self._metadata.busy or self._storing or not usable:
            return
        file = None if self._partial.layout is None else self._partial.missing_layers()[0]
        if self._metadata.start(usable, file):
            self.last_progress = trio.current_time()

    def _leave_slow_metadata(self, now: float) -> None:
        late = self._metadata.late(now)
        others = any(self._metadata.usable(c) for c in self._item.connections.values() if c is not late)
        if late is not None and others:
            late.end(m.BYE_SILENT, TransportError("the peer is too slow with the metadata"))
            self._metadata.forget(late, failed=True)
            self._next_metadata()

    def _on_metadata(self, connection: Connection, chunk: m.Info | m.Layer) -> None:
        whole = self._metadata.receive(connection, chunk, self._partial.layout)
        if len(chunk.data) == m.MAX_CHUNK_BYTES:  # less would let one peer hold the fetch with single bytes
            self.last_progress = trio.current_time()
        if whole is None:
            self._next_metadata()
            return
        file, data = whole
        self._storing = True

        def store() -> RemoteProtocolError | None:
            try:
                if file is None:
                    self._partial.set_info(data)
                else:
                    self._partial.set_layer(file, data)
            except RemoteProtocolError as error:
                return error
            return None

        async def work() -> None:
            error = await self._item.shared.blocking(store)
            if isinstance(error, RemoteProtocolError):
                connection.end(m.BYE_VIOLATION, error)
            else:
                self.last_progress = trio.current_time()
                self._metadata.stored()
            self._storing = False
            self._after_metadata()

        self._submit(work)

    def _after_metadata(self) -> None:
        layout = self._partial.layout
        if layout is None or self._partial.missing_layers():
            self._next_metadata()
            return
        self._layout = layout
        have = read_bitfield(self._partial.bitfield(), layout.pieces)
        self._scheduler = Scheduler(layout.pieces, lambda piece: layout.piece_span(piece)[2], have, self._rng)
        self._bytes_done = sum(layout.piece_span(piece)[2] for piece in have)
        self.last_progress = trio.current_time()
        for connection in list(self._item.connections.values()):
            self._add_peer(connection)
            self._item.send_bitfield(connection)
        early, self._early = self._early, {}
        for connection, (bits, haves) in early.items():
            self._apply_early(connection, bits, haves)
        self._check_complete()

    def _apply_early(self, connection: Connection, bits: bytes, haves: list[PieceIndex]) -> None:
        try:
            self._on_bitfield(connection, bits)
            for piece in haves:
                self._on_have(connection, piece)
        except RemoteProtocolError as error:
            connection.end(m.BYE_VIOLATION, error)
        else:
            self.fill(connection)

    # -- what peers have -------------------------------------------------------------------------

    def _on_bitfield(self, connection: Connection, bits: bytes) -> None:
        if self._scheduler is None or self._layout is None:
            self._early[connection] = (bits, [])
            self._metadata.may_have(connection)
            self._next_metadata()
            return
        self._scheduler.picker.set_peer(connection, read_bitfield(bits, self._layout.pieces))

    def _on_have(self, connection: Connection, piece: PieceIndex) -> None:
        if self._scheduler is not None:
            if self._scheduler.picker.peer_got(connection, piece):
                self._changed.add(connection)
        elif len(self._early[connection][1]) < MAX_EARLY_HAVES:
            self._early[connection][1].append(piece)
        else:
            raise RemoteProtocolError("too many haves before we know the item")

    # -- requesting ------------------------------------------------------------------------------

    def fill_all(self) -> None:
        """Asks everyone who may have room, the fastest first."""
        if self._scheduler is not None:
            for connection in self._scheduler.ranked(trio.current_time()):
                self.fill(connection)

    def fill(self, connection: Connection) -> None:
        """Says whether we are interested, and asks for as much as the window and the limits allow."""
        if self._scheduler is None or not connection.usable:
            return
        now = trio.current_time()
        session = connection.session
        connection.send(session.interest(self._scheduler.picker.interesting(connection), now))
        if not self._scheduler.has_room(connection, now):
            return
        shared = self._item.shared
        budget = shared.down_limit.available(connection.node_id, now)
        if self._verifier.full or self._held_back or budget <= 0:
            return
        keys = self._scheduler.requests(
            connection,
            session.request_room(),
            now,
            allowed=session.can_request,
            budget=budget,
            block_bytes=connection.block_bytes,
        )
        if keys:
            shared.down_limit.take(connection.node_id, sum(key[2] for key in keys), now)
            connection.send(b"".join(session.request(*key, now) for key in keys))

    def housekeep(self) -> None:
        """About once a second: late peers, growing windows, fetches that matter more."""
        now = trio.current_time()
        self._held_back = self._item.shared.holds_back(self, now)
        if self._held_back:
            self.last_progress = now  # waiting for its turn is no stall
        if self._scheduler is None:
            self._leave_slow_metadata(now)
            return
        for connection, key in self._scheduler.overdue(now):
            if connection.usable:
                connection.snubbed_since = connection.snubbed_since or now
                connection.send(connection.session.cancel_block(*key, now))
        self.fill_all()

    def rate(self, connection: Connection, now: float) -> float | None:
        """Bytes per second this peer gives us; None while we know nothing of it."""
        return None if self._scheduler is None else self._scheduler.rate(connection, now)

    def _on_reject(self, connection: Connection, event: m.Reject) -> None:
        lacks = not connection.session.peer_choking
        if self._scheduler is not None:
            self._scheduler.rejected(connection, (event.piece, event.offset, event.length), lacks=lacks)
        if not lacks:
            return
        connection.rejections += 1
        if connection.rejections > MAX_REJECTIONS:
            raise TransportError("the peer rejects what it said it has")

    def _on_timeout(self, connection: Connection, event: RequestTimedOut) -> None:
        """The peer gets hardly any new requests until it delivers again; its blocks go to others."""
        assert self._scheduler is not None
        now = trio.current_time()
        connection.snubbed_since = connection.snubbed_since or now
        for key in self._scheduler.timed_out(connection, (event.piece, event.offset, event.length)):
            connection.send(connection.session.cancel_block(*key, now))
        self.fill_all()

    # -- blocks and pieces -----------------------------------------------------------------------

    def _on_block(self, connection: Connection, block: m.Block) -> None:
        assert self._scheduler is not None
        now = trio.current_time()
        connection.snubbed_since = None
        self._item.shared.down.add(len(block.data), now)
        arrived = self._scheduler.block(connection, block.piece, block.offset, block.data, now)
        self._wasted += arrived.wasted
        for other, key in arrived.cancels:
            if other.usable:
                other.send(other.session.cancel_block(*key, now))
                self.fill(other)
        if arrived.piece is not None:
            self._verifier.add(block.piece, arrived.piece, connection)

    def _on_good(self, arrival: Arrival[Connection]) -> None:
        assert self._scheduler is not None
        now = trio.current_time()
        self.last_progress = now
        self._bytes_done += arrival.length
        arrival.sender.rejections = 0
        self.sources.delivered(arrival.sender.node_id)
        self._item.shared.delivered(arrival.sender.node_id)
        good = self._scheduler.good(arrival.piece)
        for other in list(self._item.connections.values()):
            self._tell(other, arrival.piece, now)
        for other in good.useless:
            self.fill(other)  # which takes our interest back
        self._blame(good.liars, arrival.piece)
        self._check_complete()

    def _tell(self, connection: Connection, piece: PieceIndex, now: float) -> None:
        # who has it learns nothing from our Have; and a bitfield still to be sent will name it
        assert self._scheduler is not None
        known = self._scheduler.picker.peer_has(connection, piece)
        if connection.usable and connection.bitfield_sent and not known:
            connection.send(connection.session.have(piece, now))

    def _on_bad(self, arrival: Arrival[Connection]) -> None:
        assert self._scheduler is not None
        self._wasted += arrival.length
        self._blame(self._scheduler.bad(arrival.piece), arrival.piece)
        self.fill_all()

    def _blame(self, liars: Iterable[Connection], piece: PieceIndex) -> None:
        """Ends the sessions of those proven to have sent a bad block, and bans them."""
        for connection in liars:
            error = RemoteProtocolError(f"it sent a bad piece {piece}")
            if not connection.ending:
                connection.end(m.BYE_BANNED, error)
            elif not isinstance(connection.failure, RemoteProtocolError):  # else it has its strike
                connection.failure = error
                self._item.strike(connection.node_id, str(error))

    def _check_complete(self) -> None:
        picker = None if self._scheduler is None else self._scheduler.picker
        if picker is None or not picker.complete or self._complete.is_set():
            return
        self._complete.set()
        now = trio.current_time()
        for connection in list(self._item.connections.values()):
            if not connection.usable:
                continue
            connection.send(connection.session.interest(False, now))
            if picker.peer_has_all(connection):
                connection.end(m.BYE_DONE)
