"""When uploads make room for the trainer: only while they are seen to slow it down.

Owns: the comparison of the trainer's speed with and without uploads, how long to yield, when to look again.
Does not own: measuring either, or holding uploads back (`net.limits`).

A trainer's speed varies of itself, by a checkpoint or another program: medians of several reports are
compared, and what was found is looked at again after a while, each time later while it stays true.
"""

from collections import deque
from statistics import median

QUIET_BYTES_PER_S = 64 * 1024
"""Uploads below that cost the trainer nothing that could be measured."""
SLOWED = 1.03
"""So many times slower than usual the trainer has to be: what serving may cost it."""
QUIET_REPORTS = 30
BUSY_REPORTS = 5
FIRST_YIELD_S = 60.0
LONGEST_YIELD_S = 960.0


class UploadYield:
    """Fed with the trainer's reports; `yielding` says whether uploads should hold back."""

    def __init__(self) -> None:
        self.yielding = False
        self._quiet: deque[float] = deque(
            maxlen=QUIET_REPORTS
        )  # images per second while nothing was uploaded
        self._busy: deque[float] = deque(maxlen=BUSY_REPORTS)  # while something was
        self._patience_s = FIRST_YIELD_S
        self._until = 0.0

    def report(self, images_per_s: float, up_bytes_per_s: float, now: float) -> bool:
        """The trainer's speed since its last report, and the uploads meanwhile; whether to yield now."""
        if self.yielding:
            self._quiet.append(images_per_s)  # what is let through hardly counts
            if now >= self._until:
                self.yielding = False
                self._busy.clear()
        elif up_bytes_per_s < QUIET_BYTES_PER_S:
            self._quiet.append(images_per_s)
            self._busy.clear()
        else:
            self._busy.append(images_per_s)
            self._judge(now)
        return self.yielding

    def _judge(self, now: float) -> None:
        if len(self._busy) < BUSY_REPORTS or len(self._quiet) < BUSY_REPORTS:
            return
        if median(self._quiet) > SLOWED * median(self._busy):
            self.yielding = True
            self._until = now + self._patience_s
            self._patience_s = min(2 * self._patience_s, LONGEST_YIELD_S)
        else:
            self._patience_s = FIRST_YIELD_S
