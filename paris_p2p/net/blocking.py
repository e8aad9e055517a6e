"""Running what blocks (disk, hashing) without blocking the event loop.

Owns: the `Blocking` protocol and its real implementation. A simulation passes one that runs the job at
once, so that virtual time never waits for a thread.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

T = TypeVar("T")

THREADS = 8


class Blocking(Protocol):
    """Runs `job` to its end, also when cancelled meanwhile; returns or raises what it does."""

    async def __call__(self, job: Callable[[], T]) -> T: ...


class InThreads:
    """In worker threads, at most `THREADS` at a time."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(THREADS)

    async def __call__(self, job: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(job, limiter=self._limiter)
