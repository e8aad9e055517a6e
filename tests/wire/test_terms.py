"""Tests of `paris_p2p.wire.terms`: what tells two claims' terms apart, and what bounds them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.ids import NodeId, Role, Term
from paris_p2p.wire.terms import (
    MARK_BITS,
    MAX_NUMBER,
    MAX_TERM,
    NUMBERS_SINCE_UNIX,
    belongs,
    highest_number,
    make_term,
    term_number,
)

ANN, BOB = NodeId(b"a" * 32), NodeId(b"b" * 32)
A, B = Role("expert-0"), Role("expert-1")
NOW = 1.75e9

numbers = st.integers(1, MAX_NUMBER)
times = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, derandomize=True)
@given(numbers, numbers, times, times)
def test_a_higher_number_is_a_higher_term_whatever_the_marks(
    one: int, other: int, since: float, later: float
) -> None:
    first, second = make_term(one, A, ANN, since), make_term(other, A, BOB, later)
    assert 1 <= first <= MAX_TERM and term_number(first) == one
    if one != other:
        assert (first < second) == (one < other)


def test_claims_of_one_number_have_different_terms_and_each_belongs_to_its_claim() -> None:
    claims = [(A, ANN, NOW), (A, BOB, NOW), (A, ANN, NOW + 1), (B, ANN, NOW)]
    terms = [make_term(7, *claim) for claim in claims]
    assert len(set(terms)) == len(claims)
    assert all(belongs(a, *c) == (a == make_term(7, *c)) for a in terms for c in claims)


def test_a_term_without_a_number_belongs_to_nobody() -> None:
    mark = make_term(1, A, ANN, NOW) - (1 << MARK_BITS)
    assert not belongs(Term(mark), A, ANN, NOW)


@pytest.mark.parametrize("number", [0, -1, MAX_NUMBER + 1])
def test_a_number_out_of_range_is_our_own_bug(number: int) -> None:
    with pytest.raises(ValueError, match="number"):
        make_term(number, A, ANN, NOW)


def test_one_number_a_second_may_have_been_used_up() -> None:
    assert highest_number(NUMBERS_SINCE_UNIX - 10) == 0
    assert highest_number(NUMBERS_SINCE_UNIX + 10.5) == 10
    assert highest_number(1e12) == MAX_NUMBER
