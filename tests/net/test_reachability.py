"""How a node finds out whether others can dial it, and stays reachable when they cannot: the whole state
machine, with helpers that help, refuse, vanish or lie, strangers and chosen ones."""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from paris_p2p.errors import TransportError
from paris_p2p.ids import NodeId
from paris_p2p.net.addresses import Endpoint
from paris_p2p.net.arrivals import Arrivals
from paris_p2p.net.reachability import LOOK_S, RELAYS, RELOOK_S, TOLD_S, Reachability
from paris_p2p.net.tls_stream import DIRECT, PUNCHED, RELAYED
from paris_p2p.net.transport import Peer
from paris_p2p.wire.identity import Identity, peer_id_text
from paris_p2p.wire.reach import Answer, Status

ME = peer_id_text(Identity(b"i" * 32).node_id)
LISTENING = Endpoint("192.0.2.7", 4001, tls=True)
OURS, ROUTER = "192.0.2.7", "203.0.113.9"
REACHED, MAPPED = Answer(Status.OK, OURS, 5), Answer(Status.OK, ROUTER, 5)
BLOCKED, BUSY = Answer(Status.UNREACHABLE, ROUTER, 5), Answer(Status.BUSY)
THROUGH_ROUTER = f"/ip4/{ROUTER}/tcp/4001/tls/p2p/{ME}"


class Helper:
    """A public node at a site of its own, or at that of `host`. `answer`: what it says to a probe, None when
    it is silent; it got through when it says so, unless it `lies`; it `grants` reservations until it is
    `gone`."""

    def __init__(
        self,
        number: int,
        answer: Answer | None,
        *,
        grants: bool = True,
        stands_s: float = 1e9,
        host: str = "",
        lies: bool = False,
    ) -> None:
        self.node_id = NodeId(bytes([number]) * 32)
        self.answer, self.grants, self.stands_s, self.lies = answer, grants, stands_s, lies
        self.host = host or f"198.51.{number}.1"
        self.gone = trio.Event()
        self.probed = self.asked = self.holding = 0
        self.address = f"/ip4/{self.host}/tcp/{4000 + number}/tls"

    @property
    def circuit(self) -> str:
        return f"{self.address}/p2p-circuit/p2p/{ME}"

    def leave(self) -> None:
        self.answer = None
        self.gone.set()


class Internet:
    """Stands in for the `TlsHost` and the `Circuits` of one node: the helpers around it."""

    def __init__(self, *helpers: Helper) -> None:
        self.helpers = {helper.address: helper for helper in helpers}
        self.endpoints = [LISTENING]
        self.arrivals = Arrivals()
        self.last_path = DIRECT
        self.searches = 0
        self.down = False

    async def find(self) -> Sequence[Peer]:
        self.searches += 1
        if self.down:
            raise TransportError("the DHT is away")
        return [Peer(h.node_id, (f"{h.address}/p2p/{ME}",)) for h in self.helpers.values()]

    async def probe(self, helper: Endpoint, port: int) -> Answer:
        assert port == LISTENING.port
        there = self.helpers.get(helper.text())
        await trio.sleep(0.1)
        if there is None or there.answer is None:
            raise TransportError("no answer")
        there.probed += 1
        if there.answer.status is Status.OK and not there.lies:
            self.arrivals.note(there.host, trio.current_time())
        return there.answer

    async def hold(self, _: NodeId, relay: Endpoint, reserved: Callable[[Answer], None]) -> None:
        there = self.helpers[relay.text()]
        there.asked += 1
        await trio.sleep(0.1)
        if there.gone.is_set() or not there.grants:
            raise TransportError("the relay is busy")
        reserved(MAPPED)
        there.holding += 1
        try:
            with trio.move_on_after(there.stands_s):
                await there.gone.wait()
            raise TransportError("the relay is gone")
        finally:
            there.holding -= 1


