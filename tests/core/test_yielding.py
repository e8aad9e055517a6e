"""Tests of `paris_p2p.core.yielding`."""

from paris_p2p.core.yielding import BUSY_REPORTS, FIRST_YIELD_S, UploadYield

MBYTE = 1_000_000.0


def reports(uploads: UploadYield, images_per_s: float, up: float, count: int, start: float) -> float:
    for number in range(count):
        uploads.report(images_per_s, up, start + number)
    return start + count


def test_uploads_yield_when_the_trainer_is_slower_than_without_them() -> None:
    uploads = UploadYield()
    now = reports(uploads, 100.0, 0.0, 10, 0.0)
    reports(uploads, 95.0, MBYTE, BUSY_REPORTS - 1, now)
    assert not uploads.yielding
    assert uploads.report(95.0, MBYTE, now + BUSY_REPORTS)


def test_uploads_that_cost_up_to_three_per_cent_go_on() -> None:
    uploads = UploadYield()
    now = reports(uploads, 100.0, 0.0, 10, 0.0)
    reports(uploads, 97.5, MBYTE, 100, now)
    assert not uploads.yielding


def test_one_slow_report_such_as_a_checkpoint_is_no_reason() -> None:
    uploads = UploadYield()
    now = reports(uploads, 100.0, 0.0, 10, 0.0)
    for number in range(20):
        uploads.report(10.0 if number % 5 == 0 else 99.0, MBYTE, now + number)
        assert not uploads.yielding


def test_without_a_measurement_of_the_trainer_alone_nothing_is_concluded() -> None:
    uploads = UploadYield()
    reports(uploads, 50.0, MBYTE, 100, 0.0)
    assert not uploads.yielding


def test_uploads_yield_when_the_trainer_waits_for_its_input_however_fast_it_is() -> None:
    uploads = UploadYield()
    for number in range(10):
        uploads.report(100.0, 0.0, float(number), 0.01)
    for number in range(BUSY_REPORTS):
        uploads.report(100.0, MBYTE, 10.0 + number, 0.1)
    assert uploads.yielding


def test_a_trainer_that_starts_amid_uploads_and_waits_is_given_room_at_once() -> None:
    uploads = UploadYield()
    for number in range(BUSY_REPORTS):
        uploads.report(50.0, MBYTE, float(number), 0.2)
    assert uploads.yielding


def test_an_input_that_is_as_slow_without_uploads_does_not_hold_them_back_for_long() -> None:
    uploads, yielded = UploadYield(), 0
    for number in range(1000):
        yielded += uploads.report(50.0, MBYTE, float(number), 0.2)
    assert 0 < yielded <= FIRST_YIELD_S


def test_it_looks_again_after_a_while_and_each_time_later() -> None:
    uploads = UploadYield()
    now = reports(uploads, 100.0, 0.0, 10, 0.0)
    waits = []
    for _ in range(3):
        now = reports(uploads, 80.0, MBYTE, BUSY_REPORTS, now)
        assert uploads.yielding
        began = now
        while uploads.report(100.0, 0.0, now):
            now += 1
        waits.append(now - began)
    assert FIRST_YIELD_S - 1 <= waits[0] < waits[1] < waits[2]


def test_once_serving_costs_nothing_any_more_the_waits_are_short_again() -> None:
    uploads = UploadYield()
    now = reports(uploads, 100.0, 0.0, 10, 0.0)
    for _ in range(4):
        now = reports(uploads, 80.0, MBYTE, BUSY_REPORTS, now)
        now = reports(uploads, 100.0, 0.0, 2000, now)
    now = reports(uploads, 100.0, MBYTE, BUSY_REPORTS, now)
    now = reports(uploads, 80.0, MBYTE, BUSY_REPORTS, now)
    assert uploads.yielding
    reports(uploads, 100.0, 0.0, int(FIRST_YIELD_S) + 2, now)
    assert not uploads.yielding
