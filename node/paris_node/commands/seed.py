"""`paris-node seed`: serve a file or folder to whoever knows its id, straight from where it lies."""

from pathlib import Path

import trio

from paris_node.sharing import ShareRequest, open_sharing, own_identity, place, until_reachable, until_seeded
from paris_node.signals import unless_interrupted
from paris_p2p.errors import ConfigError
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
    store, ref = place(home, path, piece_length)
    with own_identity(home) as identity:
        return trio.run(_seed, store, ref, request, identity, output)


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
            + "\n".join(f"  paris-node get {info_hash} --out DIR --peer {peer}" for peer in swarm.addresses),
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
