"""Items being fetched: verified pieces written in place, resumed after a crash.

Owns: the write side. Every piece is hashed before it is written, and nothing a previous process left is
believed unless `store.journal` proves it or it is hashed again. Does not own: which piece comes next (`net`).
"""

import os
import shutil
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError, StoreError
from paris_p2p.ids import FileIndex
from paris_p2p.store.durable import disk, read_at, sync_path, write_atomic, write_parts
from paris_p2p.store.handles import HandlePool
from paris_p2p.store.item import load_info, load_layer, read_span, read_span_now
from paris_p2p.store.journal import Believed, Journal
from paris_p2p.store.layout import ItemFolder
from paris_p2p.store.locks import FileLock
from paris_p2p.wire.bep52 import (
    Buffer,
    FileEntry,
    Layout,
    check_in_steps,
    check_layer,
    check_piece,
    parse_info,
)
from paris_p2p.wire.content import AnyRef, ContentRef


class PartialItem:
    """One item being fetched. Its process holds the item's lock until `finish` or `close`.

    All methods may be called from several threads; they block on the disk.
    """

    def __init__(
        self,
        folder: ItemFolder,
        ref: AnyRef,
        pool: HandlePool,
        lock: FileLock,
        complete: Callable[[ItemFolder], ItemFolder],
        require_room: Callable[[ContentRef, ItemFolder], None],
    ) -> None:
        """`complete` moves the finished folder to the complete items and says where it is then.

        `require_room` raises `DiskFullError` when the disk cannot hold the item; it is asked as soon as the
        sizes of a `MagnetRef` are known, which then becomes a `ContentRef`.
        """
        self.ref: AnyRef = ref
        self.info: bytes | None = None
        self.layout: Layout | None = None
        self._folder = folder
        self._pool = pool
        self._lock = lock
        self._complete = complete
        self._require_room = require_room
        self._mutex = threading.RLock()
        self._place = (
            threading.Lock()
        )  # held while reading, so that `finish` does not move the files meanwhile
        self._open = True
        self._have = bytearray()
        self._layers: dict[int, bytes] = {}
        self._layerless: list[FileIndex] = []
        self._journal: Journal | None = None
        self._unsynced: set[FileIndex] = set()
        self._unflushed = 0  # bytes of pieces
        self._flushing = threading.Lock()  # taken before `_mutex`, which is free while the disk flushes
        self._noted = False  # the journal on the disk is of a clean close, and nothing changed since
        self._metadata_synced = False
        with disk("resuming an item", folder.root):
            self._resume()

    # --- what was there before -------------------------------------------------------------------

    def _resume(self) -> None:
        try:
            info, layout = load_info(self._folder, self.ref)
        except StoreError:  # not there yet, or damaged: fetched (again)
            return
        self._size(layout)
        self._prepare(info, layout)

    def _size(self, layout: Layout) -> None:
        """The item's sizes are known: see whether there is room, and note them."""
        if isinstance(self.ref, ContentRef):
            return
        ref = ContentRef(self.ref.info_hash, layout.length, layout.piece_length)
        self._require_room(ref, self._folder)
        self._folder.write_ref(ref)
        self.ref = ref

    def _prepare(self, info: bytes, layout: Layout) -> None:
        """Take `info` as known: find out what is on disk, and bring the files to their lengths."""
        self._have = bytearray((layout.pieces + 7) // 8)
        for index in layout.layered():
            try:
                self._layers[index] = load_layer(self._folder, layout, index)
            except StoreError:  # as above; its pieces are hashed when the layer is known
                self._layerless.append(index)
        self._journal = Journal(self._folder, self.ref.info_hash, layout)
        believed = self._journal.read()
        for index in map(FileIndex, range(len(layout.files))):
            if index not in self._layerless:
                self._recover_file(layout, index, believed)
            self._settle_file(layout, index)
            self._journal.note(index)
        self._noted = len(believed.settled) == len(layout.files)
        self.info, self.layout = info, layout  # last: who sees the layout may take the bitfield as true

    def _recover_file(self, layout: Layout, index: FileIndex, believed: Believed) -> None:
        entry = layout.files[index]
        for piece in range(entry.first_piece, entry.first_piece + entry.pieces):
            self._have[piece >> 3] |= believed.bitfield[piece >> 3] & (0x80 >> (piece & 7))
        if index not in believed.settled:
            self._rehash_file(layout, index)

    def _rehash_file(self, layout: Layout, index: FileIndex) -> None:
        """Hash what is in doubt of a file whose layer is known, skipping holes: they were never written."""
        entry = layout.files[index]
        path = self._folder.file(entry.path)
        unknown = entry.pieces == 0 or (entry.pieces > 1 and index not in self._layers)
        if unknown or path.is_symlink() or not path.is_file():
            return
        with self._pool.use(path) as fd:
            offset = _next_data(fd, 0)
            while offset is not None and offset < entry.length:
                piece = entry.first_piece + offset // layout.piece_length
                _, start, length = layout.piece_span(piece)
                if not self.has_piece(piece) and check_piece(
                    layout, piece, read_at(fd, length, start), self._layers.get(index)
                ):
                    self._mark(index, piece, length)
                offset = _next_data(fd, start + length)

    def _settle_file(self, layout: Layout, index: FileIndex) -> None:
        """Give a file its length (as a hole where nothing is written yet).

        A file that still needs pieces and has other names (hard links from `ContentStore.add`) is first
        replaced by a copy: what the operator linked is never written to.
        """
        entry = layout.files[index]
        path = self._folder.file(entry.path)
        whole = all(self.has_piece(entry.first_piece + i) for i in range(entry.pieces))
        if path.is_symlink():
            path.unlink()
        if path.exists() and path.stat().st_size == entry.length and (whole or path.stat().st_nlink == 1):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_nlink > 1:
            own = self._folder.root / "own.tmp"
            shutil.copyfile(path, own)
            own.replace(path)
            self._unsynced.add(index)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            os.ftruncate(fd, entry.length)
        finally:
            os.close(fd)

    # --- reading ---------------------------------------------------------------------------------

    def has_piece(self, piece: int) -> bool:
        """Whether the piece is here and verified."""
        return 0 <= piece < 8 * len(self._have) and bool(self._have[piece >> 3] & (0x80 >> (piece & 7)))

    def bitfield(self) -> bytes:
        """One bit a piece, the first piece the highest bit of the first byte; empty without info."""
        return bytes(self._have)  # without the mutex: `finish` holds that while it flushes

    def read_block(self, piece: int, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` bytes into a piece that is here.

        Raises `RemoteProtocolError` for a block that is not, `StoreError` when the disk refuses.
        """
        if self.layout is None or not self.has_piece(piece):
            raise RemoteProtocolError(f"a block of piece {piece} was asked for, which is not here yet")
        with self._place:
            return read_span(self._pool, self._folder, self.layout, piece, offset, length)

    def read_now(self, piece: int, offset: int, length: int) -> bytearray | None:
        """As `read_block` when the block is in memory, at once; None when it is not or anything is wrong."""
        if self.layout is None or not self.has_piece(piece) or not self._place.acquire(blocking=False):
            return None
        try:
            return read_span_now(self._pool, self._folder, self.layout, piece, offset, length)
        finally:
            self._place.release()

    def layer(self, file_index: int) -> bytes:
        """The piece layer of a file. Raises `RemoteProtocolError` when it is not here, or there is none."""
        layer = self._layers.get(file_index)
        if layer is None:
            raise RemoteProtocolError(f"the piece layer of file {file_index} is not here")
        return layer

    def missing_layers(self) -> list[FileIndex]:
        """The files whose piece layer must be fetched before their pieces can be. Empty without info."""
        return list(self._layerless)

    # --- writing ---------------------------------------------------------------------------------

    def set_info(self, info: bytes) -> None:
        """Take the info dictionary a peer sent and make room for its files; nothing if it is known.

        Raises `RemoteProtocolError` when it is not the one `ref` names, `StoreError` (`DiskFullError` when
        it does not fit).
        """
        layout = parse_info(info, self.ref)
        with self._mutex, disk("making room for an item", self._folder.root, layout.length):
            self._require_open()
            if self.info is None:
                self._size(layout)
                write_atomic(self._folder.info, info, sync=False)  # believed only after a check of its hash
                self._prepare(info, layout)

    def set_layer(self, file_index: int, hashes: bytes) -> None:
        """Take the piece layer of a file; nothing if it is known.

        Raises `RemoteProtocolError` when it does not match the file's pieces root, `StoreError`.
        """
        layout = self._known_layout()
        in_range = 0 <= file_index < len(layout.files)
        if not in_range or not check_layer(layout.files[file_index], hashes, layout.piece_length):
            raise RemoteProtocolError(f"the piece layer does not match the pieces root of file {file_index}")
        with self._mutex, disk("storing a piece layer", self._folder.root, len(hashes)):
            self._require_open()
            if file_index in self._layers:
                return
            self._folder.layers.mkdir(exist_ok=True)
            write_atomic(self._folder.layer(file_index), hashes, sync=False)  # as the info: checked when read
            self._layers[file_index] = hashes
            self._layerless.remove(FileIndex(file_index))
            self._rehash_file(layout, FileIndex(file_index))

    def check_in_steps(self, piece: int, data: Buffer | Sequence[Buffer]) -> Generator[None, None, bool]:
        """Whether that is the piece, found out in short steps. Raises `LocalProtocolError` before info and
        layer are known."""
        layout = self._known_layout()
        index, _, _ = layout.piece_span(piece)
        return check_in_steps(layout, piece, data, self._layers.get(index))

    def write_piece(self, piece: int, data: Buffer | Sequence[Buffer], *, checked: bool = False) -> bool:
        """Verify the piece and write it. False, and nothing written, when its hash or length is wrong.

        `data`: the piece, or its consecutive parts; `checked`: `check_in_steps` said just now that it is
        right. Raises `LocalProtocolError` before info and layer are known, `StoreError` when the disk
        refuses.
        """
        parts = [data] if isinstance(data, Buffer) else data
        layout = self._known_layout()
        index, offset, _ = layout.piece_span(piece)
        if self.has_piece(piece):
            return True
        if not checked and not check_piece(layout, piece, parts, self._layers.get(index)):
            return False
        path = self._folder.file(layout.files[index].path)
        with disk(f"writing {path.name}", path.parent, sum(map(len, parts))):
            self._begin_writing()
            with self._pool.use(path, write=True) as fd:
                write_parts(fd, parts, offset)
        self._mark(index, piece, sum(map(len, parts)))
        return True

    def _begin_writing(self) -> None:
        with self._mutex:
            self._require_open()
            if self._noted:
                self._known_journal().reopen()
                self._noted = False

    def _mark(self, index: FileIndex, piece: int, length: int) -> None:
        """The piece is verified, and written; not before, lest a flush meanwhile take it for flushed."""
        with self._mutex:
            self._have[piece >> 3] |= 0x80 >> (piece & 7)
            self._unsynced.add(index)
            self._unflushed += length

    @property
    def unflushed_bytes(self) -> int:
        """Bytes of verified pieces that are in doubt after a crash."""
        return self._unflushed

    def flush(self) -> None:
        """Bring what was written to the disk, and note it in the journal; others may write meanwhile.

        Raises `StoreError` when the disk refuses.
        """
        with self._flushing, disk("flushing an item", self._folder.root):
            with self._mutex:
                if not self._open or not self._unsynced:
                    return
                changed, self._unsynced, self._unflushed = self._unsynced, set(), 0
                have, self._noted = bytes(self._have), False
            try:
                self._sync_metadata()
                self._known_journal().flush(have, changed, closed=False)
            except BaseException:
                with self._mutex:
                    self._unsynced |= changed
                raise

    def _sync_metadata(self) -> None:
        """A journal is no use without the info, layers and names of the files it speaks of."""
        if not self._metadata_synced:
            sync_tree(self._folder)
            self._metadata_synced = True

    # --- the end ---------------------------------------------------------------------------------

    def finish(self) -> Path:
        """Flush everything and move the item to the complete ones; the folder of its files.

        The item stays readable, and gives its lock back. Raises `LocalProtocolError` when pieces or
        layers are missing, `StoreError` when the disk refuses or a file has changed its length.
        """
        with self._flushing, self._mutex, disk("completing an item", self._folder.root):
            self._require_open()
            layout = self._known_layout()
            missing = layout.pieces - int.from_bytes(self._have, "big").bit_count()
            if missing or self._layerless:
                raise LocalProtocolError(f"the item is not complete: {missing} pieces are missing")
            for entry in layout.files:
                self._require_length(entry)
            journal = self._known_journal()
            for index in sorted(self._unsynced | journal.lost):
                journal.sync(index)
            sync_tree(self._folder)
            self._folder.journal.unlink(missing_ok=True)
            with self._place:
                self._pool.forget(self._folder.root)
                self._folder = self._complete(self._folder)
            self._release()
            return self._folder.files

    def _require_length(self, entry: FileEntry) -> None:
        path = self._folder.file(entry.path)
        if path.lstat().st_size != entry.length:
            raise StoreError(f"{path} changed its length while it was fetched: start the fetch again")

    def close(self) -> None:
        """Flush, note in the journal what is here, and give the lock back; a second call does nothing."""
        with self._flushing, self._mutex:
            if not self._open:
                return
            try:
                if self._journal is not None and not self._noted:
                    with disk("closing an item", self._folder.root):
                        self._sync_metadata()
                        self._journal.flush(bytes(self._have), self._unsynced, closed=True)
            finally:
                self._pool.forget(self._folder.root)
                if self.layout is None:
                    _remove_if_empty(self._folder.root)
                self._release()

    def _release(self) -> None:
        self._open = False
        self._lock.release()

    def _require_open(self) -> None:
        if not self._open:
            raise LocalProtocolError("the item is closed")

    def _known_journal(self) -> Journal:
        if self._journal is None:
            raise LocalProtocolError("the item's info is not known yet")
        return self._journal

    def _known_layout(self) -> Layout:
        if self.layout is None:
            raise LocalProtocolError("the item's info is not known yet")
        return self.layout


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty: what is in it is kept
        folder.rmdir()


def sync_tree(folder: ItemFolder) -> None:
    """Flush an item's metadata and every folder in it; the data files are flushed by who wrote them."""
    sync_path(folder.info)
    sync_path(folder.ref)
    for parent, _, names in os.walk(folder.root):
        if Path(parent) == folder.layers:
            for name in names:
                sync_path(Path(parent, name))
        sync_path(Path(parent))


def _next_data(fd: int, offset: int) -> int | None:
    """The first byte from `offset` on that is not in a hole; None when only a hole or the end follows."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:  # ENXIO: nothing there
        return None
