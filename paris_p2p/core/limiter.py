"""How many bytes may pass now: token buckets, one for the node and one for each peer, per direction.

Owns: the arithmetic of limits. Does not own: what waits (`net.connection` before it serves,
`net.download` before it asks), clocks.

A bucket may be overdrawn by one transfer: whoever finds it above zero takes all it needs and the next one
waits for it to be filled again. So a block larger than the burst passes too, and the mean rate is exact.
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

P = TypeVar("P", bound=Hashable)

BURST_S = 0.25
MIN_BURST_BYTES = 64 * 1024


class TokenBucket:
    """`rate`: bytes per second, None for no limit. Holds at most `BURST_S` of it, at least 64 KiB."""

    def __init__(self, rate: float | None, now: float) -> None:
        self._rate = rate
        self._tokens = self._burst()
        self._filled = now

    @property
    def rate(self) -> float | None:
        return self._rate

    def _burst(self) -> float:
        return max(MIN_BURST_BYTES, (self._rate or 0.0) * BURST_S)

    def set_rate(self, rate: float | None, now: float) -> None:
        """From `now` on."""
        self._fill(now)
        self._rate = rate
        self._tokens = min(self._tokens, self._burst()) if rate is not None else self._burst()

    def _fill(self, now: float) -> None:
        if self._rate is not None and now > self._filled:
            self._tokens = min(self._burst(), self._tokens + (now - self._filled) * self._rate)
        self._filled = max(now, self._filled)

    def available(self, now: float) -> float:
        """Bytes that may pass now: infinite without a limit, negative while overdrawn."""
        if self._rate is None:
            return float("inf")
        self._fill(now)
        return self._tokens

    def take(self, count: int, now: float) -> None:
        """`count` bytes pass. A caller that respects the limit has seen `wait` return 0."""
        if self._rate is not None:
            self._fill(now)
            self._tokens -= count

    def wait(self, now: float) -> float:
        """Seconds until something may pass; 0 when it may now."""
        available = self.available(now)
        if available > 0:
            return 0.0
        assert self._rate is not None
        # One byte more than nothing; a rate of 0 is asked again later, it may have been changed.
        return min((1.0 - available) / self._rate, 60.0) if self._rate > 0 else 60.0


class Limiter(Generic[P]):
    """One direction: a bucket for all peers together and one for each peer."""

    def __init__(self, total: float | None, per_peer: float | None, now: float) -> None:
        self._total = TokenBucket(total, now)
        self._per_peer = per_peer
        self._peers: dict[P, TokenBucket] = {}

    @property
    def unlimited(self) -> bool:
        return self._total.rate is None and self._per_peer is None

    def set_limits(self, total: float | None, per_peer: float | None, now: float) -> None:
        """New limits (bytes per second, None for none) from `now` on."""
        self._total.set_rate(total, now)
        self._per_peer = per_peer
        for bucket in self._peers.values():
            bucket.set_rate(per_peer, now)

    def forget(self, peer: P) -> None:
        """The peer is gone."""
        self._peers.pop(peer, None)

    def _bucket(self, peer: P, now: float) -> TokenBucket:
        bucket = self._peers.get(peer)
        if bucket is None:
            bucket = self._peers[peer] = TokenBucket(self._per_peer, now)
        return bucket

    def available(self, peer: P, now: float) -> float:
        """Bytes that may pass now between us and `peer`."""
        if self.unlimited:
            return float("inf")
        return min(self._total.available(now), self._bucket(peer, now).available(now))

    def take(self, peer: P, count: int, now: float) -> None:
        """`count` bytes pass."""
        if not self.unlimited:
            self._total.take(count, now)
            self._bucket(peer, now).take(count, now)

    def wait(self, peer: P, now: float) -> float:
        """Seconds until something may pass; 0 when it may now."""
        if self.unlimited:
            return 0.0
        return max(self._total.wait(now), self._bucket(peer, now).wait(now))
