"""The journal of a partial item: which pieces were verified, provably still so.

A journal is the statement of a clean close and nothing else. `PartialItem.close` flushes the data first,
then writes it; the next writer removes it before it writes its first piece. So where a journal stands, its
pieces reached the disk. It is believed only if each file's inode, size, modification and change time are
the ones it noted: any later write, by whatever program, moves the change time, which no program can set.
Clocks of file systems tick, and a second write in one tick does not move the time: so the change times
must also lie at least `_TICK_NS` before the journal itself.
Anything else (kill -9, power loss, a changed file) leaves no believable journal, and the item is hashed:
that is faster than any network, and finds every good piece rather than the last noted ones.
What neither notices is a disk that changes bits by itself; `ContentStore.verify` does.
"""

import os
from dataclasses import dataclass

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.store.durable import sync_path, write_atomic
from paris_p2p.store.layout import ItemFolder
from paris_p2p.wire import canonical
from paris_p2p.wire.bep52 import Layout

_MAX_BYTES = 4 << 20
_TICK_NS = 20_000_000
"""Twice the coarsest tick (10 ms) of the file times of Linux and macOS."""


@dataclass(frozen=True, slots=True)
class _Stamp:
    """A file as it was at the close: times in ns since 1970."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class _Journal:
    info_hash: bytes
    bitfield: bytes
    stamps: tuple[_Stamp, ...]


def _stamp(folder: ItemFolder, path: tuple[str, ...]) -> _Stamp:
    status = os.lstat(folder.file(path))
    return _Stamp(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def write_journal(folder: ItemFolder, info_hash: bytes, layout: Layout, bitfield: bytes) -> None:
    """State that the pieces in `bitfield` are verified and on the disk. Raises `OSError`."""
    stamps = tuple(_stamp(folder, entry.path) for entry in layout.files)
    write_atomic(folder.journal, canonical.encode(_Journal(info_hash, bitfield, stamps)))


def read_journal(folder: ItemFolder, info_hash: bytes, layout: Layout) -> bytes | None:
    """The bitfield of a journal that can be believed; None otherwise."""
    try:
        journal = canonical.decode(_Journal, folder.journal.read_bytes(), _MAX_BYTES)
        written_ns = folder.journal.stat().st_mtime_ns
        stamps = tuple(_stamp(folder, entry.path) for entry in layout.files)
    except (OSError, RemoteProtocolError):
        return None
    if journal.info_hash != info_hash or journal.stamps != stamps:
        return None
    if any(stamp.changed_ns > written_ns - _TICK_NS for stamp in stamps):
        return None
    return journal.bitfield if len(journal.bitfield) == (layout.pieces + 7) // 8 else None


def drop_journal(folder: ItemFolder) -> None:
    """Take the statement back before data is written. Raises `OSError`."""
    if folder.journal.exists():
        folder.journal.unlink()
        sync_path(folder.root)
