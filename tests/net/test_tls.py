"""The fast path over real sockets on loopback: identities, bytes, and peers that mean ill or never speak."""

import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing

from paris_p2p.errors import NetworkError, TransportError
from paris_p2p.ids import NodeId
from paris_p2p.net import tls, tls_stream
from paris_p2p.net.addresses import Endpoint
from paris_p2p.net.tls import NONCE_BYTES, TlsHost, can_connect, open_tls_host, proof_message
from paris_p2p.net.tls_stream import ALPN, SOCKET_BYTES, TlsStream
from paris_p2p.net.transport import ByteStream
from paris_p2p.wire.identity import Identity

ALICE, BOB, MALLORY = Identity(b"a" * 32), Identity(b"b" * 32), Identity(b"m" * 32)
ANYWHERE = Endpoint("127.0.0.1", 0, tls=True)


@pytest.fixture
def patient_clock() -> trio.abc.Clock:
    """Jumps to the next deadline when nothing has happened for a while: sockets and threads are real here."""
    return trio.testing.MockClock(autojump_threshold=0.5)


class Visitors:
    """A handler that notes who came and what they sent, until they are done."""

    def __init__(self) -> None:
        self.came: list[NodeId] = []
        self.sent = bytearray()
        self.streams: list[ByteStream] = []
        self.gone = trio.Event()

    async def __call__(self, node_id: NodeId, stream: ByteStream) -> None:
        self.came.append(node_id)
        self.streams.append(stream)
        with suppress(TransportError):
            while data := await stream.receive_some(1 << 20):
                self.sent += data
            await stream.aclose()
        self.gone.set()


@asynccontextmanager
async def listening(identity: Identity = ALICE) -> AsyncIterator[tuple[TlsHost, Visitors]]:
    async with open_tls_host(identity, [ANYWHERE]) as host:
        visitors = Visitors()
        host.serve(visitors)
        await host._server_context()  # before a clock that does not know of threads begins to matter
        with trio.fail_after(200):
            yield host, visitors


def stranger_context(alpn: str | None = ALPN) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    return context


async def stranger(host: TlsHost, context: ssl.SSLContext | None = None) -> TlsStream:
    """A TLS connection to `host` of somebody who has not said who they are."""
    sock = socket.create_connection(("127.0.0.1", host.endpoints[0].port))
    sock.setblocking(False)
    return TlsStream(sock, context or stranger_context(), False, bytearray(SOCKET_BYTES))


async def is_closed(stream: TlsStream) -> bool:
    """Waits until the other side closes."""
    try:
        return await stream.receive_some(1) == b""
    except TransportError:
        return True
    finally:
        stream.abort()


async def test_a_stream_carries_bytes_and_both_identities() -> None:
    sent = random.Random(1).randbytes(3 * SOCKET_BYTES + 7)
    async with listening() as (alice, visitors), open_tls_host(BOB, []) as bob:
        stream = await bob.dial(ALICE.node_id, alice.endpoints[0])
        await stream.send_parts([sent[:9], memoryview(sent)[9:]])
        await stream.aclose()
        await visitors.gone.wait()
    assert bytes(visitors.sent) == sent and visitors.came == [BOB.node_id]


async def test_what_is_received_fills_the_buffer_it_is_given() -> None:
    sent = random.Random(2).randbytes(200_000)

    async def give(node_id: NodeId, stream: ByteStream) -> None:
        await stream.send_all(sent)
        await stream.aclose()

    async with open_tls_host(ALICE, [ANYWHERE]) as alice, open_tls_host(BOB, []) as bob:
        alice.serve(give)
        stream = await bob.dial(ALICE.node_id, alice.endpoints[0])
        buffer, here = memoryview(bytearray(len(sent))), 0
        with trio.fail_after(200):
            while here < len(sent):
                here += await stream.receive_into(buffer[here : here + 70_000])
            assert await stream.receive_into(memoryview(bytearray(1))) == 0
        await stream.aclose()
    assert bytes(buffer) == sent


async def chop(source: trio.SocketStream, target: trio.SocketStream, rng: random.Random) -> None:
    """Passes bytes on in pieces that know nothing of records, each only when the last has been dealt with."""
    while data := await source.receive_some(rng.choice([7, 300])):
        await target.send_all(data)
        await trio.testing.wait_all_tasks_blocked()


