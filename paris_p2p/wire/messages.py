"""The swarm protocol `/paris/swarm/1`: messages, frames, limits (normative text: docs/protocol/swarm.md).

Owns: encoding and decoding of every message that two peers exchange about one content item, and the
incremental `FrameDecoder`. Does not own: when a message may be sent (`core.session`) or the bytes'
journey (`net`).
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgpack

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError
from paris_p2p.ids import FileIndex, InfoHash, PieceIndex
from paris_p2p.wire import bep52, canonical
from paris_p2p.wire.identity import NODE_ID_BYTES

PROTOCOL_ID = "/paris/swarm/1"
VERSION = 1

MAX_PIECES = bep52.MAX_PIECES
MAX_INFO_BYTES = bep52.MAX_INFO_BYTES
MAX_CONTROL_BYTES = MAX_PIECES // 8 + 1024  # the longest legal message is a bitfield of MAX_PIECES bits
MAX_BLOCK_BYTES = 1024 * 1024  # what any peer may offer to accept; `Hello.max_block` may say less
MIN_BLOCK_BYTES = 16 * 1024  # BEP 52's leaf: what every peer must accept
BLOCK_BYTES = 64 * 1024  # what this node asks a peer for of whose speed it knows nothing
MAX_CHUNK_BYTES = 64 * 1024  # of an info dictionary or a piece layer
MAX_LAYER_BYTES = MAX_PIECES * 32
MAX_OUTSTANDING_REQUESTS = 256  # what any peer may offer to queue
MAX_FEATURES = 16
MAX_FEATURE_CHARS = 32
MAX_ADDRESSES = 4
MAX_ADDRESS_CHARS = 200
MAX_PEERS_PER_MESSAGE = 50
MAX_BYE_CHARS = 200
MAX_NAME_CHARS = 32

IGNORE_UNKNOWN = "ignore-unknown"
"""A peer that offers this feature skips control messages whose name it does not know."""

_HEADER = struct.Struct(">IB")
_BLOCK_HEADER = struct.Struct(">II")
_CONTROL, _BLOCK = 0, 1
SCRATCH_BYTES = 4096  # received at once between blocks: what of a block comes with it is copied
BLOCK_OVERHEAD = _HEADER.size + _BLOCK_HEADER.size

BYE_DONE = 0
BYE_UNKNOWN_ITEM = 1
BYE_BUSY = 2
BYE_DUPLICATE = 3
BYE_VIOLATION = 4
BYE_LEAVING = 5
BYE_BANNED = 6
BYE_SILENT = 7


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _check_addresses(addresses: Sequence[str]) -> None:
    _require(len(addresses) <= MAX_ADDRESSES, "too many addresses")
    _require(all(len(text) <= MAX_ADDRESS_CHARS for text in addresses), "an address is too long")


def _check_u32(*values: int) -> None:
    _require(all(0 <= value < 1 << 32 for value in values), "a number is out of range")


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of each side. `max_block`: bytes of the longest block this side accepts;
    `max_requests`: how many unanswered requests it queues; `addresses`: where it can be dialled."""

    version: int
    info_hash: InfoHash
    features: tuple[str, ...]
    max_block: int
    max_requests: int
    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        _require(1 <= self.version < 1 << 16, "version is out of range")
        _require(len(self.info_hash) == 32, "info_hash is not 32 bytes")
        _require(len(self.features) <= MAX_FEATURES, "too many features")
        _require(all(1 <= len(text) <= MAX_FEATURE_CHARS for text in self.features), "a feature is too long")
        _require(MIN_BLOCK_BYTES <= self.max_block <= MAX_BLOCK_BYTES, "max_block is out of range")
        _require(1 <= self.max_requests <= MAX_OUTSTANDING_REQUESTS, "max_requests is out of range")
        _check_addresses(self.addresses)


@dataclass(frozen=True, slots=True)
class InfoRequest:
    """Asks for the info dictionary from byte `offset` on."""

    offset: int

    def __post_init__(self) -> None:
        _require(0 <= self.offset < MAX_INFO_BYTES, "offset is out of range")


@dataclass(frozen=True, slots=True)
class Info:
    """A chunk of the bencoded info dictionary, of `total` bytes; `total` 0 means "I have none yet"."""

    offset: int
    total: int
    data: bytes

    def __post_init__(self) -> None:
        _check_chunk(self.offset, self.total, self.data, MAX_INFO_BYTES)


