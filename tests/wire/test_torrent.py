"""Tests of `paris_p2p.wire.torrent`, against libtorrent."""

from pathlib import Path
from random import Random

import libtorrent
import pytest

from paris_p2p.errors import ConfigError
from paris_p2p.ids import InfoHash
from paris_p2p.store.hashing import Described, describe, find_files
from paris_p2p.wire.bencode import bdecode, bencode
from paris_p2p.wire.torrent import MAX_TORRENT_BYTES, build_torrent, magnet_link, parse_item_id, read_torrent

P = 1 << 15
SIZES = {"big.bin": 9 * P + 1, "one-piece": P, "empty": 0, "sub/a": 3 * P, "sub/deep/ü ö.txt": 17, "sub/b": 1}
ID = InfoHash(bytes(range(32)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "some item"
    rng = Random(5)
    for path, size in SIZES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(rng.randbytes(size))
    return folder


@pytest.fixture(scope="module", params=["folder", "file"])
def item(source: Path, request: pytest.FixtureRequest) -> tuple[Path, Described]:
    path = source if request.param == "folder" else source / "big.bin"
    return path, describe(path.name, find_files(path), P)


def torrent_of(described: Described) -> bytes:
    return build_torrent(described.info, described.layers)


def theirs(path: Path, flags: int) -> bytes:
    made = libtorrent.create_torrent(libtorrent.list_files(str(path)), P, flags)
    libtorrent.set_piece_hashes(made, str(path.parent))
    return bytes(libtorrent.bencode(made.generate()))


def test_libtorrent_gives_the_same_files_the_same_id(item: tuple[Path, Described]) -> None:
    path, described = item
    made = theirs(path, libtorrent.create_torrent.v2_only)
    read = read_torrent(made)
    assert read.info == described.info and dict(read.layers) == described.layers
    assert libtorrent.load_torrent_buffer(made).info_hashes.v2.to_bytes() == read.ref.info_hash


def test_libtorrent_reads_what_is_exported(item: tuple[Path, Described]) -> None:
    _, described = item
    loaded = libtorrent.load_torrent_buffer(torrent_of(described))
    assert loaded.info_hashes.has_v2() and not loaded.info_hashes.has_v1()
    ref, found = read_torrent(torrent_of(described)).ref, loaded.ti
    assert found is not None and found.name() == described.layout.name
    assert loaded.info_hashes.v2.to_bytes() == ref.info_hash
    assert found.piece_length() == ref.piece_length == P and found.num_pieces() == described.layout.pieces


def test_an_exported_torrent_reads_back_whole(item: tuple[Path, Described]) -> None:
    _, described = item
    read = read_torrent(torrent_of(described))
    assert (read.info, read.layout, dict(read.layers)) == (
        described.info,
        described.layout,
        described.layers,
    )


def test_layers_that_are_missing_are_left_to_the_peers(item: tuple[Path, Described]) -> None:
    value = bdecode(torrent_of(item[1]), MAX_TORRENT_BYTES)
    assert isinstance(value, dict)
    assert read_torrent(bencode({b"info": value[b"info"]})).layers == {}


@pytest.mark.parametrize("kind", ["v1_only", None])
def test_v1_and_hybrid_torrents_are_refused_with_the_reason(source: Path, kind: str | None) -> None:
    flags = getattr(libtorrent.create_torrent, kind) if kind else 0
    with pytest.raises(ConfigError, match="v1 or hybrid"):
        read_torrent(theirs(source, flags))


def test_a_damaged_layer_names_its_file(source: Path) -> None:
    described = describe("some item", find_files(source), P)
    index = described.layout.layered()[0]
    layers = described.layers | {index: bytes(len(described.layers[index]))}
    with pytest.raises(ConfigError, match=r"piece layer of 'big\.bin' is wrong"):
        read_torrent(build_torrent(described.info, layers))


@pytest.mark.parametrize("data", [b"", b"de", b"i1e", b"d4:infodee", b"<html>", b"d4:info3:abce"])
def test_other_files_are_no_torrents(data: bytes) -> None:
    with pytest.raises(ConfigError):
        read_torrent(data)


def test_a_magnet_link_is_understood_here_and_by_libtorrent() -> None:
    link = magnet_link(ID, "a name & more")
    assert link == f"magnet:?xt=urn:btmh:1220{ID.hex()}&dn=a%20name%20%26%20more"
    assert parse_item_id(link) == ID
    parsed = libtorrent.parse_magnet_uri(link)
    assert (parsed.info_hashes.v2.to_bytes(), parsed.name) == (ID, "a name & more")


@pytest.mark.parametrize("text", [ID.hex(), ID.hex().upper(), f"urn:btmh:1220{ID.hex()}"])
def test_every_form_of_an_id_is_read(text: str) -> None:
    assert parse_item_id(text) == ID


@pytest.mark.parametrize(
    "text", ["", "abc", "x" * 64, "12" * 33, "magnet:?xt=urn:btih:" + "ab" * 20, "magnet:?"]
)
def test_other_text_is_no_id(text: str) -> None:
    assert parse_item_id(text) is None
