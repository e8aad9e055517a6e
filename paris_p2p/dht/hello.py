"""The first exchange with a bootstrap node: is it one of ours, of our version, with our time?

Owns: the answer's format, judging it, the wording of what is wrong. Does not own: connections.
Whoever dials protocol `HELLO_PROTOCOL` is sent one canonical msgpack map and the end of the stream.
"""

from dataclasses import dataclass

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.wire import canonical
from paris_p2p.wire.records import PROTOCOL_VERSION

HELLO_PROTOCOL = "paris/hello/1"
MAX_HELLO_BYTES = 256
PRODUCT = "paris-p2p"
MAX_SKEW_S = 3.0
"""hivemind refuses to join across a larger difference of clocks, with a message that names no remedy."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who answers: the product's name, its protocol version, its wall clock (unix seconds)."""

    product: str
    protocol: int
    time_unix: float


def encode_hello(now_unix: float) -> bytes:
    """Our answer."""
    return canonical.encode(Hello(PRODUCT, PROTOCOL_VERSION, now_unix))


def judge_hello(data: bytes, sent_unix: float, received_unix: float) -> str | None:
    """What is wrong with a peer's answer, or None. `sent_unix`, `received_unix`: our clock around it."""
    if not data:
        return "it hangs up instead of greeting: it is overloaded, or not a paris-p2p node"
    try:
        hello = canonical.decode(Hello, data, MAX_HELLO_BYTES)
    except RemoteProtocolError as error:
        return f"it is not a paris-p2p node (its greeting does not decode: {error})"
    if hello.product != PRODUCT:
        return "it is not a paris-p2p node"
    if hello.protocol != PROTOCOL_VERSION:
        newer = "paris-p2p here" if hello.protocol > PROTOCOL_VERSION else "the bootstrap node"
        return (
            f"it speaks protocol version {hello.protocol}, this program version {PROTOCOL_VERSION}: "
            f"upgrade {newer}"
        )
    return _judge_clock(hello.time_unix, sent_unix, received_unix)


def _judge_clock(peer_unix: float, sent_unix: float, received_unix: float) -> str | None:
    ahead_s = (sent_unix + received_unix) / 2 - peer_unix
    if abs(ahead_s) <= MAX_SKEW_S + max(0.0, received_unix - sent_unix) / 2:
        return None
    way = "ahead of" if ahead_s > 0 else "behind"
    return (
        f"this machine's clock is {abs(ahead_s):.1f} s {way} the bootstrap's; "
        f"set the clock (NTP), at most {MAX_SKEW_S:.0f} s are allowed"
    )


# part of what the libp2p daemon says when it cannot connect or open the stream -> what that means
_CAUSES: tuple[tuple[str, str], ...] = (
    ("protocols not supported", "something answers, but it is not a paris-p2p node (or one too old)"),
    ("protocol not supported", "something answers, but it is not a paris-p2p node (or one too old)"),
    (
        "peer id mismatch",
        "another peer id answers there; ask for the current address",
    ),
    ("failed to negotiate", "something answers, but it is not a libp2p node"),
    ("connection refused", "nothing listens there (connection refused); is the bootstrap node running?"),
    ("no route to host", "there is no route to it; is this machine online?"),
    ("network is unreachable", "there is no route to it; is this machine online?"),
    ("no addresses", "its name resolves to no address"),
    ("no such host", "its name does not resolve"),
    ("i/o timeout", "no answer in time; is a firewall in the way?"),
    ("deadline exceeded", "no answer in time; is a firewall in the way?"),
    ("dial to self", "that is this node's own address"),
)


def explain_failure(text: str) -> str:
    """The operator's words for the daemon's error `text`."""
    for part, meaning in _CAUSES:
        if part in text:
            return meaning
    return f"it cannot be reached ({text[:200].strip()})"
