"""Resuming after SIGKILL: the loss curve of a trainer that is killed again and again, beside an unbroken one.

Trains two small experts (flow matching, and noise prediction) and a router with the node's real trainer
process: once to the end, and once killed `--kills` times at moments drawn at random and started again from
the newest checkpoint it had handed over. Compared at every checkpoint, bit for bit: the held-out loss and the
SHA-256 of the resume bundle's tensors (weights, average, both moments), on which all that
follows depends. The last line is one JSON object; `ratio` is the share of checkpoints that are equal (the bar
is 1.0).

    python benchmarks/resume.py [--kills 4] [--steps 200] [--interval 20]
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trio
from safetensors.torch import save_file

from paris_p2p.diffusion.recipes import preset
from paris_p2p.diffusion.resume import TENSORS_NAME
from paris_p2p.errors import WorkerError
from paris_p2p.ids import ROUTER, InfoHash, Role, expert_role
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import FORMAT, Cluster, LeaseTimes, Manifest, Recipe, sign_manifest
from paris_p2p.workers.spawn import Worker, open_worker

MODULE = "paris_p2p.diffusion.train_worker"
CLUSTERS, IMAGES, TOKENS, WIDTH, SIDE = 2, 200, 4, 16, 8
DEADLINE_S = 600.0
ROLES = ((expert_role(0), 0), (expert_role(1), 1), (ROUTER, 0))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`digest`: of the resume bundle's tensors."""

    heldout_loss: float
    digest: str


def make_run(folder: Path, steps: int, interval: int) -> list[dict[str, Any]]:
    """Write a manifest and a shard a cluster into `folder`; the shards as a start message names them."""
    recipe = preset(
        "tiny",
        channels=1,
        image_size=SIDE,
        clusters=CLUSTERS,
        tokens=TOKENS,
        text_width=WIDTH,
        steps=steps,
        variants=("tiny:ddpm",),
    )
    ref = ContentRef(InfoHash(bytes(32)), 1, 1 << 14)
    organiser = Identity(bytes(32))
    manifest = Manifest(
        format=FORMAT,
        name="resume",
        organiser=organiser.node_id,
        recipe=_smaller(recipe, interval),
        clusters=tuple(Cluster(k, IMAGES, IMAGES, ref, ref) for k in range(CLUSTERS)),
        components={},
        lease=LeaseTimes(10.0, 2.0, 1.0, 1.0),
        replicas=0,
        example_prompts=(),
    )
    (folder / "manifest.paris").write_bytes(sign_manifest(manifest, organiser).data)
    shards = [_write_shard(folder, cluster) for cluster in range(CLUSTERS)]
    return [{"cluster": k, "train": shard, "heldout": shard} for k, shard in enumerate(shards)]


def _smaller(recipe: Recipe, interval: int) -> Recipe:
    """The recipe with batches of 16: what is to be shown does not depend on them, the time does."""
    experts = tuple(
        dataclasses.replace(one, training=dataclasses.replace(one.training, batch_size=16))
        for one in recipe.experts
    )
    return dataclasses.replace(recipe, experts=experts, checkpoint_interval_steps=interval)


def _write_shard(folder: Path, cluster: int) -> str:
    generator = torch.Generator().manual_seed(cluster)
    tensors = {
        "latents": torch.rand(IMAGES, 1, SIDE, SIDE, generator=generator) * 2 - 1,
        "caption_index": torch.arange(IMAGES) % 3,
        "captions": torch.randn(3, TOKENS, WIDTH, generator=generator),
        "uncond": torch.zeros(TOKENS, WIDTH),
        "caption_texts": torch.tensor(list(b'["a", "b", "c"]'), dtype=torch.uint8),
    }
    place = folder / f"shard-{cluster}"
    place.mkdir()
    save_file(tensors, place / "shard.safetensors", {"format": "2", "cluster": str(cluster)})
    return str(place)


