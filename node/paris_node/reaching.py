"""A node's side of being reached: what follows from the state that `net.reachability` finds.

Owns: the DHT's mode, telling others that this node relays, dialling those who fetch what is here and cannot
dial us. Does not own: finding the state.
"""

import logging
import random
from collections.abc import Sequence

import trio

from paris_node.announcer import Announcer
from paris_node.network import Network
from paris_p2p.errors import ParisError, TransportError
from paris_p2p.ids import InfoHash
from paris_p2p.net.swarm import Peer
from paris_p2p.programs import Output
from paris_p2p.wire.records import ProvideRecord, Record, RelayRecord

log = logging.getLogger(__name__)

WATCH_S = 1.0
OFFER_S = 5.0
ITEMS_PER_ROUND = 16
MAX_OFFERS = 8
"""Dialled in a round: the nodes that fetch anything of ours, as far as this many, others each time."""
DIAL_S = 30.0
RELAY_TTL_S = 600.0
UNREACHABLE = ("outbound-only", "relayed", "punched")

_TEXTS = {
    "direct": "others can dial this node",
    "mapped": "others can dial this node through its router",
    "relayed": "a router stands in the way; others reach this node through a relay",
    "punched": "a router stands in the way; others get through it with a relay's help",
    "outbound-only": "a router stands in the way and no relay was found; this node dials others itself",
}


class Reaching:
    """The reachability loops of one node. `relay`: relay for others where possible."""

    def __init__(self, network: Network, announcer: Announcer, output: Output, *, relay: bool) -> None:
        self._network = network
        self._announcer = announcer
        self._output = output
        self._relay = relay
        self._next = 0
        self._rng = random.Random(network.identity.sign(b"paris-p2p/reaching"))  # nobody else can foretell it

    @property
    def state(self) -> str:
        """How others reach this node; empty while unknown."""
        reachability = self._network.swarm.reachability
        state = "unknown" if reachability is None else reachability.state
        return "" if state == "unknown" else state

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            nursery.start_soon(self._offer_for_ever)

    # -- the state -------------------------------------------------------------------------------

    async def _watch(self) -> None:
        known, addresses = "", self._announcer.addresses
        only_asks: bool | None = None
        while True:
            state = self.state
            if state and state != known:
                self._output.event("reachability", _TEXTS[state], state=state)
            if state and self._cannot_answer(state) != only_asks:
                only_asks = self._cannot_answer(state)
                self._network.dht.only_ask(only_asks)
            if (state, addresses) != (known, self._announcer.addresses):
                known, addresses = state, self._announcer.addresses
                await self._say_again()
            await trio.sleep(WATCH_S)

    def _cannot_answer(self, state: str) -> bool:
        """Whether nobody in the DHT should ask this node anything. Never on strangers' word alone: they could
        drive everybody out of it."""
        reachability = self._network.swarm.reachability
        return state in UNREACHABLE and reachability is not None and reachability.certain

    async def _say_again(self) -> None:
        """Others are told at once where this node is now."""
        if self._relay and self.state in ("direct", "mapped"):
            tls = tuple(text for text in self._announcer.addresses if "/tls/" in text)
            self._announcer.say(RelayRecord(tls), b"", RELAY_TTL_S)
        else:
            self._announcer.unsay(RelayRecord, b"")
        self._announcer.readdress()
        try:
            await self._announcer.flush()
        except TransportError as error:
            log.info("telling new addresses: %s", error)

    # -- dialling those who cannot dial us -------------------------------------------------------

    async def _offer_for_ever(self) -> None:
        while True:
            await trio.sleep(OFFER_S)
            if self.state in UNREACHABLE:
                try:
                    await self._offer()
                except ParisError as error:
                    log.info("looking for nodes that fetch what is here: %s", error)

    async def _offer(self) -> None:
        items = self._some_items()
        if not items:
            return
        found = await self._network.dht.read_many([("provide", item) for item in items])
        fetching = self._fetching(items, found)
        self._rng.shuffle(fetching)  # those who are connected, or gone, must not keep the others out
        async with trio.open_nursery() as nursery:
            for item, peer in fetching[:MAX_OFFERS]:
                nursery.start_soon(self._dial, item, peer)

    def _some_items(self) -> list[InfoHash]:
        """What this node says it has, so many items a round, in turn."""
        every = self._announcer.provided()
        start = self._next % len(every) if every else 0
        self._next = start + ITEMS_PER_ROUND
        return (every[start:] + every[:start])[:ITEMS_PER_ROUND]

    def _fetching(
        self, items: Sequence[InfoHash], found: Sequence[Sequence[Record]]
    ) -> list[tuple[InfoHash, Peer]]:
        me = self._network.identity.node_id
        return [
            (item, Peer(record.owner, record.payload.addresses))
            for item, records in zip(items, found, strict=True)
            for record in records
            if isinstance(record.payload, ProvideRecord)
            and not record.payload.complete
            and record.payload.addresses
            and record.owner != me
        ]

    async def _dial(self, item: InfoHash, peer: Peer) -> None:
        with trio.move_on_after(DIAL_S):
            try:
                await self._network.swarm.offer(item, peer)
            except TransportError as error:
                log.debug("offering an item: %s", error)
