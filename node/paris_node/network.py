"""The network side of a command: home, identity, DHT client and swarm, opened and closed together.

Owns: where the bootstrap addresses come from (options, else the remembered context), which listen
addresses go to which socket. Does not own: what is done with the network.
"""

import ipaddress
import logging
import math
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from paris_node.sharing import open_near
from paris_p2p.core.relay import RelayBudget
from paris_p2p.dht.addresses import HostPort, host_port
from paris_p2p.dht.addresses import check_announce as check_announce_form
from paris_p2p.dht.addresses import check_listen as check_listen_form
from paris_p2p.dht.client import Dht, DhtConfig, open_dht
from paris_p2p.dht.notices import notice_events
from paris_p2p.errors import ConfigError, TransportError
from paris_p2p.ids import InfoHash
from paris_p2p.net.addresses import Endpoint
from paris_p2p.net.discovery import FindPeers
from paris_p2p.net.limits import SwarmLimits
from paris_p2p.net.multi import ReachOptions
from paris_p2p.net.swarm import NO_LIMITS, Peer, Swarm, open_swarm
from paris_p2p.programs import Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import MAX_ADDRESS_CHARS, ProvideRecord, RelayRecord

if TYPE_CHECKING:
    from paris_p2p.net.mdns import Lan

log = logging.getLogger(__name__)

DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/0/tls", "/ip4/0.0.0.0/tcp/0")
TLS = "/tls"
FAR_S = 10.0
"""How long nodes near by wait for what the DHT says."""
LOOK_UP_S = 5.0
LAST_PORT = 65_535
PEER_ID_CHARS = 52
"""Of an Ed25519 key, in base58."""


@dataclass(frozen=True, slots=True)
class NetworkRequest:
    """The options every networked command shares, as given; `limits`: what it may upload and download.

    `max_disk`: bytes the store may take, None for no limit; `lan`: look for peers near by, too.
    """

    home: Path | None
    bootstrap: Sequence[str] | None
    listen: Sequence[str] | None
    announce: Sequence[str] | None
    run: str | None
    limits: SwarmLimits = NO_LIMITS
    max_disk: int | None = None
    relay: bool = False
    lan: bool = False


@dataclass(frozen=True, slots=True)
class Network:
    """An open network side. `bootstrap`: the addresses it came in by; `relay`: relay for others if it can."""

    home: Home
    identity: Identity
    store: ContentStore
    dht: Dht
    swarm: Swarm
    bootstrap: tuple[str, ...]
    relay: bool = False


def bootstrap_addresses(request: NetworkRequest, home: Home) -> tuple[str, ...]:
    """The bootstrap addresses asked for, else the remembered ones; `ConfigError` when there are none."""
    if request.bootstrap:
        return tuple(request.bootstrap)
    remembered = home.context().get("bootstrap")
    if isinstance(remembered, list) and remembered:
        return tuple(str(address) for address in remembered)
    raise ConfigError(
        "no bootstrap address is known here yet: pass --bootstrap /ip4/…/tcp/…/p2p/… (the line that "
        "paris-bootstrap prints); it is remembered afterwards"
    )


def dht_listen(listen: Sequence[str]) -> tuple[str, ...]:
    """The DHT worker's listen addresses: the swarm's interfaces, any free port."""
    hosts = dict.fromkeys("/".join(address.split("/")[:3]) for address in listen)
    return tuple(f"{host}/tcp/0" for host in hosts)


def check_listen(listen: Sequence[str]) -> tuple[str, ...]:
    """The listen multiaddrs, checked for their form. Those with `/tls` are for the fast path."""
    for address in listen:
        check_listen_form(address.removesuffix(TLS))
    return tuple(listen)


def swarm_listen(listen: Sequence[str], announce: Sequence[str]) -> tuple[str, ...]:
    """Where the swarm listens: also by TLS when only libp2p is asked for, on the same interfaces, any port.
    Not with `announce`: nobody would be told of that port."""
    if announce or any(address.endswith(TLS) for address in listen):
        return tuple(listen)
    return tuple(f"{address}{TLS}" for address in dht_listen(listen)) + tuple(listen)


def check_announce(announce: Sequence[str]) -> tuple[str, ...]:
    """The multiaddrs to tell others, checked for their form and for fitting into records."""
    longest = MAX_ADDRESS_CHARS - len("/p2p/") - PEER_ID_CHARS
    for address in announce:
        check_announce_form(address)
        if len(address) > longest:
            raise ConfigError(f"{address!r} cannot be announced: at most {longest} characters fit a record")
    return tuple(announce)


