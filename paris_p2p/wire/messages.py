"""The swarm protocol `/paris/swarm/1`: messages, frames, limits (normative text: docs/protocol/swarm.md).

Owns: encoding and decoding of every message that two peers exchange about one content item. Does not own:
finding frames in a stream (`wire.frames`), when a message may be sent (`core.session`) or the bytes' journey
(`net`).
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

HEADER = struct.Struct(">IB")
BLOCK_HEADER = struct.Struct(">II")
CONTROL, BLOCK = 0, 1
"""Types of frames."""

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
"""Messages that come by the thousand: what they cost decides how many peers a node can serve. They are
written and read here without the general encoding, to the same bytes."""

_HEADS: dict[type[Frequent], bytes] = {
    Have: b"\x92\xa4have\x81\xa5piece",
    Request: b"\x92\xa7request\x83\xa6length",
    Cancel: b"\x92\xa6cancel\x83\xa6length",
    Reject: b"\x92\xa6reject\x83\xa6length",
}
"""What precedes their first number."""
_FREQUENT: dict[bytes, Callable[..., Frequent]] = {head: kind for kind, head in _HEADS.items()}
_HEAD_BYTES = {head[1]: len(head) for head in _FREQUENT}  # by the byte that begins their name
_OFFSET, _PIECE = b"\xa6offset", b"\xa5piece"
_NUMBERS = {0xCC: (1, 0x80), 0xCD: (2, 0x100), 0xCE: (4, 0x10000)}
"""First byte of a number -> (bytes that follow, least value that needs so many)."""


def _pack_number(value: int) -> bytes:
    """As msgpack has it, 0 to 2**32 - 1: the shortest form."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x100:
        return bytes((0xCC, value))
    return b"\xcd" + value.to_bytes(2, "big") if value < 0x10000 else b"\xce" + value.to_bytes(4, "big")


def _unpack_number(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends. Raises `LookupError` or `ValueError` if there is none."""
    first = data[at]
    if first < 0x80:
        return first, at + 1
    size, least = _NUMBERS[first]
    end = at + 1 + size
    value = int.from_bytes(data[at + 1 : end], "big")
    if value < least or end > len(data):
        raise ValueError("not the shortest form, or cut off")
    return value, end


def _pack_frequent(message: Frequent) -> bytes:
    """As `canonical.encode` has it: the fields in the order of their names."""
    head = _HEADS[type(message)]
    if isinstance(message, Have):
        return head + _pack_number(message.piece)
    numbers = _pack_number(message.length), _pack_number(message.offset), _pack_number(message.piece)
    return b"%b%b\xa6offset%b\xa5piece%b" % (head, *numbers)


def _unpack_frequent(payload: bytes) -> Frequent | None:
    """None for everything that is not exactly the encoding of such a message."""
    try:
        begin = _HEAD_BYTES[payload[1]]
        kind = _FREQUENT[payload[:begin]]
        number, at = _unpack_number(payload, begin)
        if kind is Have:
            return Have(PieceIndex(number)) if at == len(payload) else None
        if not payload.startswith(_OFFSET, at):
            return None
        offset, at = _unpack_number(payload, at + len(_OFFSET))
        if not payload.startswith(_PIECE, at):
            return None
        piece, at = _unpack_number(payload, at + len(_PIECE))
        return kind(PieceIndex(piece), offset, number) if at == len(payload) else None
    except (LookupError, ValueError):
        return None  # what is wrong, the thorough way says


def encode(message: Control) -> bytes:
    """The frame of a control message. Raises `LocalProtocolError` when it would be too long."""
    if isinstance(message, Frequent):
        payload = _pack_frequent(message)
    else:
        payload = canonical.pack([_NAMES[type(message)], canonical.to_plain(message)])
    if len(payload) > MAX_CONTROL_BYTES:
        raise LocalProtocolError(f"a control message of {len(payload)} bytes")
    return HEADER.pack(1 + len(payload), CONTROL) + payload


# Messages without fields have one encoding each; looked up, a flood of them costs a fraction of decoding it.
_BARE: dict[bytes, Control] = {
    encode(message)[HEADER.size :]: message
    for message in (Interested(), NotInterested(), Choke(), Unchoke(), KeepAlive())
}
_LONGEST_BARE = max(map(len, _BARE))


def block_header(piece: PieceIndex, offset: int, length: int) -> bytes:
    """The bytes that precede a block's `length` data bytes (so that the data need not be copied)."""
    if not 1 <= length <= MAX_BLOCK_BYTES:
        raise LocalProtocolError(f"a block of {length} bytes")
    return HEADER.pack(1 + BLOCK_HEADER.size + length, BLOCK) + BLOCK_HEADER.pack(piece, offset)


def encode_block(block: Block) -> bytes:
    """The frame of a block."""
    return block_header(block.piece, block.offset, len(block.data)) + block.data


def decode_control(payload: bytes) -> Control | Unknown:
    """The message in a frame of type `CONTROL`. Raises `RemoteProtocolError`."""
    bare = _BARE.get(payload) if len(payload) <= _LONGEST_BARE else None
    if bare is not None:
        return bare
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
