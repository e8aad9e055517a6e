"""What a member of a run keeps on its disk, and what it gives up.

Owns: which items are pinned while the store is limited, which half-fetched items nobody will go on with, and
telling others of items while they are being fetched. Does not own: removing (`store`), copying (`run_node`).
"""

import logging
from collections.abc import Collection, Iterable, Sequence

import trio

from paris_node.announcer import Announcer
from paris_node.network import Network
from paris_p2p import clock
from paris_p2p.core.quota import Holding
from paris_p2p.errors import StoreError, TransportError
from paris_p2p.ids import InfoHash, Role
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import Manifest

log = logging.getLogger(__name__)

ABANDONED_S = 600.0
"""A half-fetched item that nothing needs is given up when nothing came of it for so long."""
PASSING_TTL_S = 30.0
"""Who fetches and leaves is looked for in vain for at most so long."""
FETCHES_PERIOD_S = 1.0
"""In a flash crowd peers must find each other while the item is young."""


def pinned_items(
    manifest: Manifest, role: Role | None, held: Iterable[CheckpointStatement], also: Collection[InfoHash]
) -> set[InfoHash]:
    """The items a volunteer never gives up: the run's components, what its `role` (if any) trains on, the
    lineages it holds, and `also`."""
    needed: set[InfoHash] = set(also)
    needed |= {ref.info_hash for ref in manifest.components.values()}
    if role is not None:
        needed |= {ref.info_hash for ref in manifest.shards(role)}
    for statement in held:
        needed |= {statement.weights.info_hash, statement.resume.info_hash}
    return needed


def abandoned(
    holdings: Sequence[Holding], needed: Collection[InfoHash], now_unix: float
) -> tuple[InfoHash, ...]:
    """The half-fetched items that nothing needs any more: copies of checkpoints that newer ones replaced."""
    return tuple(
        holding.info_hash
        for holding in holdings
        if not holding.complete
        and holding.info_hash not in needed
        and now_unix - holding.used_unix >= ABANDONED_S
    )


async def give_up_abandoned(network: Network, refs: Iterable[ContentRef]) -> None:
    """Remove what nothing needs; `refs`: what still counts. What is being fetched is left alone."""
    needed = {ref.info_hash for ref in refs} | network.swarm.in_use()

    def remove() -> None:
        for info_hash in abandoned(network.store.holdings(), needed, clock.unix()):
            network.store.remove(info_hash)
            log.debug("gave up a half-fetched item that newer ones replaced: %s", info_hash.hex()[:16])

    try:
        await trio.to_thread.run_sync(remove)
    except StoreError as error:  # another process is at work on it; the next round tries again
        log.info("tidying the store: %s", error)


async def announce_fetches(network: Network, announcer: Announcer) -> None:
    """Tell the DHT of items as soon as they are being fetched, for ever: who has a part is a source too."""
    known: frozenset[InfoHash] = frozenset()
    while True:
        now = network.swarm.fetching()
        announcer.provide_parts(now - known)
        if now - known:
            await _tell(announcer)
        known = now
        await trio.sleep(FETCHES_PERIOD_S)


async def announce_for_now(network: Network) -> None:
    """The same for a command that ends soon: what came whole is told of, too, and nothing for long."""
    announcer = Announcer(network, provide_ttl_s=PASSING_TTL_S)
    known: frozenset[InfoHash] = frozenset()
    while True:
        now = network.swarm.fetching()
        announcer.provide_parts(now - known)
        announcer.provide(item for item in known - now if network.store.has(item))
        await _tell(announcer)
        known = now
        await trio.sleep(FETCHES_PERIOD_S)


async def _tell(announcer: Announcer) -> None:
    try:
        await announcer.flush()
    except TransportError as error:
        log.info("telling of a fetch failed, it is tried again: %s", error)
