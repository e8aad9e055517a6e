"""What the operator allows the swarm: rates, peers, how long to seed.

Owns: `SwarmLimits` and its checks. Does not own: enforcing them (`core.limiter`, `net.item`, `net.swarm`).
"""

from dataclasses import dataclass, fields

from paris_p2p.errors import ConfigError

DEFAULT_MAX_PEERS = 40
YIELDED_UP_BYTES_PER_S = 256 * 1024


@dataclass(frozen=True, slots=True)
class SwarmLimits:
    """All rates in bytes of content per second, None: no limit. Raises `ConfigError` for values that make no
    sense.

    `max_peers`: sessions an item; `seed_ratio`, `seed_time_s`: a complete item is served until that many
    times its length was uploaded, or for so long, whichever comes first (None, None: for ever), counted
    since it was completed or first asked for in this process; `yielded_up_bytes_per_s`: all uploads
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
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ConfigError(f"the limit {field.name} must be above 0, it is {value}; omit it for none")

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
    """What was uploaded of an item that is complete since `since` (monotonic seconds)."""

    since: float
    bytes: int = 0
