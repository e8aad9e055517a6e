"""One content item on the network: its connections, serving it, metadata for peers, peer exchange.

Owns: what is the same for a complete and for a partial item. Does not own: fetching (`net.download`).
"""

import logging
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence

import trio

from paris_p2p.core.ban import BanList
from paris_p2p.core.choker import Candidate
from paris_p2p.core.limiter import Limiter
from paris_p2p.core.picker import read_bitfield
from paris_p2p.core.rate import RateMeter
from paris_p2p.core.session import Event as SessionEvent
from paris_p2p.core.superseed import SuperSeed
from paris_p2p.errors import RemoteProtocolError, StoreError, TransportError
from paris_p2p.ids import InfoHash, NodeId, PieceIndex
from paris_p2p.net.blocking import Blocking
from paris_p2p.net.connection import Connection
from paris_p2p.net.download import Download
from paris_p2p.net.limits import Served, SwarmLimits
from paris_p2p.net.metadata_turns import MetadataTurns
from paris_p2p.store.item import ItemReader
from paris_p2p.store.partial import PartialItem
from paris_p2p.wire import messages as m
from paris_p2p.wire.bep52 import HASH_BYTES, Buffer
from paris_p2p.wire.content import AnyRef
from paris_p2p.wire.identity import peer_id_text

_log = logging.getLogger(__name__)

PEER_EXCHANGE_S = 0.2  # at most so often among more than a few; only what changed is told
FEW_PEERS = 16
HOLD_BACK_S = 3.0  # a more important fetch that delivered nothing for so long holds nobody back
LIMIT_POLL_S = 1.0  # limits may be changed while somebody waits
STALE_S = 5.0
READ_NOW_BYTES = 2 << 20  # of blocks in memory: less time to read than to ask a thread for
SNUBBED_S = 60.0
USELESS_S = 60.0  # complete, and the peer wants nothing
MAX_GOOD = 256
METADATA_TIMES = 3  # all the metadata so often in one session: nobody who means well needs it twice


class Shared:
    """What all items of a swarm share."""

    def __init__(
        self,
        node_id: NodeId,
        rechoke: Callable[[], None],
        blocking: Blocking,
        rng: random.Random,
        limits: SwarmLimits,
        holds: Callable[[InfoHash], bool],
    ) -> None:
        """`holds`: whether the store has the complete item; asks the disk."""
        now = trio.current_time()
        self.rng = rng
        self.holds = holds
        self.limits = limits
        self.up_limit: Limiter[NodeId] = Limiter(None, None, now)
        self.down_limit: Limiter[NodeId] = Limiter(None, None, now)
        self.metadata = MetadataTurns(self.up_limit)
        self.sessions: Counter[NodeId] = Counter()  # of all items
        self.downloads: list[Download] = []
        self.served: dict[InfoHash, Served] = {}
        self.must_serve: Callable[[], Container[InfoHash]] = frozenset
        self.preferred: Callable[[], Iterable[NodeId]] = frozenset
        self._good: OrderedDict[NodeId, None] = OrderedDict()  # who delivered, the latest last
        self.node_id = node_id
        self.rechoke = rechoke
        self.bans: BanList[NodeId] = BanList()
        self.up = RateMeter(now)
        self.down = RateMeter(now)
        self.blocking = blocking
        self.apply_limits(limits, yielding=False)

    def apply_limits(self, limits: SwarmLimits, *, yielding: bool) -> None:
        """From now on. `yielding`: uploads make room for something that matters more."""
        now = trio.current_time()
        self.limits = limits
        self.up_limit.set_limits(limits.up_now(yielding), limits.per_peer_up_bytes_per_s, now)
        self.metadata.set_limits(limits.up_now(yielding), limits.per_peer_up_bytes_per_s, now)
        self.down_limit.set_limits(limits.down_bytes_per_s, limits.per_peer_down_bytes_per_s, now)

    def holds_back(self, download: Download, now: float) -> bool:
        """Whether a fetch of higher priority is getting on, so that this one waits."""
        return any(
            other.priority > download.priority and now - other.last_progress < HOLD_BACK_S
            for other in self.downloads
        )

    def satisfied(self, info_hash: InfoHash, now: float) -> bool:
        """Whether the item, complete here, was served as much as the limits ask for, and may be refused."""
        served = self.served.get(info_hash)
        if served is None or not self.limits.seeded_enough(served.bytes, served.length, now - served.since):
            return False
        return info_hash not in self.must_serve()

    def delivered(self, node_id: NodeId) -> None:
        """This peer sent a good piece of something: next time it is asked before strangers."""
        self._good.pop(node_id, None)
        self._good[node_id] = None
        if len(self._good) > MAX_GOOD:
            self._good.popitem(last=False)

    def asked_first(self) -> frozenset[NodeId]:
        """Who is dialled before all others: who delivered to this node, and who `preferred` says."""
        return frozenset(self._good).union(self.preferred())

    def left(self, node_id: NodeId) -> None:
        """A session is over. After the peer's last one, full buckets for the next cost nothing, a leak of
        them does."""
        self.sessions[node_id] -= 1
        if self.sessions[node_id] <= 0:
            del self.sessions[node_id]
            self.up_limit.forget(node_id)
            self.metadata.forget(node_id)
            self.down_limit.forget(node_id)


