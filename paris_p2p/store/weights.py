"""Checking a weights file before it is used: exact tensors, every value finite, sane sizes.

Owns: reading the file, in bounded memory. Does not own: the rules of headers (`wire.safetensors_header`).
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.store.durable import disk, read_at
from paris_p2p.wire.manifest import TensorSpec
from paris_p2p.wire.safetensors_header import (
    DTYPE_BYTES,
    PREFIX_BYTES,
    Header,
    HeaderTensor,
    check_schema,
    header_bytes,
    parse_header,
)

CHUNK_BYTES = 4 << 20
"""Bytes read at a time; a multiple of every dtype's size."""

# A floating-point number is infinite or NaN when all its exponent bits are set (IEEE 754). Comparing bit
# patterns serves every dtype alike, BF16 too, which numpy does not know.
_EXPONENT: dict[str, tuple[str, int]] = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
MAX_RMS = 1e4
"""Of one tensor. Trained weights stay below some tens; a product of a few such tensors would overflow
fp16."""
SURELY = 1.001
"""Sums of squares beyond the limit times this are so on every machine: others, or other versions of this
program, may add up in another order."""
_WHOLE_NUMBERS = {name for name in DTYPE_BYTES if not name.startswith(("F", "BF"))}


class NearLimitError(RemoteProtocolError):
    """A tensor's size is beyond the limit here, but perhaps not where numbers are added up differently."""


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, Header]]:
    """The descriptor and checked header of a safetensors file."""
    with disk(f"reading {path.name}", path.parent):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            data = read_at(fd, header_bytes(read_at(fd, PREFIX_BYTES, 0), size), 0)
            yield fd, parse_header(data, size)
        finally:
            os.close(fd)


def check_weights_file(path: Path, tensors: Sequence[TensorSpec]) -> None:
    """Refuse a safetensors file that does not hold exactly `tensors`, or holds a NaN or an infinity, a tensor
    whose root mean square exceeds `MAX_RMS`, or nothing but zeros. Reads it once, in chunks.

    Raises `RemoteProtocolError` naming the first difference or the tensor, also when its floating-point dtype
    cannot be checked (`NearLimitError` where an honest machine may come to another finding); `StoreError`
    when the file cannot be read.
    """
    with _opened(path) as (fd, header):
        check_schema(header, tensors)
        total = 0.0
        floating = [one for one in header.tensors if one.spec.dtype not in _WHOLE_NUMBERS]
        for tensor in floating:
            squares = _check_values(fd, tensor)
            limit = MAX_RMS**2 * math.prod(tensor.spec.shape)
            if squares > limit:
                kind = RemoteProtocolError if squares > SURELY * limit else NearLimitError
                raise kind(f"tensor {tensor.spec.name!r} holds values of an insane size")
            total += squares
    if floating and total == 0:
        raise RemoteProtocolError("every weight is zero: nothing was trained here")


def _check_values(fd: int, tensor: HeaderTensor) -> float:
    """The sum of the squares of a floating-point tensor's values, all of which must be finite."""
    name, dtype = tensor.spec.name, tensor.spec.dtype
    squares = 0.0
    if dtype not in _EXPONENT:
        raise RemoteProtocolError(f"tensor {name!r} has dtype {dtype}, whose values cannot be checked")
    pattern, exponent = _EXPONENT[dtype]
    for offset in range(tensor.begin, tensor.end, CHUNK_BYTES):
        size = min(CHUNK_BYTES, tensor.end - offset)
        data = read_at(fd, size, offset)
        if len(data) != size:
            raise RemoteProtocolError(f"tensor {name!r} is cut off: the file was changed")
        bits: NDArray[np.unsignedinteger] = np.frombuffer(data, pattern)
        if np.any((bits & bits.dtype.type(exponent)) == exponent):
            raise RemoteProtocolError(f"tensor {name!r} holds a value that is not finite")
        values = _as_floats(bits, dtype)
        with np.errstate(over="ignore"):  # infinity is as insane as can be
            squares += float(np.square(values, out=values).sum())  # BLAS would add up as the CPU likes
    return squares


def _as_floats(bits: NDArray[np.unsignedinteger], dtype: str) -> NDArray[np.float64]:
    if dtype == "BF16":
        wide = bits.astype(np.uint32) << 16  # bfloat16 is the upper half of a float32
        return wide.view(np.float32).astype(np.float64)
    return bits.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float64)
