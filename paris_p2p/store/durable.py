"""Writing to disk so that a crash leaves the old or the new state, never half of one.

Owns: atomic file replacement, flushing files and folders, and turning the system's refusals into
`StoreError`. Does not own: what is written.
"""

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from paris_p2p.errors import DiskFullError, StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_OURS = "check who owns it and its permissions, or choose another folder"
_IN_THE_WAY = "a file is where a folder should be: move it away, or choose another folder"
_REMEDIES = {
    errno.EACCES: _NOT_OURS,
    errno.EPERM: _NOT_OURS,
    errno.EROFS: "it cannot be written to: choose a folder on another disk",
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: "a folder is where a file should be: move it away, or choose another name",
    errno.ENOENT: "something is missing there: check the path, and that the disk is mounted",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "too many files are open: raise the limit (`ulimit -n`)",
    errno.ENFILE: "too many files are open on this machine: end other programs",
    errno.EIO: "the disk may be failing: look at the system's log, and keep a copy of what is on it",
    errno.ESTALE: "the disk went away: mount it again",
}
"""What the operator can do about a refusal; for any other: `_LOOK`."""
_LOOK = "check that the folder exists, is yours, and its disk works"
_PARTS_AT_ONCE = 512  # Linux takes 1024


@contextmanager
def disk(doing: str, folder: Path, needed: int = 0) -> Iterator[None]:
    """Translate `OSError` inside the block to `StoreError`: `doing` says what was tried in `folder`,
    `needed` how many bytes it wanted (for the message when the disk is full)."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            wanted = f"{needed} bytes do not fit" if needed else "nothing more fits"
            message = f"disk full while {doing}: {wanted} under {folder}; free some space"
            raise DiskFullError(message) from error
        remedy = _REMEDIES.get(error.errno or 0, _LOOK)
        raise StoreError(f"{doing} in {folder} failed: {error}; {remedy}") from error


def sync_path(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def drop_cached(path: Path) -> None:
    """Have the system forget what it holds of a file in memory, and need not write any more: what is read
    next comes from the disk. A hint, and nothing where the system takes none."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # without it a file is hashed as it was, not as it is: no worse than before
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def write_atomic(path: Path, data: bytes, *, sync: bool = True, mode: int = 0o644) -> None:
    """Make `path` hold exactly `data`, replacing what stood there in one step.

    With `sync` the data and the name are on the disk when this returns. Raises `OSError`.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        try:
            write_all(fd, data, 0)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        draft.replace(path)
    except BaseException:
        draft.unlink()
        raise
    if sync:
        sync_path(path.parent)


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """`pwrite` all of `data`: one call may write less than asked."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def write_parts(fd: int, parts: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
    """As `write_all` for consecutive parts, with as few calls as the system allows."""
    for start in range(0, len(parts), _PARTS_AT_ONCE):
        some = parts[start : start + _PARTS_AT_ONCE]
        count = sum(map(len, some))
        if os.pwritev(fd, some, offset) < count:  # the disk is full, or nearly so: part by part
            at = offset
            for part in some:
                write_all(fd, part, at)
                at += len(part)
        offset += count


def read_at(fd: int, length: int, offset: int) -> bytes:
    """`pread` of `length` bytes, fewer only where the file ends."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def read_now(fd: int, length: int, offset: int) -> bytearray | None:
    """`length` bytes that are in memory; None when the disk would have to be waited for, or is too short."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    data = bytearray(length)
    try:
        count = os.preadv(fd, [data], offset, os.RWF_NOWAIT)
    except OSError:  # it is on the disk, or this file system cannot tell
        return None
    return data if count == length else None
