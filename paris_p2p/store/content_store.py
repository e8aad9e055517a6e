"""The content store: every item a node holds, in one folder, addressed by content id.

Owns: adding, finding, removing and verifying items; the rules by which processes of one user share the
folder. Writers of an item hold its lock; complete items need none, for they only appear and vanish by a
rename. Folder names: `store.layout`. Does not own: fetching (`net`), or what is worth keeping (the programs).
"""

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from paris_p2p.core.quota import Holding, choose_removals
from paris_p2p.errors import ConfigError, DiskFullError, StoreError
from paris_p2p.ids import InfoHash, PieceIndex
from paris_p2p.store.durable import disk, sync_path, write_atomic
from paris_p2p.store.files import allocated, bring, delete, link_or_copy, link_tree, rename
from paris_p2p.store.handles import HandlePool
from paris_p2p.store.hashing import Described, SourceFile, describe, find_files, item_name
from paris_p2p.store.item import StoredItem, load_info
from paris_p2p.store.layout import ItemFolder, StoreFolders
from paris_p2p.store.locks import FileLock, holder, is_locked, try_lock
from paris_p2p.store.outside import is_item, is_placed, place_of, put_place, same_files, still_placed
from paris_p2p.store.partial import PartialItem, sync_tree
from paris_p2p.wire.bep52 import Layout, content_ref, piece_count, read_layout
from paris_p2p.wire.content import AnyRef, ContentRef, MagnetRef

AddMode = Literal["link", "copy", "move"]