class Training:
    """One role's training, over as many processes as it takes."""

    def __init__(self, folder: Path, role: Role, variant: int, shards: list[dict[str, Any]]) -> None:
        wanted = [one for one in shards if role in (ROUTER, expert_role(one["cluster"]))]
        self._start = {
            "type": "start",
            "manifest": str(folder / "manifest.paris"),
            "role": role,
            "variant": variant,
            "device": "cpu",
            "shards": wanted,
            "threads": 1,
        }
        self._folder = folder
        self._processes = 0
        self._newest: tuple[int, str] | None = None
        self.curve: dict[int, list[Checkpoint]] = {}
        self.killed = 0

    async def train(self, kills: int, rng: random.Random) -> None:
        """To the end, killed `kills` times on the way."""
        while not await self._process(rng.uniform(0.2, 1.0) if self.killed < kills else None, rng):
            self.killed += 1

    async def _process(self, share: float | None, rng: random.Random) -> bool:
        """One process's life; whether it finished. `share`: it is killed that far into an interval."""
        self._processes += 1
        step, resume = self._newest or (0, None)
        out = self._folder / f"out-{self._start['role']}-{id(self)}-{self._processes}"
        async with open_worker(MODULE) as worker:
            await worker.send({**self._start, "resume": resume, "resume_step": step, "out": str(out)})
            checkpoints_before = 1 + rng.randrange(2)
            try:
                return await self._follow(worker, share, checkpoints_before)
            except WorkerError:
                return False

    async def _follow(self, worker: Worker, share: float | None, checkpoints: int) -> bool:
        seen = 0
        while True:
            with trio.fail_after(DEADLINE_S):
                message = await worker.receive()
            if message["type"] == "checkpoint":
                self._note(message)
                seen += 1
                if share is not None and seen == checkpoints:
                    await trio.sleep(share * 0.3)  # somewhere in the steps, or the writing, that follow
                    os.kill(worker.pid, signal.SIGKILL)
            elif message["type"] == "error":
                raise SystemExit(f"the trainer failed: {message['message']}")
            elif message["type"] == "finished":
                return True

    def _note(self, message: dict[str, Any]) -> None:
        bundle = Path(message["resume"])
        digest = hashlib.sha256((bundle / TENSORS_NAME).read_bytes()).hexdigest()
        found = self.curve.setdefault(int(message["step"]), [])
        found.append(Checkpoint(float(message["heldout_loss"]), digest))
        self._newest = int(message["step"]), str(bundle)


async def compare(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """For each role both curves, compared."""
    shards, results = make_run(folder, given.steps, given.interval), []
    for role, variant in ROLES:
        rng = random.Random(given.seed)
        unbroken, killed = (Training(folder, role, variant, shards) for _ in range(2))
        await unbroken.train(0, rng)
        await killed.train(given.kills, rng)
        points = sorted(unbroken.curve)
        equal = [all(one == unbroken.curve[n][0] for one in killed.curve.get(n, [None])) for n in points]
        results.append(
            {
                "role": role,
                "variant": variant,
                "kills": killed.killed,
                "checkpoints": len(points),
                "equal": sum(equal),
                "heldout_losses": [round(unbroken.curve[n][0].heldout_loss, 6) for n in points],
            }
        )
        print(json.dumps(results[-1]), flush=True)
    return results


def main() -> int:
    """Parse, train, compare, print; 1 when anything differed."""
    parser = argparse.ArgumentParser(description="a killed trainer against an unbroken one, bit for bit")
    parser.add_argument("--kills", type=int, default=4, help="of each role's trainer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--interval", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of death")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = trio.run(compare, Path(folder), given)
    equal, checkpoints = (sum(one[name] for one in results) for name in ("equal", "checkpoints"))
    kills = sum(one["kills"] for one in results)
    ratio = round(equal / checkpoints, 4)
    print(json.dumps({"benchmark": "resume", **vars(given), "killed": kills, "checkpoints": checkpoints,
                      "equal": equal, "ratio": ratio}))  # fmt: skip
    return 0 if equal == checkpoints else 1


if __name__ == "__main__":
    sys.exit(main())
