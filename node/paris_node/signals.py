"""Ctrl-C and SIGTERM as something a task can wait for, so that a node can leave cleanly."""

import signal
from collections.abc import Awaitable, Callable

import trio

from paris_p2p.workers.nursery import open_inner_nursery


async def until_interrupted() -> None:
    """Return at the first SIGINT or SIGTERM. Further ones act as usual: they end the program at once."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            return


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
