"""Callers that mean ill to a relay, and relays that mean ill to who holds a reservation: each costs little,
and everybody else is served all the same. Virtual time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from paris_p2p.core.relay import RelayBudget
from paris_p2p.errors import TransportError
from paris_p2p.ids import NodeId
from paris_p2p.net import raw
from paris_p2p.net.addresses import Endpoint
from paris_p2p.net.circuits import MAX_PINGS_PER_MINUTE, Circuits
from paris_p2p.net.relay import MAX_CALLERS_PER_HOST, PING_S, PONG_S, RelayService
from paris_p2p.net.tls import open_tls_host
from paris_p2p.wire import reach
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.reach import Answer, Ask, Opening, Status
from tests.net.lines import Lines

RELAY, NODE = Identity(b"r" * 32), Identity(b"n" * 32)
ANYWHERE = Endpoint("127.0.0.1", 0, tls=True)
BUDGET = RelayBudget(dials_per_minute=5)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    return Lines(monkeypatch)


class Lab:
    """A relay, and whoever calls it. `circuits`: an honest node's."""

    def __init__(
        self, at: Endpoint, service: RelayService, circuits: Circuits, nursery: trio.Nursery
    ) -> None:
        self.at, self.service, self.circuits, self.nursery = at, service, circuits, nursery
        self.calls: list[Any] = []

    async def says(self, data: bytes, host: str = "127.0.0.1") -> Any:
        sock = await raw.connect(self.at, 5.0, (host, 0))
        self.calls.append(sock)
        await raw.send_all(sock, data)
        return sock

    async def asks(self, opening: Opening, host: str = "127.0.0.1") -> Status:
        sock = await self.says(opening.encode(), host)
        try:
            return reach.decode_answer(await raw.receive_exactly(sock, reach.ANSWER_BYTES)).status
        finally:
            raw.close(sock)

    async def reserves(self, who: Identity, host: str = "127.0.0.1") -> tuple[Any, Status]:
        sock = await self.says(Opening(Ask.RESERVE, who.node_id).encode(), host)
        nonce = await raw.receive_exactly(sock, reach.NONCE_BYTES)
        await raw.send_all(sock, who.sign(reach.reserve_message(nonce, RELAY.node_id, who.node_id)))
        return sock, reach.decode_answer(await raw.receive_exactly(sock, reach.ANSWER_BYTES)).status

    @property
    def at_work(self) -> tuple[int, int, int]:
        """Callers, reservations, circuits."""
        ledger = self.service.ledger
        return len(self.service._callers), len(ledger.reservations), len(ledger.circuits)


@asynccontextmanager
async def lab(lines: Lines, budget: RelayBudget = BUDGET) -> AsyncIterator[Lab]:
    async with (
        open_tls_host(RELAY, [ANYWHERE]) as host,
        open_tls_host(NODE, []) as other,
        trio.open_nursery() as nursery,
    ):

        async def dial_back(node_id: NodeId, endpoint: Endpoint) -> None:
            await (await host.dial(node_id, endpoint)).aclose()

        service = RelayService(RELAY.node_id, dial_back, budget)
        host.divert = service.serve
        lines.ports[host.endpoints[0].port] = lambda sock: nursery.start_soon(host._arrived, sock)
        made = Lab(host.endpoints[0], service, Circuits(NODE, other, nursery), nursery)
        try:
            with trio.fail_after(600):
                yield made
        finally:
            for sock in made.calls:
                raw.close(sock)
            nursery.cancel_scope.cancel()


async def closed(sock: Any, within_s: float) -> bool:
    """Whether the other end hangs up in time; what it says is ignored."""
    with trio.move_on_after(within_s) as scope, suppress(TransportError):
        while await raw.receive_into(sock, memoryview(bytearray(4096))):
            pass
    return not scope.cancelled_caught


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100_000,
    reach.MAGIC + b"Z" + b"s" * 32 + b"\0\0",
    reach.MAGIC + b"D",  # and nothing more
    b"\0",
    Opening(Ask.RESERVE, b"\xff" * 32).encode() + b"\xff" * 100_000,  # no key, no proof, too much of both
    Opening(Ask.DIAL, b"\xff" * 32).encode() + b"\xff" * 100_000,
    Opening(Ask.PROBE, b"\xff" * 32, 1).encode(),
]


async def test_garbage_and_silence_end_the_connection_and_leave_nothing(
    lines: Lines, autojump_clock: MockClock
) -> None:
    async with lab(lines) as it:
        for data in GARBAGE:
            with suppress(TransportError):  # it may hang up while we are still talking
                sock = await it.says(data)
                assert await closed(sock, 30.0), data[:50]
                raw.close(sock)
        assert it.at_work == (0, 0, 0)
        _, status = await it.reserves(NODE)
        assert status is Status.OK


async def test_one_key_has_one_reservation_however_often_it_asks(
    lines: Lines, autojump_clock: MockClock
) -> None:
    async with lab(lines) as it:
        held = []
        for _ in range(20):
            sock, status = await it.reserves(NODE)
            assert status is Status.OK
            held.append(sock)
            await trio.sleep(0.1)
        assert it.at_work == (1, 1, 0)
        assert all([await closed(sock, 1.0) for sock in held[:-1]]) and not await closed(held[-1], 1.0)


