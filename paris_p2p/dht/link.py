"""A started DHT worker and the requests under way in it.

Owns: numbering requests, handing each its answer. Does not own: the worker's life, deadlines (`client`).
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import trio

from paris_p2p.errors import WorkerError
from paris_p2p.workers.spawn import Worker


class Link:
    """Requests to `worker`. One task runs `pump`; any may request."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._numbers = itertools.count()
        self._waiting: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}

    async def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer. Raises `WorkerError` when it dies meanwhile."""
        number = next(self._numbers)
        sender, receiver = trio.open_memory_channel[dict[str, Any]](1)
        self._waiting[number] = sender
        try:
            await self.worker.send({**message, "id": number})
            return await receiver.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise WorkerError("the DHT worker died") from None
        finally:
            self._waiting.pop(number, None)

    async def pump(self, told: Callable[[dict[str, Any]], None]) -> None:
        """Hand out answers, and what the worker says unasked to `told`, until it dies: `WorkerError`."""
        try:
            while True:
                message = await self.worker.receive()
                if message["type"] != "answer":
                    told(message)
                elif (sender := self._waiting.get(message["id"])) is not None:
                    sender.send_nowait(message)
        finally:
            for sender in self._waiting.values():
                sender.close()
