"""What the operator allows the swarm: rates, peers, how long to seed.

Owns: `SwarmLimits` and its checks. Does not own: enforcing them (`core.limiter`, `net.item`, `net.swarm`).
"""

from dataclasses import dataclass, field, fields

from paris_p2p.errors import ConfigError
from paris_p2p.ids import NodeId

DEFAULT_MAX_PEERS = 40
YIELDED_UP_BYTES_PER_S = 256 * 1024
TAKERS_TOGETHER = 8
"""Peers that copy an item together give each other most of it: who took an eighth here is one of them."""
MAX_TAKERS = 1024


@dataclass(frozen=True, slots=True)
class SwarmLimits:
    """All rates in bytes of content per second, None: no limit. Raises `ConfigError` for values that make no
    sense.

    `max_peers`: sessions an item; `seed_ratio`, `seed_time_s`: a complete item is served until that many
    times its length was uploaded, or for so long, whichever comes first (None, None: for ever), counted
    since it was completed or first asked for in this process, and not for what the node must keep
    (`Swarm.keep_serving`); `yielded_up_bytes_per_s`: all uploads
    together while they yield to training.
    """

    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    per_peer_up_bytes_per_s: float | None = None
    per_peer_down_bytes_per_s: float | None = None
    max_peers: int = DEFAULT_MAX_PEERS
    seed_ratio: float | None = None
    seed_time_s: float | None = None
    yielded_up_bytes_per_s: float = YIELDED_UP_BYTES_PER_S

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and not value > 0:
                raise ConfigError(f"the limit {one.name} must be above 0, it is {value}; omit it for none")

    def up_now(self, yielding: bool) -> float | None:
        """The upload limit in force."""
        if not yielding:
            return self.up_bytes_per_s
        return min(self.yielded_up_bytes_per_s, self.up_bytes_per_s or self.yielded_up_bytes_per_s)

    def seeded_enough(self, uploaded: int, length: int, seconds: float) -> bool:
        """Whether an item of `length` bytes, complete for `seconds`, need not be served any longer."""
        by_ratio = self.seed_ratio is not None and uploaded >= self.seed_ratio * length
        return by_ratio or (self.seed_time_s is not None and seconds >= self.seed_time_s)


@dataclass(slots=True)
class Served:
    """What was uploaded of an item of `length` bytes that is complete since `since` (monotonic seconds)."""

    since: float
    length: int
    bytes: int = 0
    by_peer: dict[NodeId, int] = field(default_factory=dict)

    def sent(self, node_id: NodeId, count: int) -> None:
        """`count` bytes went to this peer."""
        self.bytes += count
        self.by_peer[node_id] = self.by_peer.pop(node_id, 0) + count
        if len(self.by_peer) > MAX_TAKERS:
            del self.by_peer[next(iter(self.by_peer))]

    def takers(self) -> frozenset[NodeId]:
        """Who took as much of it as one of a few who copy it together would."""
        enough = self.length / TAKERS_TOGETHER
        return frozenset(node_id for node_id, count in self.by_peer.items() if count >= enough)
