"""Progress bars on stderr, for people: nothing is drawn with `--json`, and rich not imported.

Owns: what the bars of every command look like. Does not own: what is counted.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from paris_node.text import counted
from paris_p2p.programs import Output

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import ProgressColumn, TaskID

    from paris_p2p.net.swarm import Progress


class Bars:
    """Bars by name. Each appears when it is first shown."""

    def __init__(self, drawn: "RichBars | None") -> None:
        self._drawn = drawn
        self._tasks: dict[str, TaskID] = {}

    def show(self, name: str, done: float, total: float | None, text: str | None = None) -> None:
        """Bar `name` at `done` of `total` (None: unknown); `text` stands before it, else its name."""
        if self._drawn is None:
            return
        if name not in self._tasks:
            for earlier in self._drawn.tasks:
                if earlier.total is None:  # one of unknown length is over when the next begins
                    self._drawn.update(earlier.id, total=earlier.completed)
            self._tasks[name] = self._drawn.add_task(text or name, total=total)
        self._drawn.update(self._tasks[name], completed=done, total=total, description=text or name)


def _drawn(*columns: "ProgressColumn") -> "RichBars":
    from rich.console import Console
    from rich.progress import Progress as RichBars

    return RichBars(*columns, console=Console(stderr=True))


@contextmanager
def count_bars(output: Output, *, remaining: bool = False) -> Iterator[Bars]:
    """Bars of things that are counted, with the time since they began, or that `remaining`."""
    if output.as_json:
        yield Bars(None)
        return
    from rich import progress

    time = progress.TimeRemainingColumn() if remaining else progress.TimeElapsedColumn()
    text = progress.TextColumn("{task.description}")
    with _drawn(text, progress.BarColumn(), progress.MofNCompleteColumn(), time) as drawn:
        yield Bars(drawn)


@contextmanager
def byte_bars(output: Output) -> Iterator[Bars]:
    """Bars of bytes that are fetched, side by side."""
    if output.as_json:
        yield Bars(None)
        return
    from rich import progress

    text, speed = progress.TextColumn("{task.description}"), progress.TransferSpeedColumn()
    with _drawn(text, progress.BarColumn(), progress.DownloadColumn(), speed) as drawn:
        yield Bars(drawn)


@contextmanager
def fetch_bar(output: Output) -> Iterator[Callable[["Progress"], None]]:
    """What to call with each `Progress` of one fetch; its bar is drawn on terminals only."""
    if output.as_json or not sys.stderr.isatty():
        yield lambda _progress: None
        return
    from rich import progress

    peers = progress.TextColumn("{task.fields[peers]}")
    time, speed = progress.TimeRemainingColumn(), progress.TransferSpeedColumn()
    with _drawn(progress.BarColumn(), progress.DownloadColumn(), speed, time, peers) as drawn:
        task = drawn.add_task("", total=None, peers="")

        def show(state: "Progress") -> None:
            total = state.bytes_total or None  # unknown until the info dictionary is here
            drawn.update(task, total=total, completed=state.bytes_done, peers=counted(state.peers, "peer"))

        yield show
