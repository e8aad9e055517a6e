"""The parent's side of a worker: start a child process, talk to it, notice its death, end it.

Owns: the socket pair, the child's log, the exit status, the order of asking, closing, SIGTERM, SIGKILL.
Does not own: restarting (the caller knows when that makes sense) or what the messages mean.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import trio

from paris_p2p.errors import WorkerError
from paris_p2p.workers.child import FD_VARIABLE, PARENT_VARIABLE
from paris_p2p.workers.frames import FrameReader, Message, encode
from paris_p2p.workers.nursery import open_inner_nursery

log = logging.getLogger(__name__)

TAIL_BYTES = 8192
"""How much of the end of a child's output is kept for the error message."""
_RECEIVE_BYTES = 65_536
_EXIT_DEADLINE_S = 5.0  # from the end of its stream to the end of its process
_TERM_GRACE_S = 1.0
_LEAVE_GRACE_S = 2.0
_LAST_WORDS_S = 0.5
_POLL_S = 0.05


class WorkerDied(WorkerError):
    """A child ended. `status`: exit status, negative for a signal; `tail`: the end of what it wrote;
    `summary`: the message without that."""

    def __init__(self, module: str, pid: int, status: int, tail: str) -> None:
        self.module, self.pid, self.status, self.tail = module, pid, status, tail
        self.summary = f"{module} (process {pid}) {describe_status(status)}"
        super().__init__(self.summary + (f"; its last output:\n{tail}" if tail else ""))


