"""Fetching one item: metadata, picking, requesting, verifying, completing.

Owns: the decisions of a download, driven by its connections' events, and the one task that hashes and
writes in worker threads. Does not own: finding and dialling peers (`net.discovery`).
"""

import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from paris_p2p.core.picker import Picker, read_bitfield
from paris_p2p.core.session import Event as SessionEvent
from paris_p2p.core.session import RequestTimedOut, WastedBlock
from paris_p2p.errors import RemoteProtocolError, TransportError
from paris_p2p.ids import NodeId, PieceIndex
from paris_p2p.net.connection import Connection, farewell_text
from paris_p2p.net.metadata import MetadataFetch
from paris_p2p.net.sources import Sources
from paris_p2p.net.transport import Peer
from paris_p2p.store.partial import PartialItem
from paris_p2p.wire import messages as m
from paris_p2p.wire.bep52 import HASH_BYTES, MAX_INFO_BYTES, Layout

if TYPE_CHECKING:
    from paris_p2p.net.item import Item

_log = logging.getLogger(__name__)

MAX_UNVERIFIED_BYTES = 32 << 20
MAX_REJECTIONS = 32
REFILL = 0.7  # of the window; above that nothing more is asked for yet
MAX_EARLY_HAVES = 10_000


@dataclass(frozen=True, slots=True)
class Progress:
    """`pieces` and `bytes_total` count the whole item; `peers`: connected now."""

    pieces_done: int
    pieces: int
    bytes_done: int
    bytes_total: int
    peers: int
    wasted_bytes: int


