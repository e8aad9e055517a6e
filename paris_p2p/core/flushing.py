"""When a fetch makes what it wrote durable: seldom enough to cost little, often enough to lose little.

What a power cut takes of a fetch, and what is hashed again after a crash, came since the last flush that
ended was begun. If that one took p seconds and the next takes t, no byte waits for longer than
p + max(`BATCH_S`, min(`REST` p, `LONGEST_REST_S`)) + 2 + t seconds: `due` is asked once a second. On a disk
that flushes in a second or two that is 15 s. Of a fast fetch it is no more than `BATCH_BYTES` and one such
second, or what comes in p and in the rest after it; and in either case what comes in t.

Owns: that decision. Does not own: flushing, or the note of it (`store.journal`).
"""

BATCH_BYTES = 256 << 20
"""So much is worth a flush, unless it rests: a quarter of a second's work to hash again."""
BATCH_S = 10.0
"""So long the first byte of less waits for one."""
REST = 3.0
"""Flushing rests so many times as long as it took: a slow disk spends at most a quarter of its time on it."""
LONGEST_REST_S = 30.0


class FlushPace:
    """Asked about once a second. All times in monotonic seconds."""

    def __init__(self) -> None:
        self._since: float | None = None  # the oldest that is not durable yet
        self._not_before = 0.0

    def due(self, unflushed_bytes: int, now: float) -> bool:
        """Whether to flush now. `unflushed_bytes`: verified and written since the last time."""
        if not unflushed_bytes:
            self._since = None
            return False
        if self._since is None:
            self._since = now
        enough = unflushed_bytes >= BATCH_BYTES or now - self._since >= BATCH_S
        return enough and now >= self._not_before

    def flushed(self, began: float, ended: float) -> None:
        """It was done, in that time."""
        self._since = None
        self._not_before = ended + min(REST * (ended - began), LONGEST_REST_S)
