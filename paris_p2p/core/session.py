"""One swarm session between two peers about one item, without I/O: bytes and `now` in, events out.

Owns: the order in which messages are legal, what was asked and not yet answered on both sides, choke and
interest on both sides, every deadline. Does not own: which piece to ask for (`core.picker`), whom to serve
(`core.choker`), or the stream. Methods that speak return the bytes to write, in order.

Every `Request` is answered by exactly one `Block` or `Reject`, also after `Cancel` and `Choke`; that is
what keeps both sides' books equal without a clock.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError, TransportError
from paris_p2p.ids import FileIndex, InfoHash, PieceIndex
from paris_p2p.wire import messages as m
from paris_p2p.wire.frames import FrameDecoder


class State(enum.Enum):
    GREETING = "greeting"  # the peer's Hello has not come
    OPEN = "open"
    CLOSED = "closed"  # a Bye was sent or received


_WHEN_OPEN: tuple[type[m.Message], ...] = (
    m.InfoRequest,
    m.Info,
    m.LayerRequest,
    m.Layer,
    m.Bitfield,
    m.Have,
    m.Interested,
    m.NotInterested,
    m.Choke,
    m.Unchoke,
    m.Request,
    m.Cancel,
    m.Reject,
    m.Peers,
    m.KeepAlive,
    m.Block,
    m.Unknown,
)
TRANSITIONS: dict[tuple[State, type[m.Message]], State] = {
    (State.GREETING, m.Hello): State.OPEN,
    (State.GREETING, m.Bye): State.CLOSED,
    (State.OPEN, m.Bye): State.CLOSED,
    **{(State.OPEN, kind): State.OPEN for kind in _WHEN_OPEN},
}
"""What may be received in which state, and the state that follows. A missing entry is a violation."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What this side offers and how long it waits (seconds)."""

    max_block: int = m.MAX_BLOCK_BYTES
    max_requests: int = 128
    hello_s: float = 10.0
    request_s: float = 20.0  # without any block from the peer; four times that in all
    metadata_s: float = 5.0  # one chunk; a fetch that waits longer should ask another peer
    keep_alive_s: float = 30.0
    silence_s: float = 75.0
    max_metadata_requests: int = 8
    max_unknown: int = 1000


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class WastedBlock:
    """A block came that was cancelled or had timed out: `length` bytes for nothing."""

    length: int


@dataclass(frozen=True, slots=True)
class RequestTimedOut:
    """No answer within the deadline; ask someone else."""

    piece: PieceIndex
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class MetadataTimedOut:
    """A request for the info dictionary or a layer was not answered."""


@dataclass(frozen=True, slots=True)
class KeepAliveDue:
    """Nothing was sent for a while: call `keep_alive`."""


Event = m.Message | WastedBlock | RequestTimedOut | MetadataTimedOut | KeepAliveDue
_Key = tuple[PieceIndex, int, int]


