"""Whole swarms in one process: memory streams with latency and a shared uplink, on virtual time.

Owns: the simulated network, nodes with stores. Does not own: bad peers (the tests bring their own).
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import trio
import trio.testing

from paris_p2p.errors import TransportError
from paris_p2p.ids import InfoHash, NodeId
from paris_p2p.net.limits import SwarmLimits
from paris_p2p.net.swarm import Peer, Swarm, swarm_over
from paris_p2p.net.transport import WRITE_BYTES, ByteStream, StreamHandler
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity, peer_id_text

T = TypeVar("T")
PIECE = 16_384
NO_LIMITS = SwarmLimits()
BYTES_PER_S = 4e6
LATENCY_S = 0.01
Behaviour = Callable[[ByteStream], Awaitable[None]]


async def at_once(job: Callable[[], T]) -> T:
    """Virtual time must not run on while a thread works."""
    await trio.lowlevel.checkpoint()
    return job()


class MemoryStream:
    """One end of a memory pipe with latency; all streams of a node share its `uplink`."""

    def __init__(self, stream: trio.abc.Stream, uplink: trio.Lock, place: str = "") -> None:
        self.place = place
        self._stream = stream
        self._uplink = uplink

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise TransportError(f"broken: {error}") from None

    async def send_all(self, data: bytes) -> None:
        for start in range(0, len(data), WRITE_BYTES):
            part = data[start : start + WRITE_BYTES]
            async with self._uplink:
                await trio.sleep(len(part) / BYTES_PER_S)
            await trio.sleep(LATENCY_S)
            with self._translated():
                await self._stream.send_all(part)

    async def receive_some(self, max_bytes: int) -> bytes:
        with self._translated():
            return bytes(await self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)


class Hub:
    """All nodes of a simulated network, and who claims to hold what (for `find_peers`)."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.nodes: dict[NodeId, MemoryNetwork] = {}
        self.holders: list[Peer] = []
        self.dials = 0
        self.dead_s = 0.0
        """How long it takes to find that nobody is there."""

    async def find_peers(self, info_hash: InfoHash) -> Sequence[Peer]:
        return list(self.holders)


class MemoryNetwork:
    """A `Network` of one node. `behaviour` replaces the swarm for bad peers."""

    def __init__(self, hub: Hub, number: int) -> None:
        self._hub = hub
        self.node_id = Identity(bytes([number]) * 32).node_id
        self.addresses = (f"/memory/{number}/p2p/{peer_id_text(self.node_id)}",)
        self.place = ""
        self._handler: StreamHandler | None = None
        self.uplink = trio.Lock()
        self._accepted: set[trio.CancelScope] = set()
        hub.nodes[self.node_id] = self

    @property
    def peer(self) -> Peer:
        return Peer(self.node_id, self.addresses)

    def serve(self, handler: StreamHandler) -> None:
        self._handler = handler

    async def dial(self, peer: Peer, *, knock_s: float | None = None) -> ByteStream:
        self._hub.dials += 1
        await trio.sleep(0.05)
        target = self._hub.nodes.get(peer.node_id)
        if target is None and self._hub.dead_s:
            await trio.sleep(self._hub.dead_s if knock_s is None else min(knock_s, self._hub.dead_s))
        if target is None or target._handler is None:
            raise TransportError("nobody there")
        here, there = trio.testing.memory_stream_pair()
        theirs = MemoryStream(there, target.uplink, self.place)
        self._hub.nursery.start_soon(target._accept, self.node_id, theirs)
        return MemoryStream(here, self.uplink)

    async def _accept(self, node_id: NodeId, stream: ByteStream) -> None:
        assert self._handler is not None
        with trio.CancelScope() as scope:
            self._accepted.add(scope)
            await self._handler(node_id, stream)
        self._accepted.discard(scope)
        await stream.aclose()

    def vanish(self) -> None:
        """The node is gone without a word, and its streams with it."""
        self._hub.nodes.pop(self.node_id, None)
        for scope in self._accepted:
            scope.cancel()


class World:
    """Shorthand for the tests: nodes with stores in a temporary folder."""

    def __init__(self, hub: Hub, root: Path) -> None:
        self.hub = hub
        self._root = root
        self._count = 0

    def network(self) -> MemoryNetwork:
        self._count += 1
        return MemoryNetwork(self.hub, self._count)

    def store(self, name: str) -> ContentStore:
        return ContentStore(self._root / name)

    @asynccontextmanager
    async def node(
        self,
        store: ContentStore,
        network: MemoryNetwork | None = None,
        holder: bool = False,
        limits: SwarmLimits = NO_LIMITS,
    ) -> AsyncIterator[Swarm]:
        network = network or self.network()
        if holder:
            self.hub.holders.append(network.peer)
        rng = random.Random(self._count)
        async with swarm_over(
            network, store, find_peers=self.hub.find_peers, rng=rng, blocking=at_once, limits=limits
        ) as swarm:
            yield swarm

    def content(self, store: ContentStore, pieces: int = 40) -> ContentRef:
        """An item of three files, one of them empty, in `store`."""
        source = self._root / f"source-{store.root.name}"
        source.mkdir(exist_ok=True)
        rng = random.Random(9)
        (source / "big").write_bytes(rng.randbytes(PIECE * (pieces - 1) - 100))
        (source / "small").write_bytes(rng.randbytes(500))
        (source / "empty").write_bytes(b"")
        renamed = source.rename(self._root / "item")
        try:
            return store.add(renamed, piece_length=PIECE, mode="copy")
        finally:
            renamed.rename(source)
