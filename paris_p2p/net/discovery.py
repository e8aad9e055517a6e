"""Finding and dialling the sources of one download, and giving up when none delivers.

Owns: how often peers are looked for, how many are dialled, the stall timeout. Does not own: sessions.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

from paris_p2p.errors import ParisError, TransportError
from paris_p2p.ids import InfoHash
from paris_p2p.net.download import Download
from paris_p2p.net.item import Item
from paris_p2p.net.transport import Peer
from paris_p2p.wire.identity import peer_id_text

_log = logging.getLogger(__name__)

FIND_S = 20.0
FIRST_INTERVAL_S = 2.0
MAX_INTERVAL_S = 30.0
ENOUGH_SOURCES = 4
MAX_DIALS = 8

FindPeers = Callable[[InfoHash], Awaitable[Sequence[Peer]]]
Connect = Callable[[Item, Peer], Awaitable[None]]


class Discovery:
    """`connect` opens a session and returns once it runs; raises `TransportError`."""

    def __init__(self, item: Item, download: Download, find_peers: FindPeers, connect: Connect) -> None:
        self._item = item
        self._download = download
        self._find_peers = find_peers
        self._connect = connect
        self._dialling: set[Peer] = set()
        self._reason = ""

    async def run(self, stall_timeout_s: float) -> None:
        """Until cancelled. Raises `TransportError` when no source delivers for `stall_timeout_s`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._find_loop)
            nursery.start_soon(self._dial_loop)
            nursery.start_soon(self._watch, stall_timeout_s)

    async def _find_loop(self) -> None:
        interval = FIRST_INTERVAL_S
        while True:
            if self._download.sources.add(await self._find()):
                interval = FIRST_INTERVAL_S
                self._download.sources_changed.set()
            await trio.sleep(interval)
            interval = min(interval * 2, MAX_INTERVAL_S)
            if len(self._item.connections) < ENOUGH_SOURCES:
                interval = min(interval, MAX_INTERVAL_S / 2)

    async def _find(self) -> Sequence[Peer]:
        try:
            with trio.fail_after(FIND_S):
                return await self._find_peers(self._item.ref.info_hash)
        except trio.TooSlowError:
            self._reason = f"looking for sources took longer than {FIND_S:.0f} s"
        except ParisError as error:
            self._reason = f"looking for sources failed: {error}"
        _log.debug("%s", self._reason)
        return ()

    async def _dial_loop(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                for peer in self._due():
                    self._dialling.add(peer)
                    nursery.start_soon(self._dial, peer)
                self._download.sources_changed = trio.Event()
                with trio.move_on_after(1.0):
                    await self._download.sources_changed.wait()

    def _due(self) -> list[Peer]:
        room = min(
            MAX_DIALS - len(self._dialling),
            self._item.shared.limits.max_peers - len(self._item.connections),
        )
        excluded = set(self._item.connections) | {peer.node_id for peer in self._dialling}
        now = trio.current_time()
        bans = self._item.shared.bans

        due = self._download.sources.due(
            now, excluded, lambda node_id, alone: bans.banned(node_id, now, last_holder=alone)
        )
        return due[: max(room, 0)]

    async def _dial(self, peer: Peer) -> None:
        try:
            await self._connect(self._item, peer)
        except TransportError as error:
            _log.debug("dialling %s: %s", peer_id_text(peer.node_id), error)
            self._download.sources.failed(peer.node_id, str(error), trio.current_time())
        finally:
            self._dialling.discard(peer)

    async def _watch(self, stall_timeout_s: float) -> None:
        while True:
            await trio.sleep_until(self._download.last_progress + stall_timeout_s)
            if trio.current_time() >= self._download.last_progress + stall_timeout_s:
                raise TransportError(self._stalled(stall_timeout_s))

    def _stalled(self, stall_timeout_s: float) -> str:
        sources = self._download.sources
        reasons = dict.fromkeys([*sources.reasons(), *([self._reason] if self._reason else [])])
        text = (
            f"no source delivered anything of {self._item.ref.info_hash.hex()} for {stall_timeout_s:.0f} s "
            f"({len(sources)} known, {len(self._item.connections)} connected)"
        )
        return "; ".join([text, *list(reasons)[:3]])
