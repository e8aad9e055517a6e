"""The requests under way at one peer: how many bytes to keep asked for, what is late.

Owns: the request window (bandwidth times delay), the peer's measured rate, the soft deadline after which
others may be asked. Does not own: which blocks (`core.scheduler`), the hard deadlines (`core.session`).
"""

from paris_p2p.core.rate import RateMeter
from paris_p2p.ids import PieceIndex

Key = tuple[PieceIndex, int, int]
"""(piece, offset, length) of a request."""

MIN_WINDOW_BYTES = 64 * 1024
FIRST_WINDOW_BYTES = 256 * 1024
MAX_WINDOW_BYTES = 8 * 1024 * 1024
SLACK_S = 0.3  # of the peer's rate, beyond its delay: what waits in its queue while our next request travels
WINDOW_EVERY_S = 0.05
RATE_SMOOTHING_S = 2.0
MIN_PATIENCE_S = 4.0
MAX_PATIENCE_S = 16.0
LATE_FACTOR = 4.0


class Pipeline:
    """`block_bytes`: how much to ask for at once."""

    def __init__(self, block_bytes: int, now: float) -> None:
        self.block_bytes = block_bytes
        self.asked: dict[Key, float] = {}  # unanswered, in order of asking -> when
        self.asked_bytes = 0
        self.meter = RateMeter(now, RATE_SMOOTHING_S)
        self.snubbed = False  # it was late: one block at a time until it delivers
        self._delay: float | None = None  # the shortest answer time seen lately, s
        self._last_block = now
        self._window = FIRST_WINDOW_BYTES
        self._window_at = float("-inf")

    @property
    def measured(self) -> bool:
        """Whether the peer has delivered anything; until then its rate is unknown, not 0."""
        return self.meter.total > 0

    def window(self, now: float) -> int:
        """Bytes to keep asked for; computed anew every `WINDOW_EVERY_S`."""
        if self.snubbed:
            return self.block_bytes
        if now - self._window_at >= WINDOW_EVERY_S and self._delay is not None:
            self._window_at = now
            wanted = int(self.meter.rate(now) * (self._delay + SLACK_S))
            self._window = max(MIN_WINDOW_BYTES, min(MAX_WINDOW_BYTES, wanted))
        return self._window

    def ask(self, key: Key, now: float) -> None:
        self.asked[key] = now
        self.asked_bytes += key[2]

    def give_up(self, key: Key) -> bool:
        """Forgets a request; False when there was none."""
        if self.asked.pop(key, None) is None:
            return False
        self.asked_bytes -= key[2]
        return True

    def block(self, key: Key, now: float) -> None:
        """A block came, asked for or given up before."""
        self.meter.add(key[2], now)
        self._last_block = now
        sent = self.asked.get(key)
        if sent is None:
            return
        self.give_up(key)
        self.snubbed = False
        took = now - sent
        # Rises slowly, so that a route that has become longer is believed after a while.
        self._delay = took if self._delay is None else min(took, self._delay * 1.05)

    def eta(self, count: int, now: float) -> float:
        """Seconds until `count` further bytes would be here; infinite while nothing was measured."""
        if not self.measured:
            return float("inf")
        return (self.asked_bytes + count) / max(self.meter.rate(now), 1.0)

    def patience(self, now: float) -> float:
        """Seconds without a block after which the peer counts as late."""
        if not self.measured:
            return MIN_PATIENCE_S
        usual = LATE_FACTOR * self.block_bytes / max(self.meter.rate(self._last_block), 1.0)
        return min(max(usual, MIN_PATIENCE_S), MAX_PATIENCE_S)

    def late(self, now: float) -> bool:
        """Whether the oldest request waits, without any block, for longer than the peer usually takes."""
        if not self.asked:
            return False
        oldest = next(iter(self.asked.values()))
        return now - max(oldest, self._last_block) > self.patience(now)
