"""What a public node does for others that cannot be dialled, and how much: pure counting.

Owns: budgets, who may reserve, dial or be probed now. Does not own: sockets (`net.relay`).

Callers are counted by the address they come from: node ids are free to make.
"""

import ipaddress
from collections import Counter, OrderedDict
from dataclasses import dataclass

from paris_p2p.core.limiter import TokenBucket

MAX_HOSTS = 4096
"""Callers remembered; the one that was quiet for longest is forgotten."""
MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class RelayBudget:
    """What a relay gives. A circuit ends after `circuit_bytes` (both directions together) or `circuit_s`
    seconds; whoever wants more dials again. `*_per_host`: for one IPv4 address or IPv6 /64."""

    bytes_per_s: float = 2e6
    circuit_bytes: int = 256 * 1024 * 1024
    circuit_s: float = 600.0
    circuits: int = 32
    circuits_per_host: int = 8
    reservations: int = 128
    reservations_per_host: int = 8
    dials_per_minute: int = 60
    probes_per_minute: int = 12


def host_key(host: str) -> str:
    """What callers from `host` are counted by."""
    address = ipaddress.ip_address(host)
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


def punchable(host: str, port: int) -> bool:
    """Whether a node told to meet somebody there should try: never itself, nor many at once."""
    address = ipaddress.ip_address(host)
    return port >= 1024 and not (address.is_loopback or address.is_unspecified or address.is_multicast)


class Pace:
    """At most so many events a minute for each host, as a bucket that fills evenly."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._hosts: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens left, as of when

    def allow(self, host: str, now: float) -> bool:
        """Counts one event if it may happen now."""
        tokens, then = self._hosts.pop(host, (float(self._per_minute), now))
        tokens = min(self._per_minute, tokens + (now - then) * self._per_minute / MINUTE_S)
        allowed = tokens >= 1.0
        self._hosts[host] = (tokens - allowed, now)
        if len(self._hosts) > MAX_HOSTS:
            self._hosts.popitem(last=False)
        return allowed


class Quota:
    """At most `total` at once, and `per_host` of each host."""

    def __init__(self, total: int, per_host: int) -> None:
        self._total, self._per_host = total, per_host
        self._hosts: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._hosts.total()

    def take(self, host: str) -> bool:
        """Counts one more if there is room."""
        if self._hosts.total() >= self._total or self._hosts[host] >= self._per_host:
            return False
        self._hosts[host] += 1
        return True

    def give(self, host: str) -> None:
        """One that was taken is over."""
        self._hosts[host] -= 1
        if not self._hosts[host]:
            del self._hosts[host]


class RelayLedger:
    """All counts of one relay."""

    def __init__(self, budget: RelayBudget, now: float) -> None:
        self.budget = budget
        self.bucket = TokenBucket(budget.bytes_per_s, now)
        self.reservations = Quota(budget.reservations, budget.reservations_per_host)
        self.circuits = Quota(budget.circuits, budget.circuits_per_host)
        self.dials = Pace(budget.dials_per_minute)
        self.probes = Pace(budget.probes_per_minute)
        self.relayed_bytes = 0

    def passed(self, count: int, now: float) -> None:
        """`count` bytes were relayed."""
        self.bucket.take(count, now)
        self.relayed_bytes += count
