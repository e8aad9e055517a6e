"""Direct TLS 1.3 connections between nodes: the fast path.

Owns: handshakes that authenticate both node ids, the listeners, how many connections there may be. Does not
own: a connection's bytes (`net.tls_stream`), certificates (`net.certificates`), who is dialled when
(`net.multi`), the swarm protocol.

One connection carries one session. The server proves itself by its certificate. Python's `ssl` cannot ask
a client for a certificate that no authority signed, so the client proves itself inside the connection: a
signature over a nonce of the server's and the server's certificate. It cannot be replayed (the nonce) nor
relayed to another server (the certificate), and only the certificate's holder ever sees it.
"""

import hashlib
import logging
import os
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager

import trio

from paris_p2p.clock import unix
from paris_p2p.core.visits import Visit, Visits
from paris_p2p.errors import ParisError, TransportError
from paris_p2p.ids import NodeId
from paris_p2p.net.addresses import Endpoint, bind, cannot_listen, open_socket, place_of
from paris_p2p.net.arrivals import Arrivals
from paris_p2p.net.certificates import load_into, make_certificate, owner_of
from paris_p2p.net.memory import keep_freed_memory
from paris_p2p.net.raw import connect
from paris_p2p.net.tls_stream import ALPN, DIRECT, NOT_SENT_BYTES, SOCKET_BYTES, TlsStream
from paris_p2p.net.transport import StreamHandler, unwrapped
from paris_p2p.open_files import fitting
from paris_p2p.wire.identity import NODE_ID_BYTES, SIGNATURE_BYTES, Identity, peer_id_text, verify

_log = logging.getLogger(__name__)

CONNECT_S = 5.0
HANDSHAKE_S = 10.0
MAX_CONNECTIONS = 512  # inbound, authenticated
MAX_PER_PEER = 64
MAX_PER_PLACE = 256
MAX_HALF_OPEN = 128  # inbound, not yet authenticated; the oldest of the place with most makes way
BACKLOG = 256
NONCE_BYTES = 32
PROOF_BYTES = NODE_ID_BYTES + SIGNATURE_BYTES
_PROOF_CONTEXT = b"paris-p2p/tls-client/1:"
_ACCEPT_AGAIN_S = 0.1
_TLS_RECORD = b"\x16"  # the first byte of a handshake


def proof_message(nonce: bytes, certificate: bytes, server: NodeId, client: NodeId) -> bytes:
    """What a client signs: `certificate` (DER) is the one the server showed in this connection."""
    return _PROOF_CONTEXT + nonce + hashlib.sha256(certificate).digest() + server + client


