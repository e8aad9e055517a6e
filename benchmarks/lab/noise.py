"""What else the machine did during a measurement: shared machines give noisy figures, so say how noisy.

Owns: reading /proc/stat, waiting for a quiet second. Does not own: the measurements.
"""

import os
import time
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self

from paris_p2p import clock


class Load:
    """A block's CPU seconds on the whole machine. After it: `busy_s` (all but idle and niced work),
    `niced_s`, `stolen_s` (by other virtual machines), `wall_s`."""

    busy_s = niced_s = stolen_s = wall_s = 0.0

    def __enter__(self) -> Self:
        self._before, self._began = _read(), clock.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hz = os.sysconf("SC_CLK_TCK")
        user, nice, system, idle, iowait, irq, softirq, steal = (
            (after - before) / hz for before, after in zip(self._before, _read(), strict=True)
        )
        del idle, iowait
        self.busy_s, self.niced_s, self.stolen_s = user + system + irq + softirq + steal, nice, steal
        self.wall_s = clock.monotonic() - self._began

    def others(self, ours_s: float) -> float:
        """Cores that others kept busy, when our own processes used `ours_s` CPU seconds.

        The kernel's own work for our traffic (soft interrupts) counts as others'.
        """
        return max(0.0, self.busy_s - ours_s) / max(self.wall_s, 0.01)


def _read() -> list[int]:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return [int(field) for field in fields[1:9]]


def quiet_second(max_wait_s: float, cores: float = 0.4) -> float:
    """Waits at most `max_wait_s` for a second in which less than `cores` cores are busy; the last busy."""
    end = clock.monotonic() + max_wait_s
    while True:
        with Load() as load:
            time.sleep(1.0)
        if load.others(0.0) < cores or clock.monotonic() > end:
            return load.others(0.0)


def spread(values: list[float]) -> dict[str, float] | None:
    """Median, least and greatest, to three digits; None of nothing."""
    if not values:
        return None
    return {
        "median": round(median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }
