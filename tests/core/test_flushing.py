"""When a fetch flushes."""

import pytest

from paris_p2p.core.flushing import BATCH_BYTES, BATCH_S, LONGEST_REST_S, REST, FlushPace

LOOK_S = 1.0


def test_a_little_waits_for_more_but_not_for_ever() -> None:
    pace = FlushPace()
    assert not pace.due(1, 100.0) and not pace.due(2, 100.0 + BATCH_S - 0.1)
    assert pace.due(3, 100.0 + BATCH_S)
    pace.flushed(110.0, 110.1)
    assert not pace.due(1, 111.0) and pace.due(1, 111.0 + BATCH_S)


def test_much_is_flushed_at_once_and_nothing_never() -> None:
    pace = FlushPace()
    assert not pace.due(0, 0.0) and not pace.due(0, 1e6)
    assert pace.due(BATCH_BYTES, 1e6)


def test_time_counts_from_the_first_byte_not_from_the_last_flush() -> None:
    pace = FlushPace()
    pace.due(0, 0.0)
    assert not pace.due(1, 500.0) and not pace.due(0, 501.0)
    assert not pace.due(1, 502.0 + BATCH_S / 2) and not pace.due(1, 502.0 + BATCH_S)


def test_a_slow_disk_rests_between_two_flushes_but_not_for_ever() -> None:
    pace = FlushPace()
    pace.flushed(0.0, 2.0)
    assert not pace.due(BATCH_BYTES, 2.0 + REST * 2.0 - 0.1) and pace.due(BATCH_BYTES, 2.0 + REST * 2.0)
    pace.flushed(0.0, 1000.0)
    assert pace.due(BATCH_BYTES, 1000.0 + LONGEST_REST_S)


@pytest.mark.parametrize("disk", [20e6, 200e6, 2e9])
@pytest.mark.parametrize("rate", [1e5, 5e6, 15e6, 40e6, 100e6, 150e6, 400e6, 1e9])
def test_what_is_in_doubt_and_the_share_of_time_that_goes_into_flushing_are_bounded(
    rate: float, disk: float
) -> None:
    """`rate`: of a fetch, `disk`: of what flushing brings there, in bytes/s."""
    pace, now, flushing = FlushPace(), 0.0, 0.0
    unflushed, oldest = 0.0, 0.0  # bytes, and when the first of them came
    before, longest = 0.0, 0.0  # seconds that the last flush took, and the longest
    while now < 1000.0 and rate < disk:
        now, unflushed = now + LOOK_S, unflushed + rate * LOOK_S
        if pace.due(int(unflushed), now):
            took = 0.01 + unflushed / disk
            pace.flushed(now, now + took)
            rest = min(REST * before, LONGEST_REST_S)
            assert now + took - oldest <= before + max(BATCH_S, rest) + 2 * LOOK_S + took
            assert unflushed <= max(BATCH_BYTES + rate * LOOK_S, rate * (before + rest + LOOK_S)) + 1
            oldest, unflushed, before = now, rate * took, took
            now, flushing, longest = now + took, flushing + took, max(longest, took)
    if longest <= LONGEST_REST_S / REST:
        assert flushing <= 260.0
