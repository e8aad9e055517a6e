"""A run's content items: shards, initial weights, and nothing else in the store.

Owns: putting finished stages into the store of a prepared run. Does not own: the stages (`prepare`), the
store (`store`).
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from paris_p2p.data.options import AddInitial
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import Cluster, Manifest, Recipe

COUNTS_NAME = "counts.json"
PARTS = ("train", "heldout")


def shard_name(cluster: int, part: str) -> str:
    """The folder of one of a cluster's `PARTS`."""
    return f"cluster-{cluster:02d}-{part}"


def add_clusters(
    store: ContentStore,
    folder: Path,
    allowed: Callable[[int], tuple[int, ...]],
    count: Callable[[int, int | None], None],
) -> tuple[Cluster, ...]:
    """Add the shards in `folder`. `allowed`: the variants that the expert of a cluster may be."""
    counts = json.loads((folder / COUNTS_NAME).read_text(encoding="utf-8"))
    clusters = []
    for index, (images, heldout_images) in enumerate(counts):
        train, heldout = (store.add(folder / shard_name(index, part)) for part in PARTS)
        clusters.append(Cluster(index, images, heldout_images, train, heldout, allowed(index)))
        count(index + 1, len(counts))
    return tuple(clusters)


def with_initial(
    store: ContentStore, recipe: Recipe, add_initial: AddInitial | None, out: Path
) -> tuple[Recipe, tuple[str, ...]]:
    """`recipe` with the items its experts start from, if they do not start from random weights, and what
    there is to say of them. Scratch files go to `out`."""
    if add_initial is None:
        return recipe, ()
    with tempfile.TemporaryDirectory(prefix=".initial-", dir=out) as scratch:
        said = add_initial(recipe, Path(scratch))
        refs = [store.add(Path(scratch) / f"initial-{n}") for n in range(len(recipe.experts))]
    pairs = zip(recipe.experts, refs, strict=True)
    return replace(recipe, experts=tuple(replace(variant, initial=ref) for variant, ref in pairs)), said


def keep_only(store: ContentStore, manifest: Manifest, own: ContentRef) -> None:
    """Drop what an earlier prepare with other options left: a publisher seeds all that is in the store.
    `own`: the manifest's own item."""
    wanted = {own.info_hash, *(ref.info_hash for ref in manifest.components.values())}
    wanted |= {one.initial.info_hash for one in manifest.recipe.experts if one.initial is not None}
    for cluster in manifest.clusters:
        wanted |= {cluster.train.info_hash, cluster.heldout.info_hash}
    for ref in store.complete():
        if ref.info_hash not in wanted:
            store.remove(ref.info_hash)
