"""Direct TLS 1.3 connections between nodes: the fast path.

Owns: handshakes that authenticate both node ids, encrypting and decrypting without a copy too many, the
listeners, every limit and deadline of it. Does not own: certificates (`net.certificates`), who is dialled
when (`net.multi`), the swarm protocol.

One connection carries one session. The server proves itself by its certificate. Python's `ssl` cannot ask
a client for a certificate that no authority signed, so the client proves itself inside the connection: a
signature over a nonce of the server's and the server's certificate. It cannot be replayed (the nonce) nor
relayed to another server (the certificate), and only the certificate's holder ever sees it.

TLS runs over memory buffers: the socket is read and written in quarter megabytes, not in records.
"""

import hashlib
import logging
import math
import os
import socket
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress

import trio

from paris_p2p.clock import unix
from paris_p2p.core.visits import Visit, Visits
from paris_p2p.errors import NetworkError, ParisError, TransportError
from paris_p2p.ids import NodeId
from paris_p2p.net.addresses import Endpoint, bind, place_of
from paris_p2p.net.certificates import load_into, make_certificate, owner_of
from paris_p2p.net.memory import keep_freed_memory
from paris_p2p.net.raw import connect
from paris_p2p.net.transport import DirectStream, StreamHandler, unwrapped
from paris_p2p.wire.bep52 import Buffer
from paris_p2p.wire.identity import NODE_ID_BYTES, SIGNATURE_BYTES, Identity, peer_id_text, verify

_log = logging.getLogger(__name__)

ALPN = "paris-swarm/1"
DIRECT, PUNCHED, RELAYED = "direct", "punched", "relayed"  # the paths a connection may take
CONNECT_S = 5.0
HANDSHAKE_S = 10.0
WRITE_S = 15.0  # without any progress
FLUSH_S = 60.0  # for `SOCKET_BYTES`
CLOSE_S = 2.0
MAX_CONNECTIONS = 512  # inbound, authenticated
MAX_PER_PEER = 64
MAX_PER_PLACE = 256
MAX_HALF_OPEN = 128  # inbound, not yet authenticated; the oldest of the place with most makes way
BACKLOG = 256
SOCKET_BYTES = 256 * 1024  # read and written at once
NOT_SENT_BYTES = 128 * 1024  # what waits in the kernel can no longer be overtaken
FIRST_READ_BYTES = 17 * 1024  # one record and a little: what is fed to TLS at once of a stranger
TRUST_SHARE = 16  # of what a peer sent in data, that much is read at once
MAX_IDLE_BYTES = 32 * 1024  # of TLS's own messages in a connection's life, and a record begun
RECORD_BYTES = 22  # of a TLS 1.3 record besides its data
NONCE_BYTES = 32
PROOF_BYTES = NODE_ID_BYTES + SIGNATURE_BYTES
_PROOF_CONTEXT = b"paris-p2p/tls-client/1:"
_ACCEPT_AGAIN_S = 0.1
_TLS_RECORD = b"\x16"  # the first byte of a handshake


def proof_message(nonce: bytes, certificate: bytes, server: NodeId, client: NodeId) -> bytes:
    """What a client signs: `certificate` (DER) is the one the server showed in this connection."""
    return _PROOF_CONTEXT + nonce + hashlib.sha256(certificate).digest() + server + client


