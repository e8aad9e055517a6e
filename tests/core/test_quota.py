"""Tests of `paris_p2p.core.quota`."""

from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.core.quota import Holding, choose_removals
from paris_p2p.ids import InfoHash


def held(number: int, size: int = 10, *, complete: bool = True, used: float = 0.0) -> Holding:
    return Holding(InfoHash(bytes([number]) * 32), size, complete, used)


def chosen(holdings: list[Holding], needed: int, pinned: tuple[int, ...] = ()) -> list[int]:
    pins = {InfoHash(bytes([number]) * 32) for number in pinned}
    return [info_hash[0] for info_hash in choose_removals(holdings, needed, pins)]


def test_nothing_goes_while_nothing_is_needed() -> None:
    assert chosen([held(1), held(2)], 0) == chosen([held(1)], -5) == chosen([], 0) == []


def test_half_fetched_items_go_first_then_what_was_used_longest_ago() -> None:
    holdings = [held(1, used=1.0), held(2, used=9.0), held(3, complete=False, used=99.0)]
    assert chosen(holdings, 30) == [3, 1, 2]
    assert chosen(holdings, 11) == [3, 1]
    assert chosen(holdings, 10) == [3]


def test_pinned_items_stay_even_when_nothing_else_is_there() -> None:
    assert chosen([held(1, 100), held(2, 10)], 10, pinned=(1,)) == [2]
    assert chosen([held(1, 100)], 10, pinned=(1,)) == []


def test_nothing_is_given_up_for_what_would_not_fit_anyway() -> None:
    assert chosen([held(1), held(2, 100)], 11, pinned=(2,)) == []


HOLDINGS = st.lists(
    st.builds(held, st.integers(0, 255), st.integers(0, 1000), complete=st.booleans(), used=st.floats(0, 9)),
    unique_by=lambda holding: holding.info_hash,
    max_size=12,
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(HOLDINGS, st.integers(-10, 5000), st.sets(st.integers(0, 255)))
def test_what_goes_is_enough_and_never_pinned(holdings: list[Holding], needed: int, pinned: set[int]) -> None:
    gone = set(chosen(holdings, needed, tuple(pinned)))
    freed = sum(holding.bytes_on_disk for holding in holdings if holding.info_hash[0] in gone)
    assert not gone & pinned and (not gone or freed >= needed > 0)
