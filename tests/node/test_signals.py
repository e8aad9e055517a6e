"""Tests of `paris_node.signals`."""

import os
import signal
import threading

import pytest
import trio

from paris_node import signals
from paris_node.signals import FORCE_AFTER_S, end_by_force, the_next_one_ends_all, until_interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_signal_is_waited_for_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_interrupted)
        while signal.getsignal(number) is before:
            await trio.lowlevel.checkpoint()
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_what_does_not_end_is_ended_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda _status: ended.set())
    end_by_force(0.0)
    assert ended.wait(20)


def test_meanwhile_a_signal_does_what_it_did_and_the_end_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[float] = []
    monkeypatch.setattr(signals, "end_by_force", forced.append)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), the_next_one_ends_all():
        signal.raise_signal(signal.SIGINT)
    assert forced == [FORCE_AFTER_S] and signal.getsignal(signal.SIGINT) is before
