"""The private folder that holds one DHT worker's sockets, and the removal of what dead ones left.

Owns: where the folder is, its cleaning. Does not own: the sockets. Each process has a folder of its own, so
that `status` beside a running `join` in one home disturbs nothing.
"""

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from paris_p2p.errors import StoreError

MAX_PLACE_BYTES = 60
"""A socket's path has at most 104 bytes (macOS; 108 on Linux): this, `/<process>-<number>` and `/<name>`."""

_numbers = itertools.count()


@contextmanager
def runtime_folder(base: Path) -> Iterator[Path]:
    """A fresh folder (mode 0700) under `base`, gone afterwards. Folders of dead processes are removed.

    Where `base` is too long for a socket's path, a folder in the system's temporary folder, whose name
    follows from `base`, takes its place. Raises `StoreError`.
    """
    place = runtime_place(base)
    try:
        _make_private(place)
        _remove_stale(place)
        folder = place / f"{os.getpid()}-{next(_numbers)}"
        make_folder(folder)
    except OSError as error:
        raise StoreError(f"the runtime folder {place} cannot be used: {error}") from error
    try:
        yield folder
    finally:
        remove_folder(folder)


def make_folder(folder: Path) -> None:
    """Make a worker's folder, also anew after a worker that thought us dead removed it. Raises `OSError`."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a worker's folder, and the one it is in when that is empty; what is gone already is fine."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # another process's folder is still in it
        folder.parent.rmdir()


def runtime_place(base: Path) -> Path:
    """Where the folders of processes that name `base` are."""
    base = base.absolute()
    if len(os.fsencode(base)) <= MAX_PLACE_BYTES:
        return base
    digest = hashlib.sha256(os.fsencode(base)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"paris-{digest}"


def _make_private(place: Path) -> None:
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = place.stat(follow_symlinks=False)
    if status.st_uid != os.getuid() or place.is_symlink():
        raise StoreError(f"{place} belongs to someone else; remove it or set TMPDIR")


def _remove_stale(place: Path) -> None:
    for folder in place.iterdir():
        process, _, _ = folder.name.partition("-")
        if process.isdecimal() and int(process) != os.getpid() and not _alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
