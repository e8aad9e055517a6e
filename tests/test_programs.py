"""Tests of `paris_p2p.programs`."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from paris_p2p.errors import (
    ConfigError,
    IncompleteError,
    LocalProtocolError,
    ManifestError,
    NetworkError,
    ParisError,
    RemoteProtocolError,
    StoreError,
    TransportError,
    WorkerError,
)
from paris_p2p.programs import DIE_WITH_PARENT, Output, _Brief, run_program

EXIT_CODES: list[tuple[BaseException, int]] = [
    (ConfigError("x"), 2),
    (ManifestError("x"), 2),
    (StoreError("x"), 2),
    (NetworkError("x"), 3),
    (TransportError("x"), 3),
    (RemoteProtocolError("x"), 3),
    (IncompleteError("x"), 4),
    (KeyboardInterrupt(), 130),
    (WorkerError("x"), 1),
    (LocalProtocolError("x"), 1),
    (ParisError("x"), 1),
    (RuntimeError("x"), 1),
]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A program sets its process's signal handlers; this process wants its own back."""
    saved = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in saved.items():
        signal.signal(number, handler)


def raising(error: BaseException) -> int:
    """The exit code of a program whose body raises `error`."""

    def body() -> None:
        raise error

    return run_program(body)


# --- exit codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code"), EXIT_CODES)
def test_every_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert raising(error) == code


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (4, 4), (130, 130)])
def test_a_body_that_returns_decides_the_exit_code(returned: int | None, code: int) -> None:
    assert run_program(lambda: returned) == code


def test_one_of_our_errors_is_one_message_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(TransportError("nobody answers")) == 3
    assert (
        capsys.readouterr().err
        == "error: nobody answers\nRun the command again: it goes on where it stopped.\n"
    )


def test_a_bug_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(ZeroDivisionError("oops")) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "ZeroDivisionError: oops" in said and "report it" in said


def test_debug_shows_the_traceback_of_any_error(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        raise ConfigError("wrong")

    assert run_program(body, debug=True) == 2
    assert "Traceback" in capsys.readouterr().err


def test_nothing_of_an_error_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    raising(ConfigError("wrong"))
    raising(RuntimeError("worse"))
    assert capsys.readouterr().out == ""


def test_a_system_exit_keeps_its_own_code() -> None:
    with pytest.raises(SystemExit) as caught:
        raising(SystemExit(7))
    assert caught.value.code == 7


# --- exception groups ------------------------------------------------------------------------------


def nested(*errors: BaseException) -> BaseExceptionGroup[BaseException]:
    return BaseExceptionGroup("outer", [BaseExceptionGroup("inner", [error]) for error in errors])


def test_an_error_is_found_inside_nested_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(nested(NetworkError("no run there"))) == 3
    said = capsys.readouterr().err
    assert said.startswith("error: no run there") and "Traceback" not in said


def test_of_several_of_ours_one_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(nested(StoreError("first"), StoreError("second"))) == 2
    assert "first" in capsys.readouterr().err


def test_a_bug_goes_before_everything_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(nested(KeyboardInterrupt(), NetworkError("gone"), KeyError("bug"))) == 1
    assert "KeyError" in capsys.readouterr().err


def test_an_interruption_goes_before_what_it_breaks() -> None:
    assert raising(nested(TransportError("the swarm was closed"), KeyboardInterrupt())) == 130


async def fails_in_a_nursery() -> None:
    async def child() -> None:
        raise IncompleteError("router is missing")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child)
        await trio.sleep_forever()


def test_what_a_nursery_wraps_is_reported_as_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(lambda: trio.run(fails_in_a_nursery)) == 4
    assert "router is missing" in capsys.readouterr().err


# --- output ----------------------------------------------------------------------------------------


def test_with_json_every_event_is_one_object_on_a_line_and_nothing_else() -> None:
    out = io.StringIO()
    output = Output(True, out)
    output.event("step", "step 1\nof 2", role="expert-0", step=1, loss=0.5)
    output.say("for people")
    output.data({"name": "día\n\x9b2J\u202e"})
    assert out.getvalue().isascii() and "\x1b" not in out.getvalue()
    lines = out.getvalue().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"event": "step", "role": "expert-0", "step": 1, "loss": 0.5},
        {"name": "día\n\x9b2J\u202e"},
    ]


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_on_a_terminal_a_log_line_is_brief(level: int) -> None:
    record = logging.LogRecord("paris_node.x", level, "", 1, "the %s is away", ("network",), None)
    line = _Brief().format(record)
    word = "warning: " if level == logging.WARNING else ""
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {word}the network is away", line)


def test_for_people_only_the_text_is_said() -> None:
    out = io.StringIO()
    output = Output(False, out)
    output.event("step", role="expert-0")
    output.event("joined", "joined run digits", run_id="ab")
    output.say("more")
    assert out.getvalue() == "joined run digits\nmore\n"


# --- in a process of its own -----------------------------------------------------------------------

WAITS = """
import sys, trio
from paris_p2p.programs import run_program
async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        try:
            print("up", flush=True)
            await trio.sleep(60)
        finally:
            print("cleaned up", flush=True)
sys.exit(run_program(lambda: trio.run(main)))
"""
SPEAKS = """
import sys, trio
from paris_p2p.programs import Output, run_program
async def main():
    async def speak():
        while True:
            Output(True).event("step", step=1)
            await trio.sleep(0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(speak)
        nursery.start_soon(speak)
sys.exit(run_program(lambda: trio.run(main)))
"""


def python(script: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cleans_up_and_ends_with_130(number: signal.Signals) -> None:
    with python(WAITS) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, "cleaned up\n", "interrupted\n")


def test_a_job_started_in_the_background_can_be_interrupted_too() -> None:
    """A shell starts `command &` with Ctrl-C ignored."""
    with python("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WAITS) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "cleaned up\n")


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    with python(SPEAKS) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == '{"event": "step", "step": 1}\n'
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_a_program_whose_parent_is_gone_already_ends_at_once() -> None:
    with python(WAITS, **{DIE_WITH_PARENT: "1"}) as process:
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
