"""Tests of `paris_p2p.wire.bencode`."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError
from paris_p2p.wire.bencode import MAX_DEPTH, Bencoded, bdecode, bencode

quick = settings(deadline=None, derandomize=True, max_examples=150)
values = st.recursive(
    st.integers(-(10**18), 10**18) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@quick
@given(values)
def test_a_value_comes_back_as_it_went_in(value: Bencoded) -> None:
    assert bdecode(bencode(value), 1 << 20) == value


@quick
@given(st.binary(max_size=60) | st.text("0123456789ilde:-", max_size=40).map(str.encode))
def test_any_bytes_give_a_value_or_a_remote_protocol_error(data: bytes) -> None:
    try:
        value = bdecode(data, 50)
    except RemoteProtocolError:
        return
    assert bencode(value) == data


def test_an_example_of_bep_3() -> None:
    assert bencode({b"spam": [b"a", b"b"], b"cow": 3}) == b"d3:cowi3e4:spaml1:a1:bee"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"i03e",
        b"i-0e",
        b"i-e",
        b"ie",
        b"i+1e",
        b"i1",
        b"i 1e",
        b"i" + b"9" * 30 + b"e",
        b"i" + b"9" * 5000 + b"e",
        b"03:abc",
        b"4:abc",
        b"-1:a",
        b"99999999999999999999:a",
        b"1a",
        b"d1:b0:1:a0:e",
        b"d1:a0:1:a0:e",
        b"di1e0:e",
        b"d1:ae",
        b"d1:a",
        b"l",
        b"e",
        b"0:0:",
        b"l" * (MAX_DEPTH + 2) + b"e" * (MAX_DEPTH + 2),
        b"l" * 100_000,
    ],
)
def test_what_is_not_canonical_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        bdecode(data, 1 << 20)


def test_more_bytes_than_allowed_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="at most 4"):
        bdecode(b"3:abc", 4)


def test_nesting_is_capped_alike_in_both_directions() -> None:
    deepest: Any = []
    for _ in range(MAX_DEPTH):
        deepest = [deepest]
    assert bdecode(bencode(deepest), 1 << 10) == deepest
    with pytest.raises(LocalProtocolError):
        bencode([deepest])


@pytest.mark.parametrize("value", ["text", 1.0, None, True, {"text": 1}, 10**19])
def test_what_bencode_cannot_say_is_our_own_error(value: Any) -> None:
    with pytest.raises(LocalProtocolError):
        bencode(value)
