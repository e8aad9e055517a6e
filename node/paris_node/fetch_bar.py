"""The bar that shows one fetch on a terminal. Nothing is drawn, and rich not imported, elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from paris_p2p.net.swarm import Progress
from paris_p2p.programs import Output


@contextmanager
def fetch_bar(output: Output) -> Iterator[Callable[[Progress], None]]:
    """What to call with each `Progress`; the bar is on stderr, for the length of the block."""
    if output.as_json or not sys.stderr.isatty():
        yield lambda _progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[peers]} peers"),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=None, peers=0)

        def show(progress: Progress) -> None:
            total = progress.bytes_total or None  # unknown until the info dictionary is here
            bars.update(task, total=total, completed=progress.bytes_done, peers=progress.peers)

        yield show
