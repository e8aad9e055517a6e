"""Tests of `paris_node.cli`: what scripts and newcomers rely on before any command does anything."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

from paris_bootstrap.cli import app as bootstrap
from paris_node.cli import app
from paris_node.commands.join import JoinRequest
from paris_node.network import NetworkRequest
from paris_p2p.net.limits import SwarmLimits

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, click.Command] = GROUP.commands
NETWORKED = ("publish", "join", "status", "fetch-model")
LIMITS = {"--limit-up", "--limit-down", "--peer-limit-up", "--peer-limit-down"}
HEAVY = ("torch", "hivemind", "libp2p", "trio", "diffusers", "numpy")


def options(command: click.Command) -> set[str]:
    return {option for p in command.params for option in (*p.opts, *p.secondary_opts)}


def test_the_commands_are_those_of_the_readme() -> None:
    wanted = {"prepare", "publish", "join", "status", "fetch-model", "generate", "content-id", "demo"}
    without_a_dht = {"seed", "get", "export-torrent", "verify"}
    assert wanted | without_a_dht <= set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_takes_json_home_and_debug(name: str) -> None:
    assert {"--json", "--home", "--debug"} <= options(COMMANDS[name])


@pytest.mark.parametrize("name", NETWORKED)
def test_every_networked_command_takes_listen_and_bootstrap(name: str) -> None:
    assert {"--listen", "--bootstrap"} <= options(COMMANDS[name])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_says_what_it_does(name: str) -> None:
    assert COMMANDS[name].help
    assert [p.name for p in COMMANDS[name].params if not getattr(p, "help", None)] == []


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("prepare", {"--out", "--clusters", "--preset", "--image-size", "--steps", "--seed", "--name"}),
        ("prepare", {"--image-encoder", "--text-encoder", "--vae", "--shard", "--balanced", "--device"}),
        ("prepare-merge", {"--out", "--clusters", "--seed", "--name", "--drop-duplicates", "--allow"}),
        ("join", {"--run", "--role", "--device", "--until-complete"}),
        ("status", {"--once", "--run"}),
        ("fetch-model", {"--out", "--allow-partial", "--run"}),
        (
            "generate",
            {"--model", "--n", "--seed", "--steps", "--guidance", "--top-k", "--scheduler", "--out"},
        ),
        ("content-id", {"--piece-length"}),
        ("join", {"--seed-ratio", "--seed-time", "--max-disk"}),
        ("seed", {"--piece-length", "--listen"}),
        ("get", {"--peer", "--listen", "--out", "--keep-seeding"}),
        ("export-torrent", {"--out", "--piece-length"}),
    ],
)
def test_the_contracts_options_are_there(name: str, wanted: set[str]) -> None:
    assert wanted <= options(COMMANDS[name])


@pytest.mark.parametrize("name", ["join", "publish", "fetch-model", "seed", "get"])
def test_whatever_serves_others_can_be_limited_and_look_near_by(name: str) -> None:
    assert LIMITS | {"--lan", "--no-lan"} <= options(COMMANDS[name])


@pytest.mark.parametrize(
    ("name", "module"), [("join", "join"), ("publish", "publish"), ("fetch-model", "fetch_model")]
)
def test_limits_and_the_local_network_reach_the_command(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Any] = []

    def note(*given: Any) -> int:
        calls.extend(given)
        return 0

    monkeypatch.setattr(f"paris_node.commands.{module}.run", note)
    limits = ["--limit-up=4k", "--limit-down=3k", "--peer-limit-up=2k", "--peer-limit-down=1k"]
    folder = [str(tmp_path)] if name == "publish" else []
    assert GROUP.main([name, *folder, *limits, "--lan"], standalone_mode=False) == 0
    requests = [one.network if isinstance(one, JoinRequest) else one for one in calls]
    (network,) = [one for one in requests if isinstance(one, NetworkRequest)]
    assert network.limits == SwarmLimits(4000, 3000, 2000, 1000) and network.lan


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("arguments", [["--help"], ["join", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from paris_node.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        f"print('imported:', sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout and done.stdout.rstrip().endswith("imported: []")


@pytest.mark.parametrize("command", ["join", "status", "publish", "fetch_model"])
def test_the_networked_commands_import_no_torch(command: str) -> None:
    done = python(
        "-c", f"import sys, paris_node.commands.{command}; print({{'torch', 'hivemind'}} & set(sys.modules))"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_get_imports_nothing_that_its_first_connection_does_not_need() -> None:
    """A swarm's worth of them may start at once."""
    slow = {"libp2p", "torch", "hivemind", "rich", "typer", "pydantic", "psutil", "zeroconf", "numpy"}
    script = f"import sys, paris_node.__main__, paris_node.commands.get; print({slow!r} & set(sys.modules))"
    done = python("-c", script)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["join", "--threads", "0"],
        ["no-such-command"],
        ["prepare"],
        ["generate", "x", "--n", "0"],
        ["join", "--x"],
        ["seed", ""],
        ["generate", "x", "--guidance", "nan"],
    ],
)
def test_wrong_usage_ends_with_2_and_without_a_traceback(arguments: list[str]) -> None:
    done = python("-m", "paris_node", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert "Usage" in done.stderr


@pytest.mark.parametrize("arguments", [["join", "--home", ""], ["prepare", "digits", "--out", ""]])
def test_an_empty_path_is_not_the_present_folder(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A script's unset variable would make a home of it, or share it."""
    with pytest.raises(SystemExit, match="2"):
        app(arguments)
    assert "it is empty" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_scale_that_is_no_finite_number_is_refused(value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        app(["generate", "x", "--temperature", value])


def test_the_programs_say_their_versions(capsys: pytest.CaptureFixture[str]) -> None:
    for program, name in ((app, "paris-node"), (bootstrap, "paris-bootstrap")):
        with pytest.raises(SystemExit, match="0"):
            program(["--version"])
        said = capsys.readouterr().out
        assert re.fullmatch(rf"{name} [^,]+, protocol \d+, Python 3\.\S+\n", said)
