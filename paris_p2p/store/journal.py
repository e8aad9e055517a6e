"""The journal of a partial item: which pieces were verified and reached the disk.

One file of fixed size for an item, replaced as a whole by a rename, with a checksum: there is no torn end to
cut off and nothing to compact. It is written after the data it speaks of was flushed, so it never names a
piece that a power cut can take back. What was verified since is in doubt, and hashed on the next start.

A file of the item is believed only if it is the one that was noted:
- after a clean close inode, length and change time must be equal. Any later write, by whatever program, moves
  the change time, which no program can set. Clocks of file systems tick, and a second write in one tick
  does not move the time: so it must also lie at least `_TICK_NS` before the journal. Such a file holds
  nothing that the journal does not name.
- in the middle of a fetch our own writes go on after the note: inode and length must be equal, and the change
  time not before the noted one and at most `WINDOW_NS` after the journal. Whoever changes the file of a
  killed fetch within that time is not noticed here.
A file that could once not be flushed is not believed any more, whatever later flushes say: the system reports
a write that failed once, and then takes what it did not write for written.
What neither notices is a disk that changes bits by itself, or says "flushed" before it is:
`ContentStore.verify` does, and every peer that is sent such a piece.

Owns: that file. Does not own: when to write it (`core.flushing`), hashing what is in doubt (`store.partial`).
"""

import errno
import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from paris_p2p.ids import FileIndex, InfoHash
from paris_p2p.store.durable import drop_cached, sync_path, write_atomic
from paris_p2p.store.layout import ItemFolder
from paris_p2p.wire.bep52 import FileEntry, Layout

_MAGIC = b"paris journal 2\n"
_HEAD = struct.Struct(">16s?32s")
_STAMP = struct.Struct(">QQq")
_CHECKSUM_BYTES = 32
_TICK_NS = 20_000_000
"""Twice the coarsest tick (10 ms) of the file times of Linux and macOS."""
WINDOW_NS = 60_000_000_000
"""Longer than a fetch goes on without a new journal, unless the disk is very slow."""


@dataclass(frozen=True, slots=True)
class _Stamp:
    """A file as it was: bytes, change time in ns since 1970."""

    inode: int
    size: int
    changed_ns: int


_NOTHING = _Stamp(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Believed:
    """What a journal proves. `bitfield`: these pieces are here. `settled`: files that hold nothing else."""

    bitfield: bytes
    settled: frozenset[FileIndex]


class Journal:
    """The journal of one item, for who holds the item's lock; not for two threads at once.

    Everything raises `OSError` when the disk refuses.
    """

    def __init__(self, folder: ItemFolder, info_hash: InfoHash, layout: Layout) -> None:
        self._folder = folder
        self._info_hash = info_hash
        self._layout = layout
        self._bitfield = bytes((layout.pieces + 7) // 8)
        self._stamps = [_NOTHING] * len(layout.files)
        self._closed = False  # the journal on the disk is that of a clean close
        self._lost: set[FileIndex] = set()  # what was written to them may never have reached the disk

    def read(self) -> Believed:
        """What can be believed of the journal that is there; nothing if it is damaged or another item's."""
        bits, settled = bytearray(len(self._bitfield)), set()
        written_ns = self._load()
        if written_ns is not None:
            bits[:] = self._bitfield
            for number, entry in enumerate(self._layout.files):
                if not self._holds(entry, self._stamps[number], written_ns):
                    _clear(bits, entry)
                elif self._closed:
                    settled.add(FileIndex(number))
        self._bitfield = bytes(bits)
        return Believed(self._bitfield, frozenset(settled))

    def _load(self) -> int | None:
        """Take over what the file says; when it was written, or None when it says nothing."""
        size = _HEAD.size + len(self._bitfield) + _STAMP.size * len(self._stamps)
        try:
            if self._folder.journal.lstat().st_size != size + _CHECKSUM_BYTES:
                return None
            data = self._folder.journal.read_bytes()
            written_ns = self._folder.journal.stat().st_mtime_ns
        except OSError:
            return None
        body, checksum = data[:size], data[size:]
        magic, closed, info_hash = _HEAD.unpack_from(body)
        right = hashlib.sha256(body).digest() == checksum
        if not right or magic != _MAGIC or info_hash != self._info_hash:
            return None
        self._closed = closed
        self._bitfield = body[_HEAD.size : _HEAD.size + len(self._bitfield)]
        stamps = body[_HEAD.size + len(self._bitfield) :]
        self._stamps = [_Stamp(*values) for values in _STAMP.iter_unpack(stamps)]
        return written_ns

    def _holds(self, entry: FileEntry, noted: _Stamp, written_ns: int) -> bool:
        try:
            found = self._look(entry)
        except OSError:
            return False
        if self._closed:
            return found == noted and noted.changed_ns <= written_ns - _TICK_NS
        same = (found.inode, found.size) == (noted.inode, noted.size)
        return same and noted.changed_ns <= found.changed_ns <= written_ns + WINDOW_NS

    def _look(self, entry: FileEntry) -> _Stamp:
        status = os.lstat(self._folder.file(entry.path))
        return _Stamp(status.st_ino, status.st_size, status.st_ctime_ns)

    def note(self, index: FileIndex) -> None:
        """Take the file as it is now for the one that the next journal means."""
        self._stamps[index] = self._look(self._layout.files[index])

    def reopen(self) -> None:
        """Before the first write after a clean close: say that writing goes on, so that a crash leaves only
        what is new in doubt."""
        if self._closed:
            self._write(closed=False)

    def flush(self, bitfield: bytes, changed: Iterable[FileIndex], *, closed: bool) -> None:
        """Bring the `changed` files to the disk, then note the pieces in `bitfield`, all of which were
        written before. `closed`: nothing will be written any more."""
        for index in sorted(set(changed) - self._lost):
            self.note(index)  # before it is flushed: what a write meanwhile changes must not count
            self.sync(index)
        self._bitfield = self._without_lost(bitfield)
        self._write(closed=closed)

    def sync(self, index: FileIndex) -> None:
        """Bring a file to the disk. When that fails once nothing of the file is noted any more, and it cannot
        be brought there: it is hashed on the next start."""
        path = self._folder.file(self._layout.files[index].path)
        if index in self._lost:
            raise OSError(errno.EIO, "what was written before did not reach the disk: start the fetch again")
        try:
            sync_path(path)
        except BaseException:
            self._lost.add(index)
            drop_cached(path)
            raise

    @property
    def lost(self) -> frozenset[FileIndex]:
        """The files that `sync` failed for."""
        return frozenset(self._lost)

    def _without_lost(self, bitfield: bytes) -> bytes:
        bits = bytearray(bitfield)
        for index in self._lost:
            _clear(bits, self._layout.files[index])
            self._stamps[index] = _NOTHING
        return bytes(bits)

    def _write(self, *, closed: bool) -> None:
        head = _HEAD.pack(_MAGIC, closed, self._info_hash)
        stamps = b"".join(_STAMP.pack(s.inode, s.size, s.changed_ns) for s in self._stamps)
        body = head + self._bitfield + stamps
        write_atomic(self._folder.journal, body + hashlib.sha256(body).digest())
        self._closed = closed


def _clear(bits: bytearray, entry: FileEntry) -> None:
    for piece in range(entry.first_piece, entry.first_piece + entry.pieces):
        bits[piece >> 3] &= ~(0x80 >> (piece & 7)) & 0xFF
