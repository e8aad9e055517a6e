"""Tests of `paris_node.commands.verify`."""

import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from paris_node.commands import verify
from paris_p2p.errors import ConfigError
from paris_p2p.programs import EXIT_DONE, EXIT_INCOMPLETE, Output
from paris_p2p.store.home import Home
from paris_p2p.wire.content import ContentRef

P = 1 << 14


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def refs(home: Home, tmp_path: Path) -> list[ContentRef]:
    made = []
    for number in range(3):
        source = tmp_path / f"item-{number}"
        source.write_bytes(Random(number).randbytes(3 * P))
        made.append(home.store().add(source, piece_length=P, mode="copy"))
    return made


def run(home: Home) -> tuple[int, list[dict[str, Any]]]:
    stdout = io.StringIO()
    code = verify.run(home, Output(True, stdout))
    return code, [json.loads(line) for line in stdout.getvalue().splitlines()]


def test_a_sound_store_is_said_to_be_sound(home: Home, refs: list[ContentRef]) -> None:
    code, events = run(home)
    assert code == EXIT_DONE and [event["bad_pieces"] for event in events[:-1]] == [0, 0, 0]
    assert (events[-1]["items"], events[-1]["damaged"], events[-1]["bytes"]) == (3, [], 9 * P)


def test_damage_is_named_set_aside_and_only_its_pieces_are_missing(
    home: Home, refs: list[ContentRef]
) -> None:
    store = home.store()
    path = store.files(refs[1].info_hash) / "item-1"
    data = bytearray(path.read_bytes())
    data[P] ^= 1
    path.write_bytes(data)
    code, events = run(home)
    assert code == EXIT_INCOMPLETE and events[-1]["damaged"] == [refs[1].info_hash.hex()]
    assert events[-1]["partial"] == 1 and not store.has(refs[1].info_hash) and store.has(refs[0].info_hash)
    partial = store.begin(refs[1])
    assert [partial.has_piece(piece) for piece in range(3)] == [True, False, True]
    partial.close()


def test_an_item_without_readable_metadata_is_damaged_too(home: Home, refs: list[ContentRef]) -> None:
    folder = home.path / "store" / "complete" / refs[0].info_hash.hex()
    (folder / "info").write_bytes(b"?")
    (folder / "ref").write_bytes(b"?")
    code, events = run(home)
    assert code == EXIT_INCOMPLETE and events[-1]["damaged"] == [refs[0].info_hash.hex()]


def test_people_read_a_line_an_item_and_what_to_do(home: Home, refs: list[ContentRef]) -> None:
    (home.store().files(refs[2].info_hash) / "item-2").write_bytes(b"")
    stdout = io.StringIO()
    verify.run(home, Output(False, stdout))
    lines = stdout.getvalue().splitlines()
    assert len(lines) == 4 and "a fetch" in lines[-1]
    assert sum(line.endswith("good") for line in lines) == 2


def test_a_folder_without_a_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--home"):
        run(Home(tmp_path / "typo"))
