"""Tests of `paris_node.commands.fetch_model`."""

import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from paris_node import pausing
from paris_node.commands import fetch_model
from paris_node.commands.fetch_model import _next, _unfinished, default_folder, run
from paris_node.network import NetworkRequest
from paris_p2p import clock
from paris_p2p.errors import ConfigError, DiskFullError, IncompleteError
from paris_p2p.ids import Role
from paris_p2p.programs import Output
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import role_scope

EXPERT, ROUTER = Role("expert-0"), Role("router")
MALLORY = Identity(b"m" * 32)
ORGANISER = Identity(b"o" * 32)
Fetch = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def fetch(world: Any, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """Runs the command for one home; returns what it said, also (through `said`) when it raised."""
    network = world.network("dave")

    @asynccontextmanager
    async def open_network(*_arguments: Any, **_options: Any) -> AsyncIterator[Any]:
        yield network

    monkeypatch.setattr(fetch_model, "open_network", open_network)
    monkeypatch.setattr(fetch_model, "STALL_S", 0.01)
    monkeypatch.setattr(fetch_model, "UNCHECKED_STALL_S", 0.01)
    monkeypatch.setattr(clock, "unix", lambda: world.start_unix)  # each trio.run has a clock of its own

    def command(
        out: Path | None = None, *, partial: bool = False, said: io.StringIO | None = None
    ) -> list[dict[str, Any]]:
        heard = said if said is not None else io.StringIO()
        request = NetworkRequest(network.home.path, ["/boot"], None, None, world.signed.run_id.hex())
        assert run(request, out, partial, Output(True, heard)) == 0
        return [json.loads(line) for line in heard.getvalue().splitlines()]

    return command


def trained(world: Any, *roles: str) -> dict[str, Any]:
    """A publisher that holds and announces finished checkpoints of `roles`."""
    network = world.network("publisher", seeds=True)
    made = {}
    for role in roles:
        term = world.holds(network.identity, role)
        data, made[role] = world.checkpoint(network.identity, role, 100, term=term, store=network.store)
        world.announces(network.identity, data, role)
    return made


def test_the_model_is_written_and_remembered(world: Any, fetch: Fetch, tmp_path: Path) -> None:
    made = trained(world, EXPERT, ROUTER)
    model = fetch(tmp_path / "model")[-1]
    assert model["event"] == "model" and model["missing"] == [] and model["path"] == str(tmp_path / "model")
    assert model["roles"].keys() == {EXPERT, ROUTER} and model["roles"][EXPERT]["step"] == 100
    weights = sum(statement.weights.length for statement in made.values())
    components = sum(ref.length for ref in world.signed.manifest.components.values())
    assert model["bytes"] == weights + components
    for name in ("expert_0", "router", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        assert (tmp_path / "model" / name).exists()
    assert Home(world.folder / "homes" / "dave").context().get("model") == str(tmp_path / "model")


def test_what_is_unfinished_is_said_and_what_to_try_next(world: Any) -> None:
    _, done = world.checkpoint(MALLORY, EXPERT, 100)
    _, half = world.checkpoint(MALLORY, ROUTER, 39)
    assert _unfinished([done]) == ""
    assert "not finished yet: router at 39 of 100. Run the same command again" in _unfinished([done, half])
    text = _next(("it's one", "two", "three"), Path("/my home"))
    assert "generate 'it'\"'\"'s one' --home '/my home'" in text and "generate two --home" in text
    assert "three" not in text and _next((), None) == "\nnext: paris-node generate 'your prompt'"


def test_a_full_disk_is_waited_out_and_said_once(
    world: Any, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(world, EXPERT, ROUTER)
    kind, left = type(world.network("anybody").swarm), [5]
    real = kind.fetch

    async def full(self: Any, *arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise DiskFullError("disk full: 5 more bytes are needed")
        return await real(self, *arguments, **options)

    monkeypatch.setattr(kind, "fetch", full)
    monkeypatch.setattr(pausing, "PAUSE_S", 0.01)
    events = fetch(tmp_path / "model")
    assert [event["event"] for event in events].count("paused") == 1
    assert events[-1]["event"] == "model" and events[-1]["missing"] == []


def test_missing_roles_are_named_before_anything_is_fetched(world: Any, fetch: Fetch, tmp_path: Path) -> None:
    trained(world, EXPERT)
    said = io.StringIO()
    with pytest.raises(IncompleteError, match=r"router.*--allow-partial"):
        fetch(tmp_path / "model", said=said)
    assert json.loads(said.getvalue()) == {"event": "incomplete", "missing": ["router"]}
    assert not (tmp_path / "model").exists()


def test_a_role_that_cannot_be_had_after_all_is_missing_too(world: Any, fetch: Fetch, tmp_path: Path) -> None:
    trained(world, EXPERT)
    world.announces(MALLORY, world.checkpoint(MALLORY, ROUTER, 100)[0], ROUTER)
    said = io.StringIO()
    with pytest.raises(IncompleteError, match="no source delivered"):
        fetch(tmp_path / "model", said=said)
    assert json.loads(said.getvalue().splitlines()[-1]) == {"event": "incomplete", "missing": ["router"]}
    assert not (tmp_path / "model").exists()


def test_what_there_is_can_be_asked_for(world: Any, fetch: Fetch, tmp_path: Path) -> None:
    trained(world, EXPERT)
    assert fetch(tmp_path / "model", partial=True)[-1]["missing"] == ["router"]


@pytest.mark.parametrize("bad", ["unfit", "empty", "unserved"])
def test_a_bad_checkpoint_gives_way_to_the_next(world: Any, fetch: Fetch, tmp_path: Path, bad: str) -> None:
    made = trained(world, EXPERT, ROUTER)
    store = world.stores[-1]
    changed = {}
    if bad == "unfit":
        changed["weights"] = made[ROUTER].weights
    elif bad == "empty":
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "readme").write_bytes(bytes(100))
        changed["weights"] = store.add(tmp_path / "empty")
    kept = None if bad == "unserved" else store
    lie, _ = world.checkpoint(MALLORY, EXPERT, 100, term=9 << 32, store=kept, **changed)
    world.announces(MALLORY, lie, EXPERT)
    model = fetch(tmp_path / "model")[-1]
    assert model["roles"][EXPERT]["term"] == 1 and model["missing"] == []


@pytest.mark.parametrize("checked", [False, True])
def test_a_crowd_of_fakes_does_not_hide_the_good_checkpoint(
    world: Any, fetch: Fetch, tmp_path: Path, checked: bool
) -> None:
    made = trained(world, EXPERT, ROUTER)
    if checked:
        for role in made:
            (record,) = world.live("announce", role_scope(world.signed.run_id, Role(role)))
            world.attests(ORGANISER, role, record.payload.statement, loss=0.5)
    for number in range(6):
        who = Identity(bytes([100 + number]) * 32)
        world.announces(who, world.checkpoint(who, EXPERT, 100, term=9 << 32)[0], EXPERT)
    model = fetch(tmp_path / "model")[-1]
    assert model["roles"][EXPERT]["term"] == 1 and model["roles"][EXPERT]["checked"] is checked


def test_a_model_that_is_there_is_replaced(world: Any, fetch: Fetch, tmp_path: Path) -> None:
    trained(world, EXPERT, ROUTER)
    fetch(tmp_path / "model")
    (tmp_path / "model" / "old").write_bytes(b"old")
    fetch(tmp_path / "model")
    assert (tmp_path / "model" / "router").exists() and not (tmp_path / "model" / "old").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_is_no_model_is_refused_and_kept(world: Any, fetch: Fetch, tmp_path: Path) -> None:
    trained(world, EXPERT, ROUTER)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(ConfigError, match=r"is not a model.*--out"):
        fetch(tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]
    assert world.stores[0].complete() == []  # nothing was fetched for it


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("digits", "digits"),
        ("my run 2.0", "my run 2.0"),
        ("../../../etc", "_.._.._etc"),
        ("/tmp/x", "_tmp_x"),
        ("..", "model"),
        ("a\x00b\n", "a_b_"),
    ],
)
def test_a_runs_name_cannot_lead_out_of_the_home(world: Any, name: str, folder: str) -> None:
    home = world.network("dave").home
    assert default_folder(home, world.make_run(name)) == home.models / folder


def test_two_runs_of_one_name_have_folders_of_their_own(world: Any, fetch: Fetch) -> None:
    trained(world, EXPERT, ROUTER)
    path = Path(fetch()[-1]["path"])
    home = Home(world.folder / "homes" / "dave")
    assert path == home.models / "digits" == default_folder(home, world.signed)
    other = world.make_run("digits", clusters=2)
    assert default_folder(home, other) == home.models / f"digits-{other.run_id.hex()[:12]}"
