"""The peers that may hold one item: who is known, who may be dialled now, and in which order.

Owns: known peers from every origin, backoff after failures. Does not own: bans (`core.ban`), dialling.

Anybody can announce any address under any number of keys: so chance decides, no place comes twice before
another has come once, and who is known to be good comes before all that.
"""

import random
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

from paris_p2p.ids import NodeId
from paris_p2p.net.addresses import parse_endpoint
from paris_p2p.net.arrivals import site
from paris_p2p.net.transport import Peer
from paris_p2p.wire.addresses import MAX_ADDRESSES

MAX_SOURCES = 2000  # more than the DHT keeps of one item
FIRST_BACKOFF_S = 2.0
MAX_BACKOFF_S = 60.0
GIVE_WAY_S = 1.5  # two nodes hear of each other at once: the greater id waits for the smaller one's call


@dataclass(slots=True)
class _Source:
    peer: Peer
    hearsay: bool  # known by peer exchange only, and never connected
    turn: float
    chosen: bool = False  # by the operator
    place: str = ""
    delivered: bool = False
    failures: int = 0
    not_before: float = 0.0
    reason: str = ""


class Sources:
    """Peers of one item, by node id."""

    def __init__(
        self,
        own: NodeId,
        rng: random.Random,
        first: Callable[[], Container[NodeId]] = frozenset,
    ) -> None:
        """`first`: who is dialled before all others, as known now."""
        self._own = own
        self._rng = rng
        self._first = first
        self._sources: dict[NodeId, _Source] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def add(
        self, peers: Iterable[Peer], *, exchanged: bool = False, chosen: bool = False, now: float = 0.0
    ) -> bool:
        """Learns peers and newer addresses, which come before the known ones: what a peer says of itself
        may be less than where it was found. True when a peer was new. Without addresses none is learned.

        `exchanged`: named `now` by another peer, who may lie, and who tells that peer of us too. That never
        changes what is known of a peer, and makes way for peers from elsewhere when too many are known.
        `chosen`: by the operator, and dialled first.
        """
        fresh = False
        in_the_way: Iterator[NodeId] | None = None
        for peer in peers:
            if peer.node_id == self._own or not peer.addresses:
                continue
            known = self._sources.get(peer.node_id)
            if known is not None:
                if not exchanged:
                    known.peer, known.hearsay = _merged(peer, known.peer), False
                    known.chosen |= chosen
                    known.place = site_of(known.peer)
                continue
            if len(self._sources) >= MAX_SOURCES:
                in_the_way = self._in_the_way(exchanged) if in_the_way is None else in_the_way
                worst = next(in_the_way, None)
                if worst is None:
                    continue
                del self._sources[worst]
            waits = exchanged and self._own > peer.node_id
            self._sources[peer.node_id] = _Source(
                peer,
                exchanged,
                self._rng.random(),
                chosen,
                site_of(peer),
                not_before=now + GIVE_WAY_S if waits else 0.0,
            )
            fresh = True
        return fresh

    def _in_the_way(self, exchanged: bool) -> Iterator[NodeId]:
        """Those to forget first: by hearsay, and of these and then of all others who failed most. For a new
        one by hearsay only such that did fail."""
        first = self._first()
        worse = [source for source in self._sources.values() if not self._is_good(source, first)]
        if exchanged:
            worse = [source for source in worse if source.hearsay and source.failures]
        else:
            worse = [source for source in worse if source.hearsay or source.failures]
        worse.sort(key=lambda source: (not source.hearsay, -source.failures))
        return iter([source.peer.node_id for source in worse])

    def connected(self, node_id: NodeId) -> None:
        """A session with this peer opened: it exists."""
        source = self._sources.get(node_id)
        if source is not None:
            source.hearsay = False

    def failed(self, node_id: NodeId, reason: str, now: float) -> None:
        """A dial or a session with this peer failed: leave it alone, each time twice as long."""
        source = self._sources.get(node_id)
        if source is not None:
            source.failures += 1
            source.reason = reason
            source.not_before = now + min(FIRST_BACKOFF_S * 2.0 ** min(source.failures - 1, 8), MAX_BACKOFF_S)

    def delivered(self, node_id: NodeId) -> None:
        """This peer sent a good piece: earlier failures are forgotten."""
        source = self._sources.get(node_id)
        if source is not None:
            source.failures, source.delivered = 0, True

    def failures(self, node_id: NodeId) -> int:
        """How often it failed since it last delivered."""
        source = self._sources.get(node_id)
        return 0 if source is None else source.failures

    def due(self, now: float, excluded: set[NodeId], banned: Callable[[NodeId, bool], bool]) -> list[Peer]:
        """Whom to dial now: who delivered and who is known first, then fewest failures first, of each place
        one before the next, by chance. `banned(node id, last holder?)`: see `BanList.banned`; `excluded` are
        dialled or connected."""
        idle = [s for s in self._sources.values() if s.peer.node_id not in excluded]
        alone = not excluded and all(banned(source.peer.node_id, False) for source in idle)
        ready = [s for s in idle if s.not_before <= now and not banned(s.peer.node_id, alone)]
        return [source.peer for source in self._in_order(ready, excluded)]

    @staticmethod
    def _is_good(source: _Source, first: Container[NodeId]) -> bool:
        return source.chosen or source.delivered or source.peer.node_id in first

    def _in_order(self, ready: list[_Source], excluded: set[NodeId]) -> list[_Source]:
        first = self._first()
        tried = Counter(
            source.place
            for source in self._sources.values()
            if source.failures or source.peer.node_id in excluded
        )
        keys: dict[NodeId, tuple[bool, int, bool, int, float]] = {}
        for source in sorted(ready, key=lambda source: source.turn):
            tried[source.place] += 1
            keys[source.peer.node_id] = (
                not self._is_good(source, first),
                source.failures,
                source.hearsay,
                tried[source.place],
                source.turn,
            )
        return sorted(ready, key=lambda source: keys[source.peer.node_id])

    def reasons(self) -> list[str]:
        """What went wrong with each source that failed last."""
        return [source.reason for source in self._sources.values() if source.failures]


def site_of(peer: Peer) -> str:
    """Where the peer says it is first of all; "" for what is no IP address."""
    endpoint = parse_endpoint(peer.addresses[0].split("/p2p-circuit", 1)[0]) if peer.addresses else None
    return "" if endpoint is None else site(endpoint.host)


def _merged(newer: Peer, older: Peer) -> Peer:
    every = dict.fromkeys(newer.addresses + older.addresses)
    return Peer(newer.node_id, tuple(every)[:MAX_ADDRESSES])
