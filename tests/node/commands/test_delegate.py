"""Tests of `paris_node.commands.delegate`, and of the pass a joining node reads."""

import io
import json
from typing import Any

import pytest

from paris_node.commands.delegate import expiry, run
from paris_node.commands.join import load_pass
from paris_p2p import clock
from paris_p2p.core.access import may_claim
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import Identity, peer_id_text

BOB = Identity(b"b" * 32)
NOW = 1_750_000_000.0


def delegates(world: Any, home: str = "organiser", expires: str = "30d") -> dict[str, Any]:
    said = io.StringIO()
    folder = world.folder / "homes" / home
    run(world.folder / "prepared", peer_id_text(BOB.node_id), expires, folder, Output(True, said))
    return json.loads(said.getvalue())  # type: ignore[no-any-return]


def organisers_home(world: Any) -> Home:
    home = Home(world.folder / "homes" / "organiser")
    home.identity_path.write_bytes(b"o" * 32)
    home.identity_path.chmod(0o600)
    return home


def test_the_organisers_pass_lets_a_node_claim(world: Any) -> None:
    world.signed = world.make_run("closed", restricted=True)
    organisers_home(world)
    said = delegates(world)
    path, home = world.folder / "pass.txt", Home(world.folder / "homes" / "bob")
    path.write_text(said["pass"] + "\n")
    data = load_pass(home, world.signed, path)
    assert may_claim(world.signed, BOB.node_id, data, clock.unix())
    assert not may_claim(world.signed, BOB.node_id, data, said["expires_unix"])
    assert load_pass(home, world.signed, None) == data  # kept for the next time


def test_only_the_organiser_gives_passes_and_only_where_they_are_needed(world: Any) -> None:
    organisers_home(world)
    with pytest.raises(ConfigError, match="needs no pass"):
        delegates(world)
    world.signed = world.make_run("closed", restricted=True)
    with pytest.raises(ConfigError, match="only the run's organiser"):
        delegates(world, home="stranger")


@pytest.mark.parametrize(
    ("text", "seconds"), [("12h", 43_200), ("30d", 30 * 86_400), ("2w", 14 * 86_400), ("2025-06-16", 32_000)]
)
def test_an_expiry_is_a_duration_or_a_date(text: str, seconds: int) -> None:
    assert expiry(text, NOW) == NOW + seconds


@pytest.mark.parametrize("text", ["", "soon", "0d", "-1d", "12", "2020-01-01", "12345678901234567890d"])
def test_other_expiries_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--expires"):
        expiry(text, NOW)


def test_a_file_that_holds_no_pass_is_refused(world: Any) -> None:
    home = Home(world.folder / "homes" / "bob")
    (world.folder / "pass.txt").write_text("hello")
    with pytest.raises(ConfigError, match="not a pass"):
        load_pass(home, world.signed, world.folder / "pass.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_pass(home, world.signed, world.folder / "none.txt")
    assert load_pass(home, world.signed, None) == b""
