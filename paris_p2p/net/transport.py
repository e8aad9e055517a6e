"""What the swarm needs of a network, so that the same driver runs over libp2p and over memory streams.

Owns: the `ByteStream` and `Network` protocols, `Peer`, unwrapping of nursery exceptions.
Does not own: any implementation (`net.host`, and the tests' memory network).
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from paris_p2p.ids import NodeId
from paris_p2p.wire.bep52 import Buffer

WRITE_BYTES = 65_507
"""What to write at once: with yamux's 12-byte header it fills one noise message (65,519 bytes), one byte
more takes two."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A node that may hold an item. `addresses`: multiaddr texts ending in `/p2p/<peer id>`."""

    node_id: NodeId
    addresses: tuple[str, ...]


class ByteStream(Protocol):
    """An authenticated, ordered byte stream to one peer. Every method raises `TransportError`."""

    @property
    def place(self) -> str:
        """The network that the peer is in (`net.addresses.place`); "" if it does not matter."""

    async def send_all(self, data: bytes) -> None:
        """Writes all of `data`; when it is cancelled, all or nothing of up to `WRITE_BYTES`."""

    async def receive_some(self, max_bytes: int) -> bytes:
        """At least one byte, at most `max_bytes`; b"" when the peer is done."""

    async def aclose(self) -> None:
        """Says that we are done, gives the peer a moment to read it, closes; bounded, never raises for a
        broken stream."""


class DirectStream(ABC):
    """A `ByteStream` without a muxer: fast enough for larger blocks and worth its own reading and writing
    without copies."""

    place: str = ""

    @abstractmethod
    async def send_all(self, data: bytes) -> None: ...

    @abstractmethod
    async def send_parts(self, parts: Sequence[Buffer]) -> None:
        """Writes all of `parts`; when it is cancelled, all or nothing of them, or the stream is closed."""

    @abstractmethod
    async def receive_some(self, max_bytes: int) -> bytes: ...

    @abstractmethod
    async def receive_into(self, buffer: memoryview, worth: int = 1) -> int:
        """Fills `buffer` as far as something is here, at least one byte; 0 when the peer is done.

        `worth`: bytes that are to come in any case, so that to be woken for fewer is not worth it."""

    @abstractmethod
    def receive_now(self, buffer: memoryview) -> int:
        """As `receive_into` without waiting: 0 when nothing is here, or the peer is done."""

    @abstractmethod
    async def aclose(self) -> None: ...


StreamHandler = Callable[[NodeId, ByteStream], Awaitable[None]]


class Network(Protocol):
    """Where streams come from."""

    @property
    def node_id(self) -> NodeId:
        """Our own id."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where we can be dialled."""

    async def dial(self, peer: Peer, *, knock_s: float | None = None) -> ByteStream:
        """A new stream to `peer`, bounded in time; with `knock_s` only to those of its addresses where
        somebody answers within so many seconds. Raises `TransportError`."""

    def serve(self, handler: StreamHandler) -> None:
        """Runs `handler` for each stream that a peer opens."""


@runtime_checkable
class DialsDirectly(Protocol):
    """A `Network` that can leave a slow path for a fast one."""

    async def dial_direct(self, peer: Peer) -> ByteStream:
        """A `DirectStream` to `peer`. Raises `TransportError`, also when the peer has no address for one."""


@contextmanager
def unwrapped() -> Iterator[None]:
    """Turns an exception group of one exception, as a nursery raises it, into that exception."""
    try:
        yield
    except BaseExceptionGroup as group:
        leaf: BaseException = group
        while isinstance(leaf, BaseExceptionGroup) and len(leaf.exceptions) == 1:
            leaf = leaf.exceptions[0]
        if leaf is group:
            raise
        raise leaf from leaf.__cause__
