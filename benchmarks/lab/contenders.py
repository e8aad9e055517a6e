"""Who takes part in `quality.py`: networks by name, how each is trained, contenders and their scores.

Owns: the names, the recipe behind each, one training, one judgement. Does not own: order, seeds, tables, or
anything a user has: data, training, sampling and scores are the package's own.

Networks: `monolithic`, `monolithic-control`, `router`, `router-text-free`, `expert-K`, `expert-K-ddpm`,
`start` (one network, half of the samples, its rate falls to zero), `expert-K-started` (from `start`, the
other half), `start-S` (one network, the share S of the samples, its rate stays), `expert-K-after-S` (from
`start-S`), `one-after-S` (from `start-S` with all that those see together: the control of the same schedule).
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paris_p2p.wire.manifest import Recipe, SignedManifest, check_manifest

BASELINE, CONTROL = "monolithic", "monolithic, expert's batch"
NOT_NETWORKS = (BASELINE, CONTROL)
TEXT, PUBLISHED, START = "router", "router-text-free", "start"
ONE_NETWORK = {BASELINE: "monolithic", CONTROL: "monolithic-control"}
ROUTERS = {"text-aware router": TEXT, "published router": PUBLISHED}
PICTURES = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the networks of a seed. `steps`: of an expert and of a router."""

    data: str
    preset: str
    image_size: int | None
    clusters: int
    steps: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Task:
    """A seed's work: its prepared folder and the folder of its networks."""

    settings: Settings
    prepared: Path
    networks: Path
    device: str

    def manifest(self) -> SignedManifest:
        """The run's."""
        return check_manifest((self.prepared / "manifest.paris").read_bytes())


@dataclasses.dataclass(frozen=True)
class Contender:
    """`experts`: the networks, by cluster; `router`: None for one network alone. Routing as `Routing`."""

    name: str
    experts: tuple[str, ...]
    router: str | None = None
    top_k: int = 1
    temperature: float = 1.0
    threshold: float = 0.0

    @property
    def networks(self) -> tuple[str, ...]:
        """What it is made of."""
        return self.experts if self.router is None else (self.router, *self.experts)


def contenders(
    settings: Settings,
    ddpm_every: int,
    shared_start: bool,
    full: bool,
    knobs: bool,
    kept_rate: float | None = None,
) -> list[Contender]:
    """Everyone that is judged, the headline first."""
    clusters = range(settings.clusters)
    experts = tuple(f"expert-{k}" for k in clusters)
    found = [Contender(name, (network,)) for name, network in ONE_NETWORK.items()]
    for title, router in ROUTERS.items():
        found += [Contender(f"top-{k}, {title}", experts, router, k) for k in (1, 2)]
        if full:
            found.append(Contender(f"full, {title}", experts, router, 0))
    if ddpm_every:
        mixed = tuple(
            f"expert-{k}-ddpm" if k % ddpm_every == ddpm_every - 1 else f"expert-{k}" for k in clusters
        )
        for title, router in ROUTERS.items():
            found.append(Contender(f"top-2, {title}, 1 in {ddpm_every} DDPM", mixed, router, 2))
    if shared_start:
        found.append(Contender("the shared start alone", (START,)))
        started = tuple(f"expert-{k}-started" for k in clusters)
        for title, router in ROUTERS.items():
            found += [Contender(f"top-{k}, {title}, shared start", started, router, k) for k in (1, 2)]
    if kept_rate is not None:
        what = f"start of {kept_rate:g} that keeps its rate"
        found.append(Contender(f"the {what} alone", (f"{START}-{kept_rate:g}",)))
        found.append(Contender(f"one network from the {what}", (f"one-after-{kept_rate:g}",)))
        after = tuple(f"expert-{k}-after-{kept_rate:g}" for k in clusters)
        for title, router in ROUTERS.items():
            found += [Contender(f"top-{k}, {title}, {what}", after, router, k) for k in (1, 2)]
    if knobs:
        title = "text-aware router"
        found += [
            Contender(f"top-2, {title}, temperature {value:g}", experts, TEXT, 2, temperature=value)
            for value in (0.5, 2.0)
        ]
        found.append(Contender(f"top-2, {title}, threshold 0.2", experts, TEXT, 2, threshold=0.2))
    return found


def networks_for(wanted: list[Contender], settings: Settings) -> list[list[str]]:
    """The networks the contenders need: those that need none other, the longest first, then the rest."""
    names = list(dict.fromkeys(name for contender in wanted for name in contender.networks))
    later = [name for name in names if start_of(name) is not None]
    starts = [START, *(name for name in names if name.startswith(f"{START}-"))]
    longest = ["monolithic-control", "monolithic", *starts, TEXT, PUBLISHED]
    length = {name: place for place, name in enumerate(longest)}
    first = [name for name in names if name not in later]
    return [sorted(first, key=lambda name: length.get(name, len(longest))), later]


def start_of(network: str) -> str | None:
    """The network that `network` starts from; None: from random weights."""
    if network.endswith("-started"):
        return START
    _, after, share = network.partition("-after-")
    return f"{START}-{share}" if after else None


