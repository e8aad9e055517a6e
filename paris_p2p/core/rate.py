"""Exponentially smoothed byte rates. Owns: `RateMeter`, `Rates`. Does not own: clocks (`now` is given)."""

import math
from dataclasses import dataclass

SMOOTHING_S = 5.0


class RateMeter:
    """Bytes per second, smoothed with a time constant of `smoothing_s` seconds."""

    def __init__(self, now: float, smoothing_s: float = SMOOTHING_S) -> None:
        self._start = now
        self._updated = now
        self._weighted = 0.0  # bytes, each weighted by its age
        self._smoothing_s = smoothing_s
        self.total = 0

    def add(self, count: int, now: float) -> None:
        """`count` bytes passed at `now`."""
        self._decay(now)
        self._weighted += count
        self.total += count

    def rate(self, now: float) -> float:
        """Bytes per second at `now`. Young meters divide by their age, not by the time constant."""
        self._decay(now)
        age = max(now - self._start, 0.1)
        return self._weighted / (self._smoothing_s * -math.expm1(-age / self._smoothing_s))

    def _decay(self, now: float) -> None:
        if now > self._updated:
            self._weighted *= math.exp(-(now - self._updated) / self._smoothing_s)
            self._updated = now


@dataclass(frozen=True, slots=True)
class Rates:
    """Payload bytes (blocks) of all items: smoothed rates and totals. `peers`: connected now."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    peers: int
    up_bytes: int
    down_bytes: int
