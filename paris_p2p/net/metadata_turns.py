"""Serving metadata within the upload limits: whose turn it is.

Owns: what was asked for and waits, fairness between those who wait. Does not own: what is asked for and how
often (`net.item`), the limits (`core.limiter`), blocks, which wait for buckets of their own.

Metadata has half of the upload limits, and what it takes of that is taken from blocks: neither can keep the
other from being served. Keys are free, so those at one place share a turn.
"""

from collections import Counter, deque
from collections.abc import Callable

import trio

from paris_p2p.core.limiter import Limiter
from paris_p2p.ids import NodeId
from paris_p2p.net.connection import Connection

SHARE = 0.5
"""Of the upload limits, for metadata."""
LEAST_BYTES_PER_S = 16 * 1024
"""But so much at least, as far as the limits allow: nobody waits for a chunk for more than 5 s."""
POLL_S = 1.0  # limits may be changed while somebody waits
FORGET_S = 10.0  # what was taken so long ago counts half

Answer = Callable[[], int]
"""Sends a chunk; its length in bytes."""


class MetadataTurns:
    """`blocks`: what passes is taken from that, too."""

    def __init__(self, blocks: Limiter[NodeId]) -> None:
        now = trio.current_time()
        self._blocks = blocks
        self._limit: Limiter[NodeId] = Limiter(None, None, now)
        self._waiting: dict[Connection, deque[Answer]] = {}  # in order of arrival
        self._asked = trio.Event()
        self._taken: Counter[str] = Counter()  # by place
        self._halved = now

    def set_limits(self, total: float | None, per_peer: float | None, now: float) -> None:
        """The upload limits, in bytes per second, from `now` on."""
        self._limit.set_limits(_share(total), _share(per_peer), now)

    def forget(self, node_id: NodeId) -> None:
        """The peer is gone."""
        self._limit.forget(node_id)

    def ask(self, connection: Connection, answer: Answer) -> None:
        """`answer` is called in its turn, unless the session ends before; at once without limits."""
        if self._limit.unlimited and connection not in self._waiting:
            answer()
            return
        self._waiting.setdefault(connection, deque()).append(answer)
        self._asked.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._asked.wait()
            self._forget_ended()
            if not self._waiting:
                self._asked = trio.Event()
                continue
            now = trio.current_time()
            waits = {c: self._limit.wait(c.node_id, now) for c in self._waiting}
            ready = [connection for connection, wait in waits.items() if wait <= 0]
            if ready:
                self._serve(min(ready, key=lambda connection: self._taken[_group(connection)]), now)
                await trio.lowlevel.checkpoint()
            else:
                await trio.sleep(min(POLL_S, *waits.values()))

    def _forget_ended(self) -> None:
        for connection in [c for c in self._waiting if not c.usable]:
            del self._waiting[connection]

    def _serve(self, connection: Connection, now: float) -> None:
        queue = self._waiting.pop(connection)
        count = queue.popleft()()
        if queue:
            self._waiting[connection] = queue  # behind the others of its place
        self._limit.take(connection.node_id, count, now)
        self._blocks.take(connection.node_id, count, now)
        if now - self._halved > FORGET_S:
            self._halved = now
            self._taken = Counter({group: taken // 2 for group, taken in self._taken.items() if taken > 1})
        self._taken[_group(connection)] += count


def _share(limit: float | None) -> float | None:
    return None if limit is None else max(SHARE * limit, min(limit, LEAST_BYTES_PER_S))


def _group(connection: Connection) -> str:
    return connection.place or connection.node_id.hex()
