"""Tests of `paris_node.commands.content_id`."""

import io
import json
from pathlib import Path

import pytest

from paris_node.commands.content_id import run
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.content_store import ContentStore


def test_it_is_the_id_under_which_the_store_keeps_it(tmp_path: Path) -> None:
    file = tmp_path / "data.bin"
    file.write_bytes(bytes(50_000))
    said = io.StringIO()
    run(file, None, Output(True, said))
    content = json.loads(said.getvalue())
    ref = ContentStore(tmp_path / "store").add(file)
    assert content["info_hash"] == ref.info_hash.hex() and content["piece_length"] == ref.piece_length
    assert [(one["path"], one["length"]) for one in content["files"]] == [("data.bin", 50_000)]


@pytest.mark.parametrize("piece_length", [0, 1, 20_000, 1 << 13, 1 << 27])
def test_a_piece_length_that_is_none_is_refused(tmp_path: Path, piece_length: int) -> None:
    file = tmp_path / "data.bin"
    file.write_bytes(b"x")
    with pytest.raises(ConfigError, match="power of two"):
        run(file, piece_length, Output(True, io.StringIO()))


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        run(tmp_path / "none", None, Output(True, io.StringIO()))
