"""Finding out whether this node can be dialled, and staying reachable when it cannot.

Owns: asking helpers to dial us back, keeping reservations at relays, the state that people are shown. Does
not own: the exchange with a helper (`net.circuits`), finding helpers (an argument), what the state means for
the DHT (the programs).
"""

import ipaddress
import logging
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Literal

import trio

from paris_p2p.errors import ParisError, TransportError
from paris_p2p.net.addresses import Endpoint, dialable, parse_endpoint
from paris_p2p.net.arrivals import site
from paris_p2p.net.circuits import PROBE_S, Circuits
from paris_p2p.net.tls import TlsHost
from paris_p2p.net.tls_stream import PUNCHED
from paris_p2p.net.transport import Peer
from paris_p2p.wire.identity import peer_id_text
from paris_p2p.wire.reach import Answer, Status, circuit_text

_log = logging.getLogger(__name__)

State = Literal["unknown", "direct", "mapped", "punched", "relayed", "outbound-only"]
"""`direct`: others dial us where we listen; `mapped`: at another address, which a router forwards; `relayed`:
by reservations at relays; `punched`: the same, and the last session by way of one got through directly;
`outbound-only`: nobody can dial us; `unknown`: nobody could be asked."""

FindHelpers = Callable[[], Awaitable[Sequence[Peer]]]
"""Public nodes with a TLS address, which dial back and may relay: anybody can say that of itself."""
Chosen = Callable[[], Awaitable[Collection[Endpoint]]]
"""Where helpers are that the operator chose, as by choosing bootstrap nodes."""

MAX_CHOSEN_ASKED = 3
MAX_HELPERS_ASKED = 3  # of strangers: each from another site
RELAYS = 2
FIRST_LOOK_S = 1.0
LOOK_S = 10.0  # while it is not known, or no relay is found
RELOOK_S = 300.0
TOLD_S = 1800.0  # what a chosen helper said so long ago is not overturned by what strangers say
RETRY_S = 5.0  # a relay that refused, or lost us
MAX_RETRY_S = 120.0
PAUSE_S = 2.0  # before another takes its place: those it had do not all come at once
STEADY_S = 60.0  # a reservation that stood for so long was a good one
MAX_FAILED = 256  # relays remembered


