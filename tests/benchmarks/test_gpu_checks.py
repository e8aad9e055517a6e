"""Tests of `benchmarks/gpu_checks.py`: that what it would run on a GPU can be asked for. What it runs at the
smallest sizes takes minutes: `python benchmarks/gpu_checks.py --small --device cpu`."""

import argparse
from pathlib import Path

import typer.core
import typer.main

from benchmarks import gpu_checks
from paris_node.cli import app


def test_the_loop_asks_for_nothing_that_the_program_does_not_know(tmp_path: Path) -> None:
    program = typer.main.get_command(app)
    assert isinstance(program, typer.core.TyperGroup)
    names = []
    for _, module, name, *arguments in gpu_checks.loop(tmp_path, "cpu", "5"):
        assert module == "paris_node"
        program.commands[name].make_context(name, arguments)  # refuses what it does not know
        names.append(name)
    assert names == ["prepare", "train-monolithic", "generate", "evaluate"]


def test_every_check_has_a_name_of_its_own(tmp_path: Path) -> None:
    for small in (False, True):
        found = list(gpu_checks.checks(argparse.Namespace(small=small, device="cpu"), tmp_path))
        assert len({check.name for check in found}) == len(found) == 10
