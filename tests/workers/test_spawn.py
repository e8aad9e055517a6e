"""Real child processes: they talk, their death is noticed, and none outlives its parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import trio

from paris_p2p import clock
from paris_p2p.errors import LocalProtocolError, WorkerError
from paris_p2p.workers.child import PARENT_GONE_STATUS, ParentLink
from paris_p2p.workers.spawn import TAIL_BYTES, WorkerDied, open_worker

CHILD = """
import os, signal, subprocess, sys, time
from paris_p2p.workers.child import ParentLink

with ParentLink.from_environment() as link:
    while (message := link.receive()) is not None:
        match message["type"]:
            case "echo":
                link.send(message)
            case "print":
                print(message["text"], flush=True)
            case "die":
                print("last words", file=sys.stderr, flush=True)
                os.kill(os.getpid(), message["signal"])
            case "exit":
                sys.exit(message["status"])
            case "hang":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                link.send({"type": "hanging"})
                time.sleep(600)
            case "beget":
                child = subprocess.Popen(["sleep", "600"])  # holds our output open
                link.send({"type": "begotten", "pid": child.pid})
            case "stop":
                link.send({"type": "checkpoint"})
                break
"""

PARENT = """
import trio
from paris_p2p.workers.spawn import open_worker

async def main():
    async with open_worker("echo_child") as worker:
        await worker.send({"type": "%s"})
        await worker.receive()
        print(worker.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.fixture(autouse=True)
def _echo_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `echo_child` a module to our children."""
    (tmp_path / "echo_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


async def until(condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
    end = clock.monotonic() + deadline_s
    while not condition():
        assert clock.monotonic() < end, "the condition did not come true in time"
        await trio.sleep(0.02)


async def test_a_message_comes_back() -> None:
    async with open_worker("echo_child") as worker:
        sent = {"type": "echo", "data": bytes(1_000_000), "number": 2.5}
        await worker.send(sent)
        assert await worker.receive() == sent
        assert worker.status is None


async def test_a_killed_child_is_noticed_at_once_with_its_signal_and_last_words() -> None:
    async with open_worker("echo_child") as worker:
        await worker.send({"type": "die", "signal": signal.SIGKILL})
        with trio.fail_after(200), pytest.raises(WorkerDied) as caught:
            await worker.receive()
        assert caught.value.status == -signal.SIGKILL
        assert "SIGKILL" in str(caught.value) and "last words" in str(caught.value)
        with pytest.raises(WorkerDied):
            await worker.send({"type": "echo"})


async def test_an_exit_status_is_reported() -> None:
    async with open_worker("echo_child") as worker:
        await worker.send({"type": "exit", "status": 7})
        with pytest.raises(WorkerDied, match="exited with status 7"):
            await worker.receive()
        assert await worker.wait() == 7


async def test_an_exception_in_the_block_comes_out_bare() -> None:
    with pytest.raises(KeyError):
        async with open_worker("echo_child"):
            raise KeyError


async def test_stop_returns_what_the_child_sent_on_its_way_out() -> None:
    async with open_worker("echo_child") as worker:
        assert await worker.stop(20.0) == [{"type": "checkpoint"}]
        assert worker.status == 0
        assert await worker.stop(1.0) == []


async def test_a_child_that_ignores_stop_is_killed_after_the_grace() -> None:
    async with open_worker("echo_child") as worker:
        await worker.send({"type": "hang"})
        await worker.receive()
        with trio.fail_after(20):
            await worker.stop(0.1)
        assert worker.status == -signal.SIGKILL


async def test_leaving_the_block_ends_the_child() -> None:
    async with open_worker("echo_child") as worker:
        await worker.send({"type": "echo"})
        await worker.receive()
    assert worker.status == PARENT_GONE_STATUS
    assert not psutil.pid_exists(worker.pid)


async def test_a_grandchild_that_holds_the_output_open_keeps_nobody_waiting() -> None:
    with trio.fail_after(30):
        async with open_worker("echo_child") as worker:
            await worker.send({"type": "beget"})
            grandchild = psutil.Process((await worker.receive())["pid"])
    assert worker.status is not None and grandchild.is_running()
    grandchild.kill()


async def test_a_cancelled_block_ends_the_child() -> None:
    with trio.CancelScope() as scope:
        async with open_worker("echo_child") as worker:
            scope.cancel()
            await trio.sleep(600)
    assert not psutil.pid_exists(worker.pid)


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with open_worker("echo_child") as worker:
        with trio.move_on_after(0):
            await worker.receive()
        await worker.send({"type": "echo", "n": 1})
        assert (await worker.receive())["n"] == 1


@pytest.mark.parametrize("state", ["echo", "hang"])
async def test_killing_the_parent_kills_the_child(state: str) -> None:
    if state == "hang" and sys.platform != "linux":
        pytest.skip("only Linux kills a child that never looks")
    parent = _start_parent(state)
    try:
        assert parent.stdout is not None
        pid = int(await trio.to_thread.run_sync(parent.stdout.readline))
        assert psutil.pid_exists(pid)
        parent.kill()
        await until(lambda: not _runs(pid))
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()


async def test_output_goes_to_the_log_and_only_its_end_is_kept(tmp_path: Path) -> None:
    log_path = tmp_path / "worker.log"
    async with open_worker("echo_child", log_path=log_path) as worker:
        for _ in range(4):
            await worker.send({"type": "print", "text": "x" * 5000})
        await worker.send({"type": "print", "text": "the end"})
        await until(lambda: worker.tail.endswith("the end"))
        assert len(worker.tail) <= TAIL_BYTES
    assert log_path.stat().st_size == 4 * 5001 + 8


async def test_a_module_that_does_not_exist_says_so() -> None:
    async with open_worker("no_such_module_here") as worker:
        with pytest.raises(WorkerError, match="No module named no_such_module_here"):
            await worker.receive()


async def test_the_child_shares_no_session_with_the_terminal() -> None:
    async with open_worker("echo_child") as worker:
        assert os.getsid(worker.pid) == worker.pid


def test_a_child_module_started_by_hand_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARIS_WORKER_FD", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(LocalProtocolError, match="parent process"):
        ParentLink.from_environment()


def _start_parent(state: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", PARENT % state]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