@asynccontextmanager
async def node(around: Internet, *chosen: Helper) -> AsyncIterator[Reachability]:
    """`chosen`: the helpers that the operator chose; their hosts are known, but not their ports."""

    async def choose() -> list[Endpoint]:
        return [Endpoint(helper.host, 1, tls=True) for helper in chosen]

    any_host = cast(Any, around)
    reachability = Reachability(any_host, any_host, ME, random.Random(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reachability.run, around.find, choose)
        yield reachability
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("answers", "grants", "path", "state", "address"),
    [
        ([], True, DIRECT, "unknown", None),
        ([None, None], True, DIRECT, "unknown", None),
        ([BUSY], True, DIRECT, "unknown", None),
        ([REACHED], True, DIRECT, "direct", None),
        ([REACHED, BLOCKED, BLOCKED], True, DIRECT, "direct", None),  # two lie, or are cut off themselves
        ([MAPPED, MAPPED, BLOCKED], True, DIRECT, "mapped", THROUGH_ROUTER),
        ([REACHED, REACHED, MAPPED], True, DIRECT, "direct", None),  # one would send our callers elsewhere
        ([BLOCKED, BLOCKED, None], True, RELAYED, "relayed", "p2p-circuit"),
        ([BLOCKED], True, PUNCHED, "punched", "p2p-circuit"),
        ([BLOCKED, BLOCKED], False, DIRECT, "outbound-only", None),
    ],
)
async def test_what_helpers_find_is_the_state_and_where_others_find_us(
    autojump_clock: MockClock,
    answers: Sequence[Answer | None],
    grants: bool,
    path: str,
    state: str,
    address: str | None,
) -> None:
    around = Internet(*[Helper(n + 1, answer, grants=grants) for n, answer in enumerate(answers)])
    around.last_path = path
    async with node(around) as reachability:
        await trio.sleep(5)
        assert reachability.state == state
        assert all(address is not None and address in text for text in reachability.addresses)
        assert bool(reachability.addresses) == (address is not None)


@pytest.mark.parametrize("host", ["2001:db8::1", "::", "127.0.0.1", "224.0.0.1", "::ffff:0.0.0.0"])
async def test_a_helper_that_saw_us_where_we_cannot_be_moves_us_nowhere(
    autojump_clock: MockClock, host: str
) -> None:
    async with node(Internet(Helper(1, Answer(Status.OK, host, 5)))) as reachability:
        await trio.sleep(5)
        assert (reachability.state, reachability.addresses) == ("direct", ())


async def test_a_relay_that_is_lost_is_replaced_within_seconds(autojump_clock: MockClock) -> None:
    relays = [Helper(number, BLOCKED) for number in (1, 2, 3)]
    async with node(Internet(*relays)) as reachability:
        await trio.sleep(60)
        held = [relay for relay in relays if relay.holding]
        assert len(held) == RELAYS and set(reachability.addresses) == {r.circuit for r in held}
        (spare,) = (relay for relay in relays if relay not in held)
        held[0].leave()
        await trio.sleep(3)
        assert spare.holding and reachability.state == "relayed"
        assert set(reachability.addresses) == {held[1].circuit, spare.circuit}


async def test_relays_that_refuse_keep_nobody_from_the_one_that_does_not(autojump_clock: MockClock) -> None:
    good, *full = (Helper(number, BLOCKED, grants=number == 1) for number in range(1, 8))
    async with node(Internet(good, *full)) as reachability:
        await trio.sleep(30)
        assert reachability.addresses == (good.circuit,)
        before = sum(relay.asked for relay in full)
        await trio.sleep(1200)
        assert sum(relay.asked for relay in full) - before <= len(full) * 25  # each less and less often


async def test_a_relay_that_takes_us_in_and_drops_us_is_asked_less_and_less_often(
    autojump_clock: MockClock,
) -> None:
    fickle = Helper(1, BLOCKED, stands_s=1.0)
    async with node(Internet(fickle)):
        await trio.sleep(1200)
        assert 5 <= fickle.asked <= 25
        assert fickle.probed <= 1200 / LOOK_S + 1


async def test_a_router_that_comes_and_goes_is_noticed(autojump_clock: MockClock) -> None:
    helper = Helper(1, BLOCKED)
    async with node(Internet(helper)) as reachability:
        await trio.sleep(30)
        assert reachability.state == "relayed"
        helper.answer = REACHED
        await trio.sleep(RELOOK_S)
        assert (reachability.state, reachability.addresses, helper.holding) == ("direct", (), 0)
        helper.answer = BLOCKED
        await trio.sleep(RELOOK_S)
        assert (reachability.state, reachability.addresses) == ("relayed", (helper.circuit,))


