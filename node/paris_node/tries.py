"""What happened to the checkpoints that this node thought of copying or looking at.

Owns: since when each is known, how often it failed, when it is its turn again, how long a try may take. Does
not own: trying (`run_node`).
"""

from collections.abc import Collection
from dataclasses import dataclass

REST_S = 20.0
MAX_REST_S = 3600.0
"""A checkpoint that cannot be copied rests for 20 s, 40 s, 80 s, … up to an hour."""
COPY_DEADLINE_S = 600.0
"""A copy that takes longer goes on later, if it is then still worth it; what was verified stays."""
EXAMINE_DEADLINE_S = 60.0
"""Nobody need serve what a stranger names faster than piece by piece: an item of it may take 60 s, at the
next try 120 s, 240 s, … up to `COPY_DEADLINE_S`."""


@dataclass(slots=True)
class Tried:
    """Of one checkpoint. Times are monotonic."""

    since: float
    failures: int = 0
    rest_until: float = 0.0


class Tries:
    """By signed statement; only of those that are shown at the moment."""

    def __init__(self) -> None:
        self._tried: dict[bytes, Tried] = {}

    def keep(self, shown: Collection[bytes]) -> None:
        """Forget all but these."""
        self._tried = {data: tried for data, tried in self._tried.items() if data in shown}

    def of(self, data: bytes, now: float) -> Tried:
        """What is known of it; known from `now` on if it was not."""
        return self._tried.setdefault(data, Tried(now))

    def resting(self, now: float) -> set[bytes]:
        """Those that failed a short while ago."""
        return {data for data, tried in self._tried.items() if tried.rest_until > now}

    def failed(self, data: bytes, now: float) -> None:
        """It could not be had, or not yet in full."""
        tried = self.of(data, now)
        tried.failures += 1
        tried.rest_until = now + min(REST_S * 2 ** min(tried.failures - 1, 16), MAX_REST_S)

    def look_deadline_s(self, data: bytes, now: float) -> float:
        """How long each item of a stranger's checkpoint may take to come this time."""
        return min(EXAMINE_DEADLINE_S * 2.0 ** min(self.of(data, now).failures, 16), COPY_DEADLINE_S)
