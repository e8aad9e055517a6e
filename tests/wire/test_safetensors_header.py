"""Tests of `paris_p2p.wire.safetensors_header`."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.wire.manifest import TensorSpec
from paris_p2p.wire.safetensors_header import (
    MAX_HEADER_BYTES,
    Header,
    check_schema,
    header_bytes,
    parse_header,
    tensor_bytes,
)

quick = settings(deadline=None, derandomize=True, max_examples=300)
A = TensorSpec("a", "F32", (2, 3))
B = TensorSpec("b", "I64", (1,))
EMPTY = TensorSpec("empty", "F16", (0, 4))
ARRAYS: dict[str, Any] = {
    "a": np.zeros((2, 3), np.float32),
    "b": np.zeros((1,), np.int64),
    "empty": np.zeros((0, 4), np.float16),
}
REAL: bytes = save(ARRAYS, metadata={"format": "1"})


EMPTY_ENTRY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def raw(header: object, body: int) -> bytes:
    """A file with any header, and `body` bytes of values."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def parse(data: bytes) -> Header:
    return parse_header(data, len(data))


def test_a_real_file_is_read() -> None:
    header = parse(REAL)
    assert {tensor.spec for tensor in header.tensors} == {A, B, EMPTY}
    assert header.metadata == {"format": "1"}
    check_schema(header, [A, B, EMPTY])
    check_schema(header, [EMPTY, B, A])


def test_the_header_alone_is_enough() -> None:
    size = header_bytes(REAL[:8], len(REAL))
    assert parse_header(REAL[:size], len(REAL)) == parse(REAL)
    with pytest.raises(RemoteProtocolError, match="cut off"):
        parse_header(REAL[: size - 1], len(REAL))


def test_a_file_of_another_size_than_its_header_says_is_refused() -> None:
    for data in (REAL[:-1], REAL + b"\0"):
        with pytest.raises(RemoteProtocolError):
            parse(data)


def test_a_file_without_tensors_is_read() -> None:
    assert parse(raw({}, 0)).tensors == ()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        bytes(8),
        b"\xff" * 8 + b"{}",
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        raw(b"[]", 0),
        raw(b" {}", 0),
        raw(b"{", 0),
        raw(b"{}x", 0),
        raw(b'{"\xff": 1}', 0),
        raw(b'{"a":' * 100_000, 0),
        raw(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}", 0),
        raw(b'{"a":' + EMPTY_ENTRY + b',"a":' + EMPTY_ENTRY + b"}", 0),
        raw(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0),
        raw({"a": 1}, 0),
        raw({"a": {}}, 0),
        raw({"a": entry(0, 1) | {"more": 1}}, 1),
        raw({"a": entry(0, 1, dtype="U9")}, 1),
        raw({"a": entry(0, 1, dtype=["U8"])}, 1),
        raw({"a": entry(0, 1, shape=1)}, 1),
        raw({"a": entry(0, 1, shape=[True])}, 1),
        raw({"a": entry(0, 1, shape=[1.0])}, 1),
        raw({"a": entry(0, 1, shape=[-1])}, 1),
        raw({"a": entry(0, 1, shape=[2])}, 1),
        raw({"a": entry(0, 1, shape=[1] * 17)}, 1),
        raw({"a": entry(1, 0, shape=[1])}, 1),
        raw({"a": entry(0, 0, shape=[1 << 39] * 16)}, 0),
        raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, 1),
        raw({"a": entry(1, 2)}, 2),  # a gap at the start
        raw({"a": entry(0, 1), "b": entry(2, 3)}, 3),  # a gap
        raw({"a": entry(0, 2), "b": entry(1, 3)}, 3),  # an overlap
        raw({"a": entry(0, 2), "b": entry(0, 2)}, 2),  # the same bytes twice
        raw({"a": entry(0, 1)}, 2),  # bytes that belong to nothing
        raw({"a": entry(0, 3)}, 2),
        raw({"__metadata__": {"a": 1}}, 0),
        raw({"__metadata__": []}, 0),
    ],
)  # fmt: skip
def test_a_malformed_header_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse(data)


@quick
@given(st.binary(max_size=80))
def test_any_bytes_give_a_header_or_a_remote_protocol_error(data: bytes) -> None:
    for whole in (data, raw(data, 0)):
        try:
            parse(whole)
        except RemoteProtocolError:
            continue


@quick
@given(st.integers(0, 1 << 10), st.integers(0, 255))
def test_a_damaged_header_gives_a_header_or_a_remote_protocol_error(position: int, byte: int) -> None:
    data = bytearray(REAL)
    data[position % len(data)] = byte
    try:
        parse(bytes(data))
    except RemoteProtocolError:
        return


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([A, B, EMPTY, TensorSpec("c", "F32", (1,))], "'c' is missing"),
        ([A, B], "'empty' does not belong"),
        ([TensorSpec("a", "BF16", (2, 3)), B, EMPTY], "'a' has dtype F32, not BF16"),
        ([TensorSpec("a", "F32", (3, 2)), B, EMPTY], r"'a' has shape \[2, 3\], not \[3, 2\]"),
        ([TensorSpec("a", "F32", (6,)), TensorSpec("z", "F32", ()), B, EMPTY], "'a' has shape"),
        ([], "'a' does not belong"),
    ],
)
def test_the_first_difference_from_the_architecture_is_named(tensors: list[TensorSpec], reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        check_schema(parse(REAL), tensors)


def test_bytes_of_tensors_are_counted() -> None:
    assert tensor_bytes([A, B, EMPTY, TensorSpec("s", "BF16", ())]) == 24 + 8 + 0 + 2
    with pytest.raises(RemoteProtocolError, match="unknown dtype"):
        tensor_bytes([TensorSpec("a", "F4", (1,))])
