"""Fetches that a full disk interrupts, and that go on when there is room again.

Owns: waiting, and saying so once. Does not own: fetching (`net.swarm`), what a volunteer does meanwhile
(`volunteer`, `saving`).
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from paris_p2p.errors import DiskFullError
from paris_p2p.programs import Output

T = TypeVar("T")

PAUSE_S = 5.0
"""How often it is looked whether there is room again."""


class UntilRoom:
    """What one command fetches, in one thing after the other or many at once."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._paused = False

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` returns: begun again whenever it found the disk full. Raises what else it raises."""
        while True:
            try:
                result = await work()
            except DiskFullError as error:
                self._say(str(error))
                await trio.sleep(PAUSE_S)
            else:
                self._paused = False
                return result

    def _say(self, reason: str) -> None:
        if not self._paused:
            self._paused = True
            text = f"paused: {reason}. It goes on when there is room; Ctrl-C ends it, what is here is kept"
            self._output.event("paused", text, reason=reason)
