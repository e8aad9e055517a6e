"""Nodes on the local network, found by multicast DNS (RFC 6762, 6763) without any server.

Owns: saying who and where this node is, hearing it of others. Nothing else is said: neither what a node holds
nor the machine's name. Whoever looks for an item asks the nodes near by, as any other source.
Does not own: dialling. What is heard proves nothing: a connection authenticates its node, or fails.

zeroconf runs in a thread of its own. It is imported only when it is used.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from paris_p2p.errors import ConfigError
from paris_p2p.ids import NodeId
from paris_p2p.net.addresses import parse_endpoint
from paris_p2p.net.transport import Peer
from paris_p2p.wire.identity import node_id_from_peer_id, peer_id_text
from paris_p2p.wire.messages import MAX_ADDRESS_CHARS, MAX_ADDRESSES

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, ServiceStateChange, Zeroconf

_log = logging.getLogger(__name__)

SERVICE = "_paris-p2p._tcp.local."
MAX_NODES = 200
ASK_MS = 3000
MAX_ASKED = 16  # nodes at once whose announcement came without its addresses
CLOSE_S = 3.0
POLL_S = 0.1


class Lan:
    """The nodes near by, as far as they were heard. Its methods may be called from any thread."""

    def __init__(self, own: NodeId) -> None:
        self._own = own
        self._mutex = threading.Lock()
        self._nodes: dict[NodeId, Peer] = {}
        self._asked = 0

    def peers(self) -> list[Peer]:
        """Who was heard and has not said goodbye since."""
        with self._mutex:
            return list(self._nodes.values())

    async def first(self, timeout_s: float) -> list[Peer]:
        """As `peers`, but waits up to `timeout_s` seconds for somebody."""
        with trio.move_on_after(timeout_s):
            while not self.peers():
                await trio.sleep(POLL_S)
        return self.peers()

    def heard(self, name: str, properties: Mapping[bytes, bytes | None]) -> None:
        """A node's announcement: the instance called `name` with its TXT record."""
        peer = read_announcement(name, properties)
        if peer is None or peer.node_id == self._own:
            return
        with self._mutex:
            if peer.node_id in self._nodes or len(self._nodes) < MAX_NODES:
                self._nodes[peer.node_id] = peer

    def gone(self, name: str) -> None:
        """A node's goodbye, or its silence for longer than it promised."""
        node_id = _node_id(name)
        with self._mutex:
            if node_id is not None:
                self._nodes.pop(node_id, None)

    def changed(
        self, zeroconf: "Zeroconf", service_type: str, name: str, state_change: "ServiceStateChange"
    ) -> None:
        """What zeroconf calls, in its only browser's thread: it must not wait there."""
        from zeroconf import ServiceInfo, ServiceStateChange

        if state_change is ServiceStateChange.Removed:
            self.gone(name)
        elif _node_id(name) is not None:
            info = ServiceInfo(service_type, name)
            if info.load_from_cache(zeroconf):  # an announcement brings all of it
                self.heard(name, info.properties)
            else:
                self._ask(zeroconf, info, name)

    def _ask(self, zeroconf: "Zeroconf", info: "ServiceInfo", name: str) -> None:
        with self._mutex:
            if self._asked >= MAX_ASKED or zeroconf.loop is None:
                return  # it announces itself again
            self._asked += 1

        async def ask() -> None:
            try:
                if await info.async_request(zeroconf, ASK_MS):
                    self.heard(name, info.properties)
            finally:
                with self._mutex:
                    self._asked -= 1

        asking = ask()
        try:
            asyncio.run_coroutine_threadsafe(asking, zeroconf.loop)
        except RuntimeError:  # zeroconf is closing
            asking.close()


def announcement(addresses: Sequence[str]) -> dict[str, str]:
    """The TXT record of a node: its first addresses that fit, and nothing else."""
    fitting = [text for text in addresses if len(text) <= MAX_ADDRESS_CHARS][:MAX_ADDRESSES]
    return {f"a{number}": text for number, text in enumerate(fitting)}