@asynccontextmanager
async def open_network(
    request: NetworkRequest,
    *,
    home: Home,
    identity: Identity | None,
    bootstrap: tuple[str, ...],
    output: Output | None = None,
) -> AsyncIterator[Network]:
    """Open DHT client and swarm. Without `identity` a throw-away one is used and the DHT is only asked.

    What goes wrong with the DHT becomes `network` events of `output`.
    """
    listen = check_listen(request.listen or DEFAULT_LISTEN)
    announce = check_announce(request.announce or ())
    config = DhtConfig(
        listen=dht_listen(listen),
        announce=(),
        bootstrap=bootstrap,
        key_path=home.path / "dht.key" if identity is not None else None,
        client_mode=identity is None,
        runtime_dir=home.path / "run",
        peers_path=home.peers_path,
    )
    store = home.store()
    own = identity if identity is not None else Identity(os.urandom(32))
    on_notice = None if output is None else notice_events(output.event)
    lan: Lan | None = None

    def near() -> Sequence[Peer]:
        return [] if lan is None else lan.peers()

    async with open_dht(config, on_notice=on_notice) as dht, AsyncExitStack() as stack:
        swarm_opened = open_swarm(
            own,
            store,
            listen=swarm_listen(listen, announce),
            announce=announce,
            find_peers=with_near(_peer_finder(dht, own), near),
            rng=random.Random(own.node_id),
            limits=request.limits,
            reach=_reach(request, dht, own, bootstrap) if identity is not None else None,
        )
        swarm = await stack.enter_async_context(swarm_opened)
        swarm.prefer(lambda: dht.vouched)
        if request.lan:
            lan = await stack.enter_async_context(open_near(own, swarm, listen))
        yield Network(home, own, store, dht, swarm, bootstrap, request.relay)


def with_near(far: FindPeers, near: Callable[[], Sequence[Peer]]) -> FindPeers:
    """Who `far` says has an item, and the nodes near by: they may have it, and where the DHT does not answer
    they are whom to ask."""

    async def find_peers(info_hash: InfoHash) -> Sequence[Peer]:
        known: Sequence[Peer] = ()
        try:
            with trio.move_on_after(FAR_S if near() else math.inf):
                known = await far(info_hash)
        except TransportError:
            if not near():
                raise
        return [*known, *near()]

    return find_peers


def _reach(request: NetworkRequest, dht: Dht, own: Identity, bootstrap: Sequence[str]) -> ReachOptions:
    async def find_helpers() -> list[Peer]:
        records = await dht.read("relay", b"")
        return [
            Peer(record.owner, record.payload.addresses)
            for record in records
            if isinstance(record.payload, RelayRecord) and record.owner != own.node_id
        ]

    async def chosen() -> list[Endpoint]:
        return await bootstrap_helpers(bootstrap)

    return ReachOptions(find_helpers, RelayBudget() if request.relay else None, chosen)


async def bootstrap_helpers(bootstrap: Sequence[str]) -> list[Endpoint]:
    """Where the bootstrap nodes help others to be reached: one port after their DHT's. Names are looked up;
    those that cannot be are left out."""
    found: list[Endpoint] = []
    for place in map(host_port, bootstrap):
        if place is not None and place.transport == "tcp" and place.port < LAST_PORT:
            found += [Endpoint(host, place.port + 1, tls=True) for host in await _addresses_of(place)]
    return found


async def _addresses_of(place: HostPort) -> list[str]:
    if place.host_kind in ("ip4", "ip6"):
        return [str(ipaddress.ip_address(place.host))]
    family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(place.host_kind, socket.AF_UNSPEC)
    with trio.move_on_after(LOOK_UP_S):
        try:
            found = await trio.socket.getaddrinfo(place.host, None, family, socket.SOCK_STREAM)
        except OSError as error:
            log.info("looking up %s: %s", place.host, error)
        else:
            return list(dict.fromkeys(str(entry[4][0]) for entry in found if "%" not in str(entry[4][0])))
    return []


def _peer_finder(dht: Dht, own: Identity) -> FindPeers:
    async def find_peers(info_hash: InfoHash) -> list[Peer]:
        records = await dht.read("provide", info_hash)
        return [
            Peer(record.owner, record.payload.addresses)
            for record in records
            if isinstance(record.payload, ProvideRecord) and record.owner != own.node_id
        ]

    return find_peers
