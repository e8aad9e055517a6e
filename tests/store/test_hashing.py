"""Tests of `paris_p2p.store.hashing`."""

import hashlib
import random
from pathlib import Path

import pytest

from paris_p2p.errors import ConfigError
from paris_p2p.store.hashing import content_id, describe, find_files, item_name
from paris_p2p.wire.bep52 import check_layer, single_piece_root

P = 1 << 14


def test_a_file_has_the_id_of_a_torrent_of_that_file(tmp_path: Path) -> None:
    """The vector `s1.bin`: one byte, agreed on by libtorrent."""
    data = hashlib.sha256(b"bep52-vector/s1.bin/" + bytes(8)).digest()[:1]
    (tmp_path / "s1.bin").write_bytes(data)
    info, layout = content_id(tmp_path / "s1.bin", 65536)
    expected = "4cec88ba4badc75ba52f8fa223a8d1911d5838e98ae04f59c9caecdc695dabcb"
    assert hashlib.sha256(info).hexdigest() == expected
    assert (layout.name, layout.files[0].path, layout.length) == ("s1.bin", ("s1.bin",), 1)


def test_a_folder_is_hashed_with_its_layers(tmp_path: Path) -> None:
    folder = tmp_path / "item"
    (folder / "sub").mkdir(parents=True)
    big = random.Random(1).randbytes(3 * P + 5)
    (folder / "sub" / "big").write_bytes(big)
    (folder / "empty").touch()
    (folder / "small").write_bytes(b"small")
    described = describe("item", find_files(folder), P)
    empty, small, large = described.layout.files
    assert (empty.path, small.path, large.path) == (("empty",), ("small",), ("sub", "big"))
    assert empty.pieces_root == b"" and small.pieces_root == single_piece_root(b"small")
    assert described.layers.keys() == {2} and check_layer(large, described.layers[2], P)


def test_the_id_depends_on_the_name_and_content_only(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent / "item").mkdir(parents=True)
        for name in ("a", "b") if parent == "x" else ("b", "a"):
            (tmp_path / parent / "item" / name).write_bytes(name.encode())
    (tmp_path / "y" / "item" / "a").chmod(0o755)
    first, _ = content_id(tmp_path / "x" / "item")
    assert content_id(tmp_path / "y" / "item")[0] == first
    (tmp_path / "x" / "item").rename(tmp_path / "x" / "other")
    assert content_id(tmp_path / "x" / "other")[0] != first


def test_the_name_is_the_last_part_of_any_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "item").mkdir()
    monkeypatch.chdir(tmp_path / "item")
    for spelling in (".", "../item", "../item/.", "../item/"):
        assert item_name(Path(spelling)) == "item"


def test_a_link_to_an_item_is_followed_and_gives_its_name(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x")
    (tmp_path / "alias").symlink_to(tmp_path / "data")
    assert content_id(tmp_path / "alias")[1].files[0].path == ("alias",)


def test_what_cannot_be_an_item_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        content_id(tmp_path / "absent")
    folder = tmp_path / "item"
    (folder / "sub").mkdir(parents=True)
    with pytest.raises(ConfigError, match="without files"):
        content_id(folder)
    (folder / "file").touch()
    (folder / "sub" / "link").symlink_to(folder / "file")
    with pytest.raises(ConfigError, match=r"link is not a plain file"):
        content_id(folder)


@pytest.mark.parametrize("name", ["a:b", "a\\b", "nul", "dot.", b"\xff".decode(errors="surrogateescape")])
def test_a_file_whose_name_is_unsafe_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "item").mkdir()
    (tmp_path / "item" / name).touch()
    with pytest.raises(ConfigError, match="rename it"):
        content_id(tmp_path / "item")


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    (tmp_path / "item").mkdir()
    for name in ("A", "a"):
        (tmp_path / "item" / name).touch()
    if len(list((tmp_path / "item").iterdir())) < 2:
        pytest.skip("this file system ignores case")
    with pytest.raises(ConfigError, match="case"):
        content_id(tmp_path / "item")


@pytest.mark.parametrize("piece_length", [0, -1, 1 << 13, 3 << 14, 1 << 27])
def test_a_wrong_piece_length_is_refused(tmp_path: Path, piece_length: int) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(ConfigError, match="piece_length"):
        content_id(tmp_path / "f", piece_length)


def test_too_many_pieces_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate((P << 21) + 1)  # a hole: nothing is written
    with pytest.raises(ConfigError, match="choose longer ones"):
        content_id(tmp_path / "f", P)
