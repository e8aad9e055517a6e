"""Tests of `paris_p2p.store.durable`."""

import errno
import os
from pathlib import Path

import pytest

from paris_p2p.errors import StoreError
from paris_p2p.store.durable import disk, drop_cached, read_at, write_all, write_atomic, write_parts


def test_a_full_disk_says_how_much_did_not_fit_and_where(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    fd = os.open(full, os.O_WRONLY)
    try:
        with (
            pytest.raises(
                StoreError, match=f"disk full while writing x: 5 bytes do not fit under {tmp_path}"
            ),
            disk("writing x", tmp_path, 5),
        ):
            os.write(fd, b"12345")
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOENT, "No such file .*; something is missing there: check the path"),
        (errno.EACCES, "check who owns it"),
        (errno.EROFS, "choose a folder on another disk"),
        (errno.ENOTDIR, "a file is where a folder should be"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "may be failing"),
        (errno.EBUSY, "check that the folder exists"),
    ],
)
def test_another_refusal_names_the_action_the_reason_and_what_to_do(
    tmp_path: Path, code: int, remedy: str
) -> None:
    with (
        pytest.raises(StoreError, match=rf"reading x in {tmp_path} failed: .*{remedy}"),
        disk("reading x", tmp_path),
    ):
        raise OSError(code, os.strerror(code), "there")


def test_our_own_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^mine$"), disk("reading x", tmp_path):
        raise StoreError("mine")


def test_a_file_is_replaced_whole_and_no_draft_is_left(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old, and longer")
    write_atomic(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "inside").touch()
    with pytest.raises(OSError, match="folder"):
        write_atomic(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_reading_stops_where_the_file_ends(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w+b") as file:
        write_all(file.fileno(), b"0123456789", 5)
        assert read_at(file.fileno(), 100, 3) == b"\0\0" + b"0123456789"
        assert read_at(file.fileno(), 4, 6) == b"1234" and read_at(file.fileno(), 4, 60) == b""


def test_any_number_of_parts_is_written_in_order(tmp_path: Path) -> None:
    parts = [bytes([number % 251]) * (number % 7) for number in range(1300)]
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        write_parts(fd, parts, 5)
        assert read_at(fd, 10_000, 0) == bytes(5) + b"".join(parts)
    finally:
        os.close(fd)


def test_dropping_what_is_cached_of_a_file_loses_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"never flushed")
    drop_cached(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"never flushed"
    drop_cached(tmp_path / "none")
