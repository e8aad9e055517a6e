"""Tests of `paris_node.commands.status`."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import trio

from paris_node.commands.status import REFRESH_S, _follow, _list, _watch, run_selector
from paris_node.network import NetworkRequest
from paris_node.runs import announced_runs, save_manifest
from paris_p2p.programs import Output
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import Identity

RUN = "ab" * 32


def request(run: str | None = None, bootstrap: list[str] | None = None) -> NetworkRequest:
    return NetworkRequest(None, bootstrap, None, None, run)


def test_the_run_asked_for_goes_before_the_remembered_one(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert run_selector(request(), home) is None
    home.remember(bootstrap=["/a"], run_id=RUN)
    assert run_selector(request("digits"), home) == "digits"
    assert run_selector(request(), home) == RUN


def test_who_names_a_bootstrap_node_wants_the_run_announced_there(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.remember(bootstrap=["/a"], run_id=RUN)
    assert run_selector(request(bootstrap=["/a"]), home) is None
    assert run_selector(request(bootstrap=["/b"]), home) is None


async def test_while_the_network_is_away_the_last_view_stays_with_a_note(
    world: Any, autojump_clock: Any
) -> None:
    network = world.network("viewer")
    views = _watch(network, world.signed)
    first, trouble = await anext(views)
    assert first is not None and trouble == ""
    network.dht.down = True
    snapshot, trouble = await anext(views)
    assert snapshot == first and "trying again" in trouble
    network.dht.down = False
    snapshot, trouble = await anext(views)
    assert snapshot is not None and snapshot.now_unix > first.now_unix and trouble == ""
    await views.aclose()


async def test_before_the_first_answer_there_is_nothing_to_show_but_the_trouble(
    world: Any, autojump_clock: Any
) -> None:
    network = world.network("viewer")
    network.dht.down = True
    views = _watch(network, world.signed)
    snapshot, trouble = await anext(views)
    assert snapshot is None and trouble
    await views.aclose()


async def test_several_runs_are_listed_when_none_is_asked_for(world: Any, autojump_clock: Any) -> None:
    network, said = world.network("viewer"), io.StringIO()
    runs = [world.signed, world.make_run("emoji")]
    for signed in runs:
        save_manifest(network.home, signed)
        world.announces_run(Identity(signed.run_id), signed, world.item("manifest"))
    found = await announced_runs(network)
    assert [signed.manifest.name for signed in found] == ["digits", "emoji"]
    await _list(network, found, Output(True, said))
    listed = json.loads(said.getvalue())["runs"]
    assert [(run["name"], run["finished"], run["roles"]) for run in listed] == [
        ("digits", 0, 2),
        ("emoji", 0, 2),
    ]
    assert listed[0]["run_id"] == world.signed.run_id.hex()


async def test_followed_json_is_a_line_a_view_and_silent_while_nothing_is_known(
    world: Any, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    network, said = world.network("viewer"), io.StringIO()
    with trio.move_on_after(5 * REFRESH_S):
        await _follow(network, world.signed, Output(True, said))
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    assert len(lines) == 5 and all(line["run_id"] == world.signed.run_id.hex() for line in lines)
    network.dht.down = True
    with trio.move_on_after(100):
        await _follow(network, world.signed, Output(True, said))
    assert len(said.getvalue().splitlines()) == 5 and "trying again" in caplog.text
