"""Real processes on loopback, driven as a script would drive them: JSON lines and exit codes.

Commands that use no network and import torch run inside the test's process where a process of their own is
not the point: each would spend 6 to 9 CPU seconds on imports. The demo runs all of them as processes.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from paris_node.cli import app

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
DEADLINE_S = 600.0

Event = dict[str, Any]


class Said:
    """What a program or a command says: its stdout and stderr go to files."""

    def __init__(self, folder: Path, module: str, arguments: Sequence[str]) -> None:
        number = len(list(folder.glob("*.out")))
        name = f"{number:02d}-{module}-{arguments[0].strip('-/')[:16]}"
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"

    @property
    def events(self) -> list[Event]:
        """Every complete JSON line so far; anything else on stdout fails the test."""
        lines = self.out.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def tail(self) -> str:
        """The end of what it logged."""
        return self.err.read_text(errors="replace")[-3000:]


class Command(Said):
    """One `paris-node` command that ran in this process."""

    def __init__(self, folder: Path, arguments: Sequence[str], home: Path) -> None:
        super().__init__(folder, "here", arguments)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        levels = {name: logging.getLogger(name).level for name in ("paris_p2p", "paris_node")}
        with self.out.open("w") as out, self.err.open("w") as err, pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(home / "cache"))  # so that the command leaves it be
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    self._code = int(app([*arguments, "--json", "--home", str(home)], standalone_mode=False))
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                for name, level in levels.items():
                    logging.getLogger(name).setLevel(level)

    def wait(self) -> int:
        """Its exit code."""
        return self._code


class Program(Said):
    """One running program; `wait_for` polls what it says with a deadline."""

    def __init__(self, folder: Path, module: str, arguments: Sequence[str], env: dict[str, str]) -> None:
        super().__init__(folder, module, arguments)
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **env},
                start_new_session=True,
            )

    def wait_for(self, matches: Callable[[Event], bool], deadline_s: float = DEADLINE_S) -> Event:
        """The first event that `matches`, as soon as it is there."""
        until = time.monotonic() + deadline_s  # noqa: TID251 - a test's own deadline
        while time.monotonic() < until:  # noqa: TID251 - a test's own deadline
            ended = self.process.poll() is not None
            for event in self.events:
                if matches(event):
                    return event
            if ended:
                break
            time.sleep(0.05)
        raise AssertionError(f"the event never came.\nevents: {self.events[-5:]}\nstderr: {self.tail()}")

    def wait_event(self, name: str, deadline_s: float = DEADLINE_S) -> Event:
        """The first event called `name`."""
        return self.wait_for(lambda event: event.get("event") == name, deadline_s)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Its exit code."""
        return self.process.wait(deadline_s)


class Stage:
    """Starts programs with homes of their own under one folder, and ends those that still run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.temporary = folder / "tmp"
        self.logs.mkdir()
        self.temporary.mkdir()
        self._programs: list[Program] = []

    def home(self, name: str) -> Path:
        """The home folder of the node called `name`."""
        return self.folder / "homes" / name

    def start(self, module: str, *arguments: object, env: dict[str, str] | None = None) -> Program:
        """Start `python -m module arguments…`; what it leaves in the temporary folder is ours to check."""
        extra = {"TMPDIR": str(self.temporary), **(env or {})}
        program = Program(self.logs, module, [str(argument) for argument in arguments], extra)
        self._programs.append(program)
        return program

    def node(self, *arguments: object, home: str, env: dict[str, str] | None = None) -> Program:
        """Start `paris-node arguments… --json --home …`."""
        return self.start("paris_node", *arguments, "--json", "--home", self.home(home), env=env)

    def here(self, *arguments: object, home: str) -> Command:
        """Run `paris-node arguments… --json --home …` to its end, in this process."""
        return Command(self.logs, [str(argument) for argument in arguments], self.home(home))

    def bootstrap(self, home: str = "bootstrap", env: dict[str, str] | None = None) -> tuple[Program, str]:
        """Start a bootstrap node; itself and its address."""
        arguments = ("--listen", LOOPBACK, "--json", "--home", self.home(home))
        program = self.start("paris_bootstrap", *arguments, env=env)
        return program, str(program.wait_event("listening")["addresses"][0])

    def left_behind(self) -> list[str]:
        """Processes that still name our folder, and files in the temporary folder."""
        alive = [p for p in psutil.process_iter(["cmdline", "environ"]) if self._is_ours(p)]
        files = [str(path) for path in self.temporary.rglob("*")]
        return [str(p) for p in alive] + files

    def _is_ours(self, process: psutil.Process) -> bool:
        cmdline, environ = process.info["cmdline"] or [], process.info["environ"] or {}
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return environ.get("TMPDIR") == str(self.temporary) or any(str(self.folder) in w for w in cmdline)

    def end(self) -> None:
        """SIGTERM, then SIGKILL, to what we started."""
        running = [program for program in self._programs if program.process.poll() is None]
        for program in reversed(running):
            program.process.terminate()
        for program in running:
            try:
                program.process.wait(30)
            except subprocess.TimeoutExpired:
                program.process.kill()
                program.process.wait()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stage for one test module."""
    stage = Stage(tmp_path_factory.mktemp("stage"))
    yield stage
    stage.end()
