"""Locks between processes: `flock` on a small file that holds the owner's process id.

The kernel drops such a lock when its process ends, however it ends: nothing stale is left to judge.
Owns: taking and giving back. Does not own: what a lock protects.
"""

import fcntl
import os
from pathlib import Path


class FileLock:
    """A lock held until `release`."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    def release(self) -> None:
        """Give the lock back and remove its file; a second call does nothing."""
        if self._fd < 0:
            return
        self._path.unlink(missing_ok=True)  # while it is still ours: `try_lock` notices
        os.close(self._fd)
        self._fd = -1


def try_lock(path: Path) -> FileLock | None:
    """The lock on `path`, None when another holder has it. Raises `OSError`."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if _is_file(path, fd):
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d" % os.getpid(), 0)
            return FileLock(path, fd)
        os.close(fd)  # its former holder removed the file after it was opened here: try the new one


def _is_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock on `path` right now. Raises `OSError`."""
    lock = try_lock(path) if path.exists() else None
    if lock is not None:
        lock.release()
        return False
    return path.exists()


def holder(path: Path) -> str:
    """What to call the lock's holder in a message: `process N`, as far as is known."""
    try:
        return f"process {int(path.read_text())}"
    except (OSError, ValueError):
        return "another process"
