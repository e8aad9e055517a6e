"""One network of two kinds of path: TLS directly where a peer can be dialled so, libp2p elsewhere.

Owns: which address of a peer is dialled in which order, which addresses are told to others, and loading
libp2p when it is needed first: it costs a second of CPU time and 60 MB, more than fetching a small item.
Does not own: either kind of connection (`net.tls`, `net.host`).
"""

import importlib
import logging
import math
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from paris_p2p.core.relay import RelayBudget
from paris_p2p.errors import ConfigError, TransportError
from paris_p2p.ids import NodeId
from paris_p2p.net.addresses import Endpoint, chosen, dialable, is_tls, listen_endpoint, parse_endpoint
from paris_p2p.net.circuits import Circuits
from paris_p2p.net.raw import within
from paris_p2p.net.reachability import Chosen, FindHelpers, Reachability
from paris_p2p.net.relay import RelayService
from paris_p2p.net.tls import CONNECT_S, HANDSHAKE_S, TlsHost, can_connect, open_tls_host
from paris_p2p.net.tls_stream import TlsStream
from paris_p2p.net.transport import ByteStream, Peer, StreamHandler, unwrapped
from paris_p2p.open_files import fitting
from paris_p2p.wire.addresses import MAX_ADDRESSES
from paris_p2p.wire.identity import Identity, peer_id_text
from paris_p2p.wire.reach import circuit_relay, is_circuit

if TYPE_CHECKING:
    from paris_p2p.net.host import Libp2pHost

_log = logging.getLogger(__name__)

DIRECT_FIRST_S = 1.5  # a peer that names a relay can rarely be dialled: it is on our local network, or not
DISTRUST_S = 30.0  # an address that failed is tried after all others for so long
MAX_DISTRUSTED = 1000
MAX_KNOCKS = 256  # at once
KNOCKED_S = 0.3  # for a peer's other addresses once one has answered


@dataclass(frozen=True, slots=True)
class ReachOptions:
    """How a node helps others to be reached, and gets help. `find_helpers` None: it looks for none itself;
    `relay`: what it relays for others, None for nothing (it dials back all the same); `chosen`: where helpers
    are that the operator chose, who are believed before all others."""

    find_helpers: FindHelpers | None
    relay: RelayBudget | None
    chosen: Chosen | None = None