class Session:
    """`receive` and `tick` raise `RemoteProtocolError` (penalise) or `TransportError` (peer is silent);
    after either the session is closed. Calling a method in the wrong state raises `LocalProtocolError`."""

    def __init__(self, now: float, limits: Limits = DEFAULT_LIMITS) -> None:
        self.state = State.GREETING
        self.limits = limits
        self.peer: m.Hello | None = None
        self.am_choking = True
        self.am_interested = False
        self.peer_choking = True
        self.peer_interested = False
        self._hello: m.Hello | None = None
        self._decoder = FrameDecoder(limits.max_block, self._expects)
        self._opened = now
        self._heard = now
        self._spoke = now
        self._last_block = now
        self._asked: dict[_Key, float] = {}  # unanswered requests of ours -> when sent
        self._dead: set[_Key] = set()  # cancelled or timed out, and still unanswered
        self._owed: set[_Key] = set()  # the peer's requests that we have not answered
        self._metadata_asked: dict[tuple[int, int], float] = {}  # (file or -1, offset) -> when sent
        self._metadata_owed = 0
        self._peer_bitfield = False
        self._unknown = 0

    # -- receiving -------------------------------------------------------------------------------

    def feed(self, data: bytes, now: float) -> None:
        """Takes bytes from the stream; `next_event` then yields what they mean."""
        self._heard = now
        if self.state is not State.CLOSED:
            self._decoder.feed(data)

    def buffer(self) -> memoryview:
        """Where to receive next, instead of `feed`: then call `filled`."""
        return self._decoder.buffer()

    @property
    def missing(self) -> int:
        """Bytes that will come before anything else can: the rest of a block that has begun, or 0."""
        return self._decoder.missing

    def filled(self, count: int, now: float) -> None:
        """`count` bytes were received into `buffer()`; `next_event` then yields what they mean."""
        self._heard = now
        if self.state is not State.CLOSED:
            self._decoder.filled(count)

    def _expects(self, piece: PieceIndex, offset: int, length: int) -> bool:
        key = (piece, offset, length)
        return key in self._asked or key in self._dead

    def next_event(self, now: float) -> Event | None:
        """The next event, or None. What came before a violation is delivered before it raises."""
        while self.state is not State.CLOSED:
            try:
                message = self._decoder.next_message()
                if message is None:
                    return None
                event = self._receive(message, now)
            except RemoteProtocolError:
                self.state = State.CLOSED
                raise
            if event is not None:
                return event
        return None

    def receive(self, data: bytes, now: float) -> list[Event]:
        """`feed`, then all events."""
        self.feed(data, now)
        events: list[Event] = []
        while (event := self.next_event(now)) is not None:
            events.append(event)
        return events

    def _receive(self, message: m.Message, now: float) -> Event | None:
        following = TRANSITIONS.get((self.state, type(message)))
        if following is None:
            raise RemoteProtocolError(f"{type(message).__name__} in state {self.state.value}")
        handler = _HANDLERS.get(type(message))
        event = message if handler is None else handler(self, message, now)
        self.state = following
        return event

    def _on_hello(self, hello: m.Hello, now: float) -> Event:
        if hello.version != m.VERSION:
            raise RemoteProtocolError(f"protocol version {hello.version}, this node speaks {m.VERSION}")
        if self._hello is not None and hello.info_hash != self._hello.info_hash:
            raise RemoteProtocolError("the peer answered about another item")
        self.peer = hello
        return hello

    def _on_bitfield(self, message: m.Bitfield, now: float) -> Event:
        if self._peer_bitfield:
            raise RemoteProtocolError("a second bitfield")
        self._peer_bitfield = True
        return message

    def _on_have(self, message: m.Have, now: float) -> Event:
        if not self._peer_bitfield:
            raise RemoteProtocolError("a have before the bitfield")
        return message

    def _on_interest(self, message: m.Interested | m.NotInterested, now: float) -> Event:
        self.peer_interested = isinstance(message, m.Interested)
        return message

    def _on_choke(self, message: m.Choke | m.Unchoke, now: float) -> Event:
        self.peer_choking = isinstance(message, m.Choke)
        return message

    def _on_request(self, message: m.Request, now: float) -> Event:
        key = (message.piece, message.offset, message.length)
        if len(self._owed) >= self.limits.max_requests:
            raise RemoteProtocolError(f"more than {self.limits.max_requests} requests at once")
        if key in self._owed:
            raise RemoteProtocolError("the same request twice")
        self._owed.add(key)
        return message

    def _on_cancel(self, message: m.Cancel, now: float) -> Event | None:
        # An answer may have crossed the cancel: then there is nothing left to do.
        return message if (message.piece, message.offset, message.length) in self._owed else None

    def _on_block(self, block: m.Block, now: float) -> Event:
        key = (block.piece, block.offset, len(block.data))
        self._last_block = now
        if self._take_asked(key):
            return block
        if key in self._dead:
            self._dead.discard(key)
            return WastedBlock(len(block.data))
        raise RemoteProtocolError(f"a block that was not asked for: piece {block.piece} at {block.offset}")

    def _on_reject(self, message: m.Reject, now: float) -> Event | None:
        key = (message.piece, message.offset, message.length)
        if self._take_asked(key):
            return message
        if key in self._dead:
            self._dead.discard(key)
            return None
        raise RemoteProtocolError("a reject of nothing that was asked for")

    def _take_asked(self, key: _Key) -> bool:
        return self._asked.pop(key, None) is not None

    def _on_metadata_request(self, message: m.InfoRequest | m.LayerRequest, now: float) -> Event:
        if self._metadata_owed >= self.limits.max_metadata_requests:
            raise RemoteProtocolError("too many metadata requests at once")
        self._metadata_owed += 1
        return message

    def _on_metadata(self, message: m.Info | m.Layer, now: float) -> Event:
        file = message.file if isinstance(message, m.Layer) else -1
        if self._metadata_asked.pop((file, message.offset), None) is None:
            raise RemoteProtocolError("metadata that was not asked for")
        return message

    def _on_unknown(self, message: m.Unknown, now: float) -> None:
        if self._hello is None or m.IGNORE_UNKNOWN not in self._hello.features:
            raise RemoteProtocolError(f"unknown message {message.name!r}")
        self._unknown += 1
        if self._unknown > self.limits.max_unknown:
            raise RemoteProtocolError("too many unknown messages")

    def _on_keep_alive(self, message: m.KeepAlive, now: float) -> None:
        return None  # `_heard` is already newer

    # -- time ------------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """When `tick` has something to do at the latest (monotonic seconds)."""
        if self.state is State.GREETING:
            return self._opened + self.limits.hello_s
        times = [self._heard + self.limits.silence_s, self._spoke + self.limits.keep_alive_s]
        if self._asked:  # in order of sending: the first one is the oldest
            times.append(self._request_deadline(next(iter(self._asked.values()))))
        if self._metadata_asked:
            times.append(min(self._metadata_asked.values()) + self.limits.metadata_s)
        return min(times)

    def _request_deadline(self, sent: float) -> float:
        # Requests queue behind each other, so any block counts as progress, but not for ever.
        wait = self.limits.request_s
        return min(max(sent, self._last_block) + wait, sent + 4 * wait)

    def tick(self, now: float) -> list[Event]:
        """Deadlines that have passed. Raises `TransportError` when the peer has gone silent."""
        if self.state is State.CLOSED:
            return []
        if self.state is State.GREETING:
            if now >= self._opened + self.limits.hello_s:
                self._fail(f"no hello within {self.limits.hello_s:.0f} s")
            return []
        if now >= self._heard + self.limits.silence_s:
            self._fail(f"nothing heard for {self.limits.silence_s:.0f} s")
        events: list[Event] = []
        for key in [key for key, sent in self._asked.items() if now >= self._request_deadline(sent)]:
            self._take_asked(key)
            self._dead.add(key)
            events.append(RequestTimedOut(*key))
        if any(now >= sent + self.limits.metadata_s for sent in self._metadata_asked.values()):
            events.append(MetadataTimedOut())
        if now >= self._spoke + self.limits.keep_alive_s:
            events.append(KeepAliveDue())
        return events

    def _fail(self, why: str) -> None:
        self.state = State.CLOSED
        raise TransportError(why)

    # -- speaking --------------------------------------------------------------------------------

    def _send(self, message: m.Control, now: float) -> bytes:
        if self.state is not State.OPEN or self._hello is None:
            raise LocalProtocolError(f"cannot send {type(message).__name__} in state {self.state.value}")
        self._spoke = now
        return m.encode(message)

    def hello(self, info_hash: InfoHash, features: tuple[str, ...], addresses: tuple[str, ...]) -> bytes:
        """This side's `Hello`: at once by who opened the stream, after the peer's by the other."""
        if self._hello is not None or self.state is State.CLOSED:
            raise LocalProtocolError("a second hello")
        limits = self.limits
        self._hello = m.Hello(
            m.VERSION, info_hash, features, limits.max_block, limits.max_requests, addresses
        )
        return m.encode(self._hello)

    def shares(self, feature: str) -> bool:
        """Whether both sides offered `feature`."""
        both = self._hello is not None and self.peer is not None
        return both and feature in self._hello.features and feature in self.peer.features  # type: ignore[union-attr]

    def request_room(self) -> int:
        """How many more requests the peer would queue."""
        if self.peer is None or self.peer_choking:
            return 0
        return min(self.peer.max_requests, self.limits.max_requests) - len(self._asked) - len(self._dead)

    def asked(self, piece: PieceIndex) -> list[_Key]:
        """Our unanswered requests for `piece`."""
        return [key for key in self._asked if key[0] == piece]

    def request(self, piece: PieceIndex, offset: int, length: int, now: float) -> bytes:
        """Asks for a block; the peer must have unchoked us and have room (`request_room`)."""
        key = (piece, offset, length)
        if self.request_room() <= 0:
            raise LocalProtocolError("a request without room for it")
        if not self.can_request(*key):
            raise LocalProtocolError("the same request twice")
        self._asked[key] = now
        return self._send(m.Request(*key), now)

    def can_request(self, piece: PieceIndex, offset: int, length: int) -> bool:
        """False while an earlier request for the same block, given up or not, is still unanswered."""
        key = (piece, offset, length)
        return key not in self._dead and key not in self._asked

    def cancel(self, piece: PieceIndex, now: float) -> bytes:
        """Takes all unanswered requests for `piece` back."""
        out = bytearray()
        for key in self.asked(piece):
            self._take_asked(key)
            self._dead.add(key)
            out += self._send(m.Cancel(*key), now)
        return bytes(out)

    def cancel_block(self, piece: PieceIndex, offset: int, length: int, now: float) -> bytes:
        """Takes one unanswered request back; nothing when it was answered or given up."""
        key = (piece, offset, length)
        if not self._take_asked(key):
            return b""
        self._dead.add(key)
        return self._send(m.Cancel(*key), now)

    def answer(self, piece: PieceIndex, offset: int, length: int, now: float) -> bytes:
        """The header of the block that answers the peer's request; the data must follow it."""
        self._settle((piece, offset, length))
        self._spoke = now
        return m.block_header(piece, offset, length)

    def reject(self, piece: PieceIndex, offset: int, length: int, now: float) -> bytes:
        """Refuses the peer's request."""
        self._settle((piece, offset, length))
        return self._send(m.Reject(piece, offset, length), now)

    def _settle(self, key: _Key) -> None:
        if key not in self._owed:
            raise LocalProtocolError(f"an answer to a request that does not stand: {key}")
        self._owed.discard(key)

    def choke(self, now: float) -> bytes:
        self.am_choking = True
        return self._send(m.Choke(), now)

    def unchoke(self, now: float) -> bytes:
        self.am_choking = False
        return self._send(m.Unchoke(), now)

    def interest(self, interested: bool, now: float) -> bytes:
        """Says whether the peer has something we lack; nothing when that is known already."""
        if interested == self.am_interested:
            return b""
        self.am_interested = interested
        return self._send(m.Interested() if interested else m.NotInterested(), now)

    def bitfield(self, bits: bytes, now: float) -> bytes:
        return self._send(m.Bitfield(bits), now)

    def have(self, piece: PieceIndex, now: float) -> bytes:
        return self._send(m.Have(piece), now)

    def info_request(self, offset: int, now: float) -> bytes:
        self._metadata_asked[(-1, offset)] = now
        return self._send(m.InfoRequest(offset), now)

    def layer_request(self, file: FileIndex, offset: int, now: float) -> bytes:
        self._metadata_asked[(file, offset)] = now
        return self._send(m.LayerRequest(file, offset), now)

    def info(self, offset: int, total: int, data: bytes, now: float) -> bytes:
        self._metadata_owed -= 1
        return self._send(m.Info(offset, total, data), now)

    def layer(self, file: FileIndex, offset: int, total: int, data: bytes, now: float) -> bytes:
        self._metadata_owed -= 1
        return self._send(m.Layer(file, offset, total, data), now)

    def peers(self, added: tuple[m.PeerAddress, ...], dropped: tuple[bytes, ...], now: float) -> bytes:
        return self._send(m.Peers(added, dropped), now)

    def keep_alive(self, now: float) -> bytes:
        return self._send(m.KeepAlive(), now)

    def bye(self, code: int, text: str) -> bytes:
        """The last message. Legal in every state; nothing can be sent or received after it."""
        self.state = State.CLOSED
        return m.encode(m.Bye(code, text[: m.MAX_BYE_CHARS]))


# `Any`: each handler takes exactly the kind it is filed under
_HANDLERS: dict[type[m.Message], Callable[[Session, Any, float], Event | None]] = {
    m.Hello: Session._on_hello,
    m.Bitfield: Session._on_bitfield,
    m.Have: Session._on_have,
    m.Interested: Session._on_interest,
    m.NotInterested: Session._on_interest,
    m.Choke: Session._on_choke,
    m.Unchoke: Session._on_choke,
    m.Request: Session._on_request,
    m.Cancel: Session._on_cancel,
    m.Block: Session._on_block,
    m.Reject: Session._on_reject,
    m.InfoRequest: Session._on_metadata_request,
    m.LayerRequest: Session._on_metadata_request,
    m.Info: Session._on_metadata,
    m.Layer: Session._on_metadata,
    m.Unknown: Session._on_unknown,
    m.KeepAlive: Session._on_keep_alive,
}
