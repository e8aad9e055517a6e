"""Ctrl-C and SIGTERM as something a task can wait for, so that a node can leave cleanly."""

import signal

import trio


async def until_interrupted() -> None:
    """Return at the first SIGINT or SIGTERM. Further ones act as usual: they end the program at once."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            return
