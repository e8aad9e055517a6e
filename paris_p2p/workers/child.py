"""The child's side of a worker: its link to the parent, and dying when the parent does.

Owns: taking over the inherited socket, framed messages in a synchronous program, the death signal.
Does not own: what the messages mean. Imports no event loop, so that a training loop can use it; an asyncio
child takes the bare socket with `ParentLink.detach`.

No child outlives its parent: reading or writing after the parent's end closed raises `ParentGone`, and on
Linux the kernel kills a child that never looks.
"""

import ctypes
import os
import select
import signal
import socket
import sys
from types import TracebackType

from paris_p2p.errors import LocalProtocolError
from paris_p2p.workers.frames import FrameReader, Message, encode

FD_VARIABLE = "PARIS_WORKER_FD"
"""Environment variable with the number of the inherited socket."""
PARENT_VARIABLE = "PARIS_WORKER_PARENT"
"""Environment variable with the parent's process id."""
PARENT_GONE_STATUS = 70
"""Exit status of a child that left because its parent did."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_RECEIVE_BYTES = 65_536


class ParentGone(SystemExit):
    """The parent closed its end or died. Uncaught it ends the child quietly; `finally` blocks still run."""

    def __init__(self) -> None:
        super().__init__(PARENT_GONE_STATUS)


def install_death_signal(signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process `signum` when its parent dies (Linux; elsewhere nothing happens).

    It fires when the parent's *thread* that started this process ends; `spawn` starts children from the
    thread that runs the event loop for that reason. Raises `ParentGone` if the parent is dead already.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    expected = os.environ.get(PARENT_VARIABLE)
    if expected is not None and os.getppid() != int(expected):  # it died before prctl could see it
        raise ParentGone


class ParentLink:
    """Framed messages to and from the parent, blocking or polled."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self._socket = connection
        self._reader = FrameReader()

    @classmethod
    def from_environment(cls, death_signal: int = signal.SIGKILL) -> "ParentLink":
        """Take over the socket the parent passed, ignore Ctrl-C (the parent decides what it means), and
        die with the parent. Call it first thing. Raises `LocalProtocolError` when there is no parent."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        number = os.environ.pop(FD_VARIABLE, None)
        if number is None:
            raise LocalProtocolError(f"{FD_VARIABLE} is not set: this module is started by a parent process")
        install_death_signal(death_signal)
        connection = socket.socket(fileno=int(number))
        connection.set_inheritable(False)  # a grandchild holding it would hide our death from the parent
        return cls(connection)

    def send(self, message: Message) -> None:
        """Send one message; blocks while the parent is behind. Raises `ParentGone`."""
        try:
            self._socket.sendall(encode(message))
        except OSError:
            raise ParentGone from None

    def poll(self) -> Message | None:
        """The next message if one has arrived, without waiting. Raises `ParentGone`, but only after every
        message that came before the end was handed out."""
        return self._next(timeout_s=0.0)

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, waiting at most `timeout_s` seconds (None: for ever; then never returns None).

        The bound is on each wait for bytes: a message arriving in parts may take longer. Raises `ParentGone`.
        """
        return self._next(timeout_s)

    def _next(self, timeout_s: float | None) -> Message | None:
        while (message := self._reader.next()) is None:
            readable, _, _ = select.select([self._socket], [], [], timeout_s)
            if not readable:
                return None
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except OSError:
                data = b""
            if not data:
                raise ParentGone
            self._reader.feed(data)
        return message

    def detach(self) -> socket.socket:
        """The bare socket, for a child with an event loop of its own; this link must not be used after."""
        return self._socket

    def close(self) -> None:
        """Close the child's end."""
        self._socket.close()

    def __enter__(self) -> "ParentLink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
