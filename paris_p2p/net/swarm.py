"""The swarm of one node: fetches items from whoever has them, serves everything in its store.

Owns: the public interface (`open_swarm`, `Swarm`), accepting sessions, upload slots, limits, shutdown.
Does not own: one item's exchange (`net.item`, `net.download`), streams (`net.multi`).
"""

import logging
import random
from collections.abc import AsyncIterator, Callable, Container, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path

import trio

from paris_p2p.core.choker import Choker
from paris_p2p.core.rate import Rates
from paris_p2p.core.session import Session
from paris_p2p.core.visits import Visit, Visits
from paris_p2p.errors import ParisError, RemoteProtocolError, StoreError, TransportError
from paris_p2p.ids import InfoHash, NodeId
from paris_p2p.net.addresses import is_tls
from paris_p2p.net.blocking import Blocking, InThreads
from paris_p2p.net.connection import Connection, limits_for, receive_hello, send_soon
from paris_p2p.net.discovery import Discovery, FindPeers
from paris_p2p.net.download import Download, Progress
from paris_p2p.net.fetch_job import FetchJob
from paris_p2p.net.item import Item, Shared, candidate
from paris_p2p.net.limits import Served, SwarmLimits
from paris_p2p.net.multi import MultiNetwork, ReachOptions, open_network
from paris_p2p.net.paced import Paced
from paris_p2p.net.reachability import Reachability
from paris_p2p.net.transport import ByteStream, DialsDirectly, DirectStream, Network, Peer, unwrapped
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.item import StoredItem
from paris_p2p.wire import messages as m
from paris_p2p.wire.content import AnyRef
from paris_p2p.wire.identity import Identity, peer_id_text

__all__ = ["Peer", "Progress", "Rates", "Swarm", "SwarmLimits", "open_swarm", "swarm_over"]

_log = logging.getLogger(__name__)

MAX_FETCHES = 6
MAX_SESSIONS = 256
MAX_SESSIONS_PER_PEER = 64
MAX_SESSIONS_PER_PLACE = 128
HOUSEKEEPING_S = 1.0
RECHOKE_S = 0.1  # it looks at every session: a flood of changes must not set its pace
SHUTDOWN_S = 3.0
FEATURES = (m.IGNORE_UNKNOWN,)
NO_LIMITS = SwarmLimits()


