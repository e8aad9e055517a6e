"""Tests of `paris_p2p.wire.canonical`."""

from dataclasses import dataclass
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError
from paris_p2p.wire import canonical

quick = settings(deadline=None, derandomize=True, max_examples=100)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
plain_data = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@dataclass(frozen=True, slots=True)
class Inner:
    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count is negative")


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    ratio: float
    flag: bool
    parts: tuple[Inner, ...]
    named: dict[str, Inner]
    maybe: Inner | None
    free: Any


OUTER = Outer("n", 0.5, True, (Inner(1), Inner(2)), {"a": Inner(3)}, None, {"x": [1, b"2"]})


@quick
@given(plain_data)
def test_plain_data_comes_back_as_it_went_in(value: Any) -> None:
    assert canonical.unpack(canonical.pack(value), 1 << 20) == value


@quick
@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_remote_protocol_error(data: bytes) -> None:
    try:
        value = canonical.unpack(data, 150)
    except RemoteProtocolError:
        return
    assert canonical.pack(value) == data


@quick
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_encoding_gives_a_value_or_a_remote_protocol_error(
    name: bytes, position: int, byte: int
) -> None:
    data = bytearray(canonical.encode(OUTER))
    data[position % len(data)] = byte
    try:
        canonical.decode(Outer, bytes(data), 1 << 10)
    except RemoteProtocolError:
        return


def test_a_dataclass_comes_back_as_it_went_in() -> None:
    assert canonical.decode(Outer, canonical.encode(OUTER), 1 << 10) == OUTER


def test_the_order_of_keys_does_not_change_the_encoding() -> None:
    assert canonical.pack({"b": 1, "a": 2}) == canonical.pack({"a": 2, "b": 1})


@pytest.mark.parametrize(
    "data",
    [
        b"\x82\xa1b\x01\xa1a\x02",  # keys not sorted
        b"\x82\xa1a\x01\xa1a\x02",  # a key twice
        b"\xcd\x00\x01",  # a long integer for 1
        b"\xca\x3f\x80\x00\x00",  # a 32-bit float
        b"\xd9\x01a",  # a long text header
        b"\x81\x01\x02",  # a key that is no text
        b"\xd4\x01\x00",  # an extension type
        b"\xd6\xff\x00\x00\x00\x01",  # a timestamp
        b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",  # NaN
        b"\xa1\xff",  # not UTF-8
        b"\x01\x01",  # bytes after the value
        b"\x92\x01",  # cut off
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",  # four thousand million items announced
        b"\x91" * 40 + b"\x01",  # nested too deeply
        b"\x91" * 5000 + b"\x01",
    ],
)
def test_what_is_not_canonical_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        canonical.unpack(data, 1 << 20)


def test_more_bytes_than_allowed_are_refused_before_they_are_read() -> None:
    with pytest.raises(RemoteProtocolError, match="at most 3"):
        canonical.unpack(canonical.pack("four"), 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, object(), {1, 2}])
def test_what_has_no_canonical_encoding_is_our_own_error(value: object) -> None:
    with pytest.raises(LocalProtocolError):
        canonical.pack(value)


def test_too_deep_nesting_is_not_encoded() -> None:
    value: list[Any] = []
    for _ in range(canonical.MAX_DEPTH + 1):
        value = [value]
    with pytest.raises(LocalProtocolError, match="deeply"):
        canonical.pack(value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": 1}, r"Outer\.name: str"),
        ({"ratio": 1}, r"Outer\.ratio: float"),
        ({"flag": 1}, r"Outer\.flag: bool"),
        ({"parts": {}}, r"Outer\.parts: a list"),
        ({"parts": [{"count": True}]}, r"Outer\.parts\[0\]\.count: int"),
        ({"parts": [{"count": -1}]}, "count is negative"),
        ({"parts": [{}]}, "missing or unknown: count"),
        ({"named": []}, r"Outer\.named: a map"),
        ({"maybe": 3}, r"Outer\.maybe: a map"),
        ({"extra": 3}, "missing or unknown: extra"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], reason: str) -> None:
    plain = canonical.to_plain(OUTER) | change
    with pytest.raises(RemoteProtocolError, match=reason):
        canonical.decode(Outer, canonical.pack(plain), 1 << 10)


def test_it_is_plain_msgpack_to_others() -> None:
    assert msgpack.unpackb(canonical.encode(Inner(7))) == {"count": 7}


@dataclass(frozen=True)
class _Grown:
    """A value whose format has grown."""

    old: int
    new: bytes = canonical.optional(b"")
    more: tuple[int, ...] = canonical.optional(())


def test_an_optional_field_is_encoded_only_when_it_is_used() -> None:
    assert canonical.encode(_Grown(1)) == canonical.pack({"old": 1})
    for value in (_Grown(1), _Grown(1, b"x"), _Grown(1, b"x", (1, 2)), _Grown(1, more=(3,))):
        assert canonical.decode(_Grown, canonical.encode(value), 100) == value


@pytest.mark.parametrize(
    "plain", [{"old": 1, "new": b""}, {"old": 1, "more": []}, {"new": b"x"}, {"old": 1, "x": 1}]
)
def test_a_default_that_is_encoded_is_refused_like_any_other_second_encoding(
    plain: dict[str, object],
) -> None:
    with pytest.raises(RemoteProtocolError):
        canonical.decode(_Grown, canonical.pack(plain), 100)