def read_announcement(name: str, properties: Mapping[bytes, bytes | None]) -> Peer | None:
    """The node that the instance `name` announces; None when a stranger's words make none."""
    node_id = _node_id(name)
    if node_id is None:
        return None
    texts = []
    for number in range(MAX_ADDRESSES):
        data = properties.get(b"a%d" % number) or b""
        text = data.decode("ascii", errors="replace")
        right = len(text) <= MAX_ADDRESS_CHARS and text.endswith(f"/p2p/{peer_id_text(node_id)}")
        if right and parse_endpoint(text) is not None:
            texts.append(text)
    return Peer(node_id, tuple(texts)) if texts else None


def _node_id(name: str) -> NodeId | None:
    try:
        return node_id_from_peer_id(name.removesuffix("." + SERVICE))
    except ConfigError:
        return None


@asynccontextmanager
async def open_lan(
    node_id: NodeId, addresses: Sequence[str], *, interfaces: Sequence[str] | None = None
) -> AsyncIterator[Lan]:
    """Announce this node near by, and hear others; returns at once, before anybody was heard.

    `interfaces`: IP addresses of the interfaces to use; all when None. Where there is no multicast it says
    so in the log, and nobody is found: that ends nothing.
    """
    lan = Lan(node_id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run, lan, node_id, tuple(addresses), interfaces)
        try:
            yield lan
        finally:
            nursery.cancel_scope.cancel()


async def _run(lan: Lan, node_id: NodeId, addresses: Sequence[str], interfaces: Sequence[str] | None) -> None:
    from zeroconf import Error

    zeroconf = await trio.to_thread.run_sync(_listen, lan, interfaces)
    if zeroconf is None:
        return
    try:
        try:
            await trio.to_thread.run_sync(_announce, zeroconf, node_id, addresses)
        except (OSError, Error) as error:  # others are heard all the same
            _log.warning("this node cannot be announced on the local network (%s)", _reason(error))
        await trio.sleep_forever()
    finally:
        # It says goodbye: a fraction of a second, unless something on the network keeps it busy.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
            # mypy does not see the keyword behind trio's variadic arguments
            await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)  # type: ignore[call-arg]


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else None
    return text or str(error) or type(error).__name__


def _listen(lan: Lan, interfaces: Sequence[str] | None) -> "Zeroconf | None":
    """None where there is no multicast. That is said here and not raised: zeroconf leaves its socket open
    then, and the error's traceback would keep it until some other thread lets go of that."""
    from zeroconf import Error, InterfaceChoice, ServiceBrowser, Zeroconf

    try:
        zeroconf = Zeroconf(interfaces=list(interfaces) if interfaces is not None else InterfaceChoice.All)
    except (OSError, Error) as error:
        _log.warning("the local network cannot be searched (%s)", _reason(error))
        return None
    ServiceBrowser(zeroconf, SERVICE, handlers=[lan.changed])
    return zeroconf


def _announce(zeroconf: "Zeroconf", node_id: NodeId, addresses: Sequence[str]) -> None:
    from zeroconf import ServiceInfo

    peer_id = peer_id_text(node_id)
    endpoints = [endpoint for endpoint in map(parse_endpoint, addresses) if endpoint is not None]
    info = ServiceInfo(
        SERVICE,
        f"{peer_id}.{SERVICE}",
        port=endpoints[0].port if endpoints else 0,
        parsed_addresses=list(dict.fromkeys(endpoint.host for endpoint in endpoints)),
        properties=announcement(addresses),
        server=f"{peer_id}.local.",  # the machine's own name stays its own
    )
    # Nobody is asked whether the name is free: it is ours, and who says otherwise could silence us.
    zeroconf.register_service(info, cooperating_responders=True)
