"""Plain TCP sockets for what is not yet, or not for us, encrypted: connecting, reading, writing, punching.

Owns: non-blocking socket calls under trio with deadlines. Does not own: what the bytes mean.
"""

import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from paris_p2p.errors import TransportError
from paris_p2p.net.addresses import Endpoint

PUNCH_S = 2.0
PUNCH_AGAIN_S = 0.05
ASK_S = 10.0


def tune(sock: socket.socket) -> None:
    """As every socket here needs it; its local port may be used towards other hosts too (`punch`)."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


async def connect(
    endpoint: Endpoint, timeout_s: float, local: tuple[str, int] | None = None
) -> socket.socket:
    """A connection to `endpoint`, from the address and port `local` if given. Raises `TransportError`."""
    sock: socket.socket | None = None
    connected = False
    try:
        sock = socket.socket(endpoint.family, socket.SOCK_STREAM)  # fails when no more files can be opened
        tune(sock)
        if local is not None:
            sock.bind(local)
        with trio.fail_after(timeout_s):
            try:
                sock.connect((endpoint.host, endpoint.port))
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock.fileno())
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        connected = True
    except trio.TooSlowError:
        raise TransportError(f"no answer within {timeout_s:.0f} s") from None
    except OSError as error:
        raise TransportError(error.strerror or str(error)) from None
    finally:
        if not connected and sock is not None:
            sock.close()
    return sock


async def punch(sock: socket.socket, peer: Endpoint) -> socket.socket | None:
    """A connection to `peer`, who tries the same at the same time, from the local port of `sock`: two routers
    that each saw their own side begin let the other in. None when that does not work within `PUNCH_S`."""
    local = sock.getsockname()[:2]
    punched: socket.socket | None = None
    with trio.move_on_after(PUNCH_S):
        while punched is None:
            try:
                punched = await connect(peer, PUNCH_S, local)
            except TransportError:
                await trio.sleep(PUNCH_AGAIN_S)
    return punched


def seen_from(sock: socket.socket) -> Endpoint:
    """Where the peer of `sock` comes from. Raises `TransportError` when it is gone."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError as error:
        raise TransportError(error.strerror or str(error)) from None
    return Endpoint(str(host), int(port), tls=True)


async def receive_into(sock: socket.socket, view: memoryview) -> int:
    """Some bytes; 0 when the peer is done. Raises `TransportError`."""
    await trio.lowlevel.checkpoint()  # a peer that never stops sending must not stop everybody else
    while True:
        try:
            return sock.recv_into(view)
        except BlockingIOError:
            await _ready(trio.lowlevel.wait_readable, sock)
        except OSError as error:
            raise TransportError(error.strerror or str(error)) from None


async def receive_exactly(sock: socket.socket, count: int) -> bytes:
    """`count` bytes, a few. Raises `TransportError`."""
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        got = await receive_into(sock, view)
        if not got:
            raise TransportError("the peer closed the connection")
        view = view[got:]
    return bytes(buffer)


async def send_all(sock: socket.socket, data: bytes | memoryview) -> None:
    """All of `data`. Raises `TransportError`."""
    await trio.lowlevel.checkpoint()
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await _ready(trio.lowlevel.wait_writable, sock)
        except OSError as error:
            raise TransportError(error.strerror or str(error)) from None


async def _ready(wait: Callable[[int], Awaitable[None]], sock: socket.socket) -> None:
    try:
        await wait(sock.fileno())
    except (trio.ClosedResourceError, OSError, ValueError):
        raise TransportError("the connection was closed") from None


def close(sock: socket.socket) -> None:
    """Closes at once; tasks that wait for it are told."""
    if sock.fileno() >= 0:
        trio.lowlevel.notify_closing(sock.fileno())
        sock.close()


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """A deadline that raises `TransportError`."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise TransportError(f"{what} took longer than {seconds:.0f} s") from None
