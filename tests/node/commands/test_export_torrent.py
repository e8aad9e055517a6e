"""Tests of `paris_node.commands.export_torrent`."""

import io
from pathlib import Path

import pytest

from paris_node.commands import export_torrent
from paris_node.commands.export_torrent import ExportRequest
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.wire.torrent import read_torrent

P = 1 << 14


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film"
    path.write_bytes(b"f" * (3 * P + 1))
    return path


def export(item: Path, out: Path, piece_length: int = P) -> str:
    stdout = io.StringIO()
    request = ExportRequest(str(item), out, piece_length, item.parent / "home")
    export_torrent.run(request, Output(False, stdout))
    return stdout.getvalue()


def test_what_was_written_is_said_and_the_magnet_link_stands_alone(film: Path, tmp_path: Path) -> None:
    out = tmp_path / "film.torrent"
    said = export(film, out).splitlines()
    assert str(out) in said[0] and said[1].startswith("magnet:?xt=urn:btmh:1220") and len(said) == 2
    assert read_torrent(out.read_bytes()).ref.length == 3 * P + 1


def test_an_older_torrent_is_replaced_and_nothing_else_ever(film: Path, tmp_path: Path) -> None:
    out = tmp_path / "film.torrent"
    export(film, out)
    export(film, out, 2 * P)
    assert read_torrent(out.read_bytes()).ref.piece_length == 2 * P
    with pytest.raises(ConfigError, match="is no torrent"):
        export(film, film)
    with pytest.raises(ConfigError, match="folder"):
        export(film, tmp_path)
    assert film.stat().st_size == 3 * P + 1
