"""Reading items: the blocks, layers and pieces of what is on disk.

Owns: the read side shared by complete and partial items, and complete items themselves.
Does not own: writing (`store.partial`), or where items live (`store.content_store`).
"""

import functools
import os
import threading
from pathlib import Path
from typing import Protocol

from paris_p2p.errors import RemoteProtocolError, StoreError
from paris_p2p.store.durable import disk, read_at, read_now
from paris_p2p.store.handles import HandlePool
from paris_p2p.store.layout import ItemFolder
from paris_p2p.wire.bep52 import Layout, check_layer, check_piece, parse_info
from paris_p2p.wire.content import AnyRef, ContentRef


class ItemReader(Protocol):
    """What a peer can be served from; `StoredItem` and `PartialItem` both are it. Safe from any thread."""

    @property
    def ref(self) -> AnyRef: ...

    @property
    def info(self) -> bytes | None: ...

    @property
    def layout(self) -> Layout | None: ...

    def has_piece(self, piece: int) -> bool: ...

    def bitfield(self) -> bytes: ...

    def read_block(self, piece: int, offset: int, length: int) -> bytes: ...

    def read_now(self, piece: int, offset: int, length: int) -> bytearray | None: ...

    def layer(self, file_index: int) -> bytes: ...


def full_bitfield(pieces: int) -> bytes:
    """`pieces` set bits, the first piece the highest bit of the first byte; spare bits are 0 (BEP 3)."""
    return (((1 << pieces) - 1) << (-pieces % 8)).to_bytes((pieces + 7) // 8, "big")


def load_info(folder: ItemFolder, ref: AnyRef) -> tuple[bytes, Layout]:
    """The stored info dictionary, checked against `ref`. Raises `StoreError`."""
    with disk("reading an item's info", folder.root):
        info = folder.info.read_bytes()
    try:
        return info, parse_info(info, ref)
    except RemoteProtocolError as error:
        raise StoreError(f"{folder.info} is damaged: {error}") from None


def load_layer(folder: ItemFolder, layout: Layout, file_index: int) -> bytes:
    """The stored piece layer of a file, checked against its pieces root. Raises `StoreError`."""
    path = folder.layer(file_index)
    with disk("reading a piece layer", folder.root):
        layer = path.read_bytes()
    if not check_layer(layout.files[file_index], layer, layout.piece_length):
        raise StoreError(f"{path} is damaged: it does not match its file's pieces root")
    return layer


@functools.lru_cache(maxsize=1024)
def _file(folder: ItemFolder, path: tuple[str, ...]) -> Path:
    return folder.file(path)  # putting paths together costs as much as reading 64 KiB


def read_span(
    pool: HandlePool, folder: ItemFolder, layout: Layout, piece: int, offset: int, length: int
) -> bytes:
    """`length` bytes from `offset` bytes into `piece`.

    Raises `RemoteProtocolError` when that is not inside the piece (peers ask for blocks), `StoreError`
    when the file cannot be read or no longer has its length.
    """
    if not 0 <= piece < layout.pieces:
        raise RemoteProtocolError(f"a block of piece {piece} of {layout.pieces} was asked for")
    index, start, piece_length = layout.piece_span(piece)
    if not (offset >= 0 and 0 < length <= piece_length - offset):
        raise RemoteProtocolError(f"a block at {offset}+{length} of a piece of {piece_length} was asked for")
    entry = layout.files[index]
    path = _file(folder, entry.path)
    with disk(f"reading {path.name}", path.parent), pool.use(path) as fd:
        size = os.fstat(fd).st_size
        data = read_at(fd, length, start + offset) if size == entry.length else b""
    if len(data) != length:
        raise StoreError(
            f"{path} has {size} bytes instead of {entry.length}: it was changed after it was stored"
        )
    return data


def read_span_now(
    pool: HandlePool, folder: ItemFolder, layout: Layout, piece: int, offset: int, length: int
) -> bytearray | None:
    """As `read_span` where nothing has to be waited for; None where something has, or anything is wrong."""
    if not 0 <= piece < layout.pieces:
        return None
    index, start, piece_length = layout.piece_span(piece)
    entry = layout.files[index]
    if not (offset >= 0 and 0 < length <= piece_length - offset):
        return None
    with pool.use_if_open(_file(folder, entry.path)) as fd:
        if fd is None or os.fstat(fd).st_size != entry.length:
            return None
        return read_now(fd, length, start + offset)


class StoredItem:
    """A complete item, open for serving. All methods may be called from several threads."""

    def __init__(self, folder: ItemFolder, ref: ContentRef, pool: HandlePool) -> None:
        self.ref = ref
        self.info, self.layout = load_info(folder, ref)
        self._folder = folder
        self._pool = pool
        self._mutex = threading.Lock()
        self._layers: dict[int, bytes] = {}

    def has_piece(self, piece: int) -> bool:
        """Whether the piece can be read: all can."""
        return 0 <= piece < self.layout.pieces

    def bitfield(self) -> bytes:
        """One bit a piece, the first piece the highest bit of the first byte; all set."""
        return full_bitfield(self.layout.pieces)

    def read_block(self, piece: int, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` bytes into `piece`. Raises as `read_span` does."""
        return read_span(self._pool, self._folder, self.layout, piece, offset, length)

    def read_now(self, piece: int, offset: int, length: int) -> bytearray | None:
        """As `read_block` when the block is in memory, at once; None when it is not or anything is wrong."""
        return read_span_now(self._pool, self._folder, self.layout, piece, offset, length)

    def layer(self, file_index: int) -> bytes:
        """The piece layer (concatenated 32-byte hashes) of a file larger than one piece.

        Raises `RemoteProtocolError` for a file that has none, `StoreError` when it is damaged.
        """
        if not 0 <= file_index < len(self.layout.files) or self.layout.files[file_index].pieces < 2:
            raise RemoteProtocolError(f"file {file_index} has no piece layer")
        with self._mutex:
            if file_index not in self._layers:
                self._layers[file_index] = load_layer(self._folder, self.layout, file_index)
            return self._layers[file_index]

    def piece_is_good(self, piece: int) -> bool:
        """Read the piece back and hash it; what cannot be read is not good."""
        index, _, length = self.layout.piece_span(piece)
        try:
            layer = self.layer(index) if self.layout.files[index].pieces > 1 else None
            return check_piece(self.layout, piece, self.read_block(piece, 0, length), layer)
        except StoreError:
            return False

    def close(self) -> None:
        """Close the item's idle files. The item may be used again: they are then reopened."""
        self._pool.forget(self._folder.root)
