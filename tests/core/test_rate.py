"""Smoothed rates."""

import pytest

from paris_p2p.core.rate import RateMeter


def test_a_steady_stream_reads_as_its_rate_from_early_on() -> None:
    meter = RateMeter(0.0)
    for step in range(1, 201):
        meter.add(100, step * 0.1)
        if step >= 20:
            assert meter.rate(step * 0.1) == pytest.approx(1000, rel=0.06)
    assert meter.total == 20_000


def test_the_rate_fades_when_nothing_comes() -> None:
    meter = RateMeter(0.0)
    meter.add(1_000_000, 1.0)
    assert meter.rate(60.0) < 10


def test_time_that_stands_still_is_no_division_by_zero() -> None:
    meter = RateMeter(5.0)
    meter.add(10, 5.0)
    assert meter.rate(5.0) == pytest.approx(100, rel=0.05)