async def test_nobody_waits_for_more_than_what_is_to_come() -> None:
    """Bytes of any number, cut anywhere on their way; the next are sent only once the last are here."""
    rng = random.Random(4)
    lengths = [rng.choice([1, 300, 17_000]) + rng.randrange(200) for _ in range(20)]

    async def give(node_id: NodeId, stream: ByteStream) -> None:
        for length in lengths:
            for start in range(0, length, 16_000):
                await stream.send_all(b"x" * min(16_000, length - start))
            assert await stream.receive_some(1) == b"!"
        await stream.aclose()

    async with open_tls_host(ALICE, [ANYWHERE]) as alice, open_tls_host(BOB, []) as bob:
        alice.serve(give)

        async def between(stream: trio.SocketStream) -> None:
            server = await trio.open_tcp_stream("127.0.0.1", alice.endpoints[0].port)
            async with server, trio.open_nursery() as both:
                both.start_soon(chop, server, stream, rng)
                await chop(stream, server, rng)
                both.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, between, 0)
            port = listeners[0].socket.getsockname()[1]
            with trio.fail_after(30):
                stream = await bob.dial(ALICE.node_id, Endpoint("127.0.0.1", port, tls=True))
                for length in lengths:
                    left, buffer = length, memoryview(bytearray(length))
                    while left:
                        room = min(left, rng.choice([100, 4096, left]))
                        left -= await stream.receive_into(buffer[:room], left)
                    await stream.send_all(b"!")
                assert await stream.receive_into(memoryview(bytearray(1)), 1) == 0
            await stream.aclose()
            nursery.cancel_scope.cancel()


async def test_a_block_half_here_wakes_nobody_for_every_few_bytes() -> None:
    async def trickle(node_id: NodeId, stream: ByteStream) -> None:
        for _ in range(100):
            await stream.send_all(b"x" * 1000)
            await trio.testing.wait_all_tasks_blocked(0.0005)
        await stream.aclose()

    async with open_tls_host(ALICE, [ANYWHERE]) as alice, open_tls_host(BOB, []) as bob:
        alice.serve(trickle)
        stream = await bob.dial(ALICE.node_id, alice.endpoints[0])
        left, woken = 100_000, 0
        with trio.fail_after(20):
            while left:
                left -= await stream.receive_into(memoryview(bytearray(left)), left)
                woken += 1
        assert woken < 25
        await stream.aclose()


async def when_all_wait(event: trio.Event) -> None:
    await trio.testing.wait_all_tasks_blocked(0.01)
    event.set()


async def test_a_peer_that_becomes_slow_inside_a_block_is_heard_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tls_stream, "PATIENCE_S", 0.02)
    waited_for, finished = trio.Event(), trio.Event()

    async def stop(node_id: NodeId, stream: ByteStream) -> None:
        await waited_for.wait()
        await stream.send_all(b"x" * 40_000)
        await finished.wait()
        await stream.aclose()

    async with open_tls_host(ALICE, [ANYWHERE]) as alice, open_tls_host(BOB, []) as bob:
        alice.serve(stop)
        stream = await bob.dial(ALICE.node_id, alice.endpoints[0])
        left, buffer = 40_000, memoryview(bytearray(SOCKET_BYTES))
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(when_all_wait, waited_for)
                while left:
                    left -= await stream.receive_into(buffer, SOCKET_BYTES)
        finished.set()
        await stream.aclose()


async def test_another_node_at_the_address_is_refused() -> None:
    async with listening() as (alice, visitors), open_tls_host(BOB, []) as bob:
        with pytest.raises(TransportError, match="another node"):
            await bob.dial(MALLORY.node_id, alice.endpoints[0])
    assert visitors.came == []


async def test_nobody_there_and_a_taken_port_are_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = Endpoint("127.0.0.1", unused.getsockname()[1], tls=True)
        async with open_tls_host(BOB, []) as bob:
            with pytest.raises(TransportError, match="refused"):
                await bob.dial(ALICE.node_id, endpoint)
            assert not await can_connect(endpoint)
        unused.listen()
        with pytest.raises(NetworkError, match="is taken by another program"):
            async with open_tls_host(BOB, [endpoint]):
                pass


# -- proofs ------------------------------------------------------------------------------------------


async def introduce(stream: TlsStream, claimed: Identity, signer: Identity, message: bytes) -> None:
    await stream.send_all(claimed.node_id + signer.sign(message))


async def test_a_node_must_prove_who_it_is() -> None:
    async with listening() as (alice, visitors):
        stream = await stranger(alice)
        certificate = await stream.handshake()
        nonce = await stream.receive_exactly(NONCE_BYTES)
        message = proof_message(nonce, certificate, ALICE.node_id, BOB.node_id)
        await introduce(stream, BOB, MALLORY, message)
        assert await is_closed(stream)
    assert visitors.came == []