def describe_status(status: int) -> str:
    """`exited with status 1` or `was killed by SIGKILL`; `status` as in `subprocess.Popen.returncode`."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


class Worker:
    """A running child. Made by `open_worker`. One task at a time may receive; any may send."""

    def __init__(self, module: str, process: "subprocess.Popen[bytes]", stream: trio.SocketStream) -> None:
        self.module = module
        self.pid = process.pid
        self._process = process
        self._stream = stream
        self._reader = FrameReader()
        self._send_lock = trio.Lock()
        self._receive_lock = trio.Lock()
        self._watching = trio.CancelScope(shield=True)
        self._exited = trio.Event()
        self._tail = bytearray()
        self._output_ended = trio.Event()

    @property
    def status(self) -> int | None:
        """The exit status once the child has ended (negative: the signal's number), else None."""
        return self._process.returncode if self._exited.is_set() else None

    async def send(self, message: Message) -> None:
        """Send one message. Raises `WorkerDied` when the child is gone."""
        async with self._send_lock:
            try:
                await self._stream.send_all(encode(message))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise await self._death() from None

    async def receive(self) -> Message:
        """The next message. Raises `WorkerDied` (status, end of its output) when the child is gone, and
        `WorkerError` when it sent nonsense. Safe to cancel: no message is lost."""
        async with self._receive_lock:
            while (message := self._reader.next()) is None:
                data = await self._receive_some()
                if not data:
                    raise await self._death()
                self._reader.feed(data)
            return message

    async def _receive_some(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(_RECEIVE_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def _death(self) -> WorkerDied:
        """Its stream has ended: wait for the process to end too, killing it if it does not."""
        with trio.move_on_after(_EXIT_DEADLINE_S):
            await self._exited.wait()
        self._signal(signal.SIGKILL)
        await self._exited.wait()
        await self._last_words()
        return WorkerDied(self.module, self.pid, self._process.returncode, self.tail)

    async def _last_words(self) -> None:
        """What it wrote last is the cause of its end; but a grandchild may hold its output open."""
        with trio.move_on_after(_LAST_WORDS_S):
            await self._output_ended.wait()

    @property
    def tail(self) -> str:
        """The end of what the child wrote to stdout and stderr so far, at most `TAIL_BYTES`."""
        return self._tail.decode(errors="replace").strip()

    async def wait(self) -> int:
        """Wait for the child to end; its exit status (negative: the signal's number)."""
        await self._exited.wait()
        return int(self._process.returncode)

    async def stop(self, grace_s: float) -> list[Message]:
        """Ask the child to stop (`{"type": "stop"}`), give it `grace_s` seconds, then end it.

        Returns the messages it sent on its way out (none if another task is receiving them). Safe to call
        when it has ended already.
        """
        messages: list[Message] = []
        with trio.move_on_after(grace_s):
            try:
                await self.send({"type": "stop"})
                if self._receive_lock.locked():  # another task is receiving: the messages are its
                    await self._exited.wait()
                while True:
                    messages.append(await self.receive())
            except WorkerError as error:
                log.debug("%s stopped: %s", self.module, error)
        await self._end()
        return messages

    def kill(self) -> None:
        """End the child at once; whoever waits for it or receives from it notices."""
        self._signal(signal.SIGKILL)

    async def _end(self) -> None:
        """SIGTERM, then SIGKILL; returns when the process is gone."""
        with trio.CancelScope(shield=True):
            for signum in (signal.SIGTERM, signal.SIGKILL):
                if self._exited.is_set():
                    return
                self._signal(signum)
                with trio.move_on_after(_TERM_GRACE_S):
                    await self._exited.wait()
            await self._exited.wait()

    def _signal(self, signum: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signum)

    async def _leave(self) -> None:
        """At the end of `open_worker`: let it see that its parent is gone, then end it."""
        with trio.CancelScope(shield=True):
            await self._stream.aclose()
            with trio.move_on_after(_LEAVE_GRACE_S):
                await self._exited.wait()
            await self._end()
            await self._last_words()
            self._watching.cancel()

    async def _watch(self, output: trio.lowlevel.FdStream, sink: BinaryIO | None) -> None:
        """Until `_leave` is done. Shielded: ending the child in a cancelled block still needs its status."""
        with self._watching:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_exit)
                nursery.start_soon(self._watch_output, output, sink)

    async def _watch_exit(self) -> None:
        descriptor = _process_descriptor(self.pid)
        if descriptor is not None:
            try:
                await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)
        while self._process.poll() is None:  # without a descriptor there is nothing to wait on
            await trio.sleep(_POLL_S)
        self._exited.set()

    async def _watch_output(self, output: trio.lowlevel.FdStream, sink: BinaryIO | None) -> None:
        lines = logging.getLogger(f"{__name__}.{self.module}")
        async for data in output:
            self._tail += data
            del self._tail[:-TAIL_BYTES]
            if sink is not None:
                sink = _append(sink, data)
            elif lines.isEnabledFor(logging.DEBUG):
                lines.debug("%s", data.decode(errors="replace").rstrip())
        self._output_ended.set()


@asynccontextmanager
async def open_worker(module: str, *, log_path: Path | None = None) -> AsyncIterator[Worker]:
    """Run `python -m module` as a child with a link to us; it is gone when the block ends.

    What the child prints (stdout and stderr) goes to `log_path` (appended) or, without it, to a logger named
    after the module at DEBUG; its end is kept for `WorkerDied`.
    The child is in a session of its own: Ctrl-C in the terminal reaches only us.
    """
    ours, process = _start(module)
    assert process.stdout is not None
    sink: BinaryIO | None = None
    try:
        sink = log_path.open("ab", buffering=0) if log_path is not None else None
        output = trio.lowlevel.FdStream(os.dup(process.stdout.fileno()))
    except OSError as error:
        if sink is not None:
            sink.close()
        ours.close()
        process.kill()
        process.wait()
        raise WorkerError(f"cannot start {module}: {error}") from error
    finally:
        process.stdout.close()
    worker = Worker(module, process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
    try:
        async with output, open_inner_nursery() as nursery:
            nursery.start_soon(worker._watch, output, sink)
            try:
                yield worker
            finally:
                await worker._leave()
    finally:
        if sink is not None:
            sink.close()


def _process_descriptor(pid: int) -> int | None:
    """What becomes readable when the process ends; None where the system has, or gives, no such thing."""
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _append(sink: BinaryIO, data: bytes) -> BinaryIO | None:
    """Write to a child's log; None when the disk refuses: the child's work is worth more than its log."""
    try:
        sink.write(data)
    except OSError as error:
        log.warning("a log is not written any more: %s", error)
        return None
    return sink


def _start(module: str) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """Start the child from this thread: its death signal fires when the thread that started it ends, and
    trio's own process starter uses a pool thread that idles out after seconds."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise WorkerError(f"cannot start {module}: {error}") from error
    with theirs:
        link = {FD_VARIABLE: str(theirs.fileno()), PARENT_VARIABLE: str(os.getpid())}
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **link},
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise WorkerError(f"cannot start {module}: {error}") from error
    return ours, process
