"""The py-libp2p host: TCP, noise, yamux; one identity; dialling, accepting, closing within bounds.

Owns: everything that touches libp2p, including the translation of its exceptions to `TransportError`, and
guards against what it does not do itself. Does not own: the swarm protocol.

Why it is not simply `new_host()` (libp2p 0.8.1):
- its default security options include plaintext, which authenticates nobody: only noise is offered here;
- an exception in a stream handler ends the whole host: handlers are guarded;
- its inbound limiter counts connections ever accepted, not open ones: the limit is set out of reach and
  open connections are limited by the resource manager, those from one place at its gate;
- it dials one address per transport and remembers failures for a minute: addresses are dialled here;
- it listens with SO_REUSEPORT, so that a taken port goes unnoticed: ports are probed first;
- a write that is cancelled half-way breaks the connection for every other stream: writes are shielded.
"""

import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from libp2p import create_yamux_muxer_option, generate_peer_id_from
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection_gate import ConnectionGate
from libp2p.network.swarm import Swarm as Libp2pNetwork
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.rcmgr import ResourceLimits, ResourceManager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from paris_p2p.errors import ConfigError, NetworkError, TransportError
from paris_p2p.ids import NodeId
from paris_p2p.net.addresses import dialable, listen_endpoint, parse_endpoint, place, probe
from paris_p2p.net.transport import WRITE_BYTES, ByteStream, Peer, StreamHandler, unwrapped
from paris_p2p.open_files import fitting
from paris_p2p.wire.addresses import MAX_ADDRESSES
from paris_p2p.wire.identity import Identity, node_id_from_peer_id, peer_id_text
from paris_p2p.wire.messages import PROTOCOL_ID

_log = logging.getLogger(__name__)

DIAL_S = 10.0
OPEN_STREAM_S = 10.0
WRITE_S = 15.0
CLOSE_S = 2.0
IDLE_S = 30.0
SHUTDOWN_S = 5.0
MAX_CONNECTIONS = 512
MAX_STREAMS = 4096
MAX_PER_PLACE = 256
ARRIVAL_S = 10.0  # libp2p's limit for a handshake
_OUT_OF_REACH = 1 << 30


class Libp2pStream:
    """A `ByteStream` over one libp2p stream."""

    def __init__(self, host: "Libp2pHost", stream: Any) -> None:
        self._host = host
        self._stream = stream
        self.place = _place_of(stream.muxed_conn)

    async def send_all(self, data: bytes) -> None:
        for start in range(0, len(data), WRITE_BYTES):
            await self._write(data[start : start + WRITE_BYTES])

    async def _write(self, data: bytes) -> None:
        # Shielded: half a frame on the connection would break every stream on it.
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + WRITE_S) as scope:
            self._host.writes.add(scope)
            try:
                await self._stream.write(data)
            except Exception as error:  # noqa: BLE001 - libp2p raises many kinds; this is the edge
                raise TransportError(f"write failed: {_reason(error)}") from None
            finally:
                self._host.writes.discard(scope)
        if scope.cancelled_caught:
            await self._host.drop(self._stream.muxed_conn)
            raise TransportError(f"a write took longer than {WRITE_S:.0f} s")

    async def receive_some(self, max_bytes: int) -> bytes:
        try:
            return bytes(await self._stream.read(max_bytes))
        except Exception as error:  # noqa: BLE001 - libp2p raises many kinds; this is the edge
            if type(error).__name__ == "StreamEOF":
                return b""
            raise TransportError(f"read failed: {_reason(error)}") from None

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
            try:
                # A reset overtakes what the peer has not read yet (our Bye): half-close and wait first.
                await self._stream.close_write()
                while await self.receive_some(1 << 16):
                    pass
            except Exception as error:  # noqa: BLE001 - a broken stream is as good as closed
                _log.debug("closing a stream: %s", _reason(error))
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
            await self._stream.reset()


class _Gate(ConnectionGate):  # type: ignore[misc]  # libp2p has no types
    """Asked for each inbound connection before its handshake: no more than `MAX_PER_PLACE` from one place are
    open, nor arrive within the time that a handshake may take."""

    def __init__(self, connections: Callable[[], Iterable[Any]]) -> None:
        super().__init__()
        self._connections = connections
        self._arrived: deque[tuple[float, str]] = deque()

    async def is_allowed(self, remote_addr: Multiaddr) -> bool:
        endpoint = parse_endpoint(str(remote_addr))
        where = "" if endpoint is None else place(endpoint.host)
        now = trio.current_time()
        while self._arrived and now - self._arrived[0][0] > ARRIVAL_S:
            self._arrived.popleft()
        arriving = sum(where == one for _, one in self._arrived)
        here = sum(where == _place_of(connection.muxed_conn) for connection in self._connections())
        if where and max(arriving, here) >= MAX_PER_PLACE:
            return False
        self._arrived.append((now, where))
        return True


