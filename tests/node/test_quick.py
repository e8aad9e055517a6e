"""Tests of `paris_node.quick`: the short way says exactly what the long way says, or nothing."""

from typing import Any

import click
import pytest
import typer.main

from paris_node import quick
from paris_node.cli import app
from paris_node.quick import FLAGS, OPTIONS, REPEATED, SINGLE, read_plain

GROUP: Any = typer.main.get_command(app)
HASH = "ab" * 32


def spelt_out(command: click.Command) -> set[str]:
    every = [option for p in command.params for option in (*p.opts, *p.secondary_opts)]
    return {option for option in every if option.startswith("--")}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_it_knows_every_option_of_the_command_and_no_other(name: str) -> None:
    assert spelt_out(GROUP.commands[name]) == OPTIONS[name]


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_it_knows_which_options_are_flags_and_which_repeat(name: str) -> None:
    for parameter in GROUP.commands[name].params:
        for option in parameter.opts:
            if option.startswith("--"):
                kind = FLAGS if parameter.is_flag else REPEATED if parameter.multiple else SINGLE
                assert option in kind


CALLS = [
    ["seed", "a file", "--piece-length", "65536", "--listen", "/ip4/127.0.0.1/tcp/1/tls", "--json"],
    [
        "seed",
        "--home=h",
        "x",
        "--limit-up",
        "5M",
        "--announce",
        "/ip4/1.2.3.4/tcp/1",
        "--lan",
        "--seed-ratio",
        "2.5",
        "--peer-limit-up=1M",
        "--peer-limit-down",
        "2M",
    ],
    ["get", HASH, "--peer", "/a", "--peer", "/b", "--out", "o", "--keep-seeding", "--seed-time=2h"],
    ["get", "--out", "o", "t.torrent", "--no-lan"],
]


@pytest.mark.parametrize("arguments", CALLS)
def test_both_ways_make_the_same_call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def note(*values: object) -> int:
        calls.append(tuple(list(value) if isinstance(value, tuple | list) else value for value in values))
        return 0

    monkeypatch.setattr(quick, arguments[0], note)
    assert quick.run_plain(arguments) == 0
    assert GROUP.main(arguments, standalone_mode=False) == 0
    assert len(calls) == 2 and calls[0] == calls[1]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["join"],
        ["seed"],
        ["seed", "--help"],
        ["seed", "a", "b"],
        ["seed", ""],
        ["get", HASH, "--out", ""],
        ["seed", "a", "--piece-length", "many"],
        ["seed", "a", "--peer", "/x"],
        ["seed", "a", "--home"],
        ["seed", "a", "--home", "--json"],
        ["seed", "a", "--json=yes"],
        ["get", HASH],
        ["get", HASH, "--out", "o", "--out", "p"],
        ["get", HASH, "--out", "o", "--lan", "--no-lan"],
        ["get", "-h", "--out", "o"],
        ["get", HASH, "--o", "o"],
    ],
)
def test_whatever_is_not_plain_is_left_to_the_long_way(arguments: list[str]) -> None:
    assert read_plain(arguments) is None
