"""Whether the disk can hold a role's shards and checkpoints.

Owns: the estimate. Does not own: what to do when it cannot (`join` refuses to start, a running volunteer
claims nothing until there is room).
"""

import math

from paris_node.network import Network
from paris_p2p.errors import StoreError
from paris_p2p.ids import Role
from paris_p2p.wire.manifest import Manifest

BYTES_PER_ELEMENT = 4
COPIES_PER_CHECKPOINT = 5  # weights; and raw weights, EMA and two optimizer moments in the resume bundle
CHECKPOINTS_ON_DISK = 4  # the newest, the announced and the safe one; one being written


def check_room(
    network: Network, manifest: Manifest, wanted: Role | None, max_disk: int | None = None
) -> None:
    """Refuse what the disk, or `max_disk` bytes of it, cannot hold. Raises `StoreError` saying how much is
    missing where."""
    role = wanted if wanted is not None else manifest.roles[0]
    initial = (ref for ref in manifest.initial(role) if ref is not None)
    refs = {*manifest.shards(role), *manifest.components.values(), *initial}
    to_fetch = sum(ref.length for ref in refs if not network.store.has(ref.info_hash))
    elements = sum(math.prod(spec.shape) for spec in manifest.architecture(role).tensors)
    checkpoints = elements * BYTES_PER_ELEMENT * COPIES_PER_CHECKPOINT * CHECKPOINTS_ON_DISK
    whole = sum(ref.length for ref in refs) + checkpoints
    if max_disk is not None and whole > max_disk:
        raise StoreError(
            f"--max-disk allows {max_disk / 1e9:.2f} GB, this run needs about {whole / 1e9:.2f} GB "
            "for shards and checkpoints: raise it"
        )
    needed = to_fetch + checkpoints
    free = network.store.free_bytes()
    if needed > free:
        raise StoreError(
            f"{network.home.path} has {free / 1e9:.2f} GB free, this run needs about {needed / 1e9:.2f} GB "
            "for shards and checkpoints: free some space, or choose another --home"
        )