class Download:
    """`item` serves what is already here; `partial` is the same item's write side."""

    def __init__(self, item: "Item", partial: PartialItem, rng: random.Random) -> None:
        self._item = item
        self._partial = partial
        self._rng = rng
        self._layout: Layout | None = None
        self._picker: Picker[Connection] | None = None
        self._metadata = MetadataFetch()
        self._storing = False  # metadata is being checked and stored
        self._early: dict[Connection, tuple[bytes, list[PieceIndex]]] = {}  # before the layout is known
        self._work: deque[tuple[Callable[[], object], Callable[[object], None]]] = deque()
        self._working = trio.Event()
        self._unverified = 0
        self._complete = trio.Event()
        self._bytes_done = 0
        self._wasted = 0
        self.last_progress = trio.current_time()
        self.sources = Sources(item.shared.node_id)
        self.sources_changed = trio.Event()

    def progress(self) -> Progress:
        pieces = 0 if self._layout is None else self._layout.pieces
        done = 0 if self._picker is None else self._picker.done
        return Progress(
            done,
            pieces,
            self._bytes_done,
            self._item.ref.length,
            len(self._item.connections),
            self._wasted,
        )

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
            nursery.start_soon(self._verify_loop)
            await self._complete.wait()
            nursery.cancel_scope.cancel()
        return await self._item.shared.blocking(self._partial.finish)

    async def _verify_loop(self) -> None:
        """Hashes and writes, one thing after the other, in worker threads."""
        while True:
            while self._work:
                job, then = self._work.popleft()
                then(await self._item.shared.blocking(job))
            self._working = trio.Event()
            await self._working.wait()

    def _submit(self, job: Callable[[], object], then: Callable[[object], None]) -> None:
        self._work.append((job, then))
        self._working.set()

    # -- connections -----------------------------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        self.sources.add([Peer(connection.node_id, connection.addresses)])
        self.sources.connected(connection.node_id)
        self._next_metadata()

    def closed(self, connection: Connection) -> None:
        self._metadata.forget(connection)
        self._early.pop(connection, None)
        self._wasted += sum(connection.pipeline.drop(piece) for piece in connection.pipeline.active)
        if self._picker is not None:
            self._picker.remove_peer(connection)
        bye = connection.ended_by_peer
        if connection.failure is not None or bye is not None:
            reason = str(connection.failure) if bye is None else f"it said goodbye ({farewell_text(bye)})"
            self.sources.failed(connection.node_id, reason, trio.current_time())
        self.sources_changed.set()
        self._next_metadata()
        self.fill_all()

    def handle(self, connection: Connection, event: SessionEvent) -> None:
        match event:
            case m.Block():
                self._on_block(connection, event)
            case m.Have():
                self._on_have(connection, event.piece)
            case m.Bitfield():
                self._on_bitfield(connection, event.bits)
            case m.Choke():
                self._on_choke(connection)
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
                pass  # Unchoke and the like: `fill` follows every event anyway

    def _on_peers(self, event: m.Peers) -> None:
        peers = [Peer(NodeId(entry.node_id), entry.addresses) for entry in event.added]
        if self.sources.add(peers, exchanged=True):
            self.sources_changed.set()

    # -- metadata --------------------------------------------------------------------------------

    def _next_metadata(self) -> None:
        usable = [c for c in self._item.connections.values() if self._metadata.usable(c)]
        if self._picker is not None or self._metadata.busy or self._storing or not usable:
            return
        layout = self._partial.layout
        if layout is None:
            self._metadata.start(self._rng.choice(usable), None, MAX_INFO_BYTES)
        else:
            file = self._partial.missing_layers()[0]
            self._metadata.start(self._rng.choice(usable), file, layout.files[file].pieces * HASH_BYTES)

    def _on_metadata(self, connection: Connection, chunk: m.Info | m.Layer) -> None:
        whole = self._metadata.receive(connection, chunk)
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

        def stored(error: object) -> None:
            if isinstance(error, RemoteProtocolError):
                connection.end(m.BYE_VIOLATION, error)
            else:
                self.last_progress = trio.current_time()
            self._storing = False
            self._after_metadata()

        self._submit(store, stored)

    def _after_metadata(self) -> None:
        layout = self._partial.layout
        if layout is None or self._partial.missing_layers():
            self._next_metadata()
            return
        self._layout = layout
        have = read_bitfield(self._partial.bitfield(), layout.pieces)
        self._picker = Picker(layout.pieces, have, self._rng)
        self._bytes_done = sum(layout.piece_span(piece)[2] for piece in have)
        self.last_progress = trio.current_time()
        for connection in list(self._item.connections.values()):
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
        if self._picker is None or self._layout is None:
            self._early[connection] = (bits, [])
            self._metadata.may_have(connection)
            self._next_metadata()
            return
        self._picker.set_peer(connection, read_bitfield(bits, self._layout.pieces))

    def _on_have(self, connection: Connection, piece: PieceIndex) -> None:
        if self._picker is not None:
            self._picker.peer_got(connection, piece)
        elif len(self._early[connection][1]) < MAX_EARLY_HAVES:
            self._early[connection][1].append(piece)
        else:
            raise RemoteProtocolError("too many haves before we know the item")

    # -- requesting ------------------------------------------------------------------------------

    def fill_all(self) -> None:
        for connection in list(self._item.connections.values()):
            self.fill(connection)

    def fill(self, connection: Connection) -> None:
        """Says whether we are interested, and asks for as much as the window allows."""
        if self._picker is None or not connection.usable:
            return
        now = trio.current_time()
        session = connection.session
        connection.send(session.interest(self._picker.interesting(connection), now))
        if connection.snubbed_since is not None or self._unverified > MAX_UNVERIFIED_BYTES:
            return
        window = connection.pipeline.window(now)
        asked = session.outstanding_bytes
        if asked > window * REFILL:
            return  # small writes cost as much as large ones: ask for several blocks at once
        while asked < window and session.request_room() > 0:
            block = self._next_block(connection)
            if block is None:
                return
            if not session.can_request(*block):
                # An earlier request for it is still unanswered: its answer brings us here again.
                connection.pipeline.put_back(*block)
                return
            connection.send(session.request(*block, now))
            asked += block[2]

    def _next_block(self, connection: Connection) -> tuple[PieceIndex, int, int] | None:
        assert self._picker is not None and self._layout is not None
        pipeline = connection.pipeline
        while (block := pipeline.next_block()) is None:
            piece = self._picker.pick(connection, pipeline.kept, endgame=not pipeline.active)
            if piece is None:
                return None
            pipeline.start(piece, self._layout.piece_span(piece)[2])
        return block

    def _on_choke(self, connection: Connection) -> None:
        for piece in connection.pipeline.active:
            connection.pipeline.keep(piece)
            self._release(connection, piece)
        self.fill_all()

    def _on_reject(self, connection: Connection, event: m.Reject) -> None:
        connection.pipeline.put_back(event.piece, event.offset, event.length)
        if connection.session.peer_choking:
            return
        connection.rejections += 1
        if connection.rejections > MAX_REJECTIONS:
            raise TransportError("the peer rejects what it said it has")

    def _on_timeout(self, connection: Connection, event: RequestTimedOut) -> None:
        """The peer gets no new requests until it delivers again; its pieces go to others."""
        connection.snubbed_since = connection.snubbed_since or trio.current_time()
        connection.pipeline.put_back(event.piece, event.offset, event.length)
        for piece in connection.pipeline.active:
            connection.send(connection.session.cancel(piece, trio.current_time()))
            self._wasted += connection.pipeline.drop(piece)
            self._release(connection, piece)
        self.fill_all()

    def _release(self, connection: Connection, piece: PieceIndex) -> None:
        assert self._picker is not None
        self._picker.release(connection, piece)

    # -- blocks and pieces -----------------------------------------------------------------------

    def _on_block(self, connection: Connection, block: m.Block) -> None:
        now = trio.current_time()
        connection.snubbed_since = None
        self._item.shared.down.add(len(block.data), now)
        data = connection.pipeline.block(block.piece, block.offset, block.data, now)
        if data is not None:
            self._verify(connection, block.piece, data)

    def _verify(self, connection: Connection, piece: PieceIndex, data: bytes) -> None:
        assert self._picker is not None
        self._picker.delivered(piece)
        self._unverified += len(data)

        def verified(good: object) -> None:
            self._unverified -= len(data)
            if good:
                self._on_good(connection, piece, len(data))
            else:
                self._on_bad(connection, piece, len(data))

        self._submit(lambda: self._partial.write_piece(piece, data), verified)

    def _on_good(self, connection: Connection, piece: PieceIndex, length: int) -> None:
        assert self._picker is not None
        now = trio.current_time()
        if self._picker.has(piece):
            self._wasted += length
            return
        self.last_progress = now
        self._bytes_done += length
        connection.rejections = 0
        self.sources.delivered(connection.node_id)
        for other in self._picker.verified(piece):
            if other is not connection and other.usable:
                other.send(other.session.cancel(piece, now))
                self._wasted += other.pipeline.drop(piece)
        for other in list(self._item.connections.values()):
            self._tell(other, piece, now)
        self._check_complete()

    def _tell(self, connection: Connection, piece: PieceIndex, now: float) -> None:
        assert self._picker is not None
        if not connection.usable:
            return
        # who has it learns nothing from our Have; and a bitfield still to be sent will name it
        if connection.bitfield_sent and not self._picker.peer_has(connection, piece):
            connection.send(connection.session.have(piece, now))
        self.fill(connection)

    def _on_bad(self, connection: Connection, piece: PieceIndex, length: int) -> None:
        self._wasted += length
        error = RemoteProtocolError(f"it sent a bad piece {piece}")
        if connection.ending:
            if not isinstance(connection.failure, RemoteProtocolError):  # else it has its strike
                self._item.strike(connection.node_id, str(error))
        else:
            connection.end(m.BYE_BANNED, error)
        self._release(connection, piece)
        self.fill_all()

    def _check_complete(self) -> None:
        if self._picker is None or not self._picker.complete or self._complete.is_set():
            return
        self._complete.set()
        now = trio.current_time()
        for connection in list(self._item.connections.values()):
            if not connection.usable:
                continue
            connection.send(connection.session.interest(False, now))
            if self._picker.peer_has_all(connection):
                connection.end(m.BYE_DONE)
