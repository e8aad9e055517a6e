"""Exponentially smoothed byte rates. Owns: `RateMeter`. Does not own: clocks (`now` is an argument)."""

import math

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
