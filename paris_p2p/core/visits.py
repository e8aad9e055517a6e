"""Who came in: from one peer and from one place no more than a share, and who has to go when it is full.

Owns: counting the sessions that others opened, choosing the one that makes way. Does not own: what a place is
(`net.addresses.place`), ending a session.

Keys cost nothing, addresses do: whoever makes a thousand keys still comes from a few networks.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from paris_p2p.ids import NodeId

GRACE_S = 10.0  # a session so young makes way for nobody


@dataclass(eq=False, slots=True)
class Visit:
    """A session that a peer opened. `place`: the network it came from, "" if that does not matter."""

    node_id: NodeId
    place: str
    since: float
    moved: Callable[[], int] = lambda: 0
    """Bytes of content, both ways, so far."""
    leave: Callable[[], None] = lambda: None
    """Ends it, soon."""


class Visits:
    """All that are open. At most `most`, `per_peer` of one peer and `per_place` from one place."""

    def __init__(self, most: int, per_peer: int, per_place: int) -> None:
        self._most = most
        self._per_peer = per_peer
        self._per_place = per_place
        self._here: dict[Visit, None] = {}  # in order of arrival
        self._peers: Counter[NodeId] = Counter()
        self._places: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._here)

    def admit(self, visit: Visit, now: float) -> bool:
        """Whether there is room for one more; `left` once it is over. When all is full the session that moved
        least makes way, of the place that has most."""
        crowded = visit.place and self._places[visit.place] >= self._per_place
        if crowded or self._peers[visit.node_id] >= self._per_peer:
            return False
        if len(self._here) >= self._most and not self._make_room(now):
            return False
        self._here[visit] = None
        self._peers[visit.node_id] += 1
        self._places[visit.place] += 1
        return True

    def _make_room(self, now: float) -> bool:
        old = [visit for visit in self._here if now - visit.since >= GRACE_S]
        if not old:
            return False
        chosen = min(old, key=lambda visit: (-self._crowd(visit), visit.moved()))
        self.left(chosen)
        chosen.leave()
        return True

    def _crowd(self, visit: Visit) -> int:
        return self._places[visit.place] if visit.place else 1

    def left(self, visit: Visit) -> None:
        """It is over. For one that made way, or was not admitted, this changes nothing."""
        if visit not in self._here:
            return
        del self._here[visit]
        self._peers[visit.node_id] -= 1
        self._places[visit.place] -= 1
        if not self._peers[visit.node_id]:
            del self._peers[visit.node_id]
        if not self._places[visit.place]:
            del self._places[visit.place]