_log = logging.getLogger(__name__)


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
        self._max_bytes: int | None = None
        self._pins: Callable[[], Collection[InfoHash]] = tuple
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

    def add(
        self,
        source: Path,
        *,
        piece_length: int | None = None,
        mode: AddMode = "link",
        foresee: Callable[[InfoHash], None] | None = None,
    ) -> ContentRef:
        """Make an item of a file or folder; its name is part of its id. An item already here stays as it is.

        `piece_length`: bytes, chosen by size when None. `mode`: `link` shares the file's bytes on disk with
        `source` (copying where that is impossible), which must not be changed in place from then on;
        `copy` duplicates them; `move` takes `source` away. `foresee` is told the id before the item is here,
        so that it can be pinned from its first moment. Raises `ConfigError` when `source` cannot be an
        item, `StoreError` when the disk refuses.
        """
        name = item_name(source)
        found = find_files(source)
        with disk(f"adding {name}", self.root, sum(file.length for file in found)):
            self._collect(sum(file.length for file in found))
            ref = self._add(name, found, piece_length, share=mode != "copy", foresee=foresee)
            if mode == "move":
                delete(source)
        return ref

    def _add(
        self,
        name: str,
        found: list[SourceFile],
        piece_length: int | None,
        *,
        share: bool,
        foresee: Callable[[InfoHash], None] | None,
    ) -> ContentRef:
        with self._staging() as stage:
            staged = [bring(file, stage.file(file.path), share=share) for file in found]
            described = describe(name, staged, piece_length)
            ref = content_ref(described.info)
            if foresee is not None:
                foresee(ref.info_hash)
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
            shutil.copytree(source.root, stage.root, copy_function=link_or_copy, dirs_exist_ok=True)
            sync_tree(stage)
            self._complete(stage, info_hash)
        self._drop_partial(info_hash)
        return ref

    def place(
        self,
        source: Path,
        *,
        piece_length: int | None = None,
        threads: int = 1,
        hashing: Callable[[int], None] | None = None,
    ) -> ContentRef:
        """Make an item of a file or folder that stays where it is, to be read there.

        It is hashed (in `threads` threads) unless it was placed before and none of its files changed since.
        `hashing` is told how many bytes will be. An item of the same id that was here already stays, unless
        it was placed elsewhere. Raises as `add`.
        """
        name, found, place = item_name(source), find_files(source), place_of(source)
        for folder in self._folders.listed("complete"):
            if still_placed(folder, place, name, found, piece_length):
                return folder.read_ref()
        if hashing is not None:
            hashing(sum(file.length for file in found))
        with disk(f"hashing {name}", self.root), self._staging() as stage:
            described = describe(name, found, piece_length, threads=threads)
            ref = content_ref(described.info)
            _write_metadata(stage, ref, described)
            put_place(stage, place, ref.info_hash, described.layout)
            if self.has(ref.info_hash) and is_placed(self._folders.complete(ref.info_hash)):
                self.remove(ref.info_hash)
            self._complete(stage, ref.info_hash)
        self._drop_partial(ref.info_hash)
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

    def ids(self) -> list[InfoHash]:
        """The ids of the complete items, damaged ones too. Raises `StoreError`."""
        return [InfoHash(bytes.fromhex(folder.root.name)) for folder in self._folders.listed("complete")]

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
        item = StoredItem(folder, folder.read_ref(), self._pool)
        with disk("noting that an item is used", self.root):
            os.utime(folder.root)
        return item

    def _existing(self, info_hash: InfoHash) -> ItemFolder:
        if not self.has(info_hash):
            raise StoreError(f"item {info_hash.hex()[:16]}… is not complete in {self.root}")
        return self._folders.complete(info_hash)

    def layout(self, info_hash: InfoHash) -> Layout:
        """The layout of a complete item. Raises `StoreError` when it is not complete, or damaged."""
        folder = self._existing(info_hash)
        return load_info(folder, folder.read_ref())[1]

    def begun(self, info_hash: InfoHash) -> Layout | None:
        """The layout of an item that is being fetched, once it is known. Raises `StoreError`."""
        folder = self._folders.partial(info_hash)
        return load_info(folder, MagnetRef(info_hash))[1] if folder.info.exists() else None

    def hand_out(self, info_hash: InfoHash, folder: Path) -> Path:
        """Give a complete item's files a second name: `folder`/its name, on the same file system.

        They are shared, not copied; without hard links they are moved, and the item leaves the store. Files
        that are the item's already stay. Raises `ConfigError` when something else has that name,
        `StoreError`.
        """
        item, layout = self._existing(info_hash), self.layout(info_hash)
        target = folder / layout.name
        if target.exists() and (same_files(item.files, target, layout) or is_item(target, layout, info_hash)):
            return target
        if target.exists() or target.is_symlink():
            raise ConfigError(
                f"{target} exists and is something else: move it away, or choose another folder"
            )
        with disk(f"putting {target} in place", folder), self._staging() as stage:
            if link_tree(item.files, stage.files):
                rename(_top(stage, layout), target)
                return target
        with disk(f"moving {target} in place", folder):
            rename(_top(item, layout), target)
        self.remove(info_hash)
        return target

    # --- fetching --------------------------------------------------------------------------------

    def foretell(self, ref: ContentRef, info: bytes, layers: Mapping[int, bytes]) -> None:
        """Note the metadata of an item before it is fetched; nothing when the item is here, or begun.

        It is checked when the fetch begins. Raises `ItemBusyError`, `StoreError`.
        """
        lock = self._lock(ref.info_hash)
        try:
            folder = self._folders.partial(ref.info_hash)
            if not self.has(ref.info_hash) and not folder.info.exists():
                with disk("noting an item's metadata", self.root):
                    folder.root.mkdir(exist_ok=True)
                    _write_metadata(folder, ref, Described(info, read_layout(info), dict(layers)))
        finally:
            lock.release()

    def begin(self, ref: AnyRef) -> PartialItem:
        """Start or resume a fetch, holding the item's lock. May hash what is there (seconds a GB).

        Raises `ItemBusyError` when another fetch of it is running (naming the process), `DiskFullError`
        when the disk has no room for what is missing, `StoreError` when the item is complete already.
        """
        lock = self._lock(ref.info_hash)
        try:
            if self.has(ref.info_hash):
                raise StoreError(f"item {ref.info_hash.hex()[:16]}… is complete already")
            folder = self._folders.partial(ref.info_hash)
            if isinstance(ref, ContentRef):
                self._require_room(ref, folder)
            with disk("beginning a fetch", self.root):
                folder.root.mkdir(exist_ok=True)
                if isinstance(ref, ContentRef):
                    folder.write_ref(ref)
            return PartialItem(
                folder,
                ref,
                self._pool,
                lock,
                lambda finished: self._complete(finished, ref.info_hash),
                self._require_room,
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

    # --- room ------------------------------------------------------------------------------------

    def limit(self, max_bytes: int | None, pins: Callable[[], Collection[InfoHash]]) -> None:
        """From now on hold at most `max_bytes`: whatever needs room displaces the least valuable items.

        `pins`: the items that must stay whatever happens, asked each time, from any thread. A fetch that
        does not fit beside them is refused (`DiskFullError`); what is added here is not, it is made here.
        """
        self._max_bytes, self._pins = max_bytes, pins

    def _require_room(self, ref: ContentRef, folder: ItemFolder) -> None:
        needed = max(0, ref.length - allocated(folder.root))
        over_quota = self._collect(needed)
        if over_quota > 0:
            raise DiskFullError(
                f"the quota of {self._max_bytes} bytes for {self.root} is {over_quota} bytes too small for "
                f"an item of {ref.length} bytes beside what must stay: raise it (--max-disk)"
            )
        missing = needed - self.free_bytes()
        if missing > 0:
            raise DiskFullError(
                f"disk full: {missing} more bytes are needed under {self.root} "
                f"for an item of {ref.length} bytes"
            )

    def _collect(self, needed: int) -> int:
        """Remove what the quota cannot hold beside `needed` more bytes; the bytes that are still too many."""
        if self._max_bytes is None:
            return 0
        holdings = self.holdings()
        excess = sum(holding.bytes_on_disk for holding in holdings) + needed - self._max_bytes
        for info_hash in choose_removals(holdings, excess, self._pins()):
            try:
                self.remove(info_hash)
            except ItemBusyError:
                continue  # it is being written: as good as pinned
            _log.info("removed item %s to stay within the quota", info_hash.hex()[:16])
            excess -= next(h.bytes_on_disk for h in holdings if h.info_hash == info_hash)
        return excess

    def holdings(self) -> list[Holding]:
        """What the store holds, and what it takes on disk; what is being fetched counts whole.

        Raises `StoreError`.
        """
        found = []
        with disk("measuring the store", self.root):
            for complete in (True, False):
                for folder in self._folders.listed("complete" if complete else "partial"):
                    found.append(self._holding(folder, complete))
        return found

    def _holding(self, folder: ItemFolder, complete: bool) -> Holding:
        info_hash = InfoHash(bytes.fromhex(folder.root.name))
        size = allocated(folder.root)
        if not complete and folder.ref.exists() and is_locked(self._folders.lock(info_hash)):
            size = max(size, folder.read_ref().length)
        used = folder.root.stat().st_mtime if folder.root.exists() else 0.0  # it may go at any moment
        return Holding(info_hash, size, complete, used)

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
        folder = self._existing(info_hash)
        ref = self._provable_ref(folder, info_hash)
        try:
            item = StoredItem(folder, ref, self._pool)
        except StoreError:
            bad = [PieceIndex(i) for i in range(max(1, piece_count(ref.length, ref.piece_length)))]
        else:
            bad = [PieceIndex(i) for i in range(item.layout.pieces) if not item.piece_is_good(i)]
        if bad:
            self._demote(info_hash)
        return bad

    def _provable_ref(self, folder: ItemFolder, info_hash: InfoHash) -> ContentRef:
        """The item's reference; a damaged one is written again from the info dictionary.

        Raises `StoreError` when that is damaged too: then the item is removed, for nothing of it can be
        proved.
        """
        try:
            ref = folder.read_ref()
            if ref.info_hash == info_hash:
                return ref
        except StoreError:
            pass  # what follows is for this case
        try:
            _, layout = load_info(folder, MagnetRef(info_hash))
        except StoreError as error:
            self.remove(info_hash)
            raise StoreError(f"item {info_hash.hex()[:16]}… was damaged beyond use and removed") from error
        ref = ContentRef(info_hash, layout.length, layout.piece_length)
        with disk("writing an item's reference", self.root):
            folder.write_ref(ref)
        return ref

    def _demote(self, info_hash: InfoHash) -> None:
        lock = self._lock(info_hash)
        try:
            with disk("setting a damaged item aside", self.root):
                partial, complete = self._folders.partial(info_hash), self._folders.complete(info_hash)
                self._discard(partial)
                if is_placed(complete):  # its files are not ours to mend
                    self._discard(complete)
                    return
                complete.journal.unlink(missing_ok=True)  # whatever it says, a piece was found bad
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


def _write_metadata(folder: ItemFolder, ref: ContentRef, described: Described) -> None:
    folder.write_ref(ref)
    write_atomic(folder.info, described.info, sync=False)
    if described.layers:
        folder.layers.mkdir()
    for index, layer in described.layers.items():
        write_atomic(folder.layer(index), layer, sync=False)


def _top(folder: ItemFolder, layout: Layout) -> Path:
    """What gets the item's name when it is handed out: its one file, or the folder of its files."""
    single = len(layout.files) == 1 and layout.files[0].path == (layout.name,)
    return folder.file((layout.name,)) if single else folder.files
