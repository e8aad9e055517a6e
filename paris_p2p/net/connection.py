"""One session over one stream: reading, writing, serving blocks, deadlines.

Owns: the tasks of one connection. The reading task only turns bytes into decisions; it never waits for the
disk or for the writing task, because libp2p resets the writer of a peer that does not read for 5 s.
Does not own: what is decided (`net.item`, `net.download`).
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from paris_p2p.core.rate import RateMeter
from paris_p2p.core.session import Event as SessionEvent
from paris_p2p.core.session import KeepAliveDue, Limits, MetadataTimedOut, Session, State
from paris_p2p.errors import ParisError, RemoteProtocolError, StoreError, TransportError
from paris_p2p.ids import NodeId, PieceIndex
from paris_p2p.net.transport import WRITE_BYTES, ByteStream, DirectStream
from paris_p2p.wire import messages as m
from paris_p2p.wire.bep52 import Buffer
from paris_p2p.wire.identity import peer_id_text

_log = logging.getLogger(__name__)

READ_BYTES = 1 << 20
MIN_BATCH_BYTES = 128 * 1024  # of blocks read from disk and queued; what is queued cannot be cancelled
MAX_BATCH_BYTES = 2 << 20  # the same for a peer that takes it at once
MAX_WRITE_BYTES = 1 << 20  # to a direct stream; to others `WRITE_BYTES`
FAST_S = 0.004  # for 64 KiB: a peer that takes them faster gets larger batches
SLOW_S = 0.012  # one that takes them slower gets smaller ones
MAX_BACKLOG_BYTES = 8 << 20  # of everything; served blocks stay below: two batches and a block
DIRECT_LIMITS = Limits()
MUXED_LIMITS = Limits(max_block=1 << 18)  # on a slow path a larger one would hold up what follows it
BLOCK_S = 0.05  # of the peer's rate: a block of that does not hold up what follows it
GATHER_S = 0.05  # of the peer's rate, of a block that has begun: to be woken for less is not worth it
FEED_BYTES = 64 * 1024  # decoded at once: what a flood of messages without meaning can hold us up for
TURN_S = 0.001  # of reading on without a pause, for as long as something is here
EVENTS_AT_ONCE = 64  # then other tasks have their turn
MAX_TEXT_CHARS = 200  # of what a stranger says, in our logs and messages
TICK_S = 1.0
FAREWELL_S = 1.0
GREETING_S = 10.0
SEND_S = 15.0


class Owner(Protocol):
    """What a connection reports to: the item it is about. Nothing here waits."""

    def opened(self, connection: "Connection") -> None: ...

    def handle(self, connection: "Connection", event: SessionEvent) -> None: ...

    def idle(self, connection: "Connection") -> None:
        """All events of one read were handled."""

    def serves(self, connection: "Connection", piece: PieceIndex) -> bool:
        """Whether a request for this piece will be answered with a block."""

    async def may_upload(self, connection: "Connection") -> None:
        """Waits until the upload limits let something pass."""

    async def read_blocks(self, requests: Sequence[m.Request]) -> Sequence[Buffer]: ...

    def uploaded(self, connection: "Connection", piece: PieceIndex, count: int) -> None:
        """`count` bytes of `piece` are on their way to the peer."""


class Connection:
    """`session` is open (both greetings are through). `outbound`: we opened the stream."""

    def __init__(
        self, owner: Owner, node_id: NodeId, stream: ByteStream, session: Session, outbound: bool
    ) -> None:
        now = trio.current_time()
        assert session.peer is not None
        self.max_block = min(session.limits.max_block, session.peer.max_block)
        self.direct = isinstance(stream, DirectStream)
        self.place = stream.place
        self.received = RateMeter(now)  # everything
        self.owner = owner
        self.node_id = node_id
        self.session = session
        self.outbound = outbound
        self.started = now
        self.slot_since = now  # last choked or unchoked by us
        self.interest_since = now  # the peer's interest last changed
        self.interested = False  # the peer in us, when it was last acted on
        self.metadata_bytes = 0  # that it took of us
        self.snubbed_since: float | None = None  # a request of ours timed out, and no block came since
        self.rejections = 0
        self.bitfield_sent = False
        self.known_peers: set[NodeId] = set()  # told to this peer by peer exchange
        self.failure: ParisError | None = None
        self.farewell = m.BYE_LEAVING
        self._said = ""
        self.ended_by_peer: m.Bye | None = None
        self._stream = stream
        self._control: deque[bytes] = deque()
        self._blocks: deque[tuple[bytes, Buffer]] = deque()  # (header, data); after all of `_control`
        self._begun: deque[Buffer] = deque()  # the rest of what is sent in part: before everything
        self.content_bytes = 0  # that it took of us
        self._unsent_bytes = 0
        self._batch = MIN_BATCH_BYTES
        self._writable = trio.Event()
        self._drained = trio.Event()
        self._uploads: deque[m.Request] = deque()
        self._requested = trio.Event()
        self._scope = trio.CancelScope()
        self.ending = False
        """Whether this side has ended the session, or a task of it has: nothing follows but the goodbye."""

    def __repr__(self) -> str:
        return f"Connection({peer_id_text(self.node_id)})"

    @property
    def block_bytes(self) -> int:
        """How much to ask this peer for in one request, by how fast it delivers."""
        if not self.direct:
            return min(m.BLOCK_BYTES, self.max_block)
        steps = int(self.received.rate(trio.current_time()) * BLOCK_S) // m.BLOCK_BYTES
        return min(m.BLOCK_BYTES << max(steps.bit_length() - 1, 0), self.max_block)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the peer says it can be dialled."""
        return () if self.session.peer is None else self.session.peer.addresses

    def moved(self) -> int:
        """Bytes of content that it took of us, and of everything that came."""
        return self.content_bytes + self.received.total

    def send(self, data: bytes) -> None:
        """Queues control messages, before all blocks; the writing task takes it from there. A peer that
        does not read is left."""
        if data:
            self._control.append(data)
            self._queued(len(data))

    def _queued(self, count: int) -> None:
        self._unsent_bytes += count
        self._writable.set()
        if self._unsent_bytes > MAX_BACKLOG_BYTES:
            self.end(m.BYE_SILENT, TransportError("the peer asks and does not read the answers"))

    def end(self, code: int, failure: ParisError | None = None, *, said: str = "") -> None:
        """Ends the session from our side, once: `code` is what the peer is told, and `said`, or what it did
        wrong."""
        if not self.ending:
            self.farewell = code
            self.failure = failure
            self._said = str(failure) if isinstance(failure, RemoteProtocolError) else said
            self._stop()

    def _stop(self) -> None:
        self.ending = True
        self._scope.cancel()

    @property
    def usable(self) -> bool:
        """Whether anything may still be sent: neither side has ended the session."""
        return not self.ending and self.session.state is State.OPEN

    def choke(self, choked: bool) -> None:
        """Gives or takes the peer's upload slot; what it asked for and did not get is rejected."""
        if not self.usable:
            return
        now = trio.current_time()
        self.slot_since = now
        if not choked:
            self.send(self.session.unchoke(now))
            return
        self.send(self.session.choke(now))
        while self._uploads:
            self._reject(self._uploads.popleft())

    def _reject(self, request: m.Request) -> None:
        answer = self.session.reject(request.piece, request.offset, request.length, trio.current_time())
        self.send(answer)

    # -- tasks -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until either side ends the session. Never raises for what a peer or the network does."""
        with self._scope:
            try:
                async with trio.open_nursery() as nursery:
                    for task in (self._read, self._write, self._serve, self._tick):
                        nursery.start_soon(self._guarded, task)
            finally:
                with trio.CancelScope(shield=True):
                    await self._say_goodbye()

    async def _guarded(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except RemoteProtocolError as error:
            self.end(m.BYE_VIOLATION, error)
        except TransportError as error:
            self.end(m.BYE_SILENT, error)
        except StoreError as error:
            _log.error("cannot serve %s: %s", peer_id_text(self.node_id), error)
            self.end(m.BYE_LEAVING, error, said="it cannot be read here")
        except Exception:  # noqa: BLE001 - our bug, but one peer's bytes must not end all other sessions
            _log.exception("a session with %s failed", peer_id_text(self.node_id))
            self.end(m.BYE_LEAVING, TransportError("internal error"))

    async def _say_goodbye(self) -> None:
        with trio.move_on_after(FAREWELL_S):
            try:
                if self.ended_by_peer is None and not isinstance(self.failure, TransportError):
                    rest = b"".join([*self._begun, *self._control])
                    await self._stream.send_all(rest + self.session.bye(self.farewell, self._said))
            except TransportError as error:
                _log.debug("saying goodbye to %s: %s", peer_id_text(self.node_id), error)
        await self._stream.aclose()

    async def _read(self) -> None:
        self.owner.opened(self)
        await self._handle_events()  # the peer's first messages came with its hello
        while self.session.state is not State.CLOSED:
            if self.usable:
                self.owner.idle(self)
            if isinstance(self._stream, DirectStream):
                await self._read_in_place(self._stream)
            else:
                await self._read_some()
        self._stop()

    async def _read_in_place(self, stream: DirectStream) -> None:
        worth = self.session.missing
        if worth > 1:
            worth = min(worth, int(self.received.rate(trio.current_time()) * GATHER_S))
        count = await stream.receive_into(self.session.buffer(), worth)
        if not count:
            raise TransportError("the peer closed the stream")
        begun = trio.current_time()
        while count:
            now = trio.current_time()
            self.received.add(count, now)
            self.session.filled(count, now)
            await self._handle_events()
            if now - begun > TURN_S or not self.usable:
                break
            count = stream.receive_now(self.session.buffer())  # the header of a block and then the block

    async def _read_some(self) -> None:
        data = await self._stream.receive_some(READ_BYTES)
        if not data:
            raise TransportError("the peer closed the stream")
        self.received.add(len(data), trio.current_time())
        for start in range(0, len(data), FEED_BYTES):
            self.session.feed(data[start : start + FEED_BYTES], trio.current_time())
            await self._handle_events()
            await trio.lowlevel.checkpoint()

    async def _handle_events(self) -> None:
        handled = 0
        now = trio.current_time()
        while not self.ending and (event := self.session.next_event(now)) is not None:
            self._handle(event)
            handled += 1
            if handled % EVENTS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
                now = trio.current_time()

    def _handle(self, event: SessionEvent) -> None:
        match event:
            case m.Request():
                self._on_request(event)
            case m.Cancel():
                self._on_cancel(event)
            case m.Bye():
                self.ended_by_peer = event
            case MetadataTimedOut():
                raise TransportError("the peer does not answer for metadata")
            case KeepAliveDue():
                self.send(self.session.keep_alive(trio.current_time()))
            case _:
                self.owner.handle(self, event)

    def _on_request(self, request: m.Request) -> None:
        if self.session.am_choking or not self.owner.serves(self, request.piece):
            self._reject(request)
            return
        self._uploads.append(request)
        self._requested.set()

    def _on_cancel(self, cancel: m.Cancel) -> None:
        request = m.Request(cancel.piece, cancel.offset, cancel.length)
        if request in self._uploads:
            self._uploads.remove(request)
            self._reject(request)

    def _take_unsent(self, limit: int) -> list[Buffer]:
        """At most `limit` bytes of what is queued, exactly that many when there are."""
        parts: list[Buffer] = []
        room = limit
        while room and (part := self._next_part()) is not None:
            if len(part) > room:
                view = memoryview(part)
                self._begun.appendleft(view[room:])
                part = view[:room]
            parts.append(part)
            room -= len(part)
        self._unsent_bytes -= limit - room
        return parts

    def _next_part(self) -> Buffer | None:
        if self._begun:
            return self._begun.popleft()
        if self._control:
            return self._control.popleft()
        if self._blocks:
            header, data = self._blocks.popleft()
            self._begun.append(data)
            return header
        return None

    async def _write(self) -> None:
        while True:
            await self._writable.wait()
            self._writable = trio.Event()
            while parts := self._take_unsent(self._write_bytes):
                self._drained.set()
                await self._write_parts(parts)

    @property
    def _write_bytes(self) -> int:
        return min(self._batch // 2, MAX_WRITE_BYTES) if self.direct else WRITE_BYTES

    async def _write_parts(self, parts: list[Buffer]) -> None:
        begun, count = trio.current_time(), sum(map(len, parts))
        try:
            if isinstance(self._stream, DirectStream):
                await self._stream.send_parts(parts)
            else:
                await self._stream.send_all(b"".join(parts))
        except trio.Cancelled:
            # Nothing of it was sent: our goodbye must follow it, not stand in the middle of a frame.
            self._begun.extendleft(reversed(parts))
            self._unsent_bytes += count
            raise
        self._adapt((trio.current_time() - begun) * MIN_BATCH_BYTES / 2 / max(count, MIN_BATCH_BYTES // 2))

    def _adapt(self, seconds: float) -> None:
        """`seconds`: what the peer took for 64 KiB."""
        if seconds < FAST_S:
            self._batch = min(self._batch * 2, MAX_BATCH_BYTES)
        elif seconds > SLOW_S:
            self._batch = max(self._batch // 2, MIN_BATCH_BYTES)

    async def _serve(self) -> None:
        while True:
            await self._requested.wait()
            self._requested = trio.Event()
            while self._uploads:
                await self.owner.may_upload(self)
                batch = self._next_batch()
                if not batch:  # choked or cancelled meanwhile
                    break
                blocks = await self.owner.read_blocks(batch)
                self._answer(batch, blocks)
                while self._unsent_bytes > self._batch:
                    self._drained = trio.Event()
                    await self._drained.wait()

    def _next_batch(self) -> list[m.Request]:
        batch: list[m.Request] = []
        total = 0
        while self._uploads and total < self._batch:
            batch.append(self._uploads.popleft())
            total += batch[-1].length
        return batch

    def _answer(self, batch: Sequence[m.Request], blocks: Sequence[Buffer]) -> None:
        now = trio.current_time()
        for request, data in zip(batch, blocks, strict=True):
            header = self.session.answer(request.piece, request.offset, request.length, now)
            self._blocks.append((header, data))
            self._queued(len(header) + len(data))
            self.content_bytes += len(data)
            self.owner.uploaded(self, request.piece, len(data))

    async def _tick(self) -> None:
        while True:
            wait = self.session.next_deadline() - trio.current_time()
            await trio.sleep(min(max(wait, 0.05), TICK_S))
            events = self.session.tick(trio.current_time())
            for event in events:
                if self.usable:
                    self._handle(event)
            if events and self.usable:
                self.owner.idle(self)


def limits_for(stream: ByteStream) -> Limits:
    """What a session over `stream` offers."""
    return DIRECT_LIMITS if isinstance(stream, DirectStream) else MUXED_LIMITS


def farewell_text(bye: m.Bye) -> str:
    """What a stranger said when it left, fit for logs and terminals."""
    return f"code {bye.code}: {bye.text[:MAX_TEXT_CHARS]!r}"


async def receive_hello(stream: ByteStream, session: Session) -> m.Hello:
    """Reads until the peer's greeting. Raises `TransportError` or `RemoteProtocolError`."""
    with trio.move_on_after(GREETING_S):
        while True:
            event = session.next_event(trio.current_time())
            if isinstance(event, m.Hello):
                return event
            if isinstance(event, m.Bye):
                raise Refused(event)
            data = await stream.receive_some(READ_BYTES)
            if not data:
                raise TransportError("the peer closed the stream before its hello")
            session.feed(data, trio.current_time())
    raise TransportError(f"no hello within {GREETING_S:.0f} s")


async def send_soon(stream: ByteStream, data: bytes) -> None:
    """Writes what comes before a session. Raises `TransportError`, also after `SEND_S`."""
    with trio.move_on_after(SEND_S):
        await stream.send_all(data)
        return
    raise TransportError(f"the peer did not take {len(data)} bytes within {SEND_S:.0f} s")


class Refused(TransportError):
    """The peer said goodbye instead of hello."""

    def __init__(self, bye: m.Bye) -> None:
        super().__init__(f"the peer refuses ({farewell_text(bye)})")
        self.code = bye.code