class TlsStream(DirectStream):
    """A `ByteStream` over one TLS connection. `scratch` is used between two awaits only: all may share it."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, server: bool, scratch: bytearray
    ) -> None:
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._scratch = scratch
        self._view = memoryview(scratch)
        self._unsent = memoryview(b"")  # encrypted, and not yet taken by the socket
        self._ended = False  # the peer sends no more
        self._closed = False
        self._low = 1  # bytes that the socket wakes us for
        self._fed = 0  # bytes given to TLS to decrypt
        self._useful = 0  # what of them brought data
        self._sent = 0  # bytes that the socket took
        self.path = DIRECT
        self.when_broken: Callable[[], None] = lambda: None
        """Called when the connection breaks under us: not for a peer that says it is done."""

    @property
    def moved(self) -> int:
        """Bytes, both ways, so far."""
        return self._useful + self._sent

    # -- handshake -------------------------------------------------------------------------------

    async def handshake(self) -> bytes:
        """TLS itself; the peer's certificate (DER), b"" from a client. Raises `TransportError`."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._read_socket()
            except ssl.SSLError as error:
                raise TransportError(f"no TLS connection: {error.reason or error}") from None
            else:
                break
        await self._flush()
        self._useful = self._fed - self._incoming.pending  # what follows are whole records
        if self._tls.version() != "TLSv1.3" or self._tls.selected_alpn_protocol() != ALPN:
            raise TransportError(f"the peer does not speak {ALPN}")
        return self._tls.getpeercert(binary_form=True) or b""

    async def receive_exactly(self, count: int) -> bytes:
        """`count` bytes, a few."""
        buffer = bytearray(count)
        view = memoryview(buffer)
        while view:
            got = await self.receive_into(view)
            if not got:
                raise TransportError("the peer closed the connection")
            view = view[got:]
        return bytes(buffer)

    # -- reading ---------------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int) -> bytes:
        buffer = bytearray(min(max_bytes, SOCKET_BYTES))
        got = await self.receive_into(memoryview(buffer))
        return bytes(memoryview(buffer)[:got])

    async def receive_into(self, buffer: memoryview, worth: int = 1) -> int:
        await trio.lowlevel.checkpoint()
        while True:
            got = self._decrypt(buffer)
            if got or self._ended:
                return got
            await self._wait_readable(worth - self._begun)

    def _decrypt(self, buffer: memoryview) -> int:
        """Fills `buffer` as far as the socket has something now; reads it once when that brings no data."""
        got, fresh = 0, False
        try:
            while got < len(buffer) and not self._ended:
                try:
                    # one record at most; its stub forgets that with a buffer it returns a count
                    count: int = self._tls.read(len(buffer) - got, buffer[got:])  # type: ignore[assignment]
                    self._ended = count == 0
                    got += count
                    self._useful += count
                    if got < len(buffer) or not self._tls.pending():  # the record is used up
                        self._useful += RECORD_BYTES
                except ssl.SSLWantReadError:
                    if (fresh and not got) or not self._take():
                        break
                    fresh = True
        except ssl.SSLError as error:
            if got:
                return got  # what came before is good; the next call raises again
            raise self._broken(f"the connection broke: {error.reason or error}") from None
        return got

    def _broken(self, why: str) -> TransportError:
        self.when_broken()
        return TransportError(why)

    def _take(self) -> bool:
        """Moves what the socket has into the TLS machine; False when it has nothing.

        TLS's own messages are work without data (a key update: 27 bytes, a tenth of a millisecond), and all
        that is here is worked on in one call: hence no more than a little at a time, and in all.
        """
        if self._begun > MAX_IDLE_BYTES:
            raise self._broken("the peer sends messages of TLS and no data")
        wanted = min(max(FIRST_READ_BYTES, self._useful // TRUST_SHARE), SOCKET_BYTES)
        try:
            count = self._sock.recv_into(self._scratch, wanted)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._broken(f"read failed: {error.strerror or error}") from None
        if count:
            self._fed += count
            self._incoming.write(self._view[:count])
        else:
            self._incoming.write_eof()  # without TLS's own goodbye the next read says that it was cut off
        return True

    async def _read_socket(self) -> None:
        while not self._take():
            await self._wait_readable()

    @property
    def _begun(self) -> int:
        """Bytes of records that are not whole yet, and of TLS's own messages."""
        return self._fed - self._useful

    async def _wait_readable(self, worth: int = 1) -> None:
        """`worth`: bytes to be woken for, all of which will come."""
        low = max(1, min(worth, SOCKET_BYTES))
        try:
            if low != self._low:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)
                self._low = low
            await trio.lowlevel.wait_readable(self._sock.fileno())
        except (trio.ClosedResourceError, OSError, ValueError):
            raise TransportError("the connection was closed") from None

    # -- writing ---------------------------------------------------------------------------------

    async def send_all(self, data: Buffer) -> None:
        await self.send_parts([data])

    async def send_parts(self, parts: Sequence[Buffer]) -> None:
        await self._wait_writable()
        left = deque(memoryview(part) for part in parts if len(part))
        try:
            await self._send(left)
        except trio.Cancelled:
            # A record cut in the middle would end the connection, our goodbye included: finish, and let
            # the caller's next checkpoint raise.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S) as scope:
                await self._send(left)
            if scope.cancelled_caught:
                self.abort()
                raise

    async def _send(self, left: deque[memoryview]) -> None:
        await self._flush()
        while left:
            while left and self._outgoing.pending < SOCKET_BYTES:
                count = self._encrypt(left[0])
                if count < len(left[0]):
                    left[0] = left[0][count:]
                else:
                    left.popleft()
            await self._flush()

    def _encrypt(self, data: memoryview) -> int:
        try:
            return self._tls.write(data)  # one record at most
        except ssl.SSLError as error:
            raise TransportError(f"write failed: {error.reason or error}") from None

    async def _flush(self) -> None:
        """Hands to the socket what is encrypted."""
        latest = math.inf
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
            try:
                count = self._sock.send(self._unsent)
            except BlockingIOError:
                latest = min(latest, trio.current_time() + FLUSH_S)
                await self._wait_writable(latest)
            except OSError as error:
                raise self._broken(f"write failed: {error.strerror or error}") from None
            else:
                self._unsent = self._unsent[count:]
                self._sent += count

    async def _wait_writable(self, latest: float = math.inf) -> None:
        with trio.CancelScope(deadline=min(latest, trio.current_time() + WRITE_S)) as scope:
            try:
                await trio.lowlevel.wait_writable(self._sock.fileno())
            except (trio.ClosedResourceError, OSError, ValueError):
                raise TransportError("the connection was closed") from None
        if scope.cancelled_caught:
            self.abort()
            raise self._broken(f"the peer took nothing for {WRITE_S:.0f} s, or little for {FLUSH_S:.0f} s")

    # -- the end ---------------------------------------------------------------------------------

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
            try:
                await self._say_goodbye()
            except (TransportError, OSError) as error:
                _log.debug("closing a connection: %s", error)
        self.abort()

    async def _say_goodbye(self) -> None:
        """A socket closed with something unread resets the connection, and the peer may then not read what
        we said last: read until the peer closes, too."""
        if self._closed:
            return
        with suppress(ssl.SSLError):  # it wants the peer's answer, which is not needed
            self._tls.unwrap()
        await self._flush()
        self._sock.shutdown(socket.SHUT_WR)
        while True:
            try:
                if not self._sock.recv_into(self._scratch):
                    return
            except BlockingIOError:
                await self._wait_readable()

    def abort(self) -> None:
        """Closes at once."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._sock.fileno())
            self._sock.close()


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
        self._connections = Visits(MAX_CONNECTIONS, MAX_PER_PEER, MAX_PER_PLACE)
        self.endpoints: list[Endpoint] = []
        """Where this host listens, with real ports."""
        self.divert: Callable[[socket.socket], Awaitable[None]] | None = None
        """Takes the inbound connections that do not begin with a TLS record."""
        self.last_path = DIRECT
        """How the last connection got through that could not be dialled or accepted plainly."""

    def serve(self, handler: StreamHandler) -> None:
        """Runs `handler` for each connection of an authenticated peer."""
        self._handler = handler

    # -- dialling --------------------------------------------------------------------------------

    async def dial(self, node_id: NodeId, endpoint: Endpoint) -> TlsStream:
        """A connection to the node, known to be it. Raises `TransportError`."""
        return await self.adopt(await connect(endpoint, CONNECT_S), node_id, DIRECT)

    async def adopt(self, sock: socket.socket, node_id: NodeId, path: str) -> TlsStream:
        """Makes `sock`, connected by whatever way, such a connection; closes it if that fails."""
        _tune(sock)
        stream = TlsStream(sock, self._client, False, self._scratch)
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
                sock, _ = listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:  # the caller hung up, or no more files can be opened
                _log.debug("accepting failed: %s", error)
                await trio.sleep(_ACCEPT_AGAIN_S)
                continue
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
        if len(self._half_open) >= MAX_HALF_OPEN:
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


async def can_connect(endpoint: Endpoint) -> bool:
    """Whether anything listens there."""
    try:
        (await connect(endpoint, CONNECT_S)).close()
    except TransportError:
        return False
    return True


def _listen(endpoint: Endpoint) -> socket.socket:
    sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bind(sock, endpoint)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise NetworkError(f"cannot listen on {endpoint.text()}: {error.strerror or error}") from None
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
