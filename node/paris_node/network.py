"""The network side of a command: home, identity, DHT client and swarm, opened and closed together.

Owns: where the bootstrap addresses come from (options, else the remembered context), which listen
addresses go to which socket. Does not own: what is done with the network.
"""

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from paris_p2p.core.relay import RelayBudget
from paris_p2p.dht.addresses import check_announce as check_announce_form
from paris_p2p.dht.addresses import check_listen as check_listen_form
from paris_p2p.dht.client import Dht, DhtConfig, open_dht
from paris_p2p.dht.notices import notice_events
from paris_p2p.errors import ConfigError
from paris_p2p.ids import InfoHash
from paris_p2p.net.limits import SwarmLimits
from paris_p2p.net.multi import ReachOptions
from paris_p2p.net.swarm import NO_LIMITS, Peer, Swarm, open_swarm
from paris_p2p.programs import Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import MAX_ADDRESS_CHARS, ProvideRecord, RelayRecord

DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/0/tls", "/ip4/0.0.0.0/tcp/0")
TLS = "/tls"
PEER_ID_CHARS = 52
"""Of an Ed25519 key, in base58."""


@dataclass(frozen=True, slots=True)
class NetworkRequest:
    """The options every networked command shares, as given; `limits`: what it may upload and download.

    `max_disk`: bytes the store may take, None for no limit.
    """

    home: Path | None
    bootstrap: Sequence[str] | None
    listen: Sequence[str] | None
    announce: Sequence[str] | None
    run: str | None
    limits: SwarmLimits = NO_LIMITS
    max_disk: int | None = None
    relay: bool = False


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
    async with open_dht(config, on_notice=on_notice) as dht:
        swarm_opened = open_swarm(
            own,
            store,
            listen=swarm_listen(listen, announce),
            announce=announce,
            find_peers=_peer_finder(dht, own),
            rng=random.Random(own.node_id),
            limits=request.limits,
            reach=_reach(request, dht, own) if identity is not None else None,
        )
        async with swarm_opened as swarm:
            yield Network(home, own, store, dht, swarm, bootstrap, request.relay)


def _reach(request: NetworkRequest, dht: Dht, own: Identity) -> ReachOptions:
    async def find_helpers() -> list[Peer]:
        records = await dht.read("relay", b"")
        return [
            Peer(record.owner, record.payload.addresses)
            for record in records
            if isinstance(record.payload, RelayRecord) and record.owner != own.node_id
        ]

    return ReachOptions(find_helpers, RelayBudget() if request.relay else None)


def _peer_finder(dht: Dht, own: Identity) -> Callable[[InfoHash], Awaitable[list[Peer]]]:
    async def find_peers(info_hash: InfoHash) -> list[Peer]:
        records = await dht.read("provide", info_hash)
        return [
            Peer(record.owner, record.payload.addresses)
            for record in records
            if isinstance(record.payload, ProvideRecord) and record.owner != own.node_id
        ]

    return find_peers
