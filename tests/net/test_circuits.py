"""Nodes reached through a relay, over real sockets on loopback; and relays and callers that mean ill."""

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio

from paris_p2p.core.relay import RelayBudget
from paris_p2p.errors import TransportError
from paris_p2p.ids import NodeId
from paris_p2p.net import raw
from paris_p2p.net.addresses import Endpoint
from paris_p2p.net.circuits import MAX_ANSWERING, Circuits
from paris_p2p.net.relay import RelayService
from paris_p2p.net.tls import TlsHost, open_tls_host
from paris_p2p.net.tls_stream import RELAYED
from paris_p2p.net.transport import ByteStream
from paris_p2p.wire import reach
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.reach import Answer, Ask, Opening, Status

RELAY, HIDDEN, CALLER, MALLORY = (Identity(letter * 32) for letter in (b"r", b"h", b"c", b"m"))
ANYWHERE = Endpoint("127.0.0.1", 0, tls=True)
NOBODY = NodeId(b"x" * 32)
MESSAGE = random.Random(1).randbytes(300_000)


class Lab:
    """A relay, a node that nobody can dial, and a caller."""

    def __init__(self, relay: TlsHost, hidden: Circuits, caller: Circuits, nursery: trio.Nursery) -> None:
        self.relay, self.hidden, self.caller, self.nursery = relay, hidden, caller, nursery
        self.at = relay.endpoints[0]

    async def reserve(self, relay: Endpoint | None = None) -> None:
        """Returns once the hidden node's reservation stands."""
        stands = trio.Event()

        async def hold() -> None:
            with suppress(TransportError):
                await self.hidden.hold(RELAY.node_id, relay or self.at, lambda _: stands.set())

        self.nursery.start_soon(hold)
        await stands.wait()


async def echo(node_id: NodeId, stream: ByteStream) -> None:
    assert node_id == CALLER.node_id
    with suppress(TransportError):
        while data := await stream.receive_some(1 << 16):
            await stream.send_all(data)
        await stream.aclose()


@asynccontextmanager
async def lab(budget: RelayBudget | None = RelayBudget()) -> AsyncIterator[Lab]:  # noqa: B008 - frozen
    async with (
        open_tls_host(RELAY, [ANYWHERE]) as relay,
        open_tls_host(HIDDEN, []) as hidden,
        open_tls_host(CALLER, []) as caller,
        trio.open_nursery() as nursery,
    ):

        async def dial_back(node_id: NodeId, endpoint: Endpoint) -> None:
            await (await relay.dial(node_id, endpoint)).aclose()

        relay.divert = RelayService(RELAY.node_id, dial_back, budget).serve
        hidden.serve(echo)
        with trio.fail_after(30):
            made = (Circuits(HIDDEN, hidden, nursery), Circuits(CALLER, caller, nursery))
            yield Lab(relay, *made, nursery)
            nursery.cancel_scope.cancel()


async def echoed(stream: ByteStream, count: int) -> bytes:
    got = b""
    while len(got) < count and (data := await stream.receive_some(1 << 16)):
        got += data
    return got


async def test_a_node_that_nobody_can_dial_is_reached_through_a_relay_as_itself() -> None:
    async with lab() as it:
        await it.reserve()
        stream = await it.caller.dial(HIDDEN.node_id, it.at)
        assert stream.path == RELAYED
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, MESSAGE)
            assert await echoed(stream, len(MESSAGE)) == MESSAGE
        await stream.aclose()


async def test_a_circuit_ends_with_its_budget_and_the_next_one_goes_on() -> None:
    async with lab(RelayBudget(circuit_bytes=100_000)) as it:
        await it.reserve()
        for _ in range(2):
            stream = await it.caller.dial(HIDDEN.node_id, it.at)
            await stream.send_all(MESSAGE[:20_000])
            assert await echoed(stream, 20_000) == MESSAGE[:20_000]
            got = b""
            with suppress(TransportError):
                await stream.send_all(MESSAGE)
                got = await echoed(stream, len(MESSAGE))
            assert len(got) < 100_000
            stream.abort()