class Item:
    """Implements `net.connection.Owner`. `download` is None once the item is complete."""

    def __init__(self, ref: AnyRef, reader: ItemReader, shared: Shared) -> None:
        self.ref = ref
        self.reader = reader
        self.shared = shared
        self.download: Download | None = None
        self.connections: dict[NodeId, Connection] = {}
        self.greetings = 0  # peers that are being greeted: their connections will come
        self._peers_sent = trio.current_time()
        self._announced = False  # a peer told what it has since the last look
        self._layer_bytes: int | None = None  # of all piece layers, once the layout is known
        self.seeding: SuperSeed[Connection] | None = None
        if reader.layout is not None and reader.info is not None and not isinstance(reader, PartialItem):
            self._seed(active=True)

    def _seed(self, *, active: bool) -> None:
        layout = self.reader.layout
        assert layout is not None
        self.seeding = SuperSeed(
            layout.pieces,
            layout.piece_length,
            self.shared.rng,
            length_of=lambda piece: layout.piece_span(piece)[2],
            active=active,
        )
        self.shared.served.setdefault(self.ref.info_hash, Served(trio.current_time(), layout.length))

    def completed(self) -> None:
        """The download is over and everything is here: who is connected knows what we have."""
        self.download = None
        self._seed(active=False)
        for connection in self.connections.values():
            assert self.seeding is not None
            self.seeding.opened(connection, trio.current_time())

    # -- connections -----------------------------------------------------------------------------

    def accepts(self, node_id: NodeId, outbound: bool, direct: bool) -> bool:
        """Whether a new session with this peer should replace the one there is, if any.

        A direct one replaces one over libp2p, whoever opened them, and not the other way round.
        When both sides dial at once, both keep the session that the smaller node id opened. An older
        session does not count against a peer that opens a new one: it has evidently lost it.
        """
        old = self.connections.get(node_id)
        if old is None or old.ending:
            return True
        if old.direct != direct:
            return direct or trio.current_time() - old.started > STALE_S
        if old.outbound == outbound:
            return True
        if outbound:
            return self.shared.node_id < node_id
        return node_id < self.shared.node_id or trio.current_time() - old.started > STALE_S

    def admit(self, connection: Connection) -> None:
        """A session is open, and `run` follows. Of two with the same peer one is ended."""
        # Asked again: another one may have come while the greetings were on their way, and if the two sides
        # kept different ones, each would end the other's.
        if not self.accepts(connection.node_id, connection.outbound, connection.direct):
            connection.end(m.BYE_DUPLICATE)
            return
        old = self.connections.get(connection.node_id)
        if old is not None:
            old.end(m.BYE_DUPLICATE)
        self.connections[connection.node_id] = connection

    async def run(self, connection: Connection) -> None:
        """Runs a connection from greeting to goodbye."""
        self.shared.sessions[connection.node_id] += 1
        try:
            await connection.run()
        finally:
            if self.connections.get(connection.node_id) is connection:
                del self.connections[connection.node_id]
            try:
                self._closed(connection)
            except Exception:  # noqa: BLE001 - our bug, but the end of one session must not end the node
                _log.exception("a session with %s did not end well", peer_id_text(connection.node_id))
            self.shared.left(connection.node_id)

    def _closed(self, connection: Connection) -> None:
        if isinstance(connection.failure, RemoteProtocolError):
            self.strike(connection.node_id, str(connection.failure))
        elif isinstance(connection.failure, TransportError):
            _log.debug("%s: %s", peer_id_text(connection.node_id), connection.failure)
        if self.download is not None:
            self.download.closed(connection)
        if self.seeding is not None:
            self.seeding.closed(connection)
        self.shared.rechoke()

    def strike(self, node_id: NodeId, reason: str) -> None:
        """Bans a peer that broke the protocol or sent a bad piece."""
        now = trio.current_time()
        ban = self.shared.bans.strike(node_id, reason, now)
        _log.warning(
            "peer %s is banned for %.0f s: %s (item %s)",
            peer_id_text(node_id),
            ban.until - now,
            reason,
            self.ref.info_hash.hex()[:16],
        )

    def end_all(self, code: int) -> None:
        for connection in list(self.connections.values()):
            connection.end(code)

    # -- Owner -----------------------------------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        self.send_bitfield(connection)
        if self.download is not None:
            self.download.opened(connection)
        self._send_peers(connection)
        self.exchange_peers()  # in a flash crowd every second until all know each other counts

    def send_bitfield(self, connection: Connection) -> None:
        """Tells what we have, as soon as that is known; a seeder alone with a crowd tells piece by piece."""
        known = self.reader.layout is not None and (self.download is None or self.download.ready)
        if not known or not connection.usable or connection.bitfield_sent:
            return
        now = trio.current_time()
        connection.bitfield_sent = True
        bits = self.reader.bitfield()
        if self.seeding is not None and self.seeding.opened(connection, now):
            bits = bytes(len(bits))
        connection.send(connection.session.bitfield(bits, now))
        self.reveal()

    def reveal(self) -> None:
        """Shows further pieces to those who are being served."""
        if self.seeding is None:
            return
        serving = [c for c in self.connections.values() if c.usable and not c.session.am_choking]
        now = trio.current_time()
        for connection, piece in self.seeding.reveals(serving, now):
            if connection.usable and connection.bitfield_sent:
                connection.send(connection.session.have(piece, now))

    def handle(self, connection: Connection, event: SessionEvent) -> None:
        match event:
            case m.InfoRequest():
                self._on_info_request(connection, event)
            case m.LayerRequest():
                self._on_layer_request(connection, event)
            case m.Interested() | m.NotInterested():
                self._on_interest(connection)
            case _:
                if self.download is not None:
                    self.download.handle(connection, event)
                elif self.seeding is not None:
                    self._on_announced(connection, event)

    def _on_interest(self, connection: Connection) -> None:
        if connection.interested != connection.session.peer_interested:  # else nothing is new
            connection.interested = connection.session.peer_interested
            connection.interest_since = trio.current_time()
            self.shared.rechoke()

    def _on_announced(self, connection: Connection, event: SessionEvent) -> None:
        layout = self.reader.layout
        assert layout is not None and self.seeding is not None
        if isinstance(event, m.Bitfield):
            pieces = read_bitfield(event.bits, layout.pieces)
        elif isinstance(event, m.Have) and event.piece < layout.pieces:
            pieces = {event.piece}
        elif isinstance(event, m.Have):
            raise RemoteProtocolError(f"piece {event.piece} of an item of {layout.pieces}")
        else:
            return
        self.seeding.has(connection, sorted(pieces), trio.current_time())
        self._announced = True

    def idle(self, connection: Connection) -> None:
        # After every read, most of which bring a part of a block: nothing to decide then.
        if self.download is not None:
            self.download.idle(connection)
        elif self._announced:
            self._announced = False
            self.reveal()

    def serves(self, connection: Connection, piece: PieceIndex) -> bool:
        if not self.reader.has_piece(piece):
            return False
        return self.seeding is None or self.seeding.requested(connection, piece, trio.current_time())

    async def may_upload(self, connection: Connection) -> None:
        limit = self.shared.up_limit
        while (wait := limit.wait(connection.node_id, trio.current_time())) > 0:
            await trio.sleep(min(wait, LIMIT_POLL_S))

    async def read_blocks(self, requests: Sequence[m.Request]) -> Sequence[Buffer]:
        reader = self.reader
        if sum(request.length for request in requests) <= READ_NOW_BYTES:
            now = [reader.read_now(r.piece, r.offset, r.length) for r in requests]
            here = [block for block in now if block is not None]
            if len(here) == len(requests):
                return here

        def read() -> list[bytes]:
            return [reader.read_block(r.piece, r.offset, r.length) for r in requests]

        try:
            return await self.shared.blocking(read)
        except StoreError:
            if self.download is not None or await self.shared.blocking(self.is_here):
                raise
            self.removed()
            await trio.lowlevel.checkpoint()  # which ends the session that asked, too
            raise

    def is_here(self) -> bool:
        """Whether the item, complete once, still is in the store. Asks the disk."""
        return self.shared.holds(self.ref.info_hash)

    def removed(self) -> None:
        """The operator, or a limit of the disk, took the item away: who asks for it hears that."""
        _log.info("item %s was removed while it was served", self.ref.info_hash.hex()[:16])
        for connection in list(self.connections.values()):
            connection.end(m.BYE_UNKNOWN_ITEM, said="the item is no longer here")

    def uploaded(self, connection: Connection, piece: PieceIndex, count: int) -> None:
        now = trio.current_time()
        self.shared.up.add(count, now)
        self.shared.up_limit.take(connection.node_id, count, now)
        served = self.shared.served.get(self.ref.info_hash)
        if served is not None:
            served.sent(connection.node_id, count)
        if self.seeding is not None:
            self.seeding.sent(connection, piece, count, now)
            self.reveal()

    def satisfied(self) -> bool:
        """Whether this item, complete here, has been served as much as the limits ask for."""
        return self.download is None and self.shared.satisfied(self.ref.info_hash, trio.current_time())

    # -- metadata --------------------------------------------------------------------------------

    def _on_info_request(self, connection: Connection, event: m.InfoRequest) -> None:
        length = len(self.reader.info or b"")
        if length and event.offset >= length:
            raise RemoteProtocolError("the info dictionary was asked for beyond its end")

        def answer() -> int:
            info = self.reader.info or b""
            data, now = _chunk(info, event.offset), trio.current_time()
            connection.send(connection.session.info(event.offset, len(info), data, now))
            return len(data)

        self._serve_metadata(connection, min(length - event.offset, m.MAX_CHUNK_BYTES), answer)

    def _on_layer_request(self, connection: Connection, event: m.LayerRequest) -> None:
        length = len(self._layer(event.file))
        if length and event.offset >= length:
            raise RemoteProtocolError("a piece layer was asked for beyond its end")

        def answer() -> int:  # which may wait: then it holds no bytes
            layer = self._layer(event.file)
            data, now = _chunk(layer, event.offset), trio.current_time()
            connection.send(connection.session.layer(event.file, event.offset, len(layer), data, now))
            return len(data)

        self._serve_metadata(connection, min(length - event.offset, m.MAX_CHUNK_BYTES), answer)

    def _serve_metadata(self, connection: Connection, count: int, answer: Callable[[], int]) -> None:
        if count <= 0:  # not here yet
            answer()
            return
        connection.metadata_bytes += count
        if connection.metadata_bytes > METADATA_TIMES * self._metadata_length():
            raise RemoteProtocolError("the same metadata was asked for again and again")
        self.shared.metadata.ask(connection, answer)

    def _metadata_length(self) -> int:
        layout = self.reader.layout
        if self._layer_bytes is None and layout is not None:  # not anew for every chunk that is served
            self._layer_bytes = HASH_BYTES * sum(layout.files[file].pieces for file in layout.layered())
        return len(self.reader.info or b"") + (self._layer_bytes or 0)

    def _layer(self, file: int) -> bytes:
        if self.reader.layout is None or (self.download is not None and not self.download.has_layer(file)):
            return b""  # not here yet: no fault of the peer's
        return self.reader.layer(file)

    # -- peer exchange ---------------------------------------------------------------------------

    def exchange_peers(self) -> None:
        """Tells every peer what changed, when it is time to."""
        now = trio.current_time()
        if len(self.connections) <= FEW_PEERS or now - self._peers_sent >= PEER_EXCHANGE_S:
            self._peers_sent = now
            for connection in list(self.connections.values()):
                self._send_peers(connection)

    def _send_peers(self, connection: Connection) -> None:
        if not connection.usable:
            return
        current = {n: c for n, c in self.connections.items() if n != connection.node_id and c.addresses}
        added = [n for n in current if n not in connection.known_peers][: m.MAX_PEERS_PER_MESSAGE]
        dropped = [n for n in connection.known_peers if n not in current][: m.MAX_PEERS_PER_MESSAGE]
        if not added and not dropped:
            return
        connection.known_peers.update(added)
        connection.known_peers.difference_update(dropped)
        entries = tuple(m.PeerAddress(n, current[n].addresses) for n in added)
        connection.send(connection.session.peers(entries, tuple(dropped), trio.current_time()))

    # -- housekeeping ----------------------------------------------------------------------------

    def housekeep(self) -> None:
        """About once a second: peer exchange, growing windows, peers that do not deliver."""
        self.exchange_peers()
        now = trio.current_time()
        if self.download is not None:
            self.download.housekeep()
        self.reveal()
        if self.satisfied():
            self.end_all(m.BYE_DONE)
        for connection in list(self.connections.values()):
            if connection.snubbed_since is not None and now - connection.snubbed_since > SNUBBED_S:
                connection.end(m.BYE_SILENT, TransportError("the peer does not deliver"))
            elif self.download is not None:
                continue
            elif not connection.session.peer_interested and now - connection.interest_since > USELESS_S:
                connection.end(m.BYE_DONE)


def _chunk(metadata: bytes, offset: int) -> bytes:
    return metadata[offset : offset + m.MAX_CHUNK_BYTES]


def candidate(connection: Connection, now: float) -> Candidate[Connection]:
    """What decides whether this peer gets an upload slot."""
    item, session = connection.owner, connection.session
    assert isinstance(item, Item)
    gives = None if item.download is None else item.download.rate(connection, now)
    return Candidate(
        connection,
        session.peer_interested,
        not session.am_choking,
        connection.slot_since,
        connection.started,
        gives,
    )
