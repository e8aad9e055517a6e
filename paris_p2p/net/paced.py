"""Work that many events ask for, done at once and then at most so often.

Owns: when it is done. Does not own: the work, who asks for it.
"""

from collections.abc import Callable

import trio


class Paced:
    """Calling this does `job` now, or once when `interval_s` seconds have passed since the last time, however
    many callers asked meanwhile. `run` must be running for the latter."""

    def __init__(self, job: Callable[[], None], interval_s: float) -> None:
        self._job = job
        self._interval_s = interval_s
        self._done = float("-inf")
        self._due = trio.Event()

    def __call__(self) -> None:
        if trio.current_time() >= self._done + self._interval_s:
            self._do()
        else:
            self._due.set()

    def _do(self) -> None:
        self._due = trio.Event()  # first: the job may ask again
        self._done = trio.current_time()
        self._job()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            due = self._due
            await due.wait()
            await trio.sleep_until(self._done + self._interval_s)
            if self._due is due:  # else it was done meanwhile
                self._do()
