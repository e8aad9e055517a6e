"""The first exchange with a node: is it one of ours, of our version, with our time, and where does it listen?

Owns: the answer's format, judging it, the wording of what is wrong. Does not own: connections.
Whoever dials protocol `HELLO_PROTOCOL` is sent one canonical msgpack map and the end of the stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.wire import canonical
from paris_p2p.wire.records import MAX_ADDRESS_CHARS, MAX_ADDRESSES, PROTOCOL_VERSION

HELLO_PROTOCOL = "paris/hello/1"
MAX_HELLO_BYTES = 512
PRODUCT = "paris-p2p"
MAX_SKEW_S = 3.0
"""hivemind refuses to join across a larger difference of clocks, with a message that names no remedy."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who answers: the product's name, its protocol version, its wall clock (unix seconds), and where it
    can be dialled: at most 3 multiaddrs that end in its peer id, none in client mode."""

    product: str
    protocol: int
    time_unix: float
    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.addresses) > MAX_ADDRESSES or any(len(a) > MAX_ADDRESS_CHARS for a in self.addresses):
            raise ValueError("too many or too long addresses")


@dataclass(frozen=True, slots=True)
class Judgement:
    """`problem`: what is wrong with a peer's answer, or None. `skew_s`: how far our clock is ahead of its,
    when the clocks are what is wrong, else 0. `addresses`: where a sound peer says it listens."""

    problem: str | None
    skew_s: float = 0.0
    addresses: tuple[str, ...] = ()


def encode_hello(now_unix: float, addresses: Sequence[str] = ()) -> bytes:
    """Our answer, with as many of our `addresses` as fit: those that others can use go first."""
    fitting = [address for address in addresses if len(address) <= MAX_ADDRESS_CHARS]
    return canonical.encode(Hello(PRODUCT, PROTOCOL_VERSION, now_unix, tuple(fitting[:MAX_ADDRESSES])))


def judge_hello(data: bytes, sent_unix: float, received_unix: float) -> Judgement:
    """What a peer's answer amounts to. `sent_unix`, `received_unix`: our clock around it."""
    if not data:
        return Judgement("it hangs up instead of greeting: it is overloaded, or not a paris-p2p node")
    try:
        hello = canonical.decode(Hello, data, MAX_HELLO_BYTES)
    except RemoteProtocolError as error:
        return Judgement(f"it is not a paris-p2p node (its greeting does not decode: {error})")
    if hello.product != PRODUCT:
        return Judgement("it is not a paris-p2p node")
    if hello.protocol != PROTOCOL_VERSION:
        newer = "paris-p2p here" if hello.protocol > PROTOCOL_VERSION else "the bootstrap node"
        return Judgement(
            f"it speaks protocol version {hello.protocol}, this program version {PROTOCOL_VERSION}: "
            f"upgrade {newer}"
        )
    skew_s = _skew(hello.time_unix, sent_unix, received_unix)
    if skew_s:
        return Judgement(clock_problem(skew_s), skew_s)
    return Judgement(None, 0.0, hello.addresses)


def clock_problem(skew_s: float) -> str:
    """What to tell the operator whose clock is `skew_s` ahead of a bootstrap node's."""
    return (
        f"this machine's clock is {abs(skew_s):.1f} s {_way(skew_s)} the bootstrap's; "
        f"set the clock (NTP), at most {MAX_SKEW_S:.0f} s are allowed"
    )


def foreign_clock_problem(skew_s: float) -> str:
    """The same where other nodes agree with our clock: it is the bootstrap node's that is wrong."""
    return (
        f"its clock is {abs(skew_s):.1f} s {_way(-skew_s)} ours, with which other nodes agree; "
        "its operator should set it (NTP)"
    )


def _way(skew_s: float) -> str:
    return "ahead of" if skew_s > 0 else "behind"


def _skew(peer_unix: float, sent_unix: float, received_unix: float) -> float:
    """How far our clock is ahead, seconds; 0 when that is within the limit and half the round trip."""
    ahead_s = (sent_unix + received_unix) / 2 - peer_unix
    allowed_s = MAX_SKEW_S + max(0.0, received_unix - sent_unix) / 2
    return 0.0 if abs(ahead_s) <= allowed_s else ahead_s


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
