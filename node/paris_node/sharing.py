"""What `seed`, `get` and `export-torrent` share: a swarm without a DHT, and where what was hashed is noted.

Owns: who this node is to its peers, the addresses and limits that people give, the stores of seeded files.
Does not own: the commands, or finding peers on the local network (`net.mdns`).

Imports stay few: these commands are started by the dozen, and the first byte should not wait for them.
"""

import hashlib
import ipaddress
import logging
import os
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from paris_node.sizes import WORTH_SAYING_BYTES, check_piece_length, read_limits
from paris_p2p.errors import ConfigError
from paris_p2p.ids import InfoHash
from paris_p2p.net.addresses import Endpoint, parse_endpoint
from paris_p2p.net.limits import SwarmLimits
from paris_p2p.net.multi import ReachOptions
from paris_p2p.net.swarm import Peer, Swarm, open_swarm
from paris_p2p.programs import Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.home import Home
from paris_p2p.wire.content import AnyRef, ContentRef
from paris_p2p.wire.identity import SEED_BYTES, Identity, node_id_from_peer_id

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from paris_node.quick import Share
    from paris_p2p.net.mdns import Lan

log = logging.getLogger(__name__)

DEFAULT_LISTEN = "/ip4/0.0.0.0/tcp/0/tls"
MAX_HASH_THREADS = 4
SEEDED_POLL_S = 1.0
REACHED_S = 20.0
"""How long a node waits at most to learn how others reach it, before it tells its addresses."""
LAN_S = 2.0
"""How long a search waits for the first node near by; those heard later are found by the next search."""


@dataclass(frozen=True, slots=True)
class ShareRequest:
    """The options of every swarm without a DHT."""

    home: Path | None
    listen: Sequence[str] | None
    announce: Sequence[str] | None
    limits: SwarmLimits
    lan: bool
    via: tuple[Peer, ...] = ()


def share_request(share: "Share") -> ShareRequest:
    """The options as given, read. Raises `ConfigError`."""
    limits = read_limits(
        share.limit_up,
        share.limit_down,
        share.peer_limit_up,
        share.peer_limit_down,
        seed_ratio=share.seed_ratio,
        seed_time=share.seed_time,
    )
    via = tuple(parse_peer(text, "--via") for text in share.via or ())
    return ShareRequest(share.home, share.listen, share.announce, limits, share.lan, via)


def parse_peer(text: str, option: str = "--peer") -> Peer:
    """The peer a multiaddr ending in `/p2p/<peer id>` names. Raises `ConfigError`."""
    address, separator, peer_id = text.rpartition("/p2p/")
    if not separator or not address.startswith("/"):
        raise ConfigError(
            f"{option} {text}: a whole address is expected, such as "
            "/ip4/203.0.113.5/tcp/4001/tls/p2p/12D3Koo… (what `paris-node seed` prints)"
        )
    return Peer(node_id_from_peer_id(peer_id), (text,))


@contextmanager
def own_identity(home: Home | None) -> Iterator[Identity]:
    """The home's identity; without a home, or while another node uses it, one that is thrown away: two nodes
    of one identity would take each other's connections."""
    with ExitStack() as stack:
        identity = Identity(os.urandom(SEED_BYTES))
        if home is not None:
            try:
                stack.enter_context(home.lock())
            except ConfigError:
                log.info("this home's node is running, so this command goes by an identity of its own")
            else:
                identity = home.identity()
        yield identity


@asynccontextmanager
async def open_sharing(
    request: ShareRequest, identity: Identity, store: ContentStore
) -> AsyncIterator[Swarm]:
    """A swarm of `store` whose peers are those it is told of, and with `lan` those near by.

    Raises `ConfigError` for malformed addresses, `NetworkError` when a port is taken.
    """
    listen = tuple(request.listen or [DEFAULT_LISTEN])
    lan: Lan | None = None

    async def find_peers(_info_hash: InfoHash) -> list[Peer]:
        return [] if lan is None else await lan.first(LAN_S)

    async def find_helpers() -> Sequence[Peer]:
        return request.via

    async def chosen() -> list[Endpoint]:
        named = [parse_endpoint(text) for peer in request.via for text in peer.addresses]
        return [endpoint for endpoint in named if endpoint is not None]

    async with AsyncExitStack() as stack:
        opened = open_swarm(
            identity,
            store,
            listen=listen,
            announce=request.announce or (),
            find_peers=find_peers,
            rng=random.Random(os.urandom(16)),
            limits=request.limits,
            reach=ReachOptions(find_helpers, None, chosen) if request.via else None,
        )
        swarm = await stack.enter_async_context(opened)
        if request.lan:
            lan = await stack.enter_async_context(open_near(identity, swarm, listen))
        yield swarm


def open_near(identity: Identity, swarm: Swarm, listen: Sequence[str]) -> "AbstractAsyncContextManager[Lan]":
    """The nodes on the local network, told of this one, on the interfaces of `listen`. Its multicast is
    imported only now."""
    from paris_p2p.net.mdns import open_lan

    return open_lan(identity.node_id, swarm.addresses, interfaces=listened_interfaces(listen))


async def until_reachable(request: ShareRequest, swarm: Swarm) -> str:
    """How others reach this node, as soon as that is known; empty when nobody can be asked."""
    reachability = swarm.reachability
    if not request.via or reachability is None:
        return ""
    with trio.move_on_after(REACHED_S):
        while reachability.state in ("unknown", "outbound-only"):
            await trio.sleep(0.1)
    return reachability.state


async def until_seeded(swarm: Swarm, ref: AnyRef, length: int) -> None:
    """Until the item of `length` bytes was served as much as the limits ask for: never, without such."""
    while not swarm.seeded_enough(ref.info_hash, length):
        await trio.sleep(SEEDED_POLL_S)


def listened_interfaces(listen: Sequence[str]) -> tuple[str, ...] | None:
    """The IP addresses listened on, None when they are all there are: nobody is told of us elsewhere."""
    hosts = tuple(dict.fromkeys(address.split("/")[2] for address in listen))
    return None if any(ipaddress.ip_address(host).is_unspecified for host in hosts) else hosts


def place(
    home: Home, path: Path, piece_length: int | None, output: Output
) -> tuple[ContentStore, ContentRef]:
    """`path` as an item read where it lies, in a store of its own: nothing else is served from it.

    It is hashed only if it changed since it was last. Raises `ConfigError`, `StoreError`.
    """
    check_piece_length(piece_length)
    key = hashlib.sha256(f"{piece_length or 0} {path.absolute()}".encode(errors="surrogateescape"))
    store = ContentStore(home.path / "seeds" / key.hexdigest()[:32])
    threads = min(MAX_HASH_THREADS, os.cpu_count() or 1)

    def hashing(count: int) -> None:
        if count >= WORTH_SAYING_BYTES:
            output.say(f"hashing {path} ({count / 1e9:.1f} GB), once …")

    ref = store.place(path, piece_length=piece_length, threads=threads, hashing=hashing)
    for other in store.ids():
        if other != ref.info_hash:  # what `path` held before
            store.remove(other)
    return store, ref
