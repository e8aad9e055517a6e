"""When uploads make room for the trainer: only while they are seen to slow it down, or to starve it of input.

Owns: the comparison of the trainer's speed, and of its waiting for input, with and without uploads, how long
to yield, when to look again. Does not own: measuring these, or holding uploads back (`net.limits`).

A trainer's speed varies of itself, by a checkpoint or another program: medians of several reports are
compared, and what was found is looked at again after a while, each time later while it stays true. What it
waits for its input is known without such a comparison: where the trainer was never seen alone, as when it
starts amid uploads, all of it counts as theirs. While they yield it is seen whether that is so; an input that
is as slow without them is not made faster by holding them back.
"""

from collections import deque
from statistics import median

QUIET_BYTES_PER_S = 64 * 1024
"""Uploads below that cost the trainer nothing that could be measured."""
SLOWED = 1.03
"""So many times slower than usual the trainer has to be: what serving may cost it."""
STARVED = 0.03
"""Such a share of its time more than usual the trainer has to wait for its input."""
QUIET_REPORTS = 30
BUSY_REPORTS = 5
FIRST_YIELD_S = 60.0
LONGEST_YIELD_S = 960.0


class UploadYield:
    """Fed with the trainer's reports; `yielding` says whether uploads should hold back."""

    def __init__(self) -> None:
        self.yielding = False
        self._quiet = _Reports(QUIET_REPORTS)  # while nothing was uploaded
        self._busy = _Reports(BUSY_REPORTS)  # while something was
        self._patience_s = FIRST_YIELD_S
        self._until = 0.0

    def report(self, images_per_s: float, up_bytes_per_s: float, now: float, waited: float = 0.0) -> bool:
        """The trainer's speed since its last report, the uploads meanwhile, and the share of that time (0 to
        1) in which it waited for its input; whether to yield now."""
        if self.yielding:
            self._quiet.add(images_per_s, waited)  # what is let through hardly counts
            if now >= self._until:
                self.yielding = False
                self._busy.clear()
        elif up_bytes_per_s < QUIET_BYTES_PER_S:
            self._quiet.add(images_per_s, waited)
            self._busy.clear()
        else:
            self._busy.add(images_per_s, waited)
            self._judge(now)
        return self.yielding

    def _judge(self, now: float) -> None:
        if len(self._busy) < BUSY_REPORTS:
            return
        alone = len(self._quiet) >= BUSY_REPORTS  # whether the trainer is known without uploads
        slowed = alone and self._quiet.speed() > SLOWED * self._busy.speed()
        starved = self._busy.waiting() > STARVED + (self._quiet.waiting() if alone else 0.0)
        if slowed or starved:
            self.yielding = True
            self._until = now + self._patience_s
            self._patience_s = min(2 * self._patience_s, LONGEST_YIELD_S)
        elif alone:
            self._patience_s = FIRST_YIELD_S


class _Reports:
    """The last reports of one kind."""

    def __init__(self, count: int) -> None:
        self._speeds: deque[float] = deque(maxlen=count)  # images per second
        self._waits: deque[float] = deque(maxlen=count)  # shares of the time

    def __len__(self) -> int:
        return len(self._speeds)

    def add(self, images_per_s: float, waited: float) -> None:
        self._speeds.append(images_per_s)
        self._waits.append(waited)

    def clear(self) -> None:
        self._speeds.clear()
        self._waits.clear()

    def speed(self) -> float:
        return median(self._speeds)

    def waiting(self) -> float:
        return median(self._waits)
