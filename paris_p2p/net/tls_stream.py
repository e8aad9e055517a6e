"""One TLS 1.3 connection as a byte stream: encrypting and decrypting without a copy too many.

Owns: a connection's bytes from its handshake to its goodbye, and every limit and deadline of them. Does not
own: who is at the other end, dialling, accepting (`net.tls`).

TLS runs over memory buffers: the socket is read and written in quarter megabytes, not in records.
"""

import logging
import math
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import trio

from paris_p2p.errors import TransportError
from paris_p2p.net.transport import DirectStream
from paris_p2p.wire.bep52 import Buffer

_log = logging.getLogger(__name__)

ALPN = "paris-swarm/1"
DIRECT, PUNCHED, RELAYED = "direct", "punched", "relayed"  # the paths a connection may take
WRITE_S = 15.0  # without any progress
FLUSH_S = 60.0  # for `SOCKET_BYTES`
CLOSE_S = 2.0
PATIENCE_S = 1.0  # for as many bytes as are worth being woken for; then any will do
SOCKET_BYTES = 256 * 1024  # read and written at once
NOT_SENT_BYTES = 128 * 1024  # what waits in the kernel can no longer be overtaken
FIRST_READ_BYTES = 17 * 1024  # one record and a little: what is fed to TLS at once of a stranger
TRUST_SHARE = 16  # of what a peer sent in data, that much is read at once
MAX_IDLE_BYTES = 32 * 1024  # of TLS's own messages in a connection's life, and a record begun
RECORD_BYTES = 22  # of a TLS 1.3 record besides its data


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

    def receive_now(self, buffer: memoryview) -> int:
        return 0 if self._closed else self._decrypt(buffer)

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
        """`worth`: bytes to be woken for, all of which will come; fewer do if they take long, for a peer that
        has become slow is not one that is silent."""
        low = max(1, min(worth, SOCKET_BYTES))
        if low > 1:
            with trio.move_on_after(PATIENCE_S):
                return await self._wait_for(low)
        await self._wait_for(1)

    async def _wait_for(self, low: int) -> None:
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
