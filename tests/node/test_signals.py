"""Tests of `paris_node.signals`."""

import signal

import pytest
import trio

from paris_node.signals import until_interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_signal_is_waited_for_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_interrupted)
        while signal.getsignal(number) is before:
            await trio.lowlevel.checkpoint()
        signal.raise_signal(number)
    assert signal.getsignal(number) is before
