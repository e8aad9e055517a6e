"""Running our own programs as children and listening to their JSON lines.

Owns: starting, killing and ending the processes of the demo. They die with it, however it ends.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio

from paris_p2p.errors import NetworkError
from paris_p2p.programs import DIE_WITH_PARENT

log = logging.getLogger(__name__)

EVENT_DEADLINE_S = 300.0
END_GRACE_S = 15.0
POLL_S = 0.05
MAX_LINE_BYTES = 1 << 20


class Actor:
    """One running program: its events so far, its log, its end."""

    def __init__(
        self,
        name: str,
        process: "subprocess.Popen[bytes]",
        log_path: Path,
        on_event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.name = name
        self._on_event = on_event
        self.log_path = log_path
        self.process = process
        self.ended = trio.Event()
        self._events: list[dict[str, Any]] = []
        self._told = 0
        self._changed = trio.Condition()

    @property
    def died_early(self) -> bool:
        """Whether the program has ended with an error."""
        return self.ended.is_set() and self.process.returncode not in (0, 130)

    def kill(self) -> None:
        """SIGKILL, as when the power goes."""
        self.process.kill()

    def news(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds since the last call."""
        fresh, self._told = self._events[self._told :], len(self._events)
        return [event for event in fresh if event.get("event") in kinds]

    async def event(self, kind: str) -> dict[str, Any]:
        """The first event of `kind`, waiting for it. Raises `NetworkError` if the program ends without."""
        with trio.move_on_after(EVENT_DEADLINE_S):
            while True:
                for event in self._events:
                    if event.get("event") == kind:
                        return event
                if self.ended.is_set():
                    break
                async with self._changed:
                    await self._changed.wait()
        raise NetworkError(f"{self.name} never said {kind!r}; its log is {self.log_path}:\n{self._tail()}")

    async def last_event(self, kind: str) -> dict[str, Any]:
        """Wait for the program to end well and return its last event, which must be of `kind`."""
        with trio.move_on_after(EVENT_DEADLINE_S):
            await self.ended.wait()
        last = self._events[-1] if self._events else {}
        if not self.ended.is_set() or self.process.returncode != 0 or last.get("event") != kind:
            status, said = self.process.poll(), last.get("event")
            raise NetworkError(
                f"{self.name} failed (status {status}, its last event was {said!r}); its log is "
                f"{self.log_path}:\n{self._tail()}"
            )
        return last

    def _tail(self) -> str:
        return self.log_path.read_text(errors="replace")[-2000:]

    async def listen(self) -> None:
        """Collect its JSON lines until it ends."""
        assert self.process.stdout is not None
        stream = trio.lowlevel.FdStream(os.dup(self.process.stdout.fileno()))
        self.process.stdout.close()
        buffer = b""
        async with stream:
            async for chunk in stream:
                *lines, buffer = (buffer + chunk).split(b"\n")
                buffer = buffer[-MAX_LINE_BYTES:]
                await self._note([json.loads(line) for line in lines if line.startswith(b"{")])
        await self.wait()
        self.ended.set()
        await self._note([])

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        while self.process.poll() is None:
            await trio.sleep(POLL_S)
        return int(self.process.returncode)

    async def _note(self, events: list[dict[str, Any]]) -> None:
        self._events += events
        for event in events:
            self._on_event(self.name, event)
        async with self._changed:
            self._changed.notify_all()


class Cast:
    """All the programs of one demo; leaving the context ends those that still run."""

    def __init__(self, logs: Path, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self._logs = logs
        self._on_event = on_event
        self._manager = trio.open_nursery()
        self.actors: list[Actor] = []

    async def __aenter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        self._nursery = await self._manager.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        with trio.CancelScope(shield=True):
            await self._end_all()
        self._nursery.cancel_scope.cancel()
        return await self._manager.__aexit__(kind, error, trace)

    def start(self, name: str, arguments: Sequence[str], program: str = "paris_node") -> Actor:
        """Start `python -m program arguments…`, logging its stderr to a file."""
        log_path = self._logs / f"{name}.log"
        # a session of its own: Ctrl-C reaches the demo alone, which then ends its programs in order
        with log_path.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env={**os.environ, DIE_WITH_PARENT: str(os.getpid())},
            )
        actor = Actor(name, process, log_path, self._on_event)
        self.actors.append(actor)
        self._nursery.start_soon(actor.listen)
        return actor

    def named(self, name: str) -> Actor:
        """The program started under `name`."""
        return next(actor for actor in self.actors if actor.name == name)

    async def _end_all(self) -> None:
        """SIGTERM to all, newest first, then SIGKILL to those that do not end in time."""
        for actor in reversed(self.actors):
            if actor.process.poll() is None:
                actor.process.send_signal(signal.SIGTERM)
        with trio.move_on_after(END_GRACE_S):
            for actor in self.actors:
                await actor.wait()
        for actor in self.actors:
            if actor.process.poll() is None:
                log.warning("%s did not end in time and is killed", actor.name)
                actor.process.kill()
                actor.process.wait()
