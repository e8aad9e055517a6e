"""A few thousand frames of `benchmarks/fuzz_frames.py`; the million is run there."""

from benchmarks.fuzz_frames import fuzz


def test_frames_of_a_stranger_give_events_or_a_violation() -> None:
    report = fuzz(4000, 3)
    assert report.frames == 4000 and report.events > 1000 and report.violations > 100
