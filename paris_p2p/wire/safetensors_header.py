"""The header of a safetensors file: what tensors it says it holds, read without any tensor library.

Format (safetensors): 8 bytes, little-endian, length of the header; the header, a JSON object of tensor
name -> {dtype, shape, data_offsets} and optionally `__metadata__` (text -> text); then the tensors' bytes,
without gaps. Owns: strict reading of it, and comparing it with a manifest's tensors.
Does not own: the tensors' values (`store.weights`).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.wire.manifest import MAX_TENSORS, TensorSpec

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 16
_MAX_DIMENSION = 1 << 40

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element of each dtype."""


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """A tensor and where its bytes are: `begin` to `end` (exclusive), counted from the file's start."""

    spec: TensorSpec
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. `tensors`: in the order of their bytes; `metadata`: the file's text pairs."""

    tensors: tuple[HeaderTensor, ...]
    metadata: dict[str, str]


def header_bytes(prefix: bytes, file_size: int) -> int:
    """How many bytes from the file's start the header takes, given its first `PREFIX_BYTES`.

    Raises `RemoteProtocolError` when it is longer than `MAX_HEADER_BYTES` or than the file.
    """
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if len(prefix) < PREFIX_BYTES or not 2 <= length <= min(MAX_HEADER_BYTES, file_size - PREFIX_BYTES):
        raise RemoteProtocolError("not a safetensors file: no header of an allowed length")
    return PREFIX_BYTES + length


def parse_header(data: bytes, file_size: int) -> Header:
    """The header in the first bytes of a file of `file_size` bytes; `data` may go on past it.

    Raises `RemoteProtocolError` unless it is well formed, names no tensor twice, and its tensors' bytes
    follow each other without gap or overlap from the header to the end of the file.
    """
    start = header_bytes(data, file_size)
    if len(data) < start:
        raise RemoteProtocolError("the safetensors header is cut off")
    plain = _json_object(data[PREFIX_BYTES:start])
    metadata = plain.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise RemoteProtocolError("safetensors metadata is not a map of texts")
    if len(plain) > MAX_TENSORS:
        raise RemoteProtocolError(f"more than {MAX_TENSORS} tensors")
    tensors = sorted((_tensor(name, entry, start) for name, entry in plain.items()), key=_position)
    at = start
    for tensor in tensors:
        if tensor.begin != at:
            raise RemoteProtocolError(f"tensor {tensor.spec.name[:80]!r} leaves a gap, or overlaps another")
        at = tensor.end
    if at != file_size:
        raise RemoteProtocolError(f"the tensors end at byte {at} of a file of {file_size}")
    return Header(tuple(tensors), metadata)


def _position(tensor: HeaderTensor) -> tuple[int, int]:
    return tensor.begin, tensor.end


def _json_object(text: bytes) -> dict[str, Any]:
    if text[:1] != b"{":
        raise RemoteProtocolError("the safetensors header is not a JSON object")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise RemoteProtocolError(f"the safetensors header is not JSON: {error}") from None
    assert isinstance(value, dict)  # it starts with a brace
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name stands twice")
    return value


def _tensor(name: str, entry: object, start: int) -> HeaderTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise RemoteProtocolError(f"tensor {name[:80]!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise RemoteProtocolError(f"tensor {name[:80]!r} has an unknown dtype")
    if not _counts(shape) or not _counts(offsets) or len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise RemoteProtocolError(f"tensor {name[:80]!r} has a malformed shape or data_offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise RemoteProtocolError(f"tensor {name[:80]!r} has more or fewer bytes than its shape needs")
    return HeaderTensor(TensorSpec(name, dtype, tuple(shape)), start + offsets[0], start + offsets[1])


def _counts(value: object) -> bool:
    """Whether `value` is a list of whole numbers in range (a bool is none)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _MAX_DIMENSION for item in value)


def check_schema(header: Header, tensors: Sequence[TensorSpec]) -> None:
    """Refuse a file whose tensors are not exactly `tensors`, in whatever order.

    Raises `RemoteProtocolError` naming the first difference: in the order of `tensors` what is missing or
    differs, then what is too much.
    """
    found = {tensor.spec.name: tensor.spec for tensor in header.tensors}
    for wanted in tensors:
        spec = found.pop(wanted.name, None)
        if spec is None:
            raise RemoteProtocolError(f"tensor {wanted.name!r} is missing")
        if spec.dtype != wanted.dtype:
            raise RemoteProtocolError(f"tensor {wanted.name!r} has dtype {spec.dtype}, not {wanted.dtype}")
        if spec.shape != wanted.shape:
            raise RemoteProtocolError(
                f"tensor {wanted.name!r} has shape {list(spec.shape)}, not {list(wanted.shape)}"
            )
    if found:
        raise RemoteProtocolError(f"tensor {min(found)[:80]!r} does not belong to the architecture")


def tensor_bytes(tensors: Sequence[TensorSpec]) -> int:
    """Bytes the values of `tensors` take. Raises `RemoteProtocolError` for an unknown dtype."""
    unknown = next((tensor for tensor in tensors if tensor.dtype not in DTYPE_BYTES), None)
    if unknown is not None:
        raise RemoteProtocolError(f"tensor {unknown.name!r} has an unknown dtype")
    return sum(math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype] for tensor in tensors)
