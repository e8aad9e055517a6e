"""What the programs share: output as people or scripts want it, and errors turned into exit codes.

Owns: the JSON-lines contract (`--json`: one object a line on stdout, nothing else there), logging set-up,
the table from error types to exit codes. Does not own: any command.
"""

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, TextIO

from paris_p2p.errors import (
    ConfigError,
    IncompleteError,
    LocalProtocolError,
    NetworkError,
    ParisError,
    RemoteProtocolError,
    StoreError,
    TransportError,
    WorkerError,
)
from paris_p2p.open_files import allow_many
from paris_p2p.workers.child import install_death_signal

DIE_WITH_PARENT = "PARIS_DIE_WITH_PARENT"
"""Environment variable: the process id of the program that started this one and takes it along when it
dies (the demo's actors; nothing is left behind even by `kill -9`)."""

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_NETWORK = 3
EXIT_INCOMPLETE = 4
EXIT_INTERRUPTED = 130

# error type -> (exit code, what to do next); the first match wins
_REMEDIES: tuple[tuple[type[ParisError], int, str], ...] = (
    (ConfigError, EXIT_USAGE, ""),
    (StoreError, EXIT_USAGE, "Nothing that was complete is lost; put it right and run the command again."),
    (NetworkError, EXIT_NETWORK, ""),
    (TransportError, EXIT_NETWORK, "Run the command again: it goes on where it stopped."),
    (RemoteProtocolError, EXIT_NETWORK, "A peer misbehaved; run the command again to try others."),
    (IncompleteError, EXIT_INCOMPLETE, ""),
    (WorkerError, EXIT_BUG, "A helper process failed; run again with --debug for its output."),
    (LocalProtocolError, EXIT_BUG, "This is a bug in paris-p2p; run again with --debug and report it."),
)


_EXPECTED = (KeyboardInterrupt, ParisError, BrokenPipeError)


class Output:
    """Where a command speaks: JSON lines for scripts, or text for people."""

    def __init__(self, as_json: bool, stdout: TextIO | None = None) -> None:
        self.as_json = as_json
        self._stdout = stdout if stdout is not None else sys.stdout

    def event(self, name: str, text: str | None = None, /, **fields: Any) -> None:
        """One event: `{"event": name, **fields}` as a JSON line, or `text` (if any) for people."""
        if self.as_json:
            self.data({"event": name, **fields})
        elif text is not None:
            self.say(text)

    def data(self, value: Any) -> None:
        """One JSON object on a line of its own, in ASCII: terminals obey some of what strangers write."""
        print(json.dumps(value), file=self._stdout, flush=True)

    def say(self, text: str) -> None:
        """A line for people; silent with `--json`."""
        if not self.as_json:
            print(text, file=self._stdout, flush=True)


def version_text(program: str) -> str:
    """What `--version` prints: the versions that decide who can talk to whom."""
    from importlib.metadata import PackageNotFoundError, version

    from paris_p2p.wire.records import PROTOCOL_VERSION

    try:
        ours = version("paris-p2p")
    except PackageNotFoundError:  # run from its source, which was never installed
        ours = "(not installed)"
    return f"{program} {ours}, protocol {PROTOCOL_VERSION}, Python {sys.version.split()[0]}"


def run_program(body: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run a command's body and return its exit code; errors become one message on stderr.

    A traceback is shown only with `debug`, or when the error is not one of ours. SIGTERM is treated as
    Ctrl-C, so that a service manager's stop is as clean as a person's.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _tie_to_parent()
        allow_many()
        return body() or EXIT_DONE
    except BaseException as raised:  # noqa: BLE001 - the last catcher: every error becomes an exit code
        error = _single(raised)
        if isinstance(error, SystemExit):
            raise error from None
        if isinstance(error, BrokenPipeError):
            _close_stdout()
            return EXIT_DONE
        return _report(error, debug)


def _tie_to_parent() -> None:
    parent = os.environ.pop(DIE_WITH_PARENT, None)
    if parent is None:
        return
    install_death_signal(signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before the signal was installed
        raise KeyboardInterrupt


def _interrupt(_signal: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C does now. Under trio that is trio's own handler: an exception raised inside its loop
    would end it without any cleaning up."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signal.SIGINT, frame)
    else:
        raise KeyboardInterrupt


def _close_stdout() -> None:
    """The reader has gone (`| head`): say nothing more, not even at interpreter exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _single(error: BaseException) -> BaseException:
    """The one error that matters in a tree of exception groups (nurseries wrap even a lone error).

    A bug first; then the user's wish to stop, whose consequences the others may be; then one of ours.
    """
    leaves = _leaves(error)
    other = [leaf for leaf in leaves if not isinstance(leaf, _EXPECTED)]
    if other:
        return error if len(leaves) > 1 else other[0]
    return min(leaves, key=lambda leaf: [isinstance(leaf, kind) for kind in _EXPECTED].index(True))


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


def _remedy(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, ""
    for kind, code, hint in _REMEDIES:
        if isinstance(error, kind):
            return code, hint
    return EXIT_BUG, "This is a bug in paris-p2p; please report it with the lines above."


def _report(error: BaseException, debug: bool) -> int:
    code, hint = _remedy(error)
    if debug or not isinstance(error, ParisError | KeyboardInterrupt):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        print(f"error: {error}" + (f"\n{hint}" if hint else ""), file=sys.stderr)
    return code


LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class _Brief(logging.Formatter):
    """`12:52:45 warning: …`; what is no warning goes without the word."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
        return text if record.exc_info is None else f"{text}\n{self.formatException(record.exc_info)}"


def set_up_logging(debug: bool) -> None:
    """Logs go to stderr: warnings and up, or everything of ours with `debug`. On a terminal briefly, as they
    stand between a command's own lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Brief() if sys.stderr.isatty() and not debug else logging.Formatter(LOG_FORMAT))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("paris_p2p").setLevel(logging.DEBUG if debug else logging.INFO)
    logging.getLogger("paris_node").setLevel(logging.DEBUG if debug else logging.INFO)
