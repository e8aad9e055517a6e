"""BitTorrent v2 content ids (BEP 52): merkle trees, the `info` dictionary, pieces and their checks.

Owns: hashing of blocks, pieces and files; building `info`; reading an `info` a stranger sent into a
`Layout` whose paths are safe to create; checking piece layers and pieces against it.
Does not own: files on disk (`store`), or moving bytes (`net`).

Pieces are numbered through the item: files in file-tree order, each starting on a new piece; an empty file
has no pieces. Exactly one `info` is accepted for given name, piece length and files: the four keys
`file tree`, `meta version`, `name`, `piece length`, and per file `length` and (unless empty) `pieces root`.
"""

import bisect
import functools
import hashlib
import re
import unicodedata
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError
from paris_p2p.ids import FileIndex, InfoHash, PieceIndex
from paris_p2p.wire.bencode import Bencoded, bdecode, bencode
from paris_p2p.wire.content import MAX_ITEM_BYTES, AnyRef, ContentRef

Buffer = bytes | bytearray | memoryview
BLOCK_BYTES = 1 << 14
"""Bytes under one leaf of a file's merkle tree (BEP 52)."""
HASH_BYTES = 32
CHECK_STEP_BYTES = 1 << 18
MAX_INFO_BYTES = 4 << 20
MAX_FILES = 10_000
MAX_PIECES = 1 << 21
"""Pieces of one item: its piece layers then take at most 64 MiB."""
MAX_PATH_PARTS = 16
MAX_PART_BYTES = 255
"""UTF-8 bytes of one path component: what common file systems take."""
MAX_PATH_BYTES = 1024

_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]"
)  # not the joiners: words of some languages, and emoji, are written with them
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{name}{i}" for name in ("com", "lpt") for i in range(1, 10)}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an item. `path`: components below the item; `length`: bytes.

    `pieces_root`: root of the file's merkle tree, 32 bytes, empty for an empty file. The file's pieces are
    `first_piece` … `first_piece + pieces - 1` in the item's numbering.
    """

    path: tuple[str, ...]
    length: int
    pieces_root: bytes
    first_piece: PieceIndex
    pieces: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an item's bytes belong. `pieces`, `length` (bytes): of all files together."""

    name: str
    piece_length: int
    files: tuple[FileEntry, ...]
    pieces: int
    length: int

    def piece_span(self, piece: int) -> tuple[FileIndex, int, int]:
        """(file index, offset in that file, length), the last two in bytes, of a piece.

        Raises `LocalProtocolError` for a piece the item does not have.
        """
        if not 0 <= piece < self.pieces:
            raise LocalProtocolError(f"piece {piece} of an item of {self.pieces}")
        index = bisect.bisect_right(self.files, piece, key=lambda entry: entry.first_piece) - 1
        entry = self.files[index]
        offset = (piece - entry.first_piece) * self.piece_length
        return FileIndex(index), offset, min(self.piece_length, entry.length - offset)

    def layered(self) -> tuple[FileIndex, ...]:
        """The files that have a piece layer: those larger than one piece."""
        return tuple(FileIndex(i) for i, entry in enumerate(self.files) if entry.pieces > 1)


def block_hashes(data: Buffer) -> list[bytes]:
    """The SHA-256 of each 16 KiB block of `data`; the last block may be short and is not padded."""
    view = memoryview(data)
    return [hashlib.sha256(view[i : i + BLOCK_BYTES]).digest() for i in range(0, len(view), BLOCK_BYTES)]


@functools.cache
def _padding(level: int) -> bytes:
    """The root of a subtree of `level` levels whose leaves all lie past the end of the file."""
    return hashlib.sha256(_padding(level - 1) * 2).digest() if level else bytes(HASH_BYTES)


def _root(nodes: Sequence[bytes], level: int, height: int) -> bytes:
    """The root, `height` levels above the leaves, over consecutive `nodes` that stand at `level`."""
    row = list(nodes)
    for current in range(level, height):
        if len(row) % 2:
            row.append(_padding(current))
        row = [hashlib.sha256(row[i] + row[i + 1]).digest() for i in range(0, len(row), 2)]
    return row[0]


def _levels(count: int) -> int:
    """Levels a tree needs above `count` nodes: the smallest n with 2^n >= count."""
    return (count - 1).bit_length()