async def test_a_proof_cannot_be_replayed() -> None:
    async with listening() as (alice, visitors):
        first = await stranger(alice)
        certificate = await first.handshake()
        old = proof_message(await first.receive_exactly(NONCE_BYTES), certificate, ALICE.node_id, BOB.node_id)
        await introduce(first, BOB, BOB, old)
        await first.aclose()
        second = await stranger(alice)
        assert await second.handshake() == certificate
        await second.receive_exactly(NONCE_BYTES)
        await introduce(second, BOB, BOB, old)
        assert await is_closed(second)
    assert visitors.came == [BOB.node_id]


async def test_a_proof_made_for_one_node_cannot_be_relayed_to_another() -> None:
    """Mallory, whom Bob dials, passes Alice's nonce on to Bob and his answer on to Alice."""
    async with listening() as (alice, visitors), open_tls_host(BOB, []) as bob:
        to_alice = await stranger(alice)
        await to_alice.handshake()
        nonce = await to_alice.receive_exactly(NONCE_BYTES)
        async with open_tls_host(MALLORY, []) as mallory, trio.open_nursery() as nursery:
            listener = tls._listen(ANYWHERE)
            port = listener.getsockname()[1]

            async def call_mallory() -> None:
                (await bob.dial(MALLORY.node_id, Endpoint("127.0.0.1", port, tls=True))).abort()

            nursery.start_soon(call_mallory)
            await trio.lowlevel.wait_readable(listener.fileno())
            sock, _ = listener.accept()
            listener.close()
            sock.setblocking(False)
            from_bob = TlsStream(sock, await mallory._server_context(), True, bytearray(SOCKET_BYTES))
            await from_bob.handshake()
            await from_bob.send_all(nonce)
            proof = await from_bob.receive_exactly(tls.PROOF_BYTES)
            from_bob.abort()
        await to_alice.send_all(proof)
        assert await is_closed(to_alice)
    assert visitors.came == []


# -- strangers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x40\x00" + bytes(5000), b"\0"])
async def test_garbage_is_hung_up_on(garbage: bytes, patient_clock: trio.abc.Clock) -> None:
    async with listening() as (alice, visitors):
        stream = await trio.open_tcp_stream("127.0.0.1", alice.endpoints[0].port)
        async with stream:
            await stream.send_all(garbage)
            while await stream.receive_some():  # an alert may come first
                pass
        async with open_tls_host(BOB, []) as bob:
            await (await bob.dial(ALICE.node_id, alice.endpoints[0])).aclose()
            await visitors.gone.wait()
    assert visitors.came == [BOB.node_id]


async def test_a_client_of_another_protocol_is_hung_up_on() -> None:
    async with listening() as (alice, visitors):
        for alpn in (None, "h2"):
            stream = await stranger(alice, stranger_context(alpn))
            with pytest.raises(TransportError):
                await stream.handshake()
            assert await is_closed(stream)
    assert visitors.came == []


async def test_older_tls_is_refused() -> None:
    context = stranger_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with listening() as (alice, _visitors):
        stream = await stranger(alice, context)
        with pytest.raises(TransportError, match="no TLS connection"):
            await stream.handshake()
        stream.abort()


async def test_who_never_speaks_is_hung_up_on(patient_clock: trio.abc.Clock) -> None:
    async with listening() as (alice, visitors):
        silent = await trio.open_tcp_stream("127.0.0.1", alice.endpoints[0].port)
        half = await stranger(alice)  # speaks TLS, and then not a word
        await half.handshake()
        begun = trio.current_time()
        async with silent:
            assert await silent.receive_some() == b""
        await half.receive_exactly(NONCE_BYTES)
        assert await is_closed(half)
        assert trio.current_time() - begun <= tls.HANDSHAKE_S + 1
        assert alice._half_open == {} and visitors.came == []


async def test_a_server_that_never_speaks_is_given_up(patient_clock: trio.abc.Clock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = Endpoint("127.0.0.1", server.getsockname()[1], tls=True)
        async with open_tls_host(BOB, []) as bob:
            with pytest.raises(TransportError, match="no TLS handshake within"):
                await bob.dial(ALICE.node_id, endpoint)


async def test_the_oldest_who_has_not_introduced_itself_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "MAX_HALF_OPEN", 2)
    async with listening() as (alice, _visitors):
        waiting = []
        for _ in range(3):
            stream = await stranger(alice)
            await stream.handshake()
            waiting.append(stream)
        await waiting[0].receive_exactly(NONCE_BYTES)
        assert await is_closed(waiting[0])
        assert len(alice._half_open) == 2
        for stream in waiting[1:]:
            stream.abort()