class MultiNetwork:
    """A `Network`, and `DialsDirectly`. Made by `open_network`."""

    def __init__(
        self, identity: Identity, tls: TlsHost, announce: Sequence[str], nursery: trio.Nursery
    ) -> None:
        self._identity = identity
        self._tls = tls
        self._peer_id = peer_id_text(identity.node_id)
        self._announce = [_announced(text, self._peer_id) for text in announce]
        self._nursery = nursery
        self._circuits = Circuits(identity, tls, nursery)
        rng = random.Random(identity.sign(b"paris-p2p/reachability"))  # nobody else can foretell it
        self.reachability = Reachability(tls, self._circuits, self._peer_id, rng)
        self._libp2p: Libp2pHost | None = None
        self._loading = trio.Lock()
        self._stopping = trio.Event()
        self._handler: StreamHandler | None = None
        self._distrusted: dict[str, float] = {}  # address -> when it failed
        self._knocking = trio.CapacityLimiter(fitting(MAX_KNOCKS))

    @property
    def node_id(self) -> NodeId:
        return self._identity.node_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Dialable addresses, at most as many as a record holds: announced ones, or those listened on
        with `0.0.0.0` and `::` replaced by the interfaces' addresses, loopback last."""
        if self._announce:
            every = self._announce
        else:
            every = [endpoint.text(self._peer_id) for endpoint in dialable(self._tls.endpoints)]
            every += () if self._libp2p is None else self._libp2p.addresses
        direct = [text for text in every if is_tls(text)]
        own = chosen(direct, [text for text in every if not is_tls(text)], MAX_ADDRESSES)
        return (self.reachability.addresses + own)[:MAX_ADDRESSES]

    def help_others(self, budget: RelayBudget | None) -> None:
        """Serve nodes that cannot be dialled, from now on."""
        service = RelayService(self.node_id, self._dial_back, budget)
        self._tls.divert = service.serve

    async def _dial_back(self, node_id: NodeId, endpoint: Endpoint) -> None:
        await (await self._tls.dial(node_id, endpoint)).aclose()

    def serve(self, handler: StreamHandler) -> None:
        self._handler = handler
        self._tls.serve(handler)
        if self._libp2p is not None:
            self._libp2p.serve(handler)

    # -- dialling --------------------------------------------------------------------------------

    async def dial(self, peer: Peer, *, knock_s: float | None = None) -> ByteStream:
        """TLS first, relays next, then libp2p, what failed lately last."""
        addresses = peer.addresses[:MAX_ADDRESSES]
        if knock_s is not None and addresses:
            addresses = await self._answering(addresses, knock_s)
            if not addresses:
                reason = f"no address answers within {knock_s:.1f} s"
                raise TransportError(f"cannot reach {peer_id_text(peer.node_id)}: {reason}")
        now = trio.current_time()
        direct = [text for text in addresses if is_tls(text)]
        circuits = [text for text in addresses if is_circuit(text)]
        doubtful = [text for text in direct if now - self._distrusted.get(text, -DISTRUST_S) < DISTRUST_S]
        reasons = ["it has no addresses"] if not addresses else []
        stream: ByteStream | None = None
        trusted = [text for text in direct if text not in doubtful]
        stream = await self._try_tls(peer.node_id, trusted, reasons, patient=not circuits)
        if stream is None:
            stream = await self._try_circuits(peer.node_id, circuits, reasons)
        if stream is None:
            others = tuple(text for text in addresses if text not in direct and text not in circuits)
            stream = await self._try_libp2p(Peer(peer.node_id, others), reasons)
        if stream is None:
            stream = await self._try_tls(peer.node_id, doubtful, reasons)
        if stream is None:
            raise TransportError(f"cannot reach {peer_id_text(peer.node_id)}: {'; '.join(reasons)}")
        return stream

    async def _answering(self, addresses: Sequence[str], knock_s: float) -> tuple[str, ...]:
        """Those where somebody accepts connections, with what cannot be told of. All are tried at once: who
        announces many dead addresses costs no more time than with one."""
        there: list[str] = []

        async def knock(text: str, endpoint: Endpoint, scope: trio.CancelScope) -> None:
            async with self._knocking:
                if await can_connect(endpoint, knock_s):
                    there.append(text)
                    scope.deadline = min(scope.deadline, trio.current_time() + KNOCKED_S)

        async with trio.open_nursery() as nursery:
            for text in addresses:
                endpoint = parse_endpoint(circuit_relay(text) if is_circuit(text) else text)
                if endpoint is None:
                    there.append(text)
                else:
                    nursery.start_soon(knock, text, endpoint, nursery.cancel_scope)
        return tuple(text for text in addresses if text in there)

    async def _try_circuits(
        self, node_id: NodeId, texts: Sequence[str], reasons: list[str]
    ) -> TlsStream | None:
        """First the relays that did not fail, then those whose failure, or spent budget, is longest ago: one
        that cuts every circuit short must not be asked again and again."""
        for text in sorted(texts, key=lambda text: self._distrusted.get(text, -math.inf)):
            relay = parse_endpoint(circuit_relay(text))
            if relay is None:
                reasons.append(f"{text}: no address of a relay")
                continue
            try:
                stream = await self._circuits.dial(node_id, relay)
            except TransportError as error:
                self._distrust(text)
                reasons.append(f"{text}: {error}")
            else:
                stream.when_broken = partial(self._distrust, text)
                return stream
        return None

    async def dial_direct(self, peer: Peer) -> ByteStream:
        reasons: list[str] = []
        direct = [text for text in peer.addresses[:MAX_ADDRESSES] if is_tls(text)]
        stream = await self._try_tls(peer.node_id, direct, reasons)
        if stream is None:
            raise TransportError("; ".join(reasons) or "it has no TLS address")
        return stream

    async def _try_tls(
        self, node_id: NodeId, texts: Sequence[str], reasons: list[str], *, patient: bool = True
    ) -> TlsStream | None:
        limit_s = CONNECT_S + HANDSHAKE_S if patient else DIRECT_FIRST_S
        for text in texts:
            endpoint = parse_endpoint(text)
            assert endpoint is not None
            try:
                with within(limit_s, "connecting"):
                    stream = await self._tls.dial(node_id, endpoint)
            except TransportError as error:
                self._distrust(text)
                reasons.append(f"{text}: {error}")
            else:
                stream.when_broken = partial(self._distrust, text)
                return stream
        return None

    def _distrust(self, text: str) -> None:
        while len(self._distrusted) >= MAX_DISTRUSTED:
            del self._distrusted[next(iter(self._distrusted))]
        self._distrusted.pop(text, None)
        self._distrusted[text] = trio.current_time()

    async def _try_libp2p(self, peer: Peer, reasons: list[str]) -> ByteStream | None:
        if not peer.addresses or not await self._worth_loading(peer.addresses, reasons):
            return None
        try:
            host = await self.load_libp2p()
            return await host.dial(peer)
        except (TransportError, OSError) as error:  # also when no more files can be opened to load it
            reasons.append(str(error))
            return None

    async def _worth_loading(self, addresses: Sequence[str], reasons: list[str]) -> bool:
        """A peer that is gone altogether is no reason to load libp2p."""
        if self._libp2p is not None:
            return True
        for text in addresses:
            endpoint = parse_endpoint(text)
            if endpoint is None or await can_connect(endpoint):
                return True
            reasons.append(f"{text}: no connection")
        return False

    # -- libp2p ----------------------------------------------------------------------------------

    async def load_libp2p(self, listen: Sequence[str] = ()) -> "Libp2pHost":
        """The libp2p host, started when it is not there yet. Raises as `open_host` does."""
        async with self._loading:
            if self._libp2p is not None:
                return self._libp2p
            # in a thread: sessions go on meanwhile
            await trio.to_thread.run_sync(importlib.import_module, "paris_p2p.net.host")
            host: Libp2pHost = await self._nursery.start(self._run_libp2p, listen)
            if self._handler is not None:
                host.serve(self._handler)
            self._libp2p = host
            return host

    async def _run_libp2p(self, listen: Sequence[str], task_status: Any) -> None:
        from paris_p2p.net.host import open_host

        # Shielded: a cancelled libp2p task can no longer close its sockets; `stop` ends it in order.
        with trio.CancelScope(shield=True):
            async with open_host(self._identity, listen) as host:
                task_status.started(host)
                await self._stopping.wait()

    def stop(self) -> None:
        """Ends libp2p, within bounds."""
        self._stopping.set()


