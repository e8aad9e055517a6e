"""The content id of files on disk, computed with memory for one piece at a time.

Owns: finding the files of an item, reading and hashing them. Does not own: the rules of ids (`wire.bep52`).
"""

import os
import stat
from collections.abc import Iterator
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


def describe(name: str, files: list[SourceFile], piece_length: int | None) -> Described:
    """Hash `files` as the item `name`. Raises as `content_id` does."""
    piece_length = _chosen_piece_length(files, piece_length)
    hashed = [(file.path, file.length, *_hash_file(file, piece_length)) for file in files]
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


def _hash_file(file: SourceFile, piece_length: int) -> tuple[bytes, bytes]:
    """(pieces root, piece layer) of a file; the root is empty for an empty file."""
    with disk(f"reading {file.source.name}", file.source.parent):
        fd = os.open(file.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            before = os.fstat(fd)
            result = _hash_open_file(fd, file.length, piece_length)
            after = os.fstat(fd)
        finally:
            os.close(fd)
    unchanged = before.st_mtime_ns == after.st_mtime_ns and before.st_size == after.st_size == file.length
    if result is None or not unchanged:
        raise StoreError(f"{file.source} changed while it was read: wait until nothing writes to it")
    return result


def _hash_open_file(fd: int, length: int, piece_length: int) -> tuple[bytes, bytes] | None:
    """As `_hash_file`; None when the file ends early."""
    layer = bytearray()
    for offset in range(0, length, piece_length):
        data = read_at(fd, min(piece_length, length - offset), offset)
        if len(data) < min(piece_length, length - offset):
            return None
        if length <= piece_length:
            return single_piece_root(data), b""
        layer += piece_hash(data, piece_length)
    return (layer_root(bytes(layer), piece_length), bytes(layer)) if layer else (b"", b"")
