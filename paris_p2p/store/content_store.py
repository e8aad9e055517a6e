"""The content store: every item a node holds, in one folder, addressed by content id.

Owns: adding, finding, removing and verifying items; the rules by which processes of one user share the
folder. Writers of an item hold its lock; complete items need none, for they only appear and vanish by a
rename. Folder names: `store.layout`. Does not own: fetching (`net`), or what is worth keeping (the programs).
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from paris_p2p.errors import StoreError
from paris_p2p.ids import InfoHash, PieceIndex
from paris_p2p.store.durable import disk, sync_path, write_atomic
from paris_p2p.store.handles import HandlePool
from paris_p2p.store.hashing import Described, SourceFile, describe, find_files, item_name
from paris_p2p.store.item import StoredItem
from paris_p2p.store.layout import ItemFolder, StoreFolders
from paris_p2p.store.locks import FileLock, holder, try_lock
from paris_p2p.store.partial import PartialItem, sync_tree
from paris_p2p.wire.bep52 import content_ref, piece_count
from paris_p2p.wire.content import ContentRef

AddMode = Literal["link", "copy", "move"]

_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP}


class ItemBusyError(StoreError):
    """Someone else, mostly another process, is writing the item: it will be done or free again."""


class ContentStore:
    """One folder of content items, safe for several threads, and several processes of one user."""

    def __init__(self, root: Path, *, clean: bool = False) -> None:
        """Open the store at `root`, creating it if need be. Raises `StoreError`.

        `clean`: also remove what processes that died left half added.
        """
        self.root = root.absolute()
        self._folders = StoreFolders(self.root)
        self._pool = HandlePool()
        with disk("opening the content store", self.root):
            self._folders.make()
            if clean:
                self._sweep()

    def _sweep(self) -> None:
        for stage in self._folders.staging.iterdir():
            if stage.suffix == ".lock":
                continue
            lock = try_lock(stage.with_suffix(".lock"))
            if lock:  # nobody is at work in it
                shutil.rmtree(stage, ignore_errors=True)
                lock.release()

    @contextmanager
    def _staging(self) -> Iterator[ItemFolder]:
        """A folder of our own, removed at the end with what is still in it."""
        stage = self._folders.staging / secrets.token_hex(8)
        lock = try_lock(stage.with_suffix(".lock"))
        assert lock is not None  # nobody else draws the same 64 bits
        try:
            stage.mkdir()
            yield ItemFolder(stage)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            lock.release()

    # --- adding ----------------------------------------------------------------------------------

    def add(self, source: Path, *, piece_length: int | None = None, mode: AddMode = "link") -> ContentRef:
        """Make an item of a file or folder; its name is part of its id. An item already here stays as it is.

        `piece_length`: bytes, chosen by size when None. `mode`: `link` shares the file's bytes on disk with
        `source` (copying where that is impossible), which must not be changed in place from then on;
        `copy` duplicates them; `move` takes `source` away. Raises `ConfigError` when `source` cannot be an
        item, `StoreError` when the disk refuses.
        """
        name = item_name(source)
        found = find_files(source)
        with disk(f"adding {name}", self.root, sum(file.length for file in found)):
            ref = self._add(name, found, piece_length, share=mode != "copy")
            if mode == "move":
                _delete(source)
        return ref

    def _add(
        self, name: str, found: list[SourceFile], piece_length: int | None, *, share: bool
    ) -> ContentRef:
        with self._staging() as stage:
            staged = [_bring(file, stage, share) for file in found]
            described = describe(name, staged, piece_length)
            ref = content_ref(described.info)
            if not self.has(ref.info_hash):
                _write_metadata(stage, ref, described)
                for file in staged:
                    sync_path(file.source)
                sync_tree(stage)
                self._complete(stage, ref.info_hash)
        self._drop_partial(ref.info_hash)
        return ref

    def adopt(self, other: "ContentStore", info_hash: InfoHash) -> ContentRef:
        """Take over a complete item of another store, sharing its bytes on disk where that is possible.

        Raises `StoreError` when it is not complete there, or the disk refuses.
        """
        source = other._existing(info_hash)
        ref = source.read_ref()
        if self.has(info_hash):
            return ref
        with self._staging() as stage, disk("adopting an item", self.root, ref.length):
            shutil.copytree(source.root, stage.root, copy_function=_link_or_copy, dirs_exist_ok=True)
            sync_tree(stage)
            self._complete(stage, info_hash)
        self._drop_partial(info_hash)
        return ref

    def _complete(self, folder: ItemFolder, info_hash: InfoHash) -> ItemFolder:
        """Move a finished folder to the complete items; one already there wins."""
        target = self._folders.complete(info_hash)
        try:
            folder.root.rename(target.root)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(folder.root)
        sync_path(target.root.parent)
        return target

    def _drop_partial(self, info_hash: InfoHash) -> None:
        """Remove a half-fetched twin of a complete item, unless someone is at work on it: they will find
        the complete one when they finish."""
        partial = self._folders.partial(info_hash)
        if not partial.root.exists():
            return
        lock = try_lock(self._folders.lock(info_hash))
        if lock:
            self._discard(partial)
            lock.release()

    # --- finding ---------------------------------------------------------------------------------

    def complete(self) -> list[ContentRef]:
        """Every complete item, in order of ids. Raises `StoreError`."""
        return [folder.read_ref() for folder in self._folders.listed("complete")]

    def partial(self) -> list[ContentRef]:
        """Every item whose fetch was begun and not finished. Raises `StoreError`."""
        return [folder.read_ref() for folder in self._folders.listed("partial") if folder.ref.exists()]

    def has(self, info_hash: InfoHash) -> bool:
        """Whether the item is complete."""
        return self._folders.complete(info_hash).root.exists()

    def files(self, info_hash: InfoHash) -> Path:
        """The folder that holds a complete item's files (for a single file: the folder with that file).

        Only to be read. Raises `StoreError` when the item is not complete.
        """
        return self._existing(info_hash).files

    def ref(self, info_hash: InfoHash) -> ContentRef:
        """The reference of a complete item. Raises `StoreError` when it is not complete."""
        return self._existing(info_hash).read_ref()

    def open(self, info_hash: InfoHash) -> StoredItem:
        """A complete item for reading. Raises `StoreError` when it is not complete, or damaged."""
        folder = self._existing(info_hash)
        return StoredItem(folder, folder.read_ref(), self._pool)

    def _existing(self, info_hash: InfoHash) -> ItemFolder:
        if not self.has(info_hash):
            raise StoreError(f"item {info_hash.hex()[:16]}… is not complete in {self.root}")
        return self._folders.complete(info_hash)

    # --- fetching --------------------------------------------------------------------------------

    def begin(self, ref: ContentRef) -> PartialItem:
        """Start or resume a fetch, holding the item's lock. May hash what is there (seconds a GB).

        Raises `ItemBusyError` when another fetch of it is running (naming the process), `StoreError` when
        the item is complete already, or the disk has no room for what is missing.
        """
        lock = self._lock(ref.info_hash)
        try:
            if self.has(ref.info_hash):
                raise StoreError(f"item {ref.info_hash.hex()[:16]}… is complete already")
            folder = self._folders.partial(ref.info_hash)
            self._require_room(ref, folder)
            with disk("beginning a fetch", self.root):
                folder.root.mkdir(exist_ok=True)
                folder.write_ref(ref)
            return PartialItem(
                folder, ref, self._pool, lock, lambda finished: self._complete(finished, ref.info_hash)
            )
        except BaseException:
            lock.release()
            raise

    def _lock(self, info_hash: InfoHash) -> FileLock:
        path = self._folders.lock(info_hash)
        with disk("locking an item", self.root):
            lock = try_lock(path)
        if lock is None:
            raise ItemBusyError(f"item {info_hash.hex()[:16]}… is in use by {holder(path)}")
        return lock

    def _require_room(self, ref: ContentRef, folder: ItemFolder) -> None:
        needed = max(0, ref.length - _allocated(folder.root))
        missing = needed - self.free_bytes()
        if missing > 0:
            raise StoreError(
                f"disk full: {missing} more bytes are needed under {self.root} "
                f"for an item of {ref.length} bytes"
            )

    def free_bytes(self) -> int:
        """Bytes this user can still write where the store is. Raises `StoreError`."""
        with disk("asking for free space", self.root):
            return shutil.disk_usage(self.root).free

    # --- keeping it right ------------------------------------------------------------------------

    def verify(self, info_hash: InfoHash) -> list[PieceIndex]:
        """Hash a complete item again; the pieces that are not what they should be.

        When there are any, the item is taken out of the complete ones and becomes a partial one: it is no
        longer served, `begin` keeps its good pieces, and a fetch replaces the others. Without readable
        metadata every piece the item's length implies is named. Raises `StoreError`.
        """
        ref = self.ref(info_hash)
        try:
            item = self.open(info_hash)
        except StoreError:
            bad = [PieceIndex(i) for i in range(max(1, piece_count(ref.length, ref.piece_length)))]
        else:
            bad = [PieceIndex(i) for i in range(item.layout.pieces) if not item.piece_is_good(i)]
        if bad:
            self._demote(info_hash)
        return bad

    def _demote(self, info_hash: InfoHash) -> None:
        lock = self._lock(info_hash)
        try:
            with disk("setting a damaged item aside", self.root):
                partial, complete = self._folders.partial(info_hash), self._folders.complete(info_hash)
                self._discard(partial)
                complete.root.rename(partial.root)
                self._pool.forget(complete.root)
                sync_path(complete.root.parent)
        finally:
            lock.release()

    def remove(self, info_hash: InfoHash) -> None:
        """Delete an item, complete or partial; nothing if there is none. Raises `StoreError`, also when
        the item is being fetched."""
        lock = self._lock(info_hash)
        try:
            with disk("removing an item", self.root):
                self._discard(self._folders.complete(info_hash))
                self._discard(self._folders.partial(info_hash))
        finally:
            lock.release()

    def _discard(self, folder: ItemFolder) -> None:
        """Delete an item's folder: out of sight by one rename, then file by file."""
        if folder.root.exists():
            with self._staging() as stage:
                folder.root.rename(stage.root)
        self._pool.forget(folder.root)

    def close(self) -> None:
        """Close idle files. The store may be used again: they are then reopened."""
        self._pool.forget(self.root)


def _allocated(folder: Path) -> int:
    """Bytes of disk a folder's files take (holes take none)."""
    return sum(
        os.lstat(Path(parent, name)).st_blocks * 512 for parent, _, names in os.walk(folder) for name in names
    )


def _bring(file: SourceFile, stage: ItemFolder, share: bool) -> SourceFile:
    """Put a file into the staged item: the same bytes on disk where `share` allows it, else a copy."""
    target = stage.file(file.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (share and _link(file.source, target)):
        shutil.copyfile(file.source, target, follow_symlinks=False)
    return SourceFile(file.path, target, target.lstat().st_size)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    return True


def _link_or_copy(source: str, target: str) -> None:
    if not _link(Path(source), Path(target)):
        shutil.copyfile(source, target, follow_symlinks=False)


def _write_metadata(folder: ItemFolder, ref: ContentRef, described: Described) -> None:
    folder.write_ref(ref)
    write_atomic(folder.info, described.info, sync=False)
    if described.layers:
        folder.layers.mkdir()
    for index, layer in described.layers.items():
        write_atomic(folder.layer(index), layer, sync=False)


def _delete(source: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.rmtree(source)
    else:
        source.unlink()
