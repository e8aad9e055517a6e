"""Tests of `paris_p2p.wire.bep52`, against vectors made with libtorrent and by it where it is installed.

Content of a vector: its first `size` bytes of B0 || B1 …, Bi = SHA-256("bep52-vector/" tag "/" i as 8 bytes).
"""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError
from paris_p2p.ids import InfoHash
from paris_p2p.wire.bencode import bencode
from paris_p2p.wire.bep52 import (
    BLOCK_BYTES,
    MAX_FILES,
    MAX_INFO_BYTES,
    build_info,
    check_layer,
    check_piece,
    content_ref,
    info_hash,
    layer_root,
    parse_info,
    part_fault,
    path_fault,
    piece_count,
    piece_hash,
    read_layout,
    single_piece_root,
)
from paris_p2p.wire.content import ContentRef

VECTORS = json.loads((Path(__file__).parent / "data" / "bep52_vectors.json").read_text())["vectors"]
quick = settings(deadline=None, derandomize=True, max_examples=60)
P = 2 * BLOCK_BYTES


def vector_content(tag: str, size: int) -> bytes:
    prefix = b"bep52-vector/" + tag.encode() + b"/"
    blocks = (hashlib.sha256(prefix + i.to_bytes(8, "big")).digest() for i in range(-(-size // 32)))
    return b"".join(blocks)[:size]


def hash_bytes(data: bytes, piece_length: int) -> tuple[bytes, bytes]:
    """(pieces root, piece layer) of a file's bytes."""
    if len(data) <= piece_length:
        return (single_piece_root(data) if data else b""), b""
    pieces = (data[i : i + piece_length] for i in range(0, len(data), piece_length))
    layer = b"".join(piece_hash(piece, piece_length) for piece in pieces)
    return layer_root(layer, piece_length), layer


def info_of(files: dict[str, bytes], piece_length: int = P, name: str = "item") -> bytes:
    entries = [
        (tuple(path.split("/")), len(data), hash_bytes(data, piece_length)[0]) for path, data in files.items()
    ]
    return build_info(name, piece_length, entries)


def padded_root(data: bytes, leaves: int) -> bytes:
    """The definition, written as plainly as can be: every leaf present, zeros where there is no data."""
    row = [hashlib.sha256(data[i : i + BLOCK_BYTES]).digest() for i in range(0, len(data), BLOCK_BYTES)]
    row += [bytes(32)] * (leaves - len(row))
    while len(row) > 1:
        row = [hashlib.sha256(row[i] + row[i + 1]).digest() for i in range(0, len(row), 2)]
    return row[0]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_a_published_vector_is_met(vector: dict[str, Any]) -> None:
    (file,) = vector["files"]
    data = vector_content(file["path"], file["length"])
    assert hashlib.sha256(data).hexdigest() == vector["content_sha256"][file["path"]]
    root, layer = hash_bytes(data, vector["piece_length"])
    assert root.hex() == (file["pieces_root"] or "")
    assert len(layer) == 32 * file["piece_layer_hashes"]
    if layer:
        assert hashlib.sha256(layer).hexdigest() == file["piece_layer_sha256"]
        assert layer[:32].hex() == file["piece_layer_first"]
        assert layer[-32:].hex() == file["piece_layer_last"]
    info = build_info(vector["name"], vector["piece_length"], [((file["path"],), len(data), root)])
    assert info.hex() == vector["info_hex"]
    assert info_hash(info).hex() == vector["infohash_v2"]
    layout = parse_info(info, ContentRef(info_hash(info), len(data), vector["piece_length"]))
    assert layout.files[0].pieces_root == root and layout.length == len(data)


def test_libtorrent_agrees_on_a_folder(tmp_path: Path) -> None:
    libtorrent = pytest.importorskip("libtorrent")
    rng = random.Random(5)
    sizes = {"b.bin": 3 * P + 1, "a.txt": 10, "sub/z": P, "sub/y": P + 1, "sub.x": 1, "empty": 0, "Z": 9 * P}
    files = {path: rng.randbytes(size) for path, size in sizes.items()}
    for path, data in files.items():
        (tmp_path / "item" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "item" / path).write_bytes(data)
    listed = libtorrent.list_files(os.fspath(tmp_path / "item"))
    torrent = libtorrent.create_torrent(listed, P, libtorrent.create_torrent.v2_only)
    libtorrent.set_piece_hashes(torrent, os.fspath(tmp_path))
    generated = torrent.generate()
    ours = info_of(files)
    assert libtorrent.bencode(generated[b"info"]) == ours
    layers = {hash_bytes(data, P) for data in files.values() if len(data) > P}
    assert generated[b"piece layers"] == dict(layers)
    assert libtorrent.torrent_info(generated).num_pieces() == read_layout(ours).pieces


@quick
@given(st.integers(1, 9 * BLOCK_BYTES + 3), st.sampled_from([1, 2, 4, 8]))
def test_the_fast_hashing_agrees_with_the_definition(size: int, blocks: int) -> None:
    data = random.Random(size).randbytes(size)
    leaves = 1
    while leaves * BLOCK_BYTES < size:
        leaves *= 2
    if size > blocks * BLOCK_BYTES:  # a file of several pieces is padded to whole pieces
        leaves = max(leaves, blocks)
    assert hash_bytes(data, blocks * BLOCK_BYTES)[0] == padded_root(data, leaves)


def test_pieces_are_numbered_through_the_files_in_tree_order() -> None:
    files = {"z": b"z" * 5, "d/b": b"b" * (2 * P + 7), "d/a": b"", "d.c": b"c" * P, "e": b""}
    layout = read_layout(info_of(files))
    assert ["/".join(entry.path) for entry in layout.files] == ["d/a", "d/b", "d.c", "e", "z"]
    assert [(entry.first_piece, entry.pieces) for entry in layout.files] == [
        (0, 0),
        (0, 3),
        (3, 1),
        (4, 0),
        (4, 1),
    ]
    assert (layout.pieces, layout.length) == (5, 3 * P + 12)
    spans = [layout.piece_span(piece) for piece in range(layout.pieces)]
    assert spans == [(1, 0, P), (1, P, P), (1, 2 * P, 7), (2, 0, P), (4, 0, 5)]
    assert layout.layered() == (1,)
    for piece in (-1, 5):
        with pytest.raises(LocalProtocolError):
            layout.piece_span(piece)


def test_only_the_right_bytes_pass_as_a_piece() -> None:
    data = {"big": random.Random(1).randbytes(2 * P + 100), "small": b"small"}
    layout = read_layout(info_of(data))
    layer = hash_bytes(data["big"], P)[1]
    assert check_layer(layout.files[0], layer, P)
    for piece in range(3):
        part = data["big"][piece * P : (piece + 1) * P]
        assert check_piece(layout, piece, part, layer)
        assert not check_piece(layout, piece, part[:-1], layer)
        assert not check_piece(layout, piece, part + b"\0", layer)
        assert not check_piece(layout, piece, bytes([part[0] ^ 1]) + part[1:], layer)
    assert not check_piece(layout, 1, data["big"][:P], layer)
    assert check_piece(layout, 3, b"small", None) and not check_piece(layout, 3, b"smalt", None)
    with pytest.raises(LocalProtocolError, match="piece layer"):
        check_piece(layout, 0, data["big"][:P], None)


def test_only_the_right_hashes_pass_as_a_layer() -> None:
    data = {"big": random.Random(1).randbytes(3 * P), "small": b"small"}
    layout = read_layout(info_of(data))
    root, layer = hash_bytes(data["big"], P)
    assert layout.files[0].pieces_root == root
    for wrong in (
        b"",
        layer[:-32],
        layer + bytes(32),
        layer[:-1],
        bytes(32) + layer[32:],
        layer[32:] + layer[:32],
    ):
        assert not check_layer(layout.files[0], wrong, P)
    assert not check_layer(layout.files[1], layout.files[1].pieces_root, P)


def test_two_block_hashes_do_not_pass_as_a_64_byte_file() -> None:
    """Why an id needs the length: a root alone fits a two-block file and the 64 bytes of its hashes."""
    data = random.Random(3).randbytes(2 * BLOCK_BYTES)
    fake = b"".join(hashlib.sha256(data[i : i + BLOCK_BYTES]).digest() for i in (0, BLOCK_BYTES))
    layout = read_layout(info_of({"f": data}))
    assert single_piece_root(data) == single_piece_root(fake)
    assert not check_piece(layout, 0, fake, None)


def test_an_info_other_than_the_one_asked_for_is_refused() -> None:
    info = info_of({"f": b"x" * 10})
    ref = content_ref(info)
    assert parse_info(info, ref).length == 10
    for wrong in (
        ContentRef(InfoHash(bytes(32)), ref.length, ref.piece_length),
        ContentRef(ref.info_hash, ref.length + 1, ref.piece_length),
        ContentRef(ref.info_hash, ref.length, 2 * ref.piece_length),
    ):
        with pytest.raises(RemoteProtocolError):
            parse_info(info, wrong)
    with pytest.raises(RemoteProtocolError):
        parse_info(info + b" ", ref)


GOOD: dict[bytes, Any] = {
    b"file tree": {b"f": {b"": {b"length": 1, b"pieces root": bytes(32)}}},
    b"meta version": 2,
    b"name": b"f",
    b"piece length": P,
}


def test_the_info_the_bad_ones_are_made_of_is_good() -> None:
    assert read_layout(bencode(GOOD)).pieces == 1


@pytest.mark.parametrize(
    "change",
    [
        {b"meta version": 1},
        {b"meta version": b"2"},
        {b"piece length": 0},
        {b"piece length": -P},
        {b"piece length": P + 1},
        {b"piece length": 1 << 13},
        {b"piece length": b"x"},
        {b"name": b""},
        {b"name": b".."},
        {b"name": b"a/b"},
        {b"name": b"\xff"},
        {b"name": 3},
        {b"private": 1},
        {b"pieces": b""},
        {b"file tree": {}},
        {b"file tree": 1},
        {b"file tree": {b"": {b"length": 0}}},
        {b"file tree": {b"f": {}}},
        {b"file tree": {b"f": b""}},
        {b"file tree": {b"f": {b"": b""}}},
        {b"file tree": {b"f": {b"": {b"length": 0}, b"g": {b"": {b"length": 0}}}}},
        {b"file tree": {b"F": {b"": {b"length": 0}}, b"f": {b"": {b"length": 0}}}},
        {b"file tree": {"é".encode(): {b"": {b"length": 0}}, "e\u0301".encode(): {b"": {b"length": 0}}}},
        {b"file tree": {b"f": {b"": {b"length": -1}}}},
        {b"file tree": {b"f": {b"": {b"length": b"1"}}}},
        {b"file tree": {b"f": {b"": {b"length": 1}}}},
        {b"file tree": {b"f": {b"": {b"length": 0, b"pieces root": bytes(32)}}}},
        {b"file tree": {b"f": {b"": {b"length": 1, b"pieces root": bytes(31)}}}},
        {b"file tree": {b"f": {b"": {b"length": 1, b"pieces root": 1}}}},
        {b"file tree": {b"f": {b"": {b"length": 1, b"pieces root": bytes(32), b"attr": b"l"}}}},
        {b"file tree": {b"f": {b"": {b"length": 1 << 41, b"pieces root": bytes(32)}}}},
        {b"file tree": {b"f": {b"": {b"length": 1 << 40, b"pieces root": bytes(32)}}}},  # too many pieces
    ],
)  # fmt: skip
def test_a_malformed_info_is_refused(change: dict[bytes, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        read_layout(bencode(GOOD | change))


@pytest.mark.parametrize("key", sorted(GOOD))
def test_an_info_without_one_of_its_keys_is_refused(key: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read_layout(bencode({name: value for name, value in GOOD.items() if name != key}))


def test_an_info_that_is_too_large_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        read_layout(b"x" * (MAX_INFO_BYTES + 1))


def test_more_files_than_allowed_are_refused() -> None:
    tree: dict[bytes, Any] = {b"%d" % i: {b"": {b"length": 0}} for i in range(MAX_FILES)}
    assert len(read_layout(bencode(GOOD | {b"file tree": tree})).files) == MAX_FILES
    with pytest.raises(RemoteProtocolError, match="files"):
        read_layout(bencode(GOOD | {b"file tree": tree | {b"x": {b"": {b"length": 0}}}}))


@pytest.mark.parametrize(
    "part",
    ["", ".", "..", "a/b", "a\\b", "a\0", "\n", "c:", "a:b", "con", "NUL.txt", "com1", "x.", "x ",
     "a" * 256, "é" * 128, "\ud800", "a\x7f", "\x9b2J", "a\u202egpj.exe", "a\u200bb", "\ufeffa", "a\u2028b"],
)  # fmt: skip
def test_a_part_that_could_do_harm_is_refused(part: str) -> None:
    assert part_fault(part)
    assert path_fault(("fine", part))
    with pytest.raises(LocalProtocolError):
        build_info("item", P, [((part,), 0, b"")])


@pytest.mark.parametrize(
    "part", ["a", ".hidden", "a.b", "...x", "ü", "console", "a b", "a" * 255, "数", "می\u200cخواهم"]
)
def test_an_ordinary_part_is_allowed(part: str) -> None:
    assert part_fault(part) is None


@pytest.mark.parametrize("path", [(), ("a",) * 17, ("a" * 255,) * 5])
def test_a_path_of_bad_shape_is_refused(path: tuple[str, ...]) -> None:
    assert path_fault(path)


@pytest.mark.parametrize("paths", [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("A", "a")])
def test_paths_that_collide_are_not_built(paths: tuple[str, str]) -> None:
    with pytest.raises(LocalProtocolError):
        build_info("item", P, [(tuple(path.split("/")), 0, b"") for path in paths])


@quick
@given(st.integers(0, 1 << 14), st.binary(min_size=1, max_size=4))
def test_a_damaged_info_gives_a_layout_or_a_remote_protocol_error(position: int, junk: bytes) -> None:
    info = bytearray(info_of({"a/b": b"x" * 10, "c": b"y" * (P + 1)}))
    position %= len(info)
    info[position : position + len(junk)] = junk
    try:
        layout = read_layout(bytes(info))
    except RemoteProtocolError:
        return
    assert sum(entry.pieces for entry in layout.files) == layout.pieces


@quick
@given(
    st.dictionaries(st.text("abc.", min_size=1, max_size=3), st.integers(0, 3 * P), min_size=1, max_size=6),
    st.sampled_from([BLOCK_BYTES, P]),
)
def test_a_built_info_reads_back_as_the_same_files(sizes: dict[str, int], piece_length: int) -> None:
    sizes = {name: size for name, size in sizes.items() if part_fault(name) is None} or {"a": 0}
    roots = {name: bytes([i + 1]) * 32 if sizes[name] else b"" for i, name in enumerate(sizes)}
    info = build_info("item", piece_length, [((name,), sizes[name], roots[name]) for name in sizes])
    layout = parse_info(info, content_ref(info))
    assert {entry.path[0]: entry.length for entry in layout.files} == sizes
    assert {entry.path[0]: entry.pieces_root for entry in layout.files} == roots
    assert layout.pieces == sum(piece_count(size, piece_length) for size in sizes.values())
