"""Ctrl-C and SIGTERM as something a task can wait for, so that a node can leave cleanly."""

import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import trio

from paris_p2p.programs import EXIT_INTERRUPTED
from paris_p2p.workers.nursery import open_inner_nursery


async def until_interrupted() -> None:
    """Return at the first SIGINT or SIGTERM. Further ones act as usual: they end the program at once."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            return


FORCE_AFTER_S = 3.0


def end_by_force(after_s: float) -> None:
    """End this program in `after_s` seconds if it has not ended by then. Its children notice and end too."""

    def end() -> None:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)

    timer = threading.Timer(after_s, end)
    timer.daemon = True
    timer.start()


@contextmanager
def the_next_one_ends_all() -> Iterator[None]:
    """Meanwhile SIGINT and SIGTERM act as usual, and what is not over soon after one is ended by force: who
    asks twice does not want to wait for what is being tidied up."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def hurry(number: int, frame: FrameType | None) -> None:
        end_by_force(FORCE_AFTER_S)
        handler = usual[signal.Signals(number)]
        if not callable(handler):
            raise KeyboardInterrupt
        handler(number, frame)

    for number in usual:
        signal.signal(number, hurry)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


async def unless_interrupted(work: Callable[[], Awaitable[None]]) -> bool:
    """Run `work`; False when SIGINT or SIGTERM came before it was done."""
    done = False
    async with open_inner_nursery() as nursery:

        async def until_done() -> None:
            nonlocal done
            await work()
            done = True
            nursery.cancel_scope.cancel()

        nursery.start_soon(until_done)
        await until_interrupted()
        nursery.cancel_scope.cancel()
    return done