async def test_who_cannot_look_for_helpers_looks_again(autojump_clock: MockClock) -> None:
    around = Internet(Helper(1, MAPPED))
    around.down = True
    async with node(around) as reachability:
        await trio.sleep(60)
        state: str = reachability.state
        assert state == "unknown" and around.searches <= 7
        around.down = False
        await trio.sleep(LOOK_S + 1)
        state = reachability.state
        assert state == "mapped"


async def test_a_helper_is_asked_at_the_address_that_we_can_dial(autojump_clock: MockClock) -> None:
    around = Internet(Helper(1, REACHED))

    async def find() -> Sequence[Peer]:
        (peer,) = await around.find()
        return [Peer(peer.node_id, ("/ip6/2001:db8::1/tcp/4001/tls", "/dns/x", *peer.addresses))]

    any_host = cast(Any, around)
    reachability = Reachability(any_host, any_host, ME, random.Random(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reachability.run, find)
        await trio.sleep(5)
        assert reachability.state == "direct"
        nursery.cancel_scope.cancel()


def crowd(answer: Answer, count: int = 40, **how: Any) -> list[Helper]:
    """One stranger's port under many keys."""
    return [Helper(100 + number, answer, host="203.0.113.66", **how) for number in range(count)]


async def test_strangers_cannot_talk_a_node_that_is_dialled_out_of_it(autojump_clock: MockClock) -> None:
    honest = Helper(1, REACHED)
    for around, chosen in (
        (Internet(honest, *crowd(BLOCKED)), []),
        (Internet(honest, *[Helper(n, BLOCKED) for n in range(2, 40)]), [honest]),  # each at another site
    ):
        async with node(around, *chosen) as reachability:
            await trio.sleep(5)
            assert (reachability.state, reachability.addresses) == ("direct", ())


async def test_strangers_alone_never_make_it_certain_that_nobody_gets_through(
    autojump_clock: MockClock,
) -> None:
    async with node(Internet(*crowd(BLOCKED))) as reachability:
        await trio.sleep(30)
        assert reachability.state == "relayed" and not reachability.certain
    silent = Helper(1, BLOCKED)
    async with node(Internet(silent, *crowd(BLOCKED)), silent) as reachability:
        await trio.sleep(30)
        assert reachability.state == "relayed" and reachability.certain
        silent.answer = None  # what it said stands for a while
        await trio.sleep(TOLD_S / 2)
        assert reachability.certain
        await trio.sleep(TOLD_S)
        assert not reachability.certain


async def test_who_says_that_it_got_through_and_did_not_is_not_believed(autojump_clock: MockClock) -> None:
    liars = [Helper(number, REACHED, lies=True) for number in range(1, 9)]
    behind = Helper(20, BLOCKED)
    async with node(Internet(*liars)) as reachability:
        await trio.sleep(30)
        assert reachability.state == "unknown"
    async with node(Internet(*liars, behind), behind) as reachability:
        await trio.sleep(30)
        assert reachability.state == "relayed" and reachability.certain


async def test_whoever_came_from_outside_proves_it_for_a_while(autojump_clock: MockClock) -> None:
    blocked = Helper(1, BLOCKED)
    around = Internet(blocked)
    async with node(around, blocked) as reachability:
        for host in ("192.168.1.5", "10.0.0.9", "192.0.2.200", "127.0.0.1", "fd00::7"):
            around.arrivals.note(host, trio.current_time())  # neighbours come without passing a router
        await trio.sleep(5)
        assert reachability.state == "relayed"
        await trio.sleep(RELOOK_S - 30)
        around.arrivals.note("9.9.9.9", trio.current_time())
        await trio.sleep(60)
        state: str = reachability.state
        assert state == "mapped" and reachability.addresses == (THROUGH_ROUTER,)
        await trio.sleep(2 * RELOOK_S)
        assert reachability.state == "relayed"


async def test_one_strangers_keys_are_asked_once_and_are_not_all_our_relays(
    autojump_clock: MockClock,
) -> None:
    many = crowd(BLOCKED)
    chosen, other = Helper(1, BLOCKED), Helper(2, BLOCKED)
    async with node(Internet(*many, chosen, other), chosen):
        await trio.sleep(5)
        assert sum(liar.probed for liar in many) == 1
        await trio.sleep(30)
        assert chosen.holding and sum(relay.holding for relay in many) <= 1
