"""`paris-node seed`: serve a file or folder to whoever knows its id, straight from where it lies."""

from collections.abc import Sequence
from pathlib import Path

import trio

from paris_node.sharing import ShareRequest, open_sharing, own_identity, place, until_reachable, until_seeded
from paris_node.signals import unless_interrupted
from paris_p2p.errors import ConfigError
from paris_p2p.net.addresses import is_loopback
from paris_p2p.programs import EXIT_DONE, EXIT_INTERRUPTED, Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.home import Home
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.torrent import magnet_link


def run(path: Path, piece_length: int | None, request: ShareRequest, output: Output) -> int:
    """Seed `path` until interrupted, or as much as the limits ask for."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    home = Home.resolve(request.home)
    store, ref = place(home, path, piece_length, output)
    with own_identity(home) as identity:
        return trio.run(_seed, store, ref, request, identity, output)


def how_to_get(info_hash: str, addresses: Sequence[str], *, lan: bool) -> list[str]:
    """The commands that fetch the item, each with a remark where it does not work from everywhere."""
    get = f"  paris-node get {info_hash} --out DIR"
    near = [f"{get} --lan  # on this network"] if lan else []
    return near + [
        f"{get} --peer {address}{'  # on this machine' if is_loopback(address) else ''}"
        for address in addresses
    ]


async def _seed(
    store: ContentStore, ref: ContentRef, request: ShareRequest, identity: Identity, output: Output
) -> int:
    name = store.layout(ref.info_hash).name
    async with open_sharing(request, identity, store) as swarm:
        info_hash = ref.info_hash.hex()
        reach = await until_reachable(request, swarm)
        output.event(
            "seeding",
            f"seeding {name} ({ref.length / 1e6:.1f} MB); Ctrl-C ends it. To fetch it:\n"
            + "\n".join(how_to_get(info_hash, swarm.addresses, lan=request.lan)),
            info_hash=info_hash,
            addresses=list(swarm.addresses),
            name=name,
            bytes=ref.length,
            piece_length=ref.piece_length,
            magnet=magnet_link(ref.info_hash, name),
            **({"reach": reach} if reach else {}),
        )
        if await unless_interrupted(lambda: until_seeded(swarm, ref, ref.length)):
            return EXIT_DONE
    return EXIT_INTERRUPTED