@dataclass(frozen=True, slots=True)
class LayerRequest:
    """Asks for the piece layer (32-byte hashes) of a file from byte `offset` on."""

    file: FileIndex
    offset: int

    def __post_init__(self) -> None:
        _check_u32(self.file)
        _require(0 <= self.offset < MAX_LAYER_BYTES, "offset is out of range")


@dataclass(frozen=True, slots=True)
class Layer:
    """A chunk of a file's piece layer, of `total` bytes; `total` 0 means "I have none yet"."""

    file: FileIndex
    offset: int
    total: int
    data: bytes

    def __post_init__(self) -> None:
        _check_u32(self.file)
        _check_chunk(self.offset, self.total, self.data, MAX_LAYER_BYTES)


def _check_chunk(offset: int, total: int, data: bytes, limit: int) -> None:
    _require(0 <= total <= limit and len(data) <= MAX_CHUNK_BYTES, "a chunk is too long")
    _require(offset >= 0 and offset + len(data) <= max(total, offset), "a chunk is misplaced")
    _require((len(data) > 0) == (total > 0), "a chunk is empty, or data without a total")


@dataclass(frozen=True, slots=True)
class Bitfield:
    """The pieces the sender has: bit 7 of byte 0 is piece 0; spare bits are zero."""

    bits: bytes

    def __post_init__(self) -> None:
        _require(len(self.bits) <= MAX_PIECES // 8, "a bitfield is too long")


@dataclass(frozen=True, slots=True)
class Have:
    """The sender has verified `piece` and serves it from now on."""

    piece: PieceIndex

    def __post_init__(self) -> None:
        _require(0 <= self.piece < MAX_PIECES, "piece is out of range")


@dataclass(frozen=True, slots=True)
class Interested:
    """The receiver has pieces that the sender lacks."""


@dataclass(frozen=True, slots=True)
class NotInterested:
    """Takes `Interested` back."""


@dataclass(frozen=True, slots=True)
class Choke:
    """The sender rejects requests until it unchokes (each side starts choked)."""


@dataclass(frozen=True, slots=True)
class Unchoke:
    """The sender answers requests from now on."""


@dataclass(frozen=True, slots=True)
class Request:
    """Asks for `length` bytes of `piece` from `offset`. Answered by exactly one block or `Reject`."""

    piece: PieceIndex
    offset: int
    length: int

    def __post_init__(self) -> None:
        _check_request(self.piece, self.offset, self.length)


@dataclass(frozen=True, slots=True)
class Cancel:
    """The sender no longer needs this request; it is still answered by a block or a `Reject`."""

    piece: PieceIndex
    offset: int
    length: int

    def __post_init__(self) -> None:
        _check_request(self.piece, self.offset, self.length)


@dataclass(frozen=True, slots=True)
class Reject:
    """This request will not be answered with a block."""

    piece: PieceIndex
    offset: int
    length: int

    def __post_init__(self) -> None:
        _check_request(self.piece, self.offset, self.length)


def _check_request(piece: int, offset: int, length: int) -> None:
    _require(0 <= piece < MAX_PIECES, "piece is out of range")
    _require(0 <= offset < 1 << 32, "a number is out of range")
    _require(1 <= length <= MAX_BLOCK_BYTES, "length is out of range")


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """A peer of this item: its node id and where it can be dialled."""

    node_id: bytes
    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        _require(len(self.node_id) == NODE_ID_BYTES, "node_id is not 32 bytes")
        _check_addresses(self.addresses)


@dataclass(frozen=True, slots=True)
class Peers:
    """Peer exchange: peers of this item that the sender is connected to now (`added`), or no longer."""

    added: tuple[PeerAddress, ...]
    dropped: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _require(len(self.added) <= MAX_PEERS_PER_MESSAGE, "too many peers")
        _require(len(self.dropped) <= MAX_PEERS_PER_MESSAGE, "too many peers")
        _require(all(len(node_id) == NODE_ID_BYTES for node_id in self.dropped), "node_id is not 32 bytes")


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Nothing to say, still here."""


@dataclass(frozen=True, slots=True)
class Bye:
    """The last message: why the sender ends the session (`BYE_*`), and a text for logs."""

    code: int
    text: str

    def __post_init__(self) -> None:
        _require(0 <= self.code < 256 and len(self.text) <= MAX_BYE_CHARS, "code or text out of range")


@dataclass(frozen=True, slots=True)
class Unknown:
    """A well-formed control message of a name this version does not know."""

    name: str


@dataclass(frozen=True, slots=True)
class Block:
    """`data` are the bytes of `piece` from `offset`: the answer to a `Request` (a frame of type 1)."""

    piece: PieceIndex
    offset: int
    data: bytes | bytearray


Control = (
    Hello
    | InfoRequest
    | Info
    | LayerRequest
    | Layer
    | Bitfield
    | Have
    | Interested
    | NotInterested
    | Choke
    | Unchoke
    | Request
    | Cancel
    | Reject
    | Peers
    | KeepAlive
    | Bye
)
Message = Control | Block | Unknown

_KINDS: dict[str, type[Control]] = {
    "hello": Hello,
    "info-request": InfoRequest,
    "info": Info,
    "layer-request": LayerRequest,
    "layer": Layer,
    "bitfield": Bitfield,
    "have": Have,
    "interested": Interested,
    "not-interested": NotInterested,
    "choke": Choke,
    "unchoke": Unchoke,
    "request": Request,
    "cancel": Cancel,
    "reject": Reject,
    "peers": Peers,
    "keep-alive": KeepAlive,
    "bye": Bye,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


Frequent = Have | Request | Cancel | Reject
"""Messages that come by the thousand: what they cost decides how many peers a node can serve."""

_FREQUENT: dict[bytes, type[Frequent]] = {
    b"\xa4h": Have,
    b"\xa7r": Request,
    b"\xa6c": Cancel,
    b"\xa6r": Reject,
}
"""By the bytes 1 and 2 of their payload: their name's length and first letter."""
_MAX_FREQUENT_BYTES = 64


def _pack_frequent(message: Frequent) -> bytes:
    """As `canonical.encode` has it: the fields in the order of their names."""
    if isinstance(message, Have):
        return msgpack.packb(["have", {"piece": message.piece}])  # type: ignore[no-any-return]
    fields = {"length": message.length, "offset": message.offset, "piece": message.piece}
    return msgpack.packb([_NAMES[type(message)], fields])  # type: ignore[no-any-return]


def _unpack_frequent(payload: bytes) -> Frequent | None:
    """None for everything that is not exactly the encoding of such a message."""
    kind = _FREQUENT.get(payload[1:3])
    if kind is None or len(payload) > _MAX_FREQUENT_BYTES:
        return None
    try:
        _, fields = msgpack.unpackb(payload)
        values = [fields["piece"]] if kind is Have else [fields["piece"], fields["offset"], fields["length"]]
        if any(type(value) is not int for value in values):  # True and 1.0 are other encodings' 1
            return None
        message = kind(*values)
    except (ValueError, TypeError, LookupError, RecursionError, msgpack.exceptions.UnpackException):
        return None  # whatever is wrong, the thorough way says
    return message if _pack_frequent(message) == payload else None


def encode(message: Control) -> bytes:
    """The frame of a control message. Raises `LocalProtocolError` when it would be too long."""
    if isinstance(message, Frequent):
        payload = _pack_frequent(message)
    else:
        payload = canonical.pack([_NAMES[type(message)], canonical.to_plain(message)])
    if len(payload) > MAX_CONTROL_BYTES:
        raise LocalProtocolError(f"a control message of {len(payload)} bytes")
    return _HEADER.pack(1 + len(payload), _CONTROL) + payload


def block_header(piece: PieceIndex, offset: int, length: int) -> bytes:
    """The bytes that precede a block's `length` data bytes (so that the data need not be copied)."""
    if not 1 <= length <= MAX_BLOCK_BYTES:
        raise LocalProtocolError(f"a block of {length} bytes")
    return _HEADER.pack(1 + _BLOCK_HEADER.size + length, _BLOCK) + _BLOCK_HEADER.pack(piece, offset)


def encode_block(block: Block) -> bytes:
    """The frame of a block."""
    return block_header(block.piece, block.offset, len(block.data)) + block.data


def _decode_control(payload: bytes) -> Control | Unknown:
    frequent = _unpack_frequent(payload)
    if frequent is not None:
        return frequent
    plain = canonical.unpack(payload, MAX_CONTROL_BYTES)
    if not (isinstance(plain, list) and len(plain) == 2 and isinstance(plain[0], str)):
        raise RemoteProtocolError("a control message is not [name, fields]")
    name = plain[0]
    if not 1 <= len(name) <= MAX_NAME_CHARS:
        raise RemoteProtocolError("a control message's name is empty or too long")
    kind = _KINDS.get(name)
    if kind is None:
        return Unknown(name)
    return canonical.from_plain(kind, plain[1], name)


@dataclass(slots=True)
class _Arriving:
    """A block of which a part is here."""

    piece: PieceIndex
    offset: int
    data: bytearray
    here: int  # bytes


class FrameDecoder:
    """Bytes in, messages out; buffers at most one frame plus what was fed at once.

    Bytes are either handed over (`feed`), or received in place: into `buffer()`, then `filled(count)`. A
    block's data is then never copied. `max_block`: the longest block (bytes) to accept. `expects(piece,
    offset, length)`: whether a block was asked for, so that nothing is set aside for one that was not.
    After an error every call of `next_message` raises it again.
    """

    def __init__(
        self,
        max_block: int = MAX_BLOCK_BYTES,
        expects: Callable[[PieceIndex, int, int], bool] = lambda piece, offset, length: True,
    ) -> None:
        self._limits = {_CONTROL: 1 + MAX_CONTROL_BYTES, _BLOCK: 1 + _BLOCK_HEADER.size + max_block}
        self._expects = expects
        self._buffer = bytearray()
        self._start = 0
        self._arriving: _Arriving | None = None
        self._scratch = bytearray()  # made when it is first used
        self._error: RemoteProtocolError | None = None

    def feed(self, data: bytes | memoryview) -> None:
        """Takes bytes as they came."""
        block = self._arriving
        if block is not None:
            taken = min(len(data), len(block.data) - block.here)
            block.data[block.here : block.here + taken] = data[:taken]
            block.here += taken
            data = data[taken:]
        if self._start:
            # Once per read, not once per message: what is moved is less than one frame.
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def buffer(self) -> memoryview:
        """Where to receive next (at least one byte); all messages must have been taken."""
        block = self._arriving
        if block is not None and block.here < len(block.data):
            return memoryview(block.data)[block.here :]
        if not self._scratch:
            self._scratch = bytearray(SCRATCH_BYTES)
        return memoryview(self._scratch)

    def filled(self, count: int) -> None:
        """`count` bytes were received into `buffer()`."""
        block = self._arriving
        if block is not None and block.here < len(block.data):
            block.here += count
        else:
            self.feed(memoryview(self._scratch)[:count])

    def next_message(self) -> Message | None:
        """The next whole message, or None when more bytes are needed. Raises `RemoteProtocolError`."""
        if self._error is not None:
            raise self._error
        try:
            return self._next()
        except RemoteProtocolError as error:
            self._error = error
            self._buffer.clear()
            self._start = 0
            self._arriving = None
            raise

    def _next(self) -> Message | None:
        if self._arriving is not None:
            return self._arrived(self._arriving)
        if len(self._buffer) - self._start < _HEADER.size:
            return None
        length, kind = _HEADER.unpack_from(self._buffer, self._start)
        limit = self._limits.get(kind)
        if limit is None:
            raise RemoteProtocolError(f"a frame of unknown type {kind}")
        if not 1 <= length <= limit:
            raise RemoteProtocolError(f"a frame of {length} bytes, at most {limit} are allowed")
        begin = self._start + _HEADER.size
        end = begin + length - 1
        if kind == _BLOCK:
            return self._block(begin, end)
        if len(self._buffer) < end:
            return None
        self._start = end
        return _decode_control(self._bytes(begin, end))

    def _bytes(self, begin: int, end: int) -> bytes:
        with memoryview(self._buffer) as view:
            return bytes(view[begin:end])

    def _block(self, begin: int, end: int) -> Block | None:
        length = end - begin - _BLOCK_HEADER.size
        if length <= 0:
            raise RemoteProtocolError("a block without data")
        here = len(self._buffer) - begin - _BLOCK_HEADER.size
        if here < 0:
            return None
        piece, offset = _BLOCK_HEADER.unpack_from(self._buffer, begin)
        if not self._expects(PieceIndex(piece), offset, length):
            raise RemoteProtocolError(f"a block that was not asked for: piece {piece} at {offset}")
        if here >= length:
            self._start = end
            return Block(PieceIndex(piece), offset, self._bytes(begin + _BLOCK_HEADER.size, end))
        data = bytearray(length)
        data[:here] = self._buffer[begin + _BLOCK_HEADER.size :]
        self._arriving = _Arriving(PieceIndex(piece), offset, data, here)
        self._buffer.clear()
        self._start = 0
        return None

    def _arrived(self, block: _Arriving) -> Block | None:
        if block.here < len(block.data):
            return None
        self._arriving = None
        return Block(block.piece, block.offset, block.data)