class Libp2pHost:
    """A `Network` over libp2p. Made by `open_host`."""

    def __init__(self, identity: Identity, announce: Sequence[str]) -> None:
        self._identity = identity
        self._peer_id = peer_id_text(identity.node_id)
        self._announce = [_with_peer_id(text, self._peer_id) for text in announce]
        self._host = _make_host(identity)
        self._network: Any = self._host.get_network()
        self._guarded = self._network.common_stream_handler
        self._network.set_stream_handler(self._guard)
        self._network.connection_gate = _Gate(self._network.get_connections)
        self._dialling: dict[NodeId, trio.Lock] = {}
        self.writes: set[trio.CancelScope] = set()

    @property
    def node_id(self) -> NodeId:
        return self._identity.node_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Dialable addresses, at most as many as a record holds: announced ones, or those listened on
        with `0.0.0.0` and `::` replaced by the interfaces' addresses, loopback last."""
        if self._announce:
            return tuple(self._announce[:MAX_ADDRESSES])
        listening = [parse_endpoint(str(address)) for address in self._host.get_transport_addrs()]
        endpoints = dialable(endpoint for endpoint in listening if endpoint is not None)
        return tuple(endpoint.text(self._peer_id) for endpoint in endpoints[:MAX_ADDRESSES])

    def serve(self, handler: StreamHandler) -> None:
        async def handle(stream: Any) -> None:
            try:
                node_id = node_id_from_peer_id(str(stream.muxed_conn.peer_id))
            except ConfigError:
                await Libp2pStream(self, stream).aclose()
                return
            try:
                await handler(node_id, Libp2pStream(self, stream))
            except Exception:  # noqa: BLE001 - our bug, which must not end the host
                _log.exception("handling a stream of %s failed", peer_id_text(node_id))

        self._host.set_stream_handler(TProtocol(PROTOCOL_ID), handle)

    async def _guard(self, stream: Any) -> None:
        try:
            await self._guarded(stream)
        except Exception as error:  # noqa: BLE001 - whatever a stranger sends must not end the host
            _log.debug("a peer's stream failed: %s", _reason(error))
            await Libp2pStream(self, stream).aclose()

    async def dial(self, peer: Peer, *, knock_s: float | None = None) -> ByteStream:
        """`knock_s` is for addresses that nobody has knocked at: it bounds the connection of each."""
        peer_id = ID.from_base58(peer_id_text(peer.node_id))
        lock = self._dialling.setdefault(peer.node_id, trio.Lock())
        try:
            async with lock:
                if not self._network.get_connections(peer_id):
                    await self._connect(peer, peer_id, DIAL_S if knock_s is None else min(knock_s, DIAL_S))
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._dialling.pop(peer.node_id, None)
        return await self._open_stream(peer_id)

    async def _connect(self, peer: Peer, peer_id: Any, limit_s: float) -> None:
        reasons = ["it has no addresses"] if not peer.addresses else []
        for text in peer.addresses[:MAX_ADDRESSES]:
            with trio.move_on_after(limit_s) as scope:
                try:
                    await self._network.dial_addr(Multiaddr(_without_peer_id(text)), peer_id)
                    return
                except Exception as error:  # noqa: BLE001 - libp2p raises many kinds; this is the edge
                    reasons.append(f"{text}: {_reason(error)}")
            if scope.cancelled_caught:
                reasons.append(f"{text}: no answer within {limit_s:.0f} s")
        raise TransportError(f"cannot reach {peer_id}: {'; '.join(reasons)}")

    async def _open_stream(self, peer_id: Any) -> ByteStream:
        try:
            with trio.fail_after(OPEN_STREAM_S):
                return Libp2pStream(self, await self._host.new_stream(peer_id, [TProtocol(PROTOCOL_ID)]))
        except trio.TooSlowError:
            _log.debug("%s does not open a stream", peer_id)
        except Exception as error:  # noqa: BLE001 - libp2p raises many kinds; this is the edge
            raise TransportError(f"cannot open a stream to {peer_id}: {_reason(error)}") from None
        for connection in list(self._network.get_connections(peer_id)):
            await self.drop(connection.muxed_conn)
        raise TransportError(f"{peer_id} did not open a stream within {OPEN_STREAM_S:.0f} s")

    async def drop(self, muxed_connection: Any) -> None:
        """Closes a connection with all its streams; bounded."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
            try:
                await muxed_connection.close()
            except Exception as error:  # noqa: BLE001 - a broken connection is as good as closed
                _log.debug("closing a connection: %s", _reason(error))

    @asynccontextmanager
    async def run(self, listen: Sequence[str]) -> AsyncIterator[None]:
        addresses = [_listen_address(text) for text in listen]
        with trio.CancelScope() as scope:
            async with self._host.run(addresses):
                try:
                    self._check_listening(listen)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._close_idle)
                        yield
                        nursery.cancel_scope.cancel()
                finally:
                    for write in list(self.writes):
                        write.shield = False
                    scope.deadline = trio.current_time() + SHUTDOWN_S  # libp2p's shutdown may hang
                    await self._close()
        if scope.cancelled_caught:
            _log.debug("the libp2p host did not stop within %.0f s and was abandoned", SHUTDOWN_S)

    async def _close_idle(self) -> None:
        """libp2p keeps every connection until the other side goes: those without a stream are closed when
        they have none at two looks in a row."""
        idle: set[Any] = set()
        while True:
            await trio.sleep(IDLE_S)
            unused = {c for c in self._network.get_connections() if not c.get_streams()}
            for connection in unused & idle:
                await self.drop(connection.muxed_conn)
            idle = unused - idle

    async def _close(self) -> None:
        # Before its tasks are cancelled: a cancelled task can no longer close its sockets.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + SHUTDOWN_S):
            try:
                await self._host.close()
            except Exception as error:  # noqa: BLE001 - it is going away in any case
                _log.debug("closing the libp2p host: %s", _reason(error))

    def _check_listening(self, listen: Sequence[str]) -> None:
        if len(self._network.listeners) < len(set(listen)):
            missing = [text for text in listen if text not in self._network.listeners]
            raise NetworkError(
                f"cannot listen on {', '.join(missing) or 'the given addresses'}: choose other addresses "
                "with --listen, or none for any free port"
            )


@asynccontextmanager
async def open_host(
    identity: Identity, listen: Sequence[str], announce: Sequence[str] = ()
) -> AsyncIterator[Libp2pHost]:
    """A listening host. `listen`: multiaddrs such as `/ip4/0.0.0.0/tcp/0`; `announce`: what to tell others
    instead. Raises `ConfigError` for malformed addresses and `NetworkError` when a port is taken."""
    _quieten()
    host = Libp2pHost(identity, announce)
    with unwrapped():
        async with host.run(listen):
            yield host


def _quieten() -> None:
    # libp2p clears its logger's handlers, so that logging's last resort prints its warnings, which mostly
    # tell of peers that went away, to the terminal.
    if not os.environ.get("LIBP2P_DEBUG"):
        logger = logging.getLogger("libp2p")
        logger.addHandler(logging.NullHandler())
        logger.setLevel(logging.CRITICAL)


def _make_host(identity: Identity) -> BasicHost:
    key_pair = create_new_key_pair(identity.seed)
    peer_store = PeerStore()
    own_id = generate_peer_id_from(key_pair)
    peer_store.add_key_pair(own_id, key_pair)
    noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
    upgrader = TransportUpgrader(
        secure_transports_by_protocol={TProtocol(NOISE_PROTOCOL_ID): noise},
        muxer_transports_by_protocol=create_yamux_muxer_option(),
    )
    config = ConnectionConfig(
        max_connections=_OUT_OF_REACH, high_watermark=_OUT_OF_REACH, low_watermark=0, min_connections=0
    )
    network = Libp2pNetwork(
        own_id,
        peer_store,
        upgrader,
        transports=[TCP()],
        retry_config=RetryConfig(max_retries=0),
        connection_config=config,
    )
    manager = ResourceManager(
        limits=ResourceLimits(max_connections=fitting(MAX_CONNECTIONS), max_streams=MAX_STREAMS),
        enable_memory_limits=False,
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
        enable_metrics=False,
    )
    return BasicHost(network=network, resource_manager=manager, disable_identify_address_discovery=True)


def _place_of(muxed_connection: Any) -> str:
    """The network a connection leads to (`net.addresses.place`)."""
    remote = muxed_connection.get_remote_address()
    return place(remote[0]) if remote else ""


def _reason(error: BaseException) -> str:
    """The innermost thing that an exception says, in one line."""
    while error.__cause__ is not None and str(error.__cause__):
        error = error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _parse(text: str) -> Multiaddr:
    try:
        return Multiaddr(text)
    except Exception as error:  # noqa: BLE001 - multiaddr raises many kinds; this is the edge
        raise ConfigError(f"{text!r} is not a multiaddr such as /ip4/127.0.0.1/tcp/4001: {error}") from None


def _without_peer_id(text: str) -> str:
    return text.split("/p2p/", 1)[0]


def _with_peer_id(text: str, peer_id: str) -> str:
    _parse(text)
    return f"{_without_peer_id(text)}/p2p/{peer_id}"


def _listen_address(text: str) -> Multiaddr:
    endpoint = listen_endpoint(text)
    if endpoint.tls:
        raise ConfigError(f"{text!r} is for direct TLS, not for libp2p")
    probe(endpoint)
    return _parse(text)
