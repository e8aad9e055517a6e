"""Tests of `paris_node.renewals`."""

from paris_node.renewals import Renewals


def losses(*kept_s: float) -> list[bool]:
    """What is to be said after each lease of 20 s that was kept for so long."""
    renewals, now, said = Renewals(20.0), 0.0, []
    for seconds in kept_s:
        renewals.won(now)
        now += seconds
        said.append(renewals.lost(now))
    return said


def test_the_third_lease_lost_in_a_row_is_said_once() -> None:
    assert losses(30.0, 20.0, 20.0, 20.0, 20.0, 20.0) == [False, False, True, False, False, False]


def test_a_lease_that_was_kept_for_a_while_ends_the_row() -> None:
    assert losses(20.0, 20.0, 150.0, 20.0, 20.0) == [False, False, False, False, True]