def prepare_run(settings: Settings, folder: Path) -> None:
    """The run of one seed, made by the package's own prepare."""
    from paris_p2p.data.prepare import PrepareOptions, prepare
    from paris_p2p.diffusion.recipes import preset
    from paris_p2p.wire.identity import Identity

    options = PrepareOptions(
        source=settings.data,
        out=folder,
        clusters=settings.clusters,
        preset=settings.preset,
        image_size=settings.image_size,
        steps=settings.steps,
        seed=settings.seed,
    )
    variants = (f"{settings.preset}:ddpm",)
    prepare(
        options,
        identity=Identity(bytes(32)),
        make_recipe=lambda name, **sizes: preset(name, variants=variants, **sizes),
        progress=lambda state: None,
    )


def recipe_for(signed: SignedManifest, network: str) -> Recipe:
    """The recipe that `network` is trained by."""
    from paris_p2p.diffusion import local
    from paris_p2p.diffusion.start import after_start, start_recipe

    recipe = signed.manifest.recipe
    clusters = len(signed.manifest.clusters)
    training = recipe.experts[0].training
    if network == "monolithic":
        return local.monolithic(recipe, clusters)
    if network == "monolithic-control":
        return local.monolithic(recipe, clusters, batch_size=training.batch_size)
    if network == START:
        half = with_steps(recipe, training.steps // 2)
        return local.monolithic(half, clusters, batch_size=training.batch_size)
    if network.startswith(f"{START}-"):
        return start_recipe(recipe, clusters, float(network.removeprefix(f"{START}-")))
    if "-after-" in network:
        rest = after_start(recipe, float(network.partition("-after-")[2]))
        one = network.startswith("one-")
        return local.monolithic(rest, clusters, batch_size=training.batch_size) if one else rest
    if network.endswith("-started"):
        return with_steps(recipe, training.steps - training.steps // 2)
    return without_text(recipe) if network == PUBLISHED else recipe


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """`recipe` with experts of `steps` steps."""
    shorter = tuple(
        dataclasses.replace(variant, training=dataclasses.replace(variant.training, steps=steps))
        for variant in recipe.experts
    )
    interval = max(1, min(recipe.checkpoint_interval_steps, steps))
    return dataclasses.replace(recipe, experts=shorter, checkpoint_interval_steps=interval)


def without_text(recipe: Recipe) -> Recipe:
    """`recipe` with the router as published."""
    from paris_p2p.diffusion import networks

    router = recipe.router
    config = {**router.architecture.config, "text_width": None}
    blind = networks.describe(router.architecture.model_class, config)
    return dataclasses.replace(recipe, router=dataclasses.replace(router, text=False, architecture=blind))


def train_one(task: Task, network: str) -> dict[str, Any]:
    """Train one network to its end, going on from its last checkpoint."""
    import torch

    from paris_p2p.diffusion import local
    from paris_p2p.diffusion.shards import Examples, load_shard
    from paris_p2p.ids import ROUTER, Role
    from paris_p2p.store.content_store import ContentStore

    torch.set_num_threads(1)
    signed = task.manifest()
    recipe = recipe_for(signed, network)
    store = ContentStore(task.prepared / "store")
    parts = network.split("-")
    expert = int(parts[1]) if parts[0] == "expert" else None
    role = ROUTER if parts[0] == "router" else Role(f"expert-{expert or 0}")
    clusters = [c for c in signed.manifest.clusters if expert is None or c.index == expert]

    def examples(part: str) -> Examples:
        refs = [(c.index, getattr(c, part)) for c in clusters]
        return Examples([load_shard(store.files(ref.info_hash), recipe, index) for index, ref in refs])

    start = start_of(network)
    began = time.process_time()
    done = local.train(
        recipe,
        role,
        examples("train"),
        examples("heldout"),
        task.networks / network,
        variant=1 if network.endswith("-ddpm") else 0,
        device=task.device,
        initial=None if start is None else weights_of(task, start),
    )
    return {
        "heldout_loss": done.heldout_loss,
        "samples": done.samples,
        "steps": done.steps,
        "batch_size": done.samples // done.steps,
        "cpu_s": round(time.process_time() - began, 1),  # of this call: less after an interruption
    }


def weights_of(task: Task, network: str) -> Path:
    """The folder of a trained network's weights."""
    return task.networks / network / "checkpoint" / "weights"


def assemble(task: Task, contender: Contender) -> Any:
    """The contender as the pipeline that a user would have."""
    from paris_p2p.diffusion.pipeline import ParisPipeline
    from paris_p2p.ids import ROUTER, expert_role
    from paris_p2p.store.content_store import ContentStore
    from paris_p2p.store.model_folder import write_model_folder

    signed = task.manifest()
    parts = {expert_role(k): name for k, name in enumerate(contender.experts)}
    if contender.router is not None:
        parts[ROUTER] = contender.router
    manifest = dataclasses.replace(
        signed.manifest,
        recipe=recipe_for(signed, contender.router or contender.experts[0]),
        clusters=signed.manifest.clusters[: len(contender.experts)],
    )
    store = ContentStore(task.prepared / "store")
    folder = write_model_folder(
        task.networks / "models" / contender.name.replace(" ", "-").replace(",", ""),
        SignedManifest(manifest, signed.run_id, b""),
        {role: weights_of(task, name) for role, name in parts.items()},
        {name: store.files(ref.info_hash) for name, ref in manifest.components.items()},
        {role: statement(signed, role, name) for role, name in parts.items()},
    )
    return ParisPipeline.from_pretrained(folder)


def statement(signed: SignedManifest, role: Any, network: str) -> Any:
    """What a model folder wants to know of a checkpoint: here only its variant is of interest."""
    from paris_p2p.ids import Term
    from paris_p2p.wire.checkpoint import CheckpointStatement
    from paris_p2p.wire.content import ContentRef

    nothing = ContentRef(signed.manifest.clusters[0].train.info_hash, 1, 1 << 14)
    return CheckpointStatement(
        run_id=signed.run_id,
        role=role,
        term=Term(1),
        holder=signed.manifest.organiser,
        step=1,
        total_steps=1,
        variant=int(network.endswith("-ddpm")),
        weights=nothing,
        resume=nothing,
        parent=b"",
        heldout_loss=0.0,
        created_unix=0.0,
    )


def real_images(task: Task, labels: str | None) -> Any:
    """The run's images, held-out ones too. `labels`: the key of metadata.jsonl that says what they are of."""
    from paris_p2p.diffusion import evaluation
    from paris_p2p.diffusion.shards import load_shard
    from paris_p2p.store.content_store import ContentStore

    manifest = task.manifest().manifest
    store = ContentStore(task.prepared / "store")
    shards = [
        (folder, load_shard(folder, manifest.recipe, cluster.index))
        for cluster in manifest.clusters
        for folder in (store.files(cluster.train.info_hash), store.files(cluster.heldout.info_hash))
    ]
    real = evaluation.real_images(shards, None)
    if labels is None:
        return real
    lines = (Path(task.settings.data) / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = {str(entry["text"]): str(entry[labels]) for entry in map(json.loads, lines)}
    return dataclasses.replace(real, kinds=tuple(kinds[caption] for caption in real.captions))


def train_yardstick(task: Task, folder: Path, labels: str | None, steps: int, samples: int) -> dict[str, Any]:
    """The feature network of all seeds, trained on the real images and their labels; their features."""
    import numpy as np
    import torch

    from paris_p2p.diffusion import evaluation, features

    torch.set_num_threads(1)
    real = real_images(task, labels)
    numbers, names, _ = features.label_images(real.kinds or real.captions, real.clusters)
    network = features.train_features(
        real.images, numbers, names, folder, seed=0, config=features.TrainingConfig(steps=steps)
    )
    found = network.embed(real.images)
    known = {
        "labels": len(names),
        "accuracy": network.accuracy,
        "floor": evaluation.floor(found, samples, 0),
        "images": len(real),
    }
    (folder / "yardstick.json").write_text(json.dumps(known))
    with (folder / "real.part").open("wb") as file:
        np.save(file, found)
    (folder / "real.part").rename(folder / "real.npy")
    return known


def judge(
    task: Task, yardstick: Path, contender: Contender, asked: Mapping[str, Any], labels: str | None
) -> dict[str, Any]:
    """Sample one contender and score it; its first pictures are kept beside the networks."""
    import numpy as np
    import torch

    from paris_p2p.diffusion import evaluation, features

    torch.set_num_threads(1)
    began = time.process_time()
    sampling = task.manifest().manifest.recipe.sampling
    guidance = asked["guidance_scale"]
    plan = evaluation.Asked(
        asked["samples"],
        asked["steps"] or sampling.steps,
        sampling.guidance_scale if guidance is None else guidance,
        task.settings.seed,
    )
    real = real_images(task, labels)
    score, images = evaluation.evaluate(
        evaluation.Contender(
            contender.name,
            assemble(task, contender).to(task.device),
            top_k=contender.top_k,
            threshold=contender.threshold or None,
            temperature=contender.temperature,
        ),
        real,
        np.load(yardstick / "real.npy"),
        features.load_features(yardstick),
        plan,
    )
    folder = task.networks.parent / "pictures"
    folder.mkdir(exist_ok=True)
    picture_row(images).save(folder / f"{contender.name}.png")
    picture_row(real.images[evaluation.drawn(real, plan)]).save(folder / "real.png")
    return {**dataclasses.asdict(score), "cpu_s": round(time.process_time() - began, 1)}


def picture_row(images: Any) -> Any:
    """The first images of (N, C, S, S) in [-1, 1] side by side, a white line between."""
    import torch
    from PIL import Image

    bytes_ = ((images[:PICTURES].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)  # (n, C, S, S)
    framed = torch.nn.functional.pad(bytes_, (0, 1, 0, 1), value=255)  # (n, C, S + 1, S + 1)
    row = torch.cat(list(framed), dim=2).expand(3, -1, -1)  # (3, S + 1, n (S + 1))
    return Image.fromarray(row.permute(1, 2, 0).contiguous().numpy())
