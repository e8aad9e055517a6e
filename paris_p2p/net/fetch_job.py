"""One running fetch and everyone who waits for it.

Owns: what a fetch was asked for with, its outcome. Does not own: running it (`net.swarm`).
"""

from collections.abc import Sequence
from pathlib import Path

import trio

from paris_p2p.errors import ParisError, TransportError
from paris_p2p.net.download import Download
from paris_p2p.net.transport import Peer
from paris_p2p.wire.content import AnyRef


class FetchJob:
    """One download, shared by everyone who asked for it."""

    def __init__(self, ref: AnyRef, stall_timeout_s: float, priority: int) -> None:
        self.ref = ref
        self.priority = priority
        self.stall_timeout_s = stall_timeout_s
        self.waiting = 0
        self.hints: list[Peer] = []
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.download: Download | None = None
        self.path: Path | None = None
        self.error: ParisError | None = None

    def hint(self, peers: Sequence[Peer]) -> None:
        self.hints += peers
        if self.download is not None:
            self.download.sources.add(peers)
            self.download.sources_changed.set()

    def raise_priority(self, priority: int) -> None:
        """Someone else asks for the same item: the more urgent one counts."""
        self.priority = max(self.priority, priority)
        if self.download is not None:
            self.download.priority = self.priority

    def result(self) -> Path:
        if self.path is not None:
            return self.path
        raise self.error or TransportError("the swarm was closed")