class Swarm:
    """Made by `open_swarm`. Serves the store's complete items and what is being fetched, to anyone."""

    def __init__(
        self,
        network: Network,
        store: ContentStore,
        find_peers: FindPeers,
        rng: random.Random,
        nursery: trio.Nursery,
        blocking: Blocking,
        limits: SwarmLimits,
    ) -> None:
        self._network = network
        self._store = store
        self._find_peers = find_peers
        self._rng = rng
        self._nursery = nursery
        self._rechoking = Paced(partial(self._guarded, self._rechoke), RECHOKE_S)
        self._shared = Shared(network.node_id, self._rechoking, blocking, rng, limits, store.has)
        self._choker: Choker[Connection] = Choker()
        self._yielding = False
        self._blocking = blocking
        self._items: dict[InfoHash, Item] = {}
        self._opening: dict[InfoHash, trio.Lock] = {}
        self._fetches: dict[InfoHash, FetchJob] = {}
        self._slots = trio.CapacityLimiter(MAX_FETCHES)
        self._visits = Visits(MAX_SESSIONS, MAX_SESSIONS_PER_PEER, MAX_SESSIONS_PER_PLACE)
        self._closing = False

    # -- public ----------------------------------------------------------------------------------

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where this node can be dialled: multiaddrs with `/p2p/`, real ports."""
        return self._network.addresses

    @property
    def reachability(self) -> Reachability | None:
        """Whether and how others can dial this node; None over a network that does not know."""
        return self._network.reachability if isinstance(self._network, MultiNetwork) else None

    def rates(self) -> Rates:
        """What passes through this node now, and did so far."""
        now, up, down = trio.current_time(), self._shared.up, self._shared.down
        peers = {node_id for item in self._items.values() for node_id in item.connections}
        return Rates(up.rate(now), down.rate(now), len(peers), up.total, down.total)

    def fetching(self) -> frozenset[InfoHash]:
        """The items being fetched, which are served too as far as they are here. From any thread."""
        return frozenset(list(self._fetches))

    def in_use(self) -> frozenset[InfoHash]:
        """The items being fetched, or served to somebody who is connected. From any thread."""
        return frozenset(list(self._fetches) + list(self._items))

    def seeded_enough(self, info_hash: InfoHash, length: int) -> bool:
        """Whether the complete item, of `length` bytes, was served as much as the limits ask for; counted
        from the first call, if nobody asked for the item before."""
        self._shared.served.setdefault(info_hash, Served(trio.current_time(), length))
        return self.refuses(info_hash)

    def refuses(self, info_hash: InfoHash) -> bool:
        """Whether the complete item, though here, is not served any longer: the limits ask for no more."""
        return self._shared.satisfied(info_hash, trio.current_time())

    def takers(self, info_hash: InfoHash) -> frozenset[NodeId]:
        """Who took a good part of the complete item from here, in this process: that they have it need not
        be believed."""
        served = self._shared.served.get(info_hash)
        return frozenset() if served is None else served.takers()

    def keep_serving(self, must_serve: Callable[[], Container[InfoHash]]) -> None:
        """What `must_serve` gives, each time it is asked, is served whatever ratio and time say."""
        self._shared.must_serve = must_serve

    def prefer(self, whom: Callable[[], Iterable[NodeId]]) -> None:
        """Those that `whom` gives, each time it is asked, are dialled before strangers."""
        self._shared.preferred = whom

    def set_limits(self, limits: SwarmLimits) -> None:
        """New limits from now on; transfers under way go on within them."""
        self._shared.apply_limits(limits, yielding=self._yielding)

    def yield_uploads(self, yielding: bool) -> None:
        """While True all uploads together keep to `SwarmLimits.yielded_up_bytes_per_s`: serving was seen to
        slow the trainer down, or to make it wait for its input (`core.yielding`)."""
        self._yielding = yielding
        self._shared.apply_limits(self._shared.limits, yielding=yielding)

    async def fetch(
        self,
        ref: AnyRef,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        peers: Sequence[Peer] = (),
        stall_timeout_s: float = 60.0,
        priority: int = 0,
    ) -> Path:
        """The folder of the item's files, fetched if need be; several callers share one download.

        `peers`: sources to try before those that `find_peers` names. When the last caller is cancelled
        the download stops; what is verified stays and is not fetched again. `priority`: while a fetch of
        higher priority gets on, those of lower priority ask for nothing new; above 0 it starts at once.
        Raises `TransportError` when no source delivers for `stall_timeout_s` seconds, `StoreError`.
        """
        while True:
            if await self._blocking(lambda: self._store.has(ref.info_hash)):
                return await self._blocking(lambda: self._store.files(ref.info_hash))
            job = self._fetches.get(ref.info_hash)
            if job is None or not job.scope.cancel_called:
                break
            await job.done.wait()  # its last caller left; begin again when it has let go
        if job is None:
            job = self._fetches[ref.info_hash] = FetchJob(ref, stall_timeout_s, priority)
            self._nursery.start_soon(self._run_fetch, job)
        job.raise_priority(priority)
        job.hint(peers)
        return await job.outcome(on_progress)

    # -- fetching --------------------------------------------------------------------------------

    async def _run_fetch(self, job: FetchJob) -> None:
        try:
            with job.scope, unwrapped():
                # What is urgent does not wait for a slot.
                async with self._slots if job.priority <= 0 else nullcontext():
                    job.path = await self._fetch(job)
        except ParisError as error:
            job.error = error
        except Exception:  # noqa: BLE001 - our bug, but one fetch's must not end the node
            _log.exception("fetching %s failed", job.ref.info_hash.hex())
            job.error = StoreError("the fetch failed by an internal error (see the log)")
        finally:
            if self._fetches.get(job.ref.info_hash) is job:
                del self._fetches[job.ref.info_hash]
            job.done.set()

    async def _fetch(self, job: FetchJob) -> Path:
        partial = await job.begin(self._store, self._blocking)
        if partial is None:
            return await self._blocking(lambda: self._store.files(job.ref.info_hash))
        item = Item(job.ref, partial, self._shared)
        try:
            item.download = job.download = Download(item, partial, self._rng, priority=job.priority)
            self._shared.downloads.append(job.download)
            job.download.sources.add(job.hints, chosen=True)
            self._items[job.ref.info_hash] = item
            discovery = Discovery(item, job.download, self._find_peers, self._connect)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(discovery.run, job.stall_timeout_s)
                path = await job.download.run()
                nursery.cancel_scope.cancel()
            item.completed()
            return path
        finally:
            if job.download is not None:
                self._shared.downloads.remove(job.download)
            if item.download is not None:  # it failed
                item.download = None
                item.end_all(m.BYE_LEAVING)
                self._drop(item)
            else:
                self._forget_unused(item)
            with trio.CancelScope(shield=True):
                await self._blocking(partial.close)

    # -- sessions --------------------------------------------------------------------------------

    async def _connect(self, item: Item, peer: Peer, knock_s: float | None) -> None:
        """Opens a session about `item`. Raises `TransportError`."""
        await self._open_session(item, peer, await self._network.dial(peer, knock_s=knock_s))

    async def _open_session(
        self, item: Item, peer: Peer, stream: ByteStream, *, serving: bool = False
    ) -> bool:
        connection = None
        direct = isinstance(stream, DirectStream)
        try:
            session = Session(trio.current_time(), limits_for(stream))
            await send_soon(stream, session.hello(item.ref.info_hash, FEATURES, self._hello_addresses()))
            await receive_hello(stream, session)
            wanted = serving or item.download is not None
            if not self._closing and wanted and item.accepts(peer.node_id, True, direct):
                connection = Connection(item, peer.node_id, stream, session, outbound=True)
        except RemoteProtocolError as error:
            item.strike(peer.node_id, str(error))
            raise TransportError(str(error)) from None
        finally:
            if connection is None:
                await stream.aclose()
        if connection is not None:
            item.admit(connection)  # now: else the same peer may be dialled once more before it runs
            run = self._run_offered if serving else self._run_connection
            self._nursery.start_soon(run, item, connection)
        return connection is not None

    async def offer(self, info_hash: InfoHash, peer: Peer) -> bool:
        """Opens a session with a peer that fetches an item of ours and cannot dial us. False when there is no
        such item, or a session. Raises `TransportError`."""
        item = await self._item(info_hash)
        if item is None or peer.node_id in item.connections or self._refusal(peer.node_id) is not None:
            return False
        item.greetings += 1
        opened = False
        try:
            opened = await self._open_session(item, peer, await self._network.dial(peer), serving=True)
        finally:
            if not opened:
                item.greetings -= 1
                self._forget_unused(item)
        return opened

    async def _run_offered(self, item: Item, connection: Connection) -> None:
        item.greetings -= 1
        await self._run_connection(item, connection)

    async def _accept(self, node_id: NodeId, stream: ByteStream) -> None:
        """Handles a stream that a peer opened. Never raises for what the peer does."""
        visit = Visit(node_id, stream.place, trio.current_time())
        try:
            connection = None
            with trio.CancelScope() as scope:
                visit.leave = scope.cancel
                connection = await self._greet(node_id, stream, visit)
            if connection is None:
                await stream.aclose()
            else:
                item = connection.owner
                assert isinstance(item, Item)
                item.admit(connection)
                if scope.cancel_called:
                    connection.end(m.BYE_BUSY)
                visit.leave = partial(connection.end, m.BYE_BUSY)
                visit.moved = connection.moved
                await self._run_connection(item, connection)
        except TransportError as error:
            _log.debug("a session with %s failed: %s", peer_id_text(node_id), error)
            await stream.aclose()
        except RemoteProtocolError as error:
            self._shared.bans.strike(node_id, str(error), trio.current_time())
            _log.warning("peer %s broke the protocol: %s", peer_id_text(node_id), error)
            await stream.aclose()
        finally:
            self._visits.left(visit)

    async def _greet(self, node_id: NodeId, stream: ByteStream, visit: Visit) -> Connection | None:
        """The session if it is to be, else the peer has been told why not."""
        session = Session(trio.current_time(), limits_for(stream))
        refusal = self._refusal(node_id)
        if refusal is None and not self._visits.admit(visit, trio.current_time()):
            refusal = (m.BYE_BUSY, "too many sessions")
        if refusal is not None:
            await send_soon(stream, session.bye(*refusal))
            return None
        hello = await receive_hello(stream, session)
        item = await self._item(hello.info_hash)
        if item is None:
            await send_soon(stream, session.bye(m.BYE_UNKNOWN_ITEM, "no such item here"))
            return None
        greeted = False
        item.greetings += 1
        try:
            if not item.accepts(node_id, False, isinstance(stream, DirectStream)):
                await send_soon(stream, session.bye(m.BYE_DUPLICATE, "a session is open"))
                return None
            await send_soon(stream, session.hello(hello.info_hash, FEATURES, self._hello_addresses()))
            greeted = True
            return Connection(item, node_id, stream, session, outbound=False)
        finally:
            item.greetings -= 1
            if not greeted:
                self._forget_unused(item)

    def _refusal(self, node_id: NodeId) -> tuple[int, str] | None:
        if self._closing:
            return (m.BYE_LEAVING, "shutting down")
        if self._shared.bans.banned(node_id, trio.current_time()):
            return (m.BYE_BANNED, "banned for now")
        return None

    def _hello_addresses(self) -> tuple[str, ...]:
        return tuple(a for a in self._network.addresses if len(a) <= m.MAX_ADDRESS_CHARS)[: m.MAX_ADDRESSES]

    async def _run_connection(self, item: Item, connection: Connection) -> None:
        if self._items.get(item.ref.info_hash) is not item:
            connection.end(m.BYE_LEAVING)  # its fetch failed or the swarm closed during the greeting
        elif item.download is not None and not connection.direct:
            self._nursery.start_soon(self._upgrade, item, connection)
        try:
            await item.run(connection)
        finally:
            self._forget_unused(item)

    async def _upgrade(self, item: Item, slow: Connection) -> None:
        """Takes the fast path to a peer that says it has one; what fails leaves the slow one as it is."""
        network = self._network
        if not isinstance(network, DialsDirectly) or not any(map(is_tls, slow.addresses)):
            return
        peer = Peer(slow.node_id, slow.addresses)
        try:
            stream = await network.dial_direct(peer)
            await self._open_session(item, peer, stream)
        except TransportError as error:
            _log.debug("no fast path to %s: %s", peer_id_text(slow.node_id), error)

    async def _item(self, info_hash: InfoHash) -> Item | None:
        """The item if it is being fetched or complete in the store."""
        lock = self._opening.setdefault(info_hash, trio.Lock())
        try:
            async with lock:
                await self._drop_removed(info_hash)
                if info_hash not in self._items:
                    stored = await self._blocking(lambda: self._open(info_hash))
                    if stored is not None and info_hash not in self._items:
                        self._items[info_hash] = Item(stored.ref, stored, self._shared)
                item = self._items.get(info_hash)
                return None if item is None or item.satisfied() else item
        finally:
            if not lock.locked():
                self._opening.pop(info_hash, None)

    async def _drop_removed(self, info_hash: InfoHash) -> None:
        item = self._items.get(info_hash)
        if item is not None and item.download is None and not await self._blocking(item.is_here):
            item.removed()
            self._drop(item)

    def _open(self, info_hash: InfoHash) -> StoredItem | None:
        try:
            if not self._store.has(info_hash):
                return None
            stored = self._store.open(info_hash)
            for file in stored.layout.layered():
                stored.layer(file)  # now, in this thread: later calls answer from memory
        except StoreError as error:
            if self._store.has(info_hash):  # else it was removed just now
                _log.error("cannot serve item %s: %s", info_hash.hex(), error)
            return None
        return stored

    def _forget_unused(self, item: Item) -> None:
        expected = item.greetings and not self._closing
        used = item.connections or expected or item.download is not None
        if not used:
            self._drop(item)

    def _drop(self, item: Item) -> None:
        if self._items.get(item.ref.info_hash) is item:  # else a new one, as of a fetch, has taken its place
            del self._items[item.ref.info_hash]

    # -- upload slots, housekeeping, the end -----------------------------------------------------

    def _connections(self) -> list[Connection]:
        every = [c for item in self._items.values() for c in item.connections.values()]
        return [connection for connection in every if connection.usable]

    def _rechoke(self) -> None:
        now = trio.current_time()
        connections = self._connections()
        chosen = self._choker.choose([candidate(c, now) for c in connections], now, self._rng)
        for connection in connections:
            if connection.session.am_choking == (connection in chosen):
                connection.choke(connection not in chosen)
        for item in self._items.values():
            item.reveal()

    async def housekeep(self) -> None:
        """Runs until cancelled."""
        while True:
            await trio.sleep(HOUSEKEEPING_S)
            for item in list(self._items.values()):
                self._guarded(item.housekeep)
            self._guarded(self._rechoke)

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception:  # noqa: BLE001 - our bug, but one item's must not end the node
            _log.exception("housekeeping failed")

    async def close(self) -> None:
        """Says goodbye to everyone; bounded."""
        self._closing = True
        for job in list(self._fetches.values()):
            job.scope.cancel()
        with trio.move_on_after(SHUTDOWN_S):
            while self._items or self._fetches:
                for item in list(self._items.values()):
                    item.end_all(m.BYE_LEAVING)
                    self._forget_unused(item)
                await trio.sleep(0.01)


@asynccontextmanager
async def swarm_over(
    network: Network,
    store: ContentStore,
    *,
    find_peers: FindPeers,
    rng: random.Random,
    blocking: Blocking | None = None,
    limits: SwarmLimits = NO_LIMITS,
) -> AsyncIterator[Swarm]:
    """A swarm over any network. `blocking`: how to run disk work; in worker threads when None."""
    with unwrapped():
        async with trio.open_nursery() as nursery:
            swarm = Swarm(network, store, find_peers, rng, nursery, blocking or InThreads(), limits)
            nursery.start_soon(swarm.housekeep)
            nursery.start_soon(swarm._rechoking.run)
            nursery.start_soon(swarm._shared.metadata.run)
            network.serve(swarm._accept)
            try:
                yield swarm
            finally:
                with trio.CancelScope(shield=True):
                    await swarm.close()
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_swarm(
    identity: Identity,
    store: ContentStore,
    *,
    listen: Sequence[str],
    find_peers: FindPeers,
    rng: random.Random,
    announce: Sequence[str] = (),
    limits: SwarmLimits = NO_LIMITS,
    reach: ReachOptions | None = None,
) -> AsyncIterator[Swarm]:
    """A swarm that listens on the multiaddrs `listen` (port 0: any): those with `/tls` for the fast path, the
    others for libp2p, which is loaded only then or when a peer can be reached no other way.

    `announce`: addresses to tell others instead of those listened on. `find_peers`: who may hold an item.
    `reach`: how it is reached behind a router, and what it does for others there.
    Raises `ConfigError` for malformed addresses, `NetworkError` when a port is taken.
    """
    async with (
        open_network(identity, listen, announce, reach) as network,
        swarm_over(network, store, find_peers=find_peers, rng=rng, limits=limits) as swarm,
    ):
        yield swarm