def _announced(text: str, peer_id: str) -> str:
    """An address to tell others, with `/p2p/`. Raises `ConfigError` when it is no multiaddr."""
    if parse_endpoint(text) is None:
        from multiaddr import Multiaddr

        try:
            Multiaddr(text)
        except Exception as error:  # noqa: BLE001 - multiaddr raises many kinds; this is the edge
            raise ConfigError(
                f"{text!r} is not a multiaddr such as /ip4/127.0.0.1/tcp/4001: {error}"
            ) from None
    return f"{text.split('/p2p/', 1)[0]}/p2p/{peer_id}"


@asynccontextmanager
async def open_network(
    identity: Identity,
    listen: Sequence[str],
    announce: Sequence[str] = (),
    reach: ReachOptions | None = None,
) -> AsyncIterator[MultiNetwork]:
    """A listening network. `listen`: multiaddrs such as `/ip4/0.0.0.0/tcp/0/tls` (direct TLS) and
    `/ip4/0.0.0.0/tcp/0` (libp2p); `announce`: what to tell others instead. Raises `ConfigError` for
    malformed addresses and `NetworkError` when a port is taken."""
    endpoints: list[Endpoint] = [listen_endpoint(text) for text in listen]
    over_tls = [endpoint for endpoint in endpoints if endpoint.tls]
    over_libp2p = [endpoint.text() for endpoint in endpoints if not endpoint.tls]
    with unwrapped():
        async with open_tls_host(identity, over_tls) as tls, trio.open_nursery() as nursery:
            network = MultiNetwork(identity, tls, announce, nursery)
            try:
                if over_libp2p:
                    await network.load_libp2p(over_libp2p)
                if reach is not None:
                    network.help_others(reach.relay)
                if reach is not None and reach.find_helpers is not None:
                    nursery.start_soon(network.reachability.run, reach.find_helpers, reach.chosen)
                yield network
            finally:
                network.stop()
                nursery.cancel_scope.cancel()