def piece_hash(data: bytes | memoryview, piece_length: int) -> bytes:
    """The piece layer's entry for one piece of a file larger than a piece; `data` is not empty."""
    return _root(block_hashes(data), 0, _levels(piece_length // BLOCK_BYTES))


def single_piece_root(data: bytes | memoryview) -> bytes:
    """The pieces root of a file that fits in one piece: its tree is no higher than its blocks need."""
    leaves = block_hashes(data)
    return _root(leaves, 0, _levels(len(leaves)))


def layer_root(hashes: bytes, piece_length: int) -> bytes:
    """The pieces root over a piece layer (concatenated 32-byte hashes, not empty)."""
    nodes = [hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)]
    level = _levels(piece_length // BLOCK_BYTES)
    return _root(nodes, level, level + _levels(len(nodes)))


def piece_count(length: int, piece_length: int) -> int:
    """Pieces of a file of `length` bytes."""
    return -(-length // piece_length)


def check_layer(entry: FileEntry, hashes: bytes, piece_length: int) -> bool:
    """Whether `hashes` is the piece layer of `entry`, a file larger than one piece."""
    if entry.pieces < 2 or len(hashes) != entry.pieces * HASH_BYTES:
        return False
    return layer_root(hashes, piece_length) == entry.pieces_root


def check_piece(layout: Layout, piece: int, data: Buffer | Sequence[Buffer], layer: bytes | None) -> bool:
    """Whether `data` (or its consecutive parts) is the piece. `layer`: the checked layer of its file, None
    if that has one piece.

    Raises `LocalProtocolError` when the layer is needed and missing.
    """
    steps = check_in_steps(layout, piece, data, layer)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return bool(done.value)


def check_in_steps(
    layout: Layout, piece: int, data: Buffer | Sequence[Buffer], layer: bytes | None
) -> Generator[None, None, bool]:
    """As `check_piece`, for who must not be held up: hashes at most `CHECK_STEP_BYTES` between two yields."""
    index, offset, length = layout.piece_span(piece)
    entry = layout.files[index]
    parts = [data] if isinstance(data, Buffer) else data
    if sum(map(len, parts)) != length:
        return False
    if any(len(part) % BLOCK_BYTES for part in parts[:-1]):
        parts = [b"".join(parts)]
    leaves: list[bytes] = []
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), CHECK_STEP_BYTES):
            leaves += block_hashes(view[start : start + CHECK_STEP_BYTES])
            yield
    if entry.pieces == 1:
        return _root(leaves, 0, _levels(len(leaves))) == entry.pieces_root
    if layer is None:
        raise LocalProtocolError("a piece cannot be checked before its file's piece layer is known")
    at = offset // layout.piece_length * HASH_BYTES
    root = _root(leaves, 0, _levels(layout.piece_length // BLOCK_BYTES))
    return root == layer[at : at + HASH_BYTES]


def part_fault(part: str) -> str | None:
    """Why `part` may not be a path component, or None.

    Refused: what leaves the folder or ends the name (`.`, `..`, separators, NUL), what another system
    reads as something else (`:` as a stream or drive, device names, a trailing dot or space, which Windows
    drops), what steers a terminal or cannot be seen there (control characters, those that turn the direction
    of text, blanks without width), and what file systems cannot store (too long, not UTF-8).
    """
    if part in ("", ".", ".."):
        return "it is empty, '.' or '..'"
    if any(character in part for character in "/\\:") or _STEERING.search(part):
        return "it contains a separator, ':' or a control character"
    if part[-1] in ". " or part.split(".")[0].rstrip().lower() in _DEVICES:
        return "it ends in a dot or space, or is a device name on Windows"
    try:
        return "it is too long" if len(part.encode()) > MAX_PART_BYTES else None
    except UnicodeEncodeError:
        return "it is not valid Unicode"


def path_fault(path: Sequence[str]) -> str | None:
    """Why `path` may not be a file's path in an item, or None."""
    if not 1 <= len(path) <= MAX_PATH_PARTS:
        return f"it has no, or more than {MAX_PATH_PARTS}, components"
    fault = next(filter(None, map(part_fault, path)), None)
    if fault is None and len("/".join(path).encode()) > MAX_PATH_BYTES:
        return f"it is longer than {MAX_PATH_BYTES} bytes"
    return fault


def build_info(name: str, piece_length: int, files: Iterable[tuple[tuple[str, ...], int, bytes]]) -> bytes:
    """The bencoded `info` of an item; `files`: (path, length in bytes, pieces root or b"" when empty).

    A single file is the path `(name,)`. Raises `LocalProtocolError` for anything `read_layout` refuses.
    """
    tree: dict[bytes, Bencoded] = {}
    fault = part_fault(name)
    for path, length, root in files:
        fault = fault or path_fault(path)
        if fault:
            raise LocalProtocolError(f"{'/'.join((name, *path))!r} cannot be in a content item: {fault}")
        _insert(tree, path, {b"length": length} | ({b"pieces root": root} if length else {}))
    info: dict[bytes, Bencoded] = {
        b"file tree": tree,
        b"meta version": 2,
        b"name": name.encode(),
        b"piece length": piece_length,
    }
    data = bencode(info)
    try:
        read_layout(data)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"these files cannot be a content item: {error}") from None
    return data


def _insert(tree: dict[bytes, Bencoded], path: tuple[str, ...], properties: dict[bytes, Bencoded]) -> None:
    for part in path:
        node = tree.setdefault(part.encode(), {})
        assert isinstance(node, dict)  # only dictionaries are put in, here and below
        tree = node
    if tree:
        raise LocalProtocolError(f"{'/'.join(path)} stands twice in the item, or is a folder too")
    tree[b""] = properties


def info_hash(info: bytes) -> InfoHash:
    """The content id of a bencoded `info`."""
    return InfoHash(hashlib.sha256(info).digest())


def content_ref(info: bytes) -> ContentRef:
    """The reference to the item `info` describes. Raises `RemoteProtocolError` as `read_layout` does."""
    layout = read_layout(info)
    return ContentRef(info_hash(info), layout.length, layout.piece_length)


def parse_info(info: bytes, ref: AnyRef) -> Layout:
    """The layout of the item `ref` from the `info` a peer sent.

    Raises `RemoteProtocolError` unless it hashes to `ref.info_hash`, passes `read_layout`, and has the
    length and piece length of `ref`, where that says them.
    """
    if len(info) > MAX_INFO_BYTES or info_hash(info) != ref.info_hash:
        raise RemoteProtocolError("the info dictionary is not the one asked for: its hash differs")
    layout = read_layout(info)
    sizes = (layout.length, layout.piece_length)
    if isinstance(ref, ContentRef) and sizes != (ref.length, ref.piece_length):
        raise RemoteProtocolError("the info dictionary has another length or piece length than announced")
    return layout


def read_layout(info: bytes) -> Layout:
    """The layout in a bencoded `info`; `RemoteProtocolError` unless it is safe and exactly as BEP 52 and
    this module's header say."""
    value = bdecode(info, MAX_INFO_BYTES)
    if not isinstance(value, dict) or value.keys() != {
        b"file tree",
        b"meta version",
        b"name",
        b"piece length",
    }:
        raise RemoteProtocolError("info has missing or unknown keys")
    piece_length = value[b"piece length"]
    if value[b"meta version"] != 2 or not isinstance(piece_length, int):
        raise RemoteProtocolError("info is not of meta version 2, or its piece length is no number")
    try:
        ContentRef(InfoHash(bytes(HASH_BYTES)), 0, piece_length)
    except ValueError as error:
        raise RemoteProtocolError(f"info: {error}") from None
    name = _text(value[b"name"])
    fault = part_fault(name)
    if fault:
        raise RemoteProtocolError(f"info: the name {name[:80]!r} is refused: {fault}")
    leaves: list[tuple[tuple[str, ...], int, bytes]] = []
    _walk(value[b"file tree"], (), leaves)
    return _layout(name, piece_length, leaves)


def _layout(name: str, piece_length: int, leaves: Sequence[tuple[tuple[str, ...], int, bytes]]) -> Layout:
    files = []
    first = total = 0
    for path, length, root in leaves:
        count = piece_count(length, piece_length)
        files.append(FileEntry(path, length, root, PieceIndex(first), count))
        first, total = first + count, total + length
    if not files or total > MAX_ITEM_BYTES or first > MAX_PIECES:
        raise RemoteProtocolError("info has no files, too many bytes, or too many pieces")
    return Layout(name, piece_length, tuple(files), first, total)


def _walk(node: Bencoded, path: tuple[str, ...], leaves: list[tuple[tuple[str, ...], int, bytes]]) -> None:
    """Append the files below `node` in file-tree order (depth first, names by their bytes)."""
    if not isinstance(node, dict) or not node:
        raise RemoteProtocolError("info: a file tree entry is not a dictionary, or is empty")
    seen: set[str] = set()
    for key, child in node.items():
        if key == b"":
            if len(node) != 1 or not path:
                raise RemoteProtocolError("info: a path is both file and folder")
            leaves.append((path, *_properties(child)))
            continue
        here = (*path, _text(key))
        fault = path_fault(here)
        folded = unicodedata.normalize("NFC", here[-1].casefold())
        if fault or folded in seen:  # file systems that ignore case would write one over the other
            shown = "/".join(here)[:80]
            raise RemoteProtocolError(
                f"info: path {shown!r} is refused: {fault or 'another differs in case only'}"
            )
        seen.add(folded)
        _walk(child, here, leaves)
        if len(leaves) > MAX_FILES:
            raise RemoteProtocolError(f"info has more than {MAX_FILES} files")


def _properties(value: Bencoded) -> tuple[int, bytes]:
    """(length, pieces root) of a file's dictionary."""
    if not isinstance(value, dict):
        raise RemoteProtocolError("info: a file is not a dictionary")
    length, root = value.get(b"length"), value.get(b"pieces root", b"")
    if not isinstance(length, int) or not 0 <= length <= MAX_ITEM_BYTES or not isinstance(root, bytes):
        raise RemoteProtocolError("info: a file's length or pieces root is malformed")
    expected = {b"length", b"pieces root"} if length else {b"length"}
    if value.keys() != expected or len(root) != (HASH_BYTES if length else 0):
        raise RemoteProtocolError("info: a file has missing or unknown keys, or a pieces root of wrong size")
    return length, root


def _text(value: Bencoded) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else ""
    except UnicodeDecodeError:
        raise RemoteProtocolError("info: a name is not UTF-8") from None
