"""One running fetch and everyone who waits for it.

Owns: what a fetch was asked for with, taking the item in the store, its outcome. Does not own: running it
(`net.swarm`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from paris_p2p.errors import ParisError, StoreError, TransportError
from paris_p2p.net.blocking import Blocking
from paris_p2p.net.download import Download, Progress
from paris_p2p.net.transport import Peer
from paris_p2p.store.content_store import ContentStore, ItemBusyError
from paris_p2p.store.partial import PartialItem
from paris_p2p.wire.content import AnyRef

PROGRESS_S = 0.2
STOP_S = 3.0
BUSY_RETRY_S = 0.5


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
            self.download.sources.add(peers, chosen=True)
            self.download.sources_changed.set()

    def raise_priority(self, priority: int) -> None:
        """Someone else asks for the same item: the more urgent one counts."""
        self.priority = max(self.priority, priority)
        if self.download is not None:
            self.download.priority = self.priority

    async def begin(self, store: ContentStore, blocking: Blocking) -> PartialItem | None:
        """Waits while another process fetches the item into the same store; None when that completed it."""
        deadline = trio.current_time() + self.stall_timeout_s
        while True:
            try:
                return await blocking(lambda: store.begin(self.ref))
            except StoreError as error:
                if await blocking(lambda: store.has(self.ref.info_hash)):
                    return None
                if not isinstance(error, ItemBusyError) or trio.current_time() >= deadline:
                    raise
            await trio.sleep(BUSY_RETRY_S)

    async def outcome(self, on_progress: Callable[[Progress], None] | None) -> Path:
        """The folder of the item's files, once it is complete; the last who stops waiting ends the fetch.
        Raises what ended it."""
        self.waiting += 1
        try:
            while not self.done.is_set():
                with trio.move_on_after(PROGRESS_S):
                    await self.done.wait()
                if on_progress is not None and self.download is not None:
                    on_progress(self.download.progress())
        finally:
            self.waiting -= 1
            if not self.waiting and not self.done.is_set():
                self.scope.cancel()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + STOP_S):
                    await self.done.wait()  # so that the item is not locked when the caller goes on
        if self.path is not None:
            return self.path
        raise self.error or TransportError("the swarm was closed")
