"""The cheap `dataclass` makes what the standard library's makes."""

import dataclasses
from dataclasses import field, replace
from typing import Any, Generic, TypeVar

import pytest

from paris_p2p import values

P = TypeVar("P")
Maker = Any


def frozen(dataclass: Maker) -> Any:
    @dataclass(frozen=True, slots=True)
    class Value:
        """Some value."""

        a: int
        b: str = "b"
        c: list[int] = field(default_factory=list, compare=False)

        def __post_init__(self) -> None:
            if self.a < 0:
                raise ValueError("below zero")

    return Value


def mutable(dataclass: Maker) -> Any:
    @dataclass(slots=True)
    class State(Generic[P]):
        a: int
        b: list[P] = field(default_factory=list)

    return State


@pytest.mark.parametrize("make", [frozen, mutable])
def test_values_print_compare_and_match_as_those_of_the_standard_library(make: Any) -> None:
    for kind in (make(values.dataclass), make(dataclasses.dataclass)):
        one, same, other = kind(1), kind(a=1), kind(2, b=[])
        assert one == same and one != other and one != (1, "b")
        assert repr(other).endswith(f".{kind.__name__}(a=2, b=[]{', c=[]' if make is frozen else ''})")
        assert kind.__match_args__ == tuple(f.name for f in dataclasses.fields(kind))
        assert replace(one, a=2).a == 2 and dataclasses.asdict(one)["a"] == 1
        assert not hasattr(one, "__dict__") and kind(1).b is not kind(2, b=[]).b
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
            kind()
        with pytest.raises(TypeError, match="unexpected keyword argument 'd'"):
            kind(1, d=2)


def test_frozen_values_hash_by_what_is_compared_and_cannot_be_changed() -> None:
    for kind in (frozen(values.dataclass), frozen(dataclasses.dataclass)):
        assert hash(kind(1, c=[1])) == hash(kind(1)) == hash((1, "b"))
        assert kind(1, c=[1]) == kind(1)
        value = kind(1)
        with pytest.raises(dataclasses.FrozenInstanceError, match="'a'"):
            value.a = 2
        with pytest.raises(dataclasses.FrozenInstanceError, match="'a'"):
            del value.a
        with pytest.raises(ValueError, match="below zero"):
            kind(-1)


def test_mutable_values_change_and_are_not_hashed() -> None:
    for kind in (mutable(values.dataclass), mutable(dataclasses.dataclass)):
        state = kind(1)
        state.a = 5
        assert state == kind(5)
        with pytest.raises(TypeError, match="unhashable"):
            hash(state)


def test_without_comparison_values_are_told_apart() -> None:
    @values.dataclass(slots=True, eq=False)
    class Visit:
        a: int

    assert Visit(1) != Visit(1) and len({Visit(1), Visit(1)}) == 2


def test_what_is_not_made_here_is_refused() -> None:
    with pytest.raises(TypeError, match="keyword-only"):

        @values.dataclass(slots=True)
        class Odd:
            a: int = field(kw_only=True)

    with pytest.raises(TypeError, match="without slots"):
        values.dataclass(slots=False)