class Reachability:
    """Made by `net.multi`. `run` works until cancelled; everything else may be read at any time."""

    def __init__(self, host: TlsHost, circuits: Circuits, peer_id: str, rng: random.Random) -> None:
        self._host = host
        self._circuits = circuits
        self._peer_id = peer_id
        self._rng = rng
        self._dialable: bool | None = None
        self._chosen: dict[str, Endpoint] = {}  # host -> where its helper should be
        self._told: float | None = None  # when a chosen helper last said whether we can be dialled
        self._looked = -math.inf  # when the last look ended
        self._mapped: str | None = None
        self._reserved: dict[str, str] = {}  # relay -> our address through it
        self._failed: dict[str, tuple[int, float]] = {}  # relay -> how often in a row, not before
        self._lost = trio.Event()

    @property
    def state(self) -> State:
        """How others reach this node."""
        if self._dialable:
            return "mapped" if self._mapped else "direct"
        if self._reserved:
            return "punched" if self._host.last_path == PUNCHED else "relayed"
        return "unknown" if self._dialable is None else "outbound-only"

    @property
    def certain(self) -> bool:
        """Whether the state is more than what strangers say: they may lie about who cannot be dialled."""
        return self._told is not None

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others reach us besides, or instead of, where we listen."""
        if self._dialable:
            return () if self._mapped is None else (self._mapped,)
        return tuple(self._reserved.values())

    async def run(self, find_helpers: FindHelpers, chosen: Chosen | None = None) -> None:
        """Until cancelled. Helpers at the hosts that `chosen` names decide; strangers do where they are
        silent."""
        async with trio.open_nursery() as nursery:
            holding: dict[str, trio.CancelScope] = {}
            look_at = trio.current_time() + FIRST_LOOK_S
            await trio.sleep_until(look_at)
            while True:
                if chosen is not None:
                    self._chosen = {endpoint.host: endpoint for endpoint in await chosen()}
                helpers = await self._find(find_helpers)
                if trio.current_time() >= look_at:
                    await self._look(helpers)
                    look_at = trio.current_time() + LOOK_S
                if self._dialable is False:
                    self._hold_some(helpers, holding, nursery)
                elif self._dialable:
                    for scope in holding.values():
                        scope.cancel()
                settled = self._dialable or len(self._reserved) >= min(RELAYS, len(helpers)) > 0
                await self._pause(RELOOK_S if settled else LOOK_S)

    async def _pause(self, seconds: float) -> None:
        """Shorter when a relay is to be replaced."""
        self._lost = trio.Event()
        with trio.move_on_after(seconds):
            await self._lost.wait()
            await trio.sleep(self._rng.uniform(0.5, 1.0) * PAUSE_S)

    async def _find(self, find_helpers: FindHelpers) -> list[tuple[Peer, Endpoint]]:
        try:
            found = await find_helpers()
        except ParisError as error:
            _log.debug("looking for helpers: %s", error)
            return []
        usable = []
        ours = {endpoint.family for endpoint in self._host.endpoints}
        for peer in found:
            endpoints = [parse_endpoint(text) for text in peer.addresses]
            tls = [endpoint for endpoint in endpoints if endpoint is not None and endpoint.tls]
            tls.sort(key=lambda endpoint: endpoint.family not in ours)
            usable += [(peer, endpoint) for endpoint in tls[:1]]
        return self._in_order(usable)

    def _in_order(self, helpers: list[tuple[Peer, Endpoint]]) -> list[tuple[Peer, Endpoint]]:
        """By chance, but first a chosen one, and one of each site before the second of any: keys are free."""
        self._rng.shuffle(helpers)
        first = next((helper for helper in helpers if helper[1].host in self._chosen), None)
        seen: Counter[str] = Counter()
        ranks = []
        for helper in helpers:
            seen[site(helper[1].host)] += 1
            ranks.append(0 if helper is first else seen[site(helper[1].host)])
        order = sorted(range(len(helpers)), key=lambda index: ranks[index])
        return [helpers[index] for index in order]

    # -- can we be dialled? ----------------------------------------------------------------------

    async def _look(self, helpers: Sequence[tuple[Peer, Endpoint]]) -> None:
        answers: list[tuple[Endpoint, Answer]] = []

        async def ask(helper: Endpoint, port: int) -> None:
            try:
                answers.append((helper, await self._circuits.probe(helper, port)))
            except TransportError as error:
                _log.debug("asking to be dialled back: %s", error)

        began = trio.current_time()
        with trio.move_on_after(2 * PROBE_S):
            async with trio.open_nursery() as nursery:
                for helper in self._whom_to_ask(helpers):
                    own = [e.port for e in self._host.endpoints if e.family == helper.family]
                    if own:
                        nursery.start_soon(ask, helper, own[0])
        self._judge(answers, began)
        _log.debug("reachability: %s", self.state)  # an event tells people

    def _whom_to_ask(self, helpers: Sequence[tuple[Peer, Endpoint]]) -> list[Endpoint]:
        """The chosen ones, where they should be and where else they say they are, and some strangers: a
        place has one voice, whatever keys it has."""
        chosen = list(self._chosen.values())
        self._rng.shuffle(chosen)
        del chosen[MAX_CHOSEN_ASKED:]
        strangers: dict[str, Endpoint] = {}
        for _, helper in helpers:
            if helper.host not in self._chosen:
                strangers.setdefault(site(helper.host), helper)
            elif len(chosen) < 2 * MAX_CHOSEN_ASKED and helper not in chosen:
                chosen.append(helper)
        return chosen + list(strangers.values())[:MAX_HELPERS_ASKED]

    def _judge(self, answers: Sequence[tuple[Endpoint, Answer]], began: float) -> None:
        """Who came from outside since the last look proves that we can be dialled. Else most of the chosen
        helpers decide; and most of the strangers while none of those has been heard of for long."""
        own = [endpoint.host for endpoint in dialable(self._host.endpoints)]
        arrivals, since = self._host.arrivals, self._looked
        proven = {v6: arrivals.outside(own, since, ipv6=v6) for v6 in (False, True)}
        self._looked = trio.current_time()
        tried = [(h, a) for h, a in answers if a.status in (Status.OK, Status.UNREACHABLE)]
        heard = [(h, a) for h, a in tried if h.host in self._chosen]
        if heard:
            self._told = trio.current_time()
        elif self._told is not None and trio.current_time() - self._told < TOLD_S:
            tried = []
        else:
            self._told = None
            tried = [(h, a) for h, a in tried if a.status is not Status.OK or self._came(h, began)]
        votes = [proven[":" in h.host] or a.status is Status.OK for h, a in heard or tried]
        if votes:
            self._dialable = 2 * sum(votes) >= len(votes)
            reached = [a for _, a in tried if a.status is Status.OK]
            self._mapped = self._mapping([a for _, a in heard] or reached)
        elif any(proven.values()):
            self._dialable = True

    def _came(self, helper: Endpoint, began: float) -> bool:
        """Whether the stranger who says that it got through did, as far as we can see."""
        return self._host.arrivals.came(helper.host, began)

    def _mapping(self, answers: Sequence[Answer]) -> str | None:
        """Where most of these, by IPv4 or else by IPv6, saw us, when that is no address of ours: a router
        forwards it."""
        for colon in (False, True):
            seen = [self._seen_at(answer) for answer in answers if (":" in answer.host) == colon]
            if seen:
                text, votes = Counter(seen).most_common(1)[0]
                if text is not None and 2 * votes > len(seen):
                    return text
        return None

    def _seen_at(self, answer: Answer) -> str | None:
        """None for an address of ours, and for one that a helper cannot have seen."""
        seen = ipaddress.ip_address(answer.host)
        if seen.is_loopback or seen.is_unspecified or seen.is_multicast:
            return None
        if any(ipaddress.ip_address(endpoint.host) == seen for endpoint in dialable(self._host.endpoints)):
            return None
        ports = [e.port for e in self._host.endpoints if (":" in e.host) == (seen.version == 6)]
        return Endpoint(answer.host, ports[0], tls=True).text(self._peer_id) if ports else None

    # -- reservations ----------------------------------------------------------------------------

    def _hold_some(
        self,
        helpers: Sequence[tuple[Peer, Endpoint]],
        holding: dict[str, trio.CancelScope],
        nursery: trio.Nursery,
    ) -> None:
        now = trio.current_time()
        for peer, relay in helpers:
            name = relay.text()
            patience = self._failed.get(name, (0, now))[1]
            if len(holding) < RELAYS and name not in holding and patience <= now:
                scope = holding[name] = trio.CancelScope()
                nursery.start_soon(self._hold, peer, relay, scope, holding)

    async def _hold(
        self, peer: Peer, relay: Endpoint, scope: trio.CancelScope, holding: dict[str, trio.CancelScope]
    ) -> None:
        """Until the relay refuses or loses us; then another takes over, or the same one later."""
        name, began = relay.text(), trio.current_time()
        try:
            with scope:
                await self._circuits.hold(peer.node_id, relay, lambda _: self._stands(name))
        except TransportError as error:
            _log.info("relay %s: %s", peer_id_text(peer.node_id), error)
        finally:
            stood = self._reserved.pop(name, None) is not None
            holding.pop(name, None)
        if not scope.cancelled_caught:
            self._note_failure(name, steady=stood and trio.current_time() - began >= STEADY_S)
            self._lost.set()

    def _note_failure(self, relay: str, *, steady: bool) -> None:
        times = 1 if steady else self._failed.pop(relay, (0, 0.0))[0] + 1
        wait_s = min(RETRY_S * 2.0 ** min(times - 1, 8), MAX_RETRY_S) * self._rng.uniform(0.5, 1.0)
        while len(self._failed) >= MAX_FAILED:
            del self._failed[next(iter(self._failed))]
        self._failed[relay] = (times, trio.current_time() + wait_s)

    def _stands(self, relay: str) -> None:
        self._reserved[relay] = circuit_text(relay, self._peer_id)
        _log.debug("reachability: %s", self.state)  # an event tells people