async def test_one_address_has_so_many_reservations_and_calls_and_others_are_served(
    lines: Lines, autojump_clock: MockClock
) -> None:
    async with lab(lines, RelayBudget(reservations_per_host=3, dials_per_minute=4)) as it:
        statuses = [(await it.reserves(Identity(bytes([n]) * 32)))[1] for n in range(5)]
        assert statuses == [Status.OK] * 3 + [Status.BUSY] * 2
        assert (await it.reserves(NODE, "127.0.0.2"))[1] is Status.OK
        target = Opening(Ask.DIAL, Identity(b"?" * 32).node_id)
        assert [await it.asks(target) for _ in range(6)] == [Status.UNKNOWN] * 4 + [Status.BUSY] * 2
        assert await it.asks(target, "127.0.0.3") is Status.UNKNOWN


async def test_who_takes_every_connection_shuts_out_nobody_else(
    lines: Lines, autojump_clock: MockClock
) -> None:
    async with lab(lines) as it:
        for _ in range(MAX_CALLERS_PER_HOST + 5):
            await it.says(reach.MAGIC)
        await trio.sleep(1)
        assert it.at_work[0] == MAX_CALLERS_PER_HOST
        assert (await it.reserves(NODE, "127.0.0.2"))[1] is Status.OK
        await trio.sleep(raw.ASK_S + 1)
        assert it.at_work == (1, 1, 0)


async def test_a_reservation_that_says_more_than_it_was_asked_is_over(
    lines: Lines, autojump_clock: MockClock
) -> None:
    async with lab(lines) as it:
        sock, _ = await it.reserves(NODE)
        with suppress(TransportError):  # it hangs up while we talk
            await raw.send_all(sock, reach.PONG * 1_000_000)
        assert await closed(sock, 1.0) and it.at_work == (0, 0, 0)


async def test_a_reservation_lives_by_its_answers_and_ends_with_them(
    lines: Lines, autojump_clock: MockClock
) -> None:
    async with lab(lines) as it:
        sock, _ = await it.reserves(NODE)
        for _ in range(3):
            assert await raw.receive_exactly(sock, reach.TOKEN_BYTES) == reach.PING
            await raw.send_all(sock, reach.PONG)
        assert it.at_work[1] == 1
        await trio.sleep(PING_S + PONG_S + 1)
        assert it.at_work == (0, 0, 0)


async def test_a_node_that_does_not_come_to_the_relay_costs_its_caller_a_wait(
    lines: Lines, autojump_clock: MockClock
) -> None:
    async with lab(lines) as it:
        await it.reserves(NODE)
        assert await it.asks(Opening(Ask.DIAL, NODE.node_id), "127.0.0.2") is Status.UNREACHABLE
        await trio.sleep(1)
        assert it.at_work == (1, 1, 0) and not it.service._meetings


# -- relays that mean ill ----------------------------------------------------------------------------


@asynccontextmanager
async def bad_relay(lines: Lines, after_proof: bytes, again: bytes = b"") -> AsyncIterator[Endpoint]:
    """Takes a reservation, then says `after_proof`, and `again` for ever."""

    async def serve(sock: Any) -> None:
        with suppress(TransportError):
            await raw.receive_exactly(sock, reach.OPENING_BYTES)
            await raw.send_all(sock, bytes(reach.NONCE_BYTES))
            await raw.receive_exactly(sock, reach.PROOF_BYTES)
            await raw.send_all(sock, after_proof)
            while again:
                await raw.send_all(sock, again)
            await closed(sock, 1000.0)
        raw.close(sock)

    async with trio.open_nursery() as nursery:
        lines.ports[1] = lambda sock: nursery.start_soon(serve, sock)
        yield Endpoint("127.0.0.1", 1, tls=True)


OK = Answer(Status.OK, "192.0.2.1", 4000).encode()


@pytest.mark.parametrize(
    ("after_proof", "again", "why", "within_s"),
    [
        (b"\x09" + OK[1:], b"", "nonsense", 1.0),
        (OK[:5], b"", "longer than", 15.0),
        (OK, b"", "ping", 65.0),
        (OK + reach.PING * (MAX_PINGS_PER_MINUTE + 1), b"", "floods", 1.0),
        (OK, reach.PING * 1000, "floods", 1.0),
    ],
    ids=["unknown status", "half an answer", "silence", "a burst of pings", "nothing but pings"],
)
async def test_a_relay_that_talks_nonsense_or_too_much_is_left(
    lines: Lines, autojump_clock: MockClock, after_proof: bytes, again: bytes, why: str, within_s: float
) -> None:
    async with lab(lines) as it, bad_relay(lines, after_proof, again) as at:
        began = trio.current_time()
        with pytest.raises(TransportError, match=why):
            await it.circuits.hold(RELAY.node_id, at, lambda _: None)
        assert trio.current_time() - began <= within_s + 1
