"""Tests of `paris_node.actor`: with real child processes, each of a few lines."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from paris_node.actor import Cast
from paris_p2p.errors import NetworkError

PROGRAM = """\
import json, os, signal, sys, time
if "ignore" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("not an event", flush=True)
for word in sys.argv[1:]:
    print(json.dumps({"event": word, "parent": os.environ["PARIS_DIE_WITH_PARENT"]}), flush=True)
print("a complaint", file=sys.stderr, flush=True)
if "wait" in sys.argv:
    time.sleep(120)
sys.exit(3 if "fail" in sys.argv else 0)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that says its arguments as events."""
    (tmp_path / "spoken_arguments.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "spoken_arguments"


def nothing(_name: str, _event: dict[str, Any]) -> None:
    pass


async def test_a_programs_json_lines_are_its_events(tmp_path: Path, program: str) -> None:
    heard: list[tuple[str, str]] = []
    with trio.fail_after(60):
        async with Cast(tmp_path / "logs", lambda name, event: heard.append((name, event["event"]))) as cast:
            actor = cast.start("alice", ["one", "two"], program=program)
            assert (await actor.event("two"))["parent"] == str(os.getpid())
            assert (await actor.last_event("two"))["event"] == "two"
            assert [event["event"] for event in actor.news("one", "two", "three")] == ["one", "two"]
            assert actor.news("one") == [] and not actor.died_early
            assert cast.named("alice") is actor
    assert heard == [("alice", "one"), ("alice", "two")]


async def test_a_program_that_ends_without_saying_it_is_an_error_with_its_log(
    tmp_path: Path, program: str
) -> None:
    with trio.fail_after(60):
        async with Cast(tmp_path / "logs", nothing) as cast:
            actor = cast.start("bob", ["fail"], program=program)
            with pytest.raises(NetworkError, match=r"(?s)bob never said 'more'.*a complaint"):
                await actor.event("more")
            with pytest.raises(NetworkError, match=r"(?s)bob failed.*a complaint"):
                await actor.last_event("fail")
            assert actor.died_early


async def test_a_killed_program_has_died_early(tmp_path: Path, program: str) -> None:
    with trio.fail_after(60):
        async with Cast(tmp_path / "logs", nothing) as cast:
            actor = cast.start("bob", ["up", "wait"], program=program)
            await actor.event("up")
            assert not actor.died_early
            actor.kill()
            assert await actor.wait() == -signal.SIGKILL
            await actor.ended.wait()
            assert actor.died_early


async def test_leaving_ends_every_program_also_one_that_will_not(
    tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_node.actor.END_GRACE_S", 0.5)
    with trio.fail_after(60):
        async with Cast(tmp_path / "logs", nothing) as cast:
            willing = cast.start("willing", ["up", "wait"], program=program)
            stubborn = cast.start("stubborn", ["up", "wait", "ignore"], program=program)
            await willing.event("up")
            await stubborn.event("ignore")
    assert willing.process.returncode == -signal.SIGTERM
    assert stubborn.process.returncode == -signal.SIGKILL
