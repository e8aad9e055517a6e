"""The bytes between a node that cannot be dialled and the public node that helps it.

Owns: the fixed-size messages of `docs/protocol/reachability.md` and the text of circuit addresses. Does not
own: sockets (`net.relay`, `net.circuits`), who may ask how often (`core.relay`).

A connection to a node's TLS port that begins with `MAGIC` instead of a TLS record is one of these.
"""

import ipaddress
import struct
from dataclasses import dataclass
from enum import Enum, IntEnum

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import NodeId
from paris_p2p.wire.identity import NODE_ID_BYTES, SIGNATURE_BYTES

MAGIC = b"PARIS-R1"
NONCE_BYTES = 32
PROOF_BYTES = SIGNATURE_BYTES
TOKEN_BYTES = 32
PING = bytes(TOKEN_BYTES)
"""A token that names no circuit: the relay asks whether the reserving node is still there."""
PONG = b"\0"
CIRCUIT = "/p2p-circuit"
_OPENING = struct.Struct(">8sc32sH")
_ANSWER = struct.Struct(">B16sH")
OPENING_BYTES = _OPENING.size
ANSWER_BYTES = _ANSWER.size
_CONTEXT = b"paris-p2p/reserve/1:"


class Ask(Enum):
    """What a caller wants. `subject` of its `Opening`: the caller (PROBE, RESERVE), the node to be connected
    with (DIAL), or a token (ACCEPT). `port`: the caller's TLS port (PROBE), else 0."""

    PROBE = b"P"
    RESERVE = b"R"
    DIAL = b"D"
    ACCEPT = b"A"


class Status(IntEnum):
    """The first byte of every answer."""

    OK = 0
    UNREACHABLE = 1
    UNKNOWN = 2
    BUSY = 3


@dataclass(frozen=True, slots=True)
class Opening:
    """The first message of a caller."""

    ask: Ask
    subject: bytes
    port: int = 0

    def encode(self) -> bytes:
        """`OPENING_BYTES` bytes."""
        return _OPENING.pack(MAGIC, self.ask.value, self.subject, self.port)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer. `host`, `port`: where the caller (PROBE, RESERVE) or the other end of the circuit (DIAL,
    ACCEPT) is seen to come from; port 0: not told."""

    status: Status
    host: str = "::"
    port: int = 0

    def encode(self) -> bytes:
        """`ANSWER_BYTES` bytes; IPv4 addresses as `::ffff:a.b.c.d`."""
        return _ANSWER.pack(self.status, _packed(self.host), self.port)


def decode_opening(data: bytes) -> Opening:
    """Raises `RemoteProtocolError`."""
    if len(data) != OPENING_BYTES:
        raise RemoteProtocolError("an opening of another length")
    magic, ask, subject, port = _OPENING.unpack(data)
    if magic != MAGIC:
        raise RemoteProtocolError("not a caller of ours")
    try:
        return Opening(Ask(ask), subject, port)
    except ValueError:
        raise RemoteProtocolError(f"nobody can ask for {ask!r}") from None


def decode_answer(data: bytes) -> Answer:
    """Raises `RemoteProtocolError`."""
    if len(data) != ANSWER_BYTES:
        raise RemoteProtocolError("an answer of another length")
    status, packed, port = _ANSWER.unpack(data)
    try:
        return Answer(Status(status), _unpacked(packed), port)
    except ValueError:
        raise RemoteProtocolError(f"no such status: {status}") from None


def reserve_message(nonce: bytes, relay: NodeId, node: NodeId) -> bytes:
    """What a node signs to reserve: `nonce` is the relay's, which is named, so that it is good there only."""
    return _CONTEXT + nonce + relay + node


def subject_node(opening: Opening) -> NodeId:
    """The node an opening is about."""
    assert len(opening.subject) == NODE_ID_BYTES
    return NodeId(opening.subject)


def circuit_text(relay: str, peer_id: str) -> str:
    """The address of `peer_id` by way of the relay at `relay` (`/ip4/A/tcp/P/tls`, `/p2p/…` left out)."""
    return f"{relay.split('/p2p/', 1)[0]}{CIRCUIT}/p2p/{peer_id}"


def is_circuit(text: str) -> bool:
    """Whether an address leads over a relay."""
    return CIRCUIT in text


def circuit_relay(text: str) -> str:
    """The relay's address of a circuit address."""
    return text.split(CIRCUIT, 1)[0]


def _packed(host: str) -> bytes:
    address = ipaddress.ip_address(host)
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def _unpacked(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)
