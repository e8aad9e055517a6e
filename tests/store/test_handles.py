"""Tests of `paris_p2p.store.handles`."""

import os
import threading
from pathlib import Path

import pytest

from paris_p2p.store.handles import HandlePool


def make_files(folder: Path, count: int) -> list[Path]:
    paths = [folder / str(i) for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(b"%d" % i)
    return paths


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_file_is_opened_once_and_kept(tmp_path: Path) -> None:
    pool = HandlePool()
    (path,) = make_files(tmp_path, 1)
    with pool.use(path) as first, pool.use(path) as second:
        assert first == second
    with pool.use(path) as third:
        assert third == first
    pool.forget(tmp_path)
    assert not is_open(first)


def test_only_a_bounded_number_stays_open_and_the_least_used_go(tmp_path: Path) -> None:
    pool = HandlePool(max_idle=2)
    paths = make_files(tmp_path, 4)
    for path in paths:
        with pool.use(path):
            pass
    for path in paths:  # another file by the same name: only a handle still open reads the old one
        (tmp_path / "new").write_bytes(b"new")
        (tmp_path / "new").replace(path)
    found = {}
    for i in (3, 2, 1, 0):
        with pool.use(paths[i]) as fd:
            found[i] = os.pread(fd, 9, 0)
    assert found == {3: b"3", 2: b"2", 1: b"new", 0: b"new"}
    pool.forget(tmp_path)


def test_a_handle_in_use_survives_eviction_and_forgetting(tmp_path: Path) -> None:
    pool = HandlePool(max_idle=0)
    first, second = make_files(tmp_path, 2)
    with pool.use(first) as fd:
        with pool.use(second):
            pass
        pool.forget(tmp_path)
        assert os.pread(fd, 1, 0) == b"0"
    assert not is_open(fd)


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (target,) = make_files(tmp_path, 1)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(OSError, match="link"), HandlePool().use(tmp_path / "link"):
        pass


def test_writing_and_reading_have_handles_of_their_own(tmp_path: Path) -> None:
    pool = HandlePool()
    (path,) = make_files(tmp_path, 1)
    with pool.use(path) as reading, pool.use(path, write=True) as writing:
        assert reading != writing
        os.pwrite(writing, b"x", 0)
        assert os.pread(reading, 1, 0) == b"x"
    pool.forget(tmp_path)


def test_many_threads_always_read_the_file_they_asked_for(tmp_path: Path) -> None:
    pool = HandlePool(max_idle=2)
    paths = make_files(tmp_path, 8)
    wrong: list[int] = []

    def read(offset: int) -> None:
        for i in range(400):
            number = (i * 3 + offset) % len(paths)
            with pool.use(paths[number]) as fd:
                if os.pread(fd, 4, 0) != b"%d" % number:
                    wrong.append(number)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.forget(tmp_path)
    assert not wrong
