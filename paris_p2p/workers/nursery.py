"""A nursery for the inside of a context manager: its being there does not show in the exceptions.

trio wraps what leaves a nursery in an exception group. Where the nursery is an implementation detail (a
worker's log reader), a caller's `except WorkerError` must still work.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_inner_nursery() -> AsyncIterator[trio.Nursery]:
    """`trio.open_nursery()`, but a group of one exception is raised as that exception."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        raise _only(group) from None


def _only(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
