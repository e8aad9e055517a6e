"""The only reader of clocks. Everything else takes `now` as an argument.

`PARIS_CLOCK_OFFSET_S` shifts the wall clock of one process tree, so that what happens on a machine
whose clock is wrong can be shown (and tested) without touching the machine.
"""

import os
import time

_OFFSET_S = float(os.environ.get("PARIS_CLOCK_OFFSET_S", "0"))


def monotonic() -> float:
    """Monotonic seconds; only differences mean anything."""
    return time.monotonic()  # noqa: TID251 - this is the one reader


def unix() -> float:
    """Wall-clock seconds since 1970, as they appear in signed records (`*_unix`)."""
    return time.time() + _OFFSET_S  # noqa: TID251 - this is the one reader
