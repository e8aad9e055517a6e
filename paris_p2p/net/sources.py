"""The peers that may hold one item: who is known, who may be dialled now.

Owns: known peers from every origin, backoff after failures. Does not own: bans (`core.ban`), dialling.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from paris_p2p.ids import NodeId
from paris_p2p.net.transport import Peer
from paris_p2p.wire.addresses import MAX_ADDRESSES

MAX_SOURCES = 500
FIRST_BACKOFF_S = 2.0
MAX_BACKOFF_S = 60.0
GIVE_WAY_S = 1.5  # two nodes hear of each other at once: the greater id waits for the smaller one's call


@dataclass(slots=True)
class _Source:
    peer: Peer
    hearsay: bool  # known by peer exchange only, and never connected
    failures: int = 0
    not_before: float = 0.0
    reason: str = ""


class Sources:
    """Peers of one item, by node id."""

    def __init__(self, own: NodeId) -> None:
        self._own = own
        self._sources: dict[NodeId, _Source] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def add(self, peers: Iterable[Peer], *, exchanged: bool = False, now: float = 0.0) -> bool:
        """Learns peers and newer addresses, which come before the known ones: what a peer says of itself
        may be less than where it was found. True when a peer was new. Without addresses none is learned.

        `exchanged`: named `now` by another peer, who may lie, and who tells that peer of us too. That never
        changes what is known of a peer, and makes way for peers from elsewhere when too many are known.
        """
        fresh = False
        for peer in peers:
            if peer.node_id == self._own or not peer.addresses:
                continue
            known = self._sources.get(peer.node_id)
            if known is not None:
                if not exchanged:
                    known.peer, known.hearsay = _merged(peer, known.peer), False
            elif len(self._sources) < MAX_SOURCES or self._make_room(exchanged):
                waits = exchanged and self._own > peer.node_id
                self._sources[peer.node_id] = _Source(
                    peer, exchanged, not_before=now + GIVE_WAY_S if waits else 0.0
                )
                fresh = True
        return fresh

    def _make_room(self, exchanged: bool) -> bool:
        """Forgets the source by hearsay that failed most; for another such one only if it did fail."""
        hearsay = [source for source in self._sources.values() if source.hearsay]
        worst = max(hearsay, key=lambda source: source.failures, default=None)
        if worst is None or (exchanged and not worst.failures):
            return False
        del self._sources[worst.peer.node_id]
        return True

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
            source.failures = 0

    def due(self, now: float, excluded: set[NodeId], banned: Callable[[NodeId, bool], bool]) -> list[Peer]:
        """Whom to dial now, fewest failures first. `banned(node id, last holder?)`: see `BanList.banned`."""
        idle = [s for s in self._sources.values() if s.peer.node_id not in excluded]
        alone = not excluded and all(banned(source.peer.node_id, False) for source in idle)
        ready = [s for s in idle if s.not_before <= now and not banned(s.peer.node_id, alone)]
        return [source.peer for source in sorted(ready, key=lambda source: (source.failures, source.hearsay))]

    def reasons(self) -> list[str]:
        """What went wrong with each source that failed last."""
        return [source.reason for source in self._sources.values() if source.failures]


def _merged(newer: Peer, older: Peer) -> Peer:
    every = dict.fromkeys(newer.addresses + older.addresses)
    return Peer(newer.node_id, tuple(every)[:MAX_ADDRESSES])
