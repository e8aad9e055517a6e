"""Tests of `paris_p2p.store.weights`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from paris_p2p.errors import RemoteProtocolError, StoreError
from paris_p2p.store.weights import CHUNK_BYTES, MAX_RMS, NearLimitError, check_weights_file
from paris_p2p.wire.manifest import TensorSpec

SPECIAL = [np.nan, np.inf, -np.inf]
NUMPY: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def write(path: Path, **arrays: NDArray[Any]) -> Path:
    save_file(arrays, path)
    return path


def write_bf16(path: Path, bits: list[int]) -> Path:
    """numpy has no BF16, so such a file is written by hand."""
    data = np.array(bits, "<u2").tobytes()
    header = b'{"w":{"dtype":"BF16","shape":[%d],"data_offsets":[0,%d]}}' % (len(bits), len(data))
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_finite_values_pass_and_others_do_not(tmp_path: Path, dtype: str) -> None:
    largest = 9000.0
    values = np.array([0.0, -0.0, 1.5, -2.0, largest, -largest, np.finfo(NUMPY[dtype]).tiny], NUMPY[dtype])
    spec = [TensorSpec("w", dtype, (len(values),))]
    check_weights_file(write(tmp_path / "w", w=values), spec)
    for value in SPECIAL:
        values[3] = value
        with pytest.raises(RemoteProtocolError, match="'w' holds a value that is not finite"):
            check_weights_file(write(tmp_path / "w", w=values), spec)


def test_bf16_values_are_judged_by_their_bits(tmp_path: Path) -> None:
    spec = [TensorSpec("w", "BF16", (3,))]
    check_weights_file(write_bf16(tmp_path / "w", [0x3F80, 0xC600, 0x4600]), spec)
    for bits in (0x7F80, 0xFF80, 0x7FC0, 0xFF81):  # infinities and NaNs
        with pytest.raises(RemoteProtocolError, match="not finite"):
            check_weights_file(write_bf16(tmp_path / "w", [0x3F80, bits, 0]), spec)


@pytest.mark.parametrize("position", [0, CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4, CHUNK_BYTES // 4 + 9])
def test_every_chunk_of_a_large_tensor_is_read(tmp_path: Path, position: int) -> None:
    values = np.zeros(CHUNK_BYTES // 4 + 10, np.float32)
    spec = [TensorSpec("w", "F32", values.shape)]
    values[position] = np.nan
    with pytest.raises(RemoteProtocolError, match="not finite"):
        check_weights_file(write(tmp_path / "w", w=values), spec)


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_values_of_an_insane_size_are_refused(tmp_path: Path, dtype: str) -> None:
    values = np.ones(4, NUMPY[dtype])
    check_weights_file(write(tmp_path / "w", w=values), [TensorSpec("w", dtype, (4,))])
    values[2] = np.finfo(NUMPY[dtype]).max
    with pytest.raises(RemoteProtocolError, match="'w' holds values of an insane size"):
        check_weights_file(write(tmp_path / "w", w=values), [TensorSpec("w", dtype, (4,))])


@pytest.mark.parametrize(("factor", "honest"), [(1.0001, True), (1.01, False)])
def test_what_is_beyond_the_limit_by_what_rounding_decides_is_told_apart(
    tmp_path: Path, factor: float, honest: bool
) -> None:
    values = np.full(4, MAX_RMS * factor, np.float32)
    with pytest.raises(RemoteProtocolError, match="'w' holds values of an insane size") as caught:
        check_weights_file(write(tmp_path / "w", w=values), [TensorSpec("w", "F32", (4,))])
    assert isinstance(caught.value, NearLimitError) is honest


def test_weights_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    spec = [TensorSpec("v", "F32", (2,)), TensorSpec("w", "F32", (4,))]
    zeros = np.zeros(4, np.float32)
    check_weights_file(write(tmp_path / "w", v=np.ones(2, np.float32), w=zeros), spec)
    with pytest.raises(RemoteProtocolError, match="every weight is zero"):
        check_weights_file(write(tmp_path / "w", v=np.zeros(2, np.float32), w=zeros), spec)


def test_whole_numbers_may_have_any_bits(tmp_path: Path) -> None:
    values = np.full(4, -1, np.int64)
    check_weights_file(write(tmp_path / "w", w=values), [TensorSpec("w", "I64", (4,))])


def test_other_tensors_than_the_architectures_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w", w=np.zeros(4, np.float32), scalar=np.array(1.0, np.float32))
    good = [TensorSpec("w", "F32", (4,)), TensorSpec("scalar", "F32", ())]
    check_weights_file(path, good)
    for wrong in (
        good[:1],
        [*good, TensorSpec("x", "F32", ())],
        [good[0], TensorSpec("scalar", "F32", (1,))],
    ):
        with pytest.raises(RemoteProtocolError, match="tensor"):
            check_weights_file(path, wrong)


def test_a_dtype_whose_values_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(RemoteProtocolError, match="cannot be checked"):
        check_weights_file(tmp_path / "w", [TensorSpec("w", "F8_E4M3", (1,))])


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", bytes(100), b"PK\x03\x04" + bytes(40)])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(RemoteProtocolError):
        check_weights_file(tmp_path / "w", [])


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w", w=np.zeros(4, np.float32))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RemoteProtocolError, match="end at byte"):
        check_weights_file(path, [TensorSpec("w", "F32", (4,))])


def test_a_file_that_cannot_be_read_is_the_disks_fault(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="absent"):
        check_weights_file(tmp_path / "absent", [])
