"""The content id of files on disk, computed with memory for one piece a thread.

Owns: finding the files of an item, reading and hashing them. Does not own: the rules of ids (`wire.bep52`).
"""

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from paris_p2p.errors import ConfigError, LocalProtocolError, StoreError
from paris_p2p.ids import InfoHash
from paris_p2p.store.durable import disk, read_at
from paris_p2p.wire.bep52 import (
    MAX_FILES,
    MAX_PIECES,
    Layout,
    build_info,
    layer_root,
    path_fault,
    piece_count,
    piece_hash,
    read_layout,
    single_piece_root,
)
from paris_p2p.wire.content import ContentRef, default_piece_length

STRETCH_BYTES = 16 << 20
"""What a thread hashes at a time: long enough that handing it out costs nothing."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to be hashed: its path inside the item, where it is, its length in bytes."""

    path: tuple[str, ...]
    source: Path
    length: int


@dataclass(frozen=True, slots=True)
class Described:
    """What hashing an item gives: bencoded `info`, its layout, and the piece layers by file index."""

    info: bytes
    layout: Layout
    layers: dict[int, bytes]


def content_id(path: Path, piece_length: int | None = None) -> tuple[bytes, Layout]:
    """The bencoded `info` and layout of a file or folder; its id is the SHA-256 of the former.

    `piece_length`: bytes, a power of two from 16 KiB; None chooses by size. Raises `ConfigError` when
    `path` cannot be a content item, `StoreError` when it cannot be read.
    """
    described = describe(item_name(path), find_files(path), piece_length)
    return described.info, described.layout


def item_name(source: Path) -> str:
    """The name an item made of `source` gets: the last component of its path."""
    return os.path.basename(os.path.abspath(source))  # noqa: PTH100, PTH119 - Path keeps `..`


def find_files(source: Path) -> list[SourceFile]:
    """The plain files of an item made of `source`. Raises `ConfigError` naming what cannot be in an item.

    Symbolic links are refused: what they point to may change without the link, and no peer could follow
    them. Only `source` itself may be one.
    """
    base = source.resolve()
    if base.is_file():
        return [_source_file((item_name(source),), base)]
    if not base.is_dir():
        raise ConfigError(f"{source} is neither a file nor a folder")
    files = []
    for path in _walk(base):
        files.append(_source_file(path.relative_to(base).parts, path))
        if len(files) > MAX_FILES:
            raise ConfigError(f"{source} has more than {MAX_FILES} files: pack them into larger ones")
    if not files:
        raise ConfigError(f"{source} is a folder without files")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    with disk("listing files", folder), os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _source_file(path: tuple[str, ...], source: Path) -> SourceFile:
    fault = path_fault(path)
    if fault:
        raise ConfigError(f"{str(source)!r} cannot be in a content item: {fault}; rename it")
    with disk("looking at a file", source.parent):
        status = source.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{source} is not a plain file: content items hold nothing else")
    return SourceFile(path, source, status.st_size)


def describe(name: str, files: list[SourceFile], piece_length: int | None, *, threads: int = 1) -> Described:
    """Hash `files` as the item `name`, in `threads` threads. Raises as `content_id` does."""
    piece_length = _chosen_piece_length(files, piece_length)
    hashed = _hash_files(files, piece_length, threads)
    try:
        info = build_info(name, piece_length, [(path, length, root) for path, length, root, _ in hashed])
    except LocalProtocolError as error:
        raise ConfigError(f"{name!r} cannot be a content item: {error}") from None
    layout = read_layout(info)
    layers = {path: layer for path, _, _, layer in hashed}
    return Described(info, layout, {index: layers[layout.files[index].path] for index in layout.layered()})


def _chosen_piece_length(files: list[SourceFile], piece_length: int | None) -> int:
    """The given piece length, or one that fits; checked before hours of hashing, not after."""
    total = sum(file.length for file in files)
    piece_length = default_piece_length(total) if piece_length is None else piece_length
    try:
        ContentRef(InfoHash(bytes(32)), total, piece_length)
    except ValueError as error:
        raise ConfigError(f"no content item can have these sizes: {error}") from None
    if sum(piece_count(file.length, piece_length) for file in files) > MAX_PIECES:
        raise ConfigError(
            f"pieces of {piece_length} bytes would be more than {MAX_PIECES}: choose longer ones"
        )
    return piece_length


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Bytes `start` … `stop` of a file, whole pieces of it: what one thread hashes at a time."""

    file: SourceFile
    start: int
    stop: int


def _hash_files(
    files: list[SourceFile], piece_length: int, threads: int
) -> list[tuple[tuple[str, ...], int, bytes, bytes]]:
    """(path, length, pieces root, piece layer) of each file; the root is empty for an empty file."""
    step = max(piece_length, STRETCH_BYTES // piece_length * piece_length)
    stretches = [
        _Stretch(file, start, min(start + step, file.length))
        for file in files
        for start in range(0, max(file.length, 1), step)
    ]
    hashes: dict[tuple[str, ...], list[bytes]] = {}
    before = {file.path: _stamp(file) for file in files}
    with ThreadPoolExecutor(threads) as pool:
        for stretch, found in zip(stretches, pool.map(_hasher(piece_length), stretches), strict=True):
            hashes.setdefault(stretch.file.path, []).append(found)
    for file in files:
        if _stamp(file) != before[file.path]:
            raise _changed(file)
    return [
        (file.path, file.length, *_tree(b"".join(hashes[file.path]), file, piece_length)) for file in files
    ]


def _hasher(piece_length: int) -> Callable[[_Stretch], bytes]:
    def hash_stretch(stretch: _Stretch) -> bytes:
        """The concatenated hashes of its pieces; of a file of one piece its root."""
        file = stretch.file
        one = file.length <= piece_length
        found = bytearray()
        with disk(f"reading {file.source.name}", file.source.parent):
            fd = os.open(file.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                for offset in range(stretch.start, stretch.stop, piece_length):
                    wanted = min(piece_length, stretch.stop - offset)
                    data = read_at(fd, wanted, offset)
                    if len(data) < wanted:
                        raise _changed(file)
                    found += single_piece_root(data) if one else piece_hash(data, piece_length)
            finally:
                os.close(fd)
        return bytes(found)

    return hash_stretch


def _tree(hashes: bytes, file: SourceFile, piece_length: int) -> tuple[bytes, bytes]:
    """(pieces root, piece layer) of a file; a file of one piece has no layer."""
    if file.length <= piece_length:
        return hashes, b""
    return layer_root(hashes, piece_length), hashes


def _stamp(file: SourceFile) -> tuple[int, int, int]:
    """What changes when the file does. Raises `StoreError` when it is no longer as long as it was found."""
    with disk(f"looking at {file.source.name}", file.source.parent):
        status = file.source.lstat()
    if status.st_size != file.length:
        raise _changed(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _changed(file: SourceFile) -> StoreError:
    return StoreError(f"{file.source} changed while it was read: wait until nothing writes to it")