async def test_one_peer_gets_so_many_connections_and_not_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "MAX_PER_PEER", 2)
    async with listening() as (alice, visitors), open_tls_host(BOB, []) as bob:
        streams = [await bob.dial(ALICE.node_id, alice.endpoints[0]) for _ in range(3)]
        async with trio.open_nursery() as nursery:
            refused = trio.Event()

            async def watch(stream: TlsStream) -> None:
                if await is_closed(stream):
                    refused.set()

            for stream in streams:
                nursery.start_soon(watch, stream)
            await refused.wait()
            assert visitors.came == [BOB.node_id] * 2
            nursery.cancel_scope.cancel()


async def test_messages_of_tls_without_data_end_the_connection() -> None:
    """What TLS works on without giving us anything, fed as from the socket: no more than a little of it."""
    async with listening() as (alice, visitors), open_tls_host(BOB, []) as bob:
        stream = await bob.dial(ALICE.node_id, alice.endpoints[0])
        stream._fed += tls_stream.MAX_IDLE_BYTES + 1  # as many key updates as that
        with pytest.raises(TransportError, match="no data"):
            await stream.receive_some(1)
        stream.abort()
        await visitors.gone.wait()


async def test_data_is_not_taken_for_messages_of_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_stream, "MAX_IDLE_BYTES", 20_000)  # a record begun, and the handshake
    sent = random.Random(3).randbytes(1 << 20)
    async with listening() as (alice, visitors), open_tls_host(BOB, []) as bob:
        stream = await bob.dial(ALICE.node_id, alice.endpoints[0])
        for start in range(0, 2000):
            await stream.send_all(sent[start : start + 1])  # records of one byte
        await stream.send_all(sent[2000:])
        await stream.aclose()
        await visitors.gone.wait()
    assert bytes(visitors.sent) == sent


async def test_of_those_not_introduced_the_place_with_most_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "MAX_HALF_OPEN", 3)
    async with open_tls_host(ALICE, []) as alice:
        scopes = {name: trio.CancelScope() for name in ("near", "far 1", "far 2", "new")}
        with (
            alice._as_half_open(scopes["near"], "a"),
            alice._as_half_open(scopes["far 1"], "b"),
            alice._as_half_open(scopes["far 2"], "b"),
            alice._as_half_open(scopes["new"], "c"),
        ):
            assert [name for name, scope in scopes.items() if scope.cancel_called] == ["far 1"]


# -- slow readers, ends ------------------------------------------------------------------------------


async def test_who_reads_nothing_is_left(patient_clock: trio.abc.Clock) -> None:
    async def ignore(node_id: NodeId, stream: ByteStream) -> None:
        await trio.sleep(1000)

    async with open_tls_host(ALICE, [ANYWHERE]) as alice, open_tls_host(BOB, []) as bob:
        alice.serve(ignore)
        await alice._server_context()
        stream = await bob.dial(ALICE.node_id, alice.endpoints[0])
        with pytest.raises(TransportError, match="took nothing"):
            await stream.send_all(bytes(32 << 20))
        with pytest.raises(TransportError, match="closed"):
            await stream.send_all(b"more")


async def test_a_write_cancelled_half_way_is_finished_for_a_reader_that_reads() -> None:
    total = 24 << 20
    start_reading = trio.Event()
    received = bytearray()
    done = trio.Event()

    async def read_late(node_id: NodeId, stream: ByteStream) -> None:
        await start_reading.wait()
        while data := await stream.receive_some(1 << 20):
            received.extend(data)
        done.set()

    async with open_tls_host(ALICE, [ANYWHERE]) as alice, open_tls_host(BOB, []) as bob:
        alice.serve(read_late)
        stream = await bob.dial(ALICE.node_id, alice.endpoints[0])
        scope = trio.CancelScope()

        async def send() -> None:
            with scope:
                await stream.send_parts([bytes(total)])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked()
            start_reading.set()
            scope.cancel()
        await stream.aclose()
        with trio.fail_after(30):
            await done.wait()
    assert len(received) == total


async def test_a_connection_cut_off_is_an_error_and_not_an_end() -> None:
    broken = []
    async with listening() as (alice, visitors), open_tls_host(BOB, []) as bob:
        stream = await bob.dial(ALICE.node_id, alice.endpoints[0])
        stream.when_broken = lambda: broken.append(True)
        await stream.send_all(b"hello")
        while not visitors.streams:
            await trio.sleep(0.01)
        server_side = visitors.streams[0]
        assert isinstance(server_side, TlsStream)
        server_side.abort()
        with pytest.raises(TransportError):
            await stream.receive_some(10)
        stream.abort()
    assert broken
