"""When a fetch flushes."""

from paris_p2p.core.flushing import BATCH_BYTES, BATCH_S, LONGEST_REST_S, REST, FlushPace


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


def test_a_fetch_at_any_rate_spends_little_of_its_time_on_flushing() -> None:
    """A disk of 200 MB/s: the share of time that goes into flushing, and what is in doubt at worst."""
    for rate in (1e5, 5e6, 40e6):
        pace, unflushed, flushing, worst, now = FlushPace(), 0.0, 0.0, 0.0, 0.0
        while now < 1000.0:
            now, unflushed = now + 1.0, unflushed + rate
            worst = max(worst, unflushed)
            if pace.due(int(unflushed), now):
                took = 0.01 + unflushed / 200e6
                pace.flushed(now, now + took)
                now, flushing, unflushed = now + took, flushing + took, rate * took
        assert flushing <= 260.0
        assert worst <= max(BATCH_BYTES, rate * BATCH_S) + 4 * rate
