"""Finding and dialling the sources of one download, and giving up when none delivers.

Owns: how often peers are looked for, how many are dialled, the stall timeout. Does not own: sessions, in
which order peers are dialled (`net.sources`).
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import trio

from paris_p2p.errors import ParisError, TransportError
from paris_p2p.ids import InfoHash
from paris_p2p.net.download import Download
from paris_p2p.net.item import Item
from paris_p2p.net.sources import site_of
from paris_p2p.net.transport import Peer
from paris_p2p.wire.identity import peer_id_text

_log = logging.getLogger(__name__)

FIND_S = 20.0
FIRST_INTERVAL_S = 2.0
MAX_INTERVAL_S = 30.0
ENOUGH_SOURCES = 4
MAX_DIALS = 8  # while enough sources deliver; and to one place
SEARCHING_DIALS = 48  # while they do not: 1,500 addresses where nobody is are through within a minute
DELIVERING_S = 5.0
KNOCK_S = 1.5  # for an address to answer when more wait than can be dialled; twice as long each further time
MAX_KNOCK_S = 6.0
GATHER_S = 0.05

FindPeers = Callable[[InfoHash], Awaitable[Sequence[Peer]]]
Connect = Callable[[Item, Peer, float | None], Awaitable[None]]


class Discovery:
    """`connect` opens a session and returns once it runs; raises `TransportError`, and with a time does not
    dial an address that does not answer for so long."""

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
                peers, crowded = self._due()
                for peer in peers:
                    self._dialling.add(peer)
                    nursery.start_soon(self._dial, peer, crowded)
                self._download.sources_changed = trio.Event()
                with trio.move_on_after(1.0):
                    await self._download.sources_changed.wait()
                if crowded:
                    await trio.sleep(GATHER_S)  # looking at thousands for each that fails costs more

    def _due(self) -> tuple[list[Peer], bool]:
        """Whom to dial now, and whether more wait than can be dialled at once."""
        delivering = trio.current_time() - self._download.last_progress < DELIVERING_S
        enough = delivering and len(self._item.connections) >= ENOUGH_SOURCES
        room = min(
            (MAX_DIALS if enough else SEARCHING_DIALS) - len(self._dialling),
            self._item.shared.limits.max_peers - len(self._item.connections),
        )
        excluded = set(self._item.connections) | {peer.node_id for peer in self._dialling}
        now = trio.current_time()
        bans = self._item.shared.bans

        due = self._download.sources.due(
            now, excluded, lambda node_id, alone: bans.banned(node_id, now, last_holder=alone)
        )
        return self._spread(due, room), len(due) + len(self._dialling) > SEARCHING_DIALS

    def _spread(self, due: Sequence[Peer], room: int) -> list[Peer]:
        """As many as there is room for, a few at once to one place: what is announced may be somebody's who
        knows nothing of it."""
        places = Counter(map(site_of, self._dialling))
        chosen: list[Peer] = []
        for peer in due:
            if len(chosen) >= room:
                break
            place = site_of(peer)
            if not place or places[place] < MAX_DIALS:
                places[place] += 1
                chosen.append(peer)
        return chosen

    async def _dial(self, peer: Peer, crowded: bool) -> None:
        failures = self._download.sources.failures(peer.node_id)
        knock_s = min(KNOCK_S * 2.0 ** min(failures, 8), MAX_KNOCK_S) if crowded else None
        try:
            await self._connect(self._item, peer, knock_s)
        except TransportError as error:
            _log.debug("dialling %s: %s", peer_id_text(peer.node_id), error)
            self._download.sources.failed(peer.node_id, str(error), trio.current_time())
        finally:
            self._dialling.discard(peer)
            self._download.sources_changed.set()

    async def _watch(self, stall_timeout_s: float) -> None:
        while True:
            await trio.sleep_until(self._download.last_progress + stall_timeout_s)
            if trio.current_time() >= self._download.last_progress + stall_timeout_s:
                raise TransportError(self._stalled(stall_timeout_s))

    def _stalled(self, stall_timeout_s: float) -> str:
        sources = self._download.sources
        reasons = dict.fromkeys([*sources.reasons(), *([self._reason] if self._reason else [])])
        item = self._item.ref.info_hash.hex()[:12]
        text = (
            f"no source delivered anything of {item}… for {stall_timeout_s:.0f} s "
            f"({len(sources)} known, {len(self._item.connections)} connected)"
        )
        return "; ".join([text, *list(reasons)[:3]])