class TlsHost:
    """Dials and accepts. Made by `open_tls_host`."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._scratch = bytearray(SOCKET_BYTES)
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT)
        self._server: ssl.SSLContext | None = None
        self._server_lock = trio.Lock()
        self._certificate = b""
        self._handler: StreamHandler | None = None
        self._half_open: dict[trio.CancelScope, str] = {}  # in order of arrival -> place
        most = fitting(MAX_CONNECTIONS)
        self._connections = Visits(most, MAX_PER_PEER, min(MAX_PER_PLACE, max(most // 2, 1)))
        self.endpoints: list[Endpoint] = []
        """Where this host listens, with real ports."""
        self.divert: Callable[[socket.socket], Awaitable[None]] | None = None
        """Takes the inbound connections that do not begin with a TLS record."""
        self.last_path = DIRECT
        """How the last connection got through that could not be dialled or accepted plainly."""
        self.arrivals = Arrivals()
        """Where those came from who connected to where this host listens."""

    def serve(self, handler: StreamHandler) -> None:
        """Runs `handler` for each connection of an authenticated peer."""
        self._handler = handler

    # -- dialling --------------------------------------------------------------------------------

    async def dial(self, node_id: NodeId, endpoint: Endpoint) -> TlsStream:
        """A connection to the node, known to be it. Raises `TransportError`."""
        return await self.adopt(await connect(endpoint, CONNECT_S), node_id, DIRECT)

    async def adopt(self, sock: socket.socket, node_id: NodeId, path: str) -> TlsStream:
        """Makes `sock`, connected by whatever way, such a connection; closes it if that fails."""
        try:
            _tune(sock)
            stream = TlsStream(sock, self._client, False, self._scratch)
        except OSError as error:
            sock.close()
            raise TransportError(error.strerror or str(error)) from None
        stream.path = path
        try:
            with trio.fail_after(HANDSHAKE_S):
                await self._introduce(stream, node_id)
        except trio.TooSlowError:
            stream.abort()
            raise TransportError(f"no TLS handshake within {HANDSHAKE_S:.0f} s") from None
        except BaseException:
            stream.abort()
            raise
        self._note_path(node_id, path)
        return stream

    def _note_path(self, node_id: NodeId, path: str) -> None:
        if path != DIRECT:
            self.last_path = path
            _log.debug("circuit: %s with %s", path, peer_id_text(node_id))

    async def _introduce(self, stream: TlsStream, expected: NodeId) -> None:
        certificate = await stream.handshake()
        server = owner_of(certificate, unix())
        if server != expected:
            raise TransportError(f"it is another node: {peer_id_text(server)}")
        nonce = await stream.receive_exactly(NONCE_BYTES)
        message = proof_message(nonce, certificate, server, self._identity.node_id)
        await stream.send_all(self._identity.node_id + self._identity.sign(message))

    # -- accepting -------------------------------------------------------------------------------

    async def accept_loop(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        """Until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(listener.fileno())
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:  # the caller hung up, or no more files can be opened
                _log.debug("accepting failed: %s", error)
                await trio.sleep(_ACCEPT_AGAIN_S)
                continue
            self.arrivals.note(str(address[0]), trio.current_time())
            nursery.start_soon(self._arrived, sock)

    async def _arrived(self, sock: socket.socket) -> None:
        """One inbound connection on a port."""
        if self.divert is not None and await self._begins_otherwise(sock):
            await self.divert(sock)
        else:
            await self.accept(sock, DIRECT)

    async def _begins_otherwise(self, sock: socket.socket) -> bool:
        sock.setblocking(False)
        with trio.move_on_after(HANDSHAKE_S) as scope, self._as_half_open(scope, place_of(sock)):
            try:
                await trio.lowlevel.wait_readable(sock.fileno())
                return sock.recv(1, socket.MSG_PEEK) not in (b"", _TLS_RECORD)
            except OSError:
                pass  # TLS finds out why
        return False

    async def accept(self, sock: socket.socket, path: str) -> None:
        """One inbound connection, from nothing to its end. Never raises for what a peer does."""
        stream = None
        try:
            _tune(sock)
            stream = TlsStream(sock, await self._server_context(), True, self._scratch)
            stream.path = path
            stream.place = place_of(sock)
            node_id = await self._authenticate(stream)
            self._note_path(node_id, path)
            await self._handle(node_id, stream)
        except (ParisError, OSError) as error:
            _log.debug("an inbound connection failed: %s", error)
        finally:
            if stream is None:
                sock.close()
            else:
                stream.abort()

    async def _authenticate(self, stream: TlsStream) -> NodeId:
        with trio.move_on_after(HANDSHAKE_S) as scope, self._as_half_open(scope, stream.place):
            await stream.handshake()
            nonce = os.urandom(NONCE_BYTES)
            await stream.send_all(nonce)
            return self._check_proof(nonce, await stream.receive_exactly(PROOF_BYTES))
        raise TransportError("the peer did not introduce itself in time, or too many did not")

    @contextmanager
    def _as_half_open(self, scope: trio.CancelScope, place: str) -> Iterator[None]:
        if len(self._half_open) >= fitting(MAX_HALF_OPEN):
            crowded = Counter(self._half_open.values()).most_common(1)[0][0]
            oldest = next(other for other, theirs in self._half_open.items() if theirs == crowded)
            del self._half_open[oldest]
            oldest.cancel()
        self._half_open[scope] = place
        try:
            yield
        finally:
            self._half_open.pop(scope, None)

    def _check_proof(self, nonce: bytes, proof: bytes) -> NodeId:
        node_id, signature = NodeId(proof[:NODE_ID_BYTES]), proof[NODE_ID_BYTES:]
        message = proof_message(nonce, self._certificate, self._identity.node_id, node_id)
        if not verify(node_id, message, signature):
            raise TransportError(f"somebody claims to be {peer_id_text(node_id)} and cannot prove it")
        return node_id

    async def _handle(self, node_id: NodeId, stream: TlsStream) -> None:
        now = trio.current_time()
        visit = Visit(node_id, stream.place, now, moved=lambda: stream.moved, leave=stream.abort)
        if self._handler is None or not self._connections.admit(visit, now):
            raise TransportError("too many connections")
        try:
            await self._handler(node_id, stream)
        except Exception:  # noqa: BLE001 - our bug, which must not end the host
            _log.exception("handling a connection of %s failed", peer_id_text(node_id))
        finally:
            self._connections.left(visit)

    async def _server_context(self) -> ssl.SSLContext:
        """Made when the first peer calls: who only fetches starts faster without."""
        async with self._server_lock:
            if self._server is None:
                made = await trio.to_thread.run_sync(_server_context, self._identity)
                self._server, self._certificate = made
            return self._server


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # no authority: `owner_of` and the client's proof are the check
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    return context


def _server_context(identity: Identity) -> tuple[ssl.SSLContext, bytes]:
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # a resumed session would not show the certificate
    certificate, private = make_certificate(identity)
    load_into(context, certificate, private)
    return context, ssl.PEM_cert_to_DER_cert(certificate.decode())


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOT_SENT_BYTES)


async def can_connect(endpoint: Endpoint, timeout_s: float = CONNECT_S) -> bool:
    """Whether anything listens there."""
    try:
        (await connect(endpoint, timeout_s)).close()
    except TransportError:
        return False
    return True


def _listen(endpoint: Endpoint) -> socket.socket:
    sock = open_socket(endpoint)
    try:
        if endpoint.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bind(sock, endpoint)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise cannot_listen(endpoint, error) from None
    except BaseException:
        sock.close()
        raise
    return sock


@asynccontextmanager
async def open_tls_host(identity: Identity, listen: Sequence[Endpoint]) -> AsyncIterator[TlsHost]:
    """A host that listens on `listen` (port 0: any). Raises `NetworkError` when a port is taken."""
    keep_freed_memory()
    host = TlsHost(identity)
    with unwrapped(), ExitStack() as listeners:
        async with trio.open_nursery() as nursery:
            for endpoint in listen:
                listener = listeners.enter_context(_listen(endpoint))
                port = listener.getsockname()[1]
                host.endpoints.append(Endpoint(endpoint.host, port, tls=True))
                nursery.start_soon(host.accept_loop, listener, nursery)
            try:
                yield host
            finally:
                nursery.cancel_scope.cancel()
