"""Child processes of the benchmarks: process groups, CPU accounting, JSON events on stdout.

Owns: starting, watching, ending. Does not own: what is started.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from paris_p2p import clock

POLL_S = 0.02


class Child:
    """One process in a group of its own. stdout and stderr go to files named after `log`."""

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        self.rc: int | None = None
        self.cpu_s = 0.0
        self.max_rss_bytes = 0
        self._events: list[dict[str, Any]] = []
        self._out = log.with_suffix(".out")
        self._read_from = self._out.stat().st_size if self._out.exists() else 0
        with self._out.open("ab") as out, log.with_suffix(".err").open("ab") as err:
            self._process = subprocess.Popen(
                list(argv),
                env={**_environment(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status (negative: the signal) once it has ended; None before."""
        if self.rc is None:
            self._reap(os.WNOHANG)
        return self.rc

    def _reap(self, flags: int) -> None:
        pid, status, usage = os.wait4(self.pid, flags)
        if pid:
            self.rc = self._process.returncode = os.waitstatus_to_exitcode(status)
            self.cpu_s = usage.ru_utime + usage.ru_stime
            self.max_rss_bytes = usage.ru_maxrss * 1024

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises `TimeoutError`."""
        wait_for(lambda: self.poll() is not None, timeout_s, "a child to end")
        assert self.rc is not None
        return self.rc

    def stop(self, sig: int = signal.SIGTERM, grace_s: float = 8.0) -> None:
        """Ends the whole group: with `sig`, after `grace_s` seconds with SIGKILL. Fills `cpu_s`."""
        self._signal(sig)
        end = clock.monotonic() + grace_s
        while self.poll() is None and clock.monotonic() < end:
            time.sleep(POLL_S)
        self._signal(signal.SIGKILL)
        if self.rc is None:
            self._reap(0)

    def _signal(self, sig: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, sig)

    def events(self) -> list[dict[str, Any]]:
        """Every JSON object it has printed so far, one a line; other lines are passed over."""
        with self._out.open("rb") as file:
            file.seek(self._read_from)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read_from += len(whole)
        self._events += json_lines(whole)
        return self._events

    def last_event(self, name: str) -> dict[str, Any] | None:
        """Its newest event of this name."""
        return next((e for e in reversed(self.events()) if e.get("event") == name), None)

    def errors(self, characters: int = 1500) -> str:
        """The end of what it wrote to stderr."""
        return self.log.with_suffix(".err").read_text(errors="replace")[-characters:]

    def cpu_now_s(self) -> float:
        """CPU seconds so far, of a process that is still running (`cpu_s` once it has ended)."""
        return cpu_of(self.pid) if self.rc is None else self.cpu_s


def _environment() -> dict[str, str]:
    """Ours, but compiled modules are kept, as they are on any machine that has run the program before."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def cpu_of(pid: int) -> float:
    """CPU seconds (user and system, all threads) of a running process. Raises `OSError` when it is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def json_lines(data: bytes) -> list[dict[str, Any]]:
    """The lines of `data` that are JSON objects."""
    found = []
    for line in data.splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


class Children:
    """All children of one run: none outlives it. Use `children()`."""

    def __init__(self) -> None:
        self.every: list[Child] = []

    def start(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Child:
        """Start one."""
        child = Child(argv, log, env)
        self.every.append(child)
        return child

    def stop(self, grace_s: float = 8.0) -> None:
        """End all, at once rather than one after the other."""
        for child in self.every:
            if child.poll() is None:
                child._signal(signal.SIGTERM)
        end = clock.monotonic() + grace_s
        for child in self.every:
            child.stop(grace_s=max(0.0, end - clock.monotonic()))

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all that have ended."""
        return sum(child.cpu_s for child in self.every)


@contextmanager
def children() -> Iterator[Children]:
    """Children that end with the block, whatever ends it."""
    kids = Children()
    try:
        yield kids
    finally:
        kids.stop()


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll `condition`. Raises `TimeoutError` naming `what`."""
    end = clock.monotonic() + timeout_s
    while not condition():
        if clock.monotonic() > end:
            raise TimeoutError(f"after {timeout_s:.0f} s still waiting for {what}")
        time.sleep(POLL_S)


def end_on_signals() -> None:
    """SIGTERM and SIGHUP end the benchmark as Ctrl-C does: with its clean-up."""

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