async def test_nobody_is_reached_who_holds_no_reservation_or_where_nothing_is_relayed() -> None:
    async with lab() as it:
        with pytest.raises(TransportError, match="no reservation"):
            await it.caller.dial(NOBODY, it.at)
    async with lab(None) as it:
        with pytest.raises(TransportError, match="busy"):
            await it.hidden.hold(RELAY.node_id, it.at, lambda _: None)
        with pytest.raises(TransportError, match="busy"):
            await it.caller.dial(HIDDEN.node_id, it.at)


async def test_a_reservation_needs_the_nodes_key_and_is_good_at_one_relay() -> None:
    async with lab() as it:
        with pytest.raises(TransportError):  # signed for another relay, as one who passes it on would have it
            await it.hidden.hold(MALLORY.node_id, it.at, lambda _: None)


async def test_a_host_gets_so_many_reservations_and_no_more() -> None:
    async with lab(RelayBudget(reservations_per_host=1)) as it:
        await it.reserve()
        with pytest.raises(TransportError, match="busy"):
            await it.caller.hold(RELAY.node_id, it.at, lambda _: None)


async def test_a_probe_tells_the_truth_and_dials_nobody_but_the_asker() -> None:
    async with lab(RelayBudget(probes_per_minute=2)) as it:
        async with open_tls_host(HIDDEN, [ANYWHERE]) as dialable:
            answer = await it.hidden.probe(it.at, dialable.endpoints[0].port)
            assert (answer.status, answer.host) == (Status.OK, "127.0.0.1")
            # somebody else's port: it is not the asker who answers there
            answer = await it.caller.probe(it.at, dialable.endpoints[0].port)
            assert answer.status is Status.UNREACHABLE
        assert (await it.hidden.probe(it.at, 1)).status is Status.BUSY


async def test_a_token_that_nobody_gave_joins_nothing() -> None:
    async with lab() as it:
        sock = await raw.connect(it.at, 5.0)
        await raw.send_all(sock, Opening(Ask.ACCEPT, b"t" * 32).encode())
        answer = reach.decode_answer(await raw.receive_exactly(sock, reach.ANSWER_BYTES))
        assert answer.status is Status.UNKNOWN
        raw.close(sock)


async def test_a_relay_that_changes_bytes_ends_the_session_and_changes_nothing() -> None:
    async with lab() as it:
        service = it.relay.divert
        assert service is not None
        await it.reserve()
        original = raw.receive_into

        async def spoil(sock: socket.socket, view: memoryview) -> int:
            count = await original(sock, view)
            if count > 20_000:
                view[count // 2] ^= 1
            return count

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("paris_p2p.net.relay.receive_into", spoil)
            stream = await it.caller.dial(HIDDEN.node_id, it.at)
            got = b""
            with suppress(TransportError):
                await stream.send_all(MESSAGE)
                got = await echoed(stream, len(MESSAGE))
            assert len(got) < len(MESSAGE) and MESSAGE.startswith(got)
            stream.abort()


async def test_a_relay_that_floods_is_answered_within_bounds() -> None:
    callers = 0
    async with trio.open_nursery() as nursery, lab() as it:

        async def flood(sock: trio.SocketStream) -> None:
            nonlocal callers
            opening = reach.decode_opening(bytes(await sock.receive_some(reach.OPENING_BYTES)))
            if opening.ask is Ask.ACCEPT:
                callers += 1
                await trio.sleep_forever()
            await sock.send_all(bytes(reach.NONCE_BYTES))
            await sock.receive_some(reach.PROOF_BYTES)
            await sock.send_all(Answer(Status.OK).encode() + b"f" * reach.TOKEN_BYTES * 200)
            await trio.sleep_forever()

        served: list[trio.SocketListener] = await nursery.start(
            partial(trio.serve_tcp, flood, 0, host="127.0.0.1")
        )
        port = served[0].socket.getsockname()[1]
        await it.reserve(Endpoint("127.0.0.1", port, tls=True))
        while callers < MAX_ANSWERING:
            await trio.sleep(0.01)
        await trio.sleep(0.1)
        assert callers == MAX_ANSWERING
        nursery.cancel_scope.cancel()
