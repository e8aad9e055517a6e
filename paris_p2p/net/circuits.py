"""Connections with the help of a relay: asking it who we are, reserving, dialling through it, being dialled.

Owns: the asking side of `docs/protocol/reachability.md`, hole punching. Does not own: which relays are asked
when (`net.reachability`), TLS inside a circuit (`net.tls`), the relay itself (`net.relay`).

A circuit is also the place where two ends meet to punch: each is told where the relay sees the other come
from, and dials it from the same local port. What works first carries the session.
"""

import logging
import socket
from collections.abc import Callable

import trio

from paris_p2p.core.relay import Pace, punchable
from paris_p2p.errors import ParisError, RemoteProtocolError, TransportError
from paris_p2p.ids import NodeId
from paris_p2p.net.addresses import Endpoint
from paris_p2p.net.raw import ASK_S, close, connect, punch, receive_exactly, send_all, within
from paris_p2p.net.tls import TlsHost
from paris_p2p.net.tls_stream import PUNCHED, RELAYED, TlsStream
from paris_p2p.wire import reach
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.reach import Answer, Ask, Opening, Status

_log = logging.getLogger(__name__)

CONNECT_S = 5.0
PUNCHED_HANDSHAKE_S = 3.0
DIAL_S = 12.0  # the relay waits for the dialled node
PROBE_S = 12.0
SILENT_S = 60.0  # relays ping three times as often
MAX_PINGS_PER_MINUTE = 30  # ten times as many as relays send: after a pause they come together
MAX_ANSWERING = 16  # circuits being taken up at once; a relay that floods us with callers gets no more

_REASONS = {
    Status.UNREACHABLE: "the relay cannot reach it",
    Status.UNKNOWN: "it holds no reservation at the relay any more",
    Status.BUSY: "the relay is busy, or the budget is spent",
}


class Circuits:
    """Uses relays for one host. `nursery` outlives every circuit."""

    def __init__(self, identity: Identity, host: TlsHost, nursery: trio.Nursery) -> None:
        self._identity = identity
        self._host = host
        self._nursery = nursery
        self._answering = 0
        self.punching = True

    async def probe(self, helper: Endpoint, port: int) -> Answer:
        """Whether `helper` can dial our `port`, and where it sees us. Raises `TransportError`."""
        sock = await connect(helper, CONNECT_S)
        try:
            return await _ask(sock, Opening(Ask.PROBE, self._identity.node_id, port), PROBE_S)
        finally:
            close(sock)

    # -- dialling --------------------------------------------------------------------------------

    async def dial(self, node_id: NodeId, relay: Endpoint) -> TlsStream:
        """A connection to a node that holds a reservation at `relay`. Raises `TransportError`."""
        sock = await connect(relay, CONNECT_S)
        try:
            answer = await _ask(sock, Opening(Ask.DIAL, node_id), DIAL_S)
            if answer.status is not Status.OK:
                raise TransportError(_REASONS[answer.status])
            stream = await self._dial_punched(node_id, sock, answer)
            if stream is not None:
                close(sock)
                return stream
        except BaseException:
            close(sock)
            raise
        return await self._host.adopt(sock, node_id, RELAYED)

    async def _dial_punched(self, node_id: NodeId, sock: socket.socket, answer: Answer) -> TlsStream | None:
        punched = await self._punch(sock, answer)
        if punched is None:
            return None
        try:
            with within(PUNCHED_HANDSHAKE_S, "the handshake"):
                return await self._host.adopt(punched, node_id, PUNCHED)
        except TransportError as error:
            _log.debug("a punched connection came to nothing: %s", error)
            return None

    async def _punch(self, sock: socket.socket, answer: Answer) -> socket.socket | None:
        """None at once when there is nothing to punch: at a relay near by, or told of no address."""
        if not (self.punching and answer.port and punchable(answer.host, answer.port)):
            return None
        peer = Endpoint(answer.host, answer.port, tls=True)
        return await punch(sock, peer) if peer.family == sock.family else None

    # -- being dialled ---------------------------------------------------------------------------

    async def hold(self, relay_id: NodeId, relay: Endpoint, reserved: Callable[[Answer], None]) -> None:
        """A reservation, for ever: `reserved` is called once it stands. Raises `TransportError` when it is
        refused or lost."""
        sock = await connect(relay, CONNECT_S)
        try:
            answer = await self._reserve(relay_id, sock)
            if answer.status is not Status.OK:
                raise TransportError(_REASONS[answer.status])
            reserved(answer)
            pings = Pace(MAX_PINGS_PER_MINUTE)
            while True:
                with within(SILENT_S, "the relay's next ping"):
                    token = await receive_exactly(sock, reach.TOKEN_BYTES)
                if token == reach.PING:
                    if not pings.allow("", trio.current_time()):
                        raise TransportError("the relay floods us with pings")
                    with within(ASK_S, "answering a ping"):
                        await send_all(sock, reach.PONG)
                elif self._answering < MAX_ANSWERING:
                    self._answering += 1
                    self._nursery.start_soon(self._take_up, token, relay)
        finally:
            close(sock)

    async def _reserve(self, relay_id: NodeId, sock: socket.socket) -> Answer:
        me = self._identity.node_id
        with within(ASK_S, "reserving"):
            await send_all(sock, Opening(Ask.RESERVE, me).encode())
            nonce = await receive_exactly(sock, reach.NONCE_BYTES)
            await send_all(sock, self._identity.sign(reach.reserve_message(nonce, relay_id, me)))
            return _decoded(await receive_exactly(sock, reach.ANSWER_BYTES))

    async def _take_up(self, token: bytes, relay: Endpoint) -> None:
        """One caller, until its session is over."""
        taking = True
        try:
            sock = await connect(relay, CONNECT_S)
            try:
                answer = await _ask(sock, Opening(Ask.ACCEPT, token), ASK_S)
            except BaseException:
                close(sock)
                raise
            if answer.status is not Status.OK:
                close(sock)
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._host.accept, sock, RELAYED)
                punched = await self._punch(sock, answer)
                taking = False
                self._answering -= 1
                if punched is not None:
                    nursery.start_soon(self._host.accept, punched, PUNCHED)
        except (ParisError, OSError) as error:
            _log.debug("taking up a circuit failed: %s", error)
        finally:
            self._answering -= taking


async def _ask(sock: socket.socket, opening: Opening, timeout_s: float) -> Answer:
    with within(timeout_s, "the relay's answer"):
        await send_all(sock, opening.encode())
        return _decoded(await receive_exactly(sock, reach.ANSWER_BYTES))


def _decoded(data: bytes) -> Answer:
    try:
        return reach.decode_answer(data)
    except RemoteProtocolError as error:
        raise TransportError(f"the relay answers nonsense: {error}") from None
