"""Where networks of `quality.py` are good: held-out losses by t, at the same t and noise for all of them.

Owns: the loss of a trained network on each cluster's held-out images, split by t. Does not own: training.

A `K` in a name stands for the cluster whose images are asked about: `expert-K` is judged on its own cluster
only. Low t is fine detail, high t the layout. The last line is one JSON object.

    python -m benchmarks.lab.losses WORK --seeds 0 1 2 [--networks monolithic-control start expert-K-started]
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lab.contenders import Settings, Task, weights_of
from paris_p2p.diffusion import networks, objectives
from paris_p2p.diffusion.expert import predict
from paris_p2p.diffusion.seeds import stream
from paris_p2p.diffusion.shards import Examples, load_shard
from paris_p2p.store.content_store import ContentStore

SAMPLES = 384
THIRDS = ("low", "middle", "high")
NETWORKS = ("monolithic", "monolithic-control", "start", "expert-K", "expert-K-started")


def by_third(losses: Tensor, t: Tensor) -> dict[str, float]:
    """Means of (N,) losses over the thirds of [0, 1] that their t (N,) are in, and over all."""
    third = (t * len(THIRDS)).long().clamp(max=len(THIRDS) - 1)
    found = {name: float(losses[third == number].mean()) for number, name in enumerate(THIRDS)}
    return {**found, "all": float(losses.mean())}


@torch.no_grad()
def of_seed(task: Task, names: list[str]) -> dict[str, dict[str, float]]:
    """Every network's losses, averaged over the clusters."""
    manifest = task.manifest().manifest
    store = ContentStore(task.prepared / "store")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for cluster in manifest.clusters:
        folder = store.files(cluster.heldout.info_hash)
        data = Examples([load_shard(folder, manifest.recipe, cluster.index)])
        batch = data.gather(torch.arange(SAMPLES) % len(data))
        chance = stream(0, "losses", cluster.index)
        t = (torch.randperm(SAMPLES, generator=chance) + 0.5) / SAMPLES
        x0, eps = batch.latents.float(), torch.randn(batch.latents.shape, generator=chance)
        for name in names:
            weights = weights_of(task, name.replace("K", str(cluster.index)))
            network = networks.build(manifest.recipe.experts[0].architecture, 0, initial=weights).eval()
            output = predict(network, objectives.noised(x0, eps, t), t, batch.text.float())
            off = (output - objectives.velocity(x0, eps)).square().flatten(1).mean(1)  # (N,)
            found[name].append(by_third(off, t))
    return {name: mean_of(several) for name, several in found.items()}


def mean_of(several: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure."""
    return {key: statistics.fmean(one[key] for one in several) for key in several[0]}


def main() -> None:
    """Parse, compute, print."""
    keep = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep)
    parser.add_argument("work", type=Path, help="quality.py's --work")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = []
    for seed in given.seeds:
        root = given.work / f"seed-{seed}"
        task = Task(Settings("", "", None, 1, 1, seed), root / "prepared", root / "networks", "cpu")
        seeds.append(of_seed(task, given.networks))
    means = {name: mean_of([one[name] for one in seeds]) for name in given.networks}
    print("| | low t | middle | high t | all |\n| --- | --- | --- | --- | --- |")
    for name, one in means.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in one.values())} |")
    print(json.dumps({"benchmark": "losses", "seeds": given.seeds, "losses": means}))


if __name__ == "__main__":
    main()
