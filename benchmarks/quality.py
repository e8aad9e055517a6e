"""The paper's comparison at a size this machine allows: isolated experts against one monolithic network.

For every seed: prepare a run (k-means clusters), train K experts, a router with text and one without (as
published), one network on all data with the same samples and K times the batch (the paper's baseline), and
the control, the same network at the experts' own batch size. Then judge all of them against the real images
with one feature network a seed, trained on those. Everything goes through the package's own prepare, trainer,
pipeline and evaluation; roles are trained in `--jobs` processes. Interrupted, it goes on where it stopped
when called again with the same `--work`.

The last line is one JSON object. `ratio`: Frechet distance of the best sparse routing (Top-1 or Top-2,
text-aware router) over the monolithic baseline's, median over seeds, with its spread; `ratio_control`: over
the control's; `*_text_free`: the same with the router as published.

    python benchmarks/quality.py                                   # digits, a minute or two
    python benchmarks/quality.py --data train.parquet --image-size 32 --clusters 8 --steps 2000 --seeds 0 1 2
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from paris_p2p.wire.manifest import Recipe, SignedManifest, check_manifest

TEXT, PUBLISHED = "router", "router-text-free"
BASELINE, CONTROL = "monolithic", "monolithic-control"


@dataclasses.dataclass(frozen=True)
class Job:
    """One network to train: which, of which run, where."""

    prepared: str
    work: str
    network: str
    ddpm: bool
    device: str


def prepare_run(arguments: argparse.Namespace, seed: int, folder: Path) -> SignedManifest:
    """The run of one seed, made by the package's own prepare."""
    from paris_p2p.data.prepare import PrepareOptions, prepare
    from paris_p2p.diffusion.recipes import preset
    from paris_p2p.wire.identity import Identity

    variants = (f"{arguments.preset}:ddpm",) if arguments.ddpm_every else ()
    options = PrepareOptions(
        source=arguments.data,
        out=folder,
        clusters=arguments.clusters,
        preset=arguments.preset,
        image_size=arguments.image_size,
        steps=arguments.steps,
        seed=seed,
    )
    report = prepare(
        options,
        identity=Identity(bytes(32)),
        make_recipe=lambda name, **sizes: preset(name, variants=variants, **sizes),
        progress=lambda state: None,
    )
    return check_manifest(report.manifest.read_bytes())


def networks_of(arguments: argparse.Namespace) -> list[str]:
    """Every network a seed trains, the longest first."""
    experts = [f"expert-{k}" for k in range(arguments.clusters)]
    return [CONTROL, BASELINE, TEXT, PUBLISHED, *experts]


def recipe_for(signed: SignedManifest, network: str) -> Recipe:
    """The recipe `network` is trained by."""
    from paris_p2p.diffusion import local, networks

    recipe = signed.manifest.recipe
    clusters = len(signed.manifest.clusters)
    if network == BASELINE:
        return local.monolithic(recipe, clusters)
    if network == CONTROL:
        return local.monolithic(recipe, clusters, batch_size=recipe.experts[0].training.batch_size)
    if network == PUBLISHED:
        router = recipe.router
        config = {**router.architecture.config, "text_width": None}
        blind = networks.describe(router.architecture.model_class, config)
        return dataclasses.replace(recipe, router=dataclasses.replace(router, text=False, architecture=blind))
    return recipe


def train_one(job: Job) -> dict[str, Any]:
    """Train one network to its end, in a process of its own."""
    import torch

    from paris_p2p.diffusion import local
    from paris_p2p.diffusion.shards import Examples, load_shard
    from paris_p2p.ids import ROUTER, Role
    from paris_p2p.store.content_store import ContentStore

    torch.set_num_threads(1)
    prepared = Path(job.prepared)
    signed = check_manifest((prepared / "manifest.paris").read_bytes())
    store = ContentStore(prepared / "store")
    recipe = recipe_for(signed, job.network)
    expert = job.network.startswith("expert-")
    role = Role(job.network) if expert else ROUTER if "router" in job.network else Role("expert-0")
    clusters = [c for c in signed.manifest.clusters if not expert or c.index == int(job.network[7:])]

    def examples(part: str) -> Examples:
        refs = [(c.index, getattr(c, part)) for c in clusters]
        return Examples([load_shard(store.files(ref.info_hash), recipe, index) for index, ref in refs])

    began = os.times()
    done = local.train(
        recipe,
        role,
        examples("train"),
        examples("heldout"),
        Path(job.work) / job.network,
        variant=1 if job.ddpm else 0,
        device=job.device,
    )
    ended = os.times()
    print(f"{job.work}: {job.network} {done}", file=sys.stderr, flush=True)
    return {
        "network": job.network,
        "heldout_loss": done.heldout_loss,
        "samples": done.samples,
        "cpu_s": ended.user + ended.system - began.user - began.system,
    }


def assemble(
    signed: SignedManifest, prepared: Path, work: Path, network: str, ddpm: set[str], router: str | None
) -> Any:
    """A pipeline of trained networks: the experts with `router`, or one monolithic `network`."""
    from paris_p2p.diffusion.pipeline import ParisPipeline
    from paris_p2p.ids import ROUTER, Role, Term
    from paris_p2p.store.content_store import ContentStore
    from paris_p2p.store.model_folder import write_model_folder
    from paris_p2p.wire.checkpoint import CheckpointStatement
    from paris_p2p.wire.content import ContentRef

    manifest = signed.manifest
    recipe = recipe_for(signed, router or network)
    parts = {Role("expert-0"): network}
    if router is not None:
        parts = {role: str(role) for role in manifest.roles if role != ROUTER}
        parts[ROUTER] = router
    else:
        manifest = dataclasses.replace(manifest, clusters=manifest.clusters[:1])
    manifest = dataclasses.replace(manifest, recipe=recipe)
    store = ContentStore(prepared / "store")
    nothing = ContentRef(manifest.clusters[0].train.info_hash, 1, 1 << 14)  # ids are of no interest here
    statements = {
        role: CheckpointStatement(
            run_id=signed.run_id,
            role=role,
            term=Term(1),
            holder=manifest.organiser,
            step=1,
            total_steps=1,
            variant=int(name in ddpm),
            weights=nothing,
            resume=nothing,
            parent=b"",
            heldout_loss=0.0,
            created_unix=0.0,
        )
        for role, name in parts.items()
    }
    out = write_model_folder(
        work / "models" / (router or network),
        SignedManifest(manifest, signed.run_id, b""),
        {role: work / name / "checkpoint" / "weights" for role, name in parts.items()},
        {name: store.files(ref.info_hash) for name, ref in manifest.components.items()},
        statements,
    )
    return ParisPipeline.from_pretrained(out)


def judge(
    arguments: argparse.Namespace, seed: int, prepared: Path, work: Path, ddpm: set[str]
) -> dict[str, Any]:
    """Every contender of one seed."""
    import torch

    from paris_p2p.diffusion import evaluation, features
    from paris_p2p.diffusion.shards import load_shard
    from paris_p2p.store.content_store import ContentStore

    torch.set_num_threads(arguments.jobs)
    signed = check_manifest((prepared / "manifest.paris").read_bytes())
    store = ContentStore(prepared / "store")
    shards = [
        (folder, load_shard(folder, signed.manifest.recipe, c.index))
        for c in signed.manifest.clusters
        for folder in (store.files(c.train.info_hash), store.files(c.heldout.info_hash))
    ]
    real = evaluation.real_images(shards, None)
    if (work / "features").is_dir():
        network = features.load_features(work / "features")
    else:
        labels, names, _ = features.label_images(real.captions, real.clusters)
        config = features.TrainingConfig(steps=arguments.feature_steps)
        network = features.train_features(
            real.images, labels, names, work / "features", seed=seed, config=config
        )
    real_features = network.embed(real.images)
    sampling = signed.manifest.recipe.sampling
    guidance = sampling.guidance_scale if arguments.guidance is None else arguments.guidance
    asked = evaluation.Asked(arguments.samples, arguments.sampling_steps or sampling.steps, guidance, seed)
    contenders = [
        evaluation.Contender(name, assemble(signed, prepared, work, name, ddpm, None), top_k=1)
        for name in (BASELINE, CONTROL)
    ]
    for router, label in ((TEXT, "text"), (PUBLISHED, "text-free")):
        pipeline = assemble(signed, prepared, work, "experts", ddpm, router)
        contenders += [
            evaluation.Contender(f"{way} {label}", pipeline, top_k=top_k)
            for way, top_k in (("top-1", 1), ("top-2", 2), ("full", 0))
        ]
    scores, grids = [], {"real": evaluation.picture_grid(real.images)}
    for contender in contenders:
        score, images = evaluation.evaluate(contender, real, real_features, network, asked)
        scores.append(score)
        grids[contender.name] = evaluation.picture_grid(images)
        print(f"seed {seed}: {score}", file=sys.stderr, flush=True)
    floor = evaluation.floor(real_features, arguments.samples, seed)
    report = evaluation.Report(
        signed.manifest.name, network.name, network.accuracy, len(real), floor, asked, tuple(scores)
    )
    evaluation.write_report(report, grids, work / "report")
    return {
        "seed": seed,
        "floor": floor,
        "feature_accuracy": network.accuracy,
        "scores": {score.name: dataclasses.asdict(score) for score in scores},
    }


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ratios over the seeds."""

    def distance(result: dict[str, Any], name: str) -> float:
        return float(result["scores"][name]["frechet_distance"])

    def ratios(label: str, against: str) -> dict[str, float]:
        found = [
            min(distance(r, f"top-1 {label}"), distance(r, f"top-2 {label}")) / distance(r, against)
            for r in results
        ]
        return {"median": statistics.median(found), "min": min(found), "max": max(found)}

    names = list(results[0]["scores"])
    table = {
        name: {
            key: statistics.median(r["scores"][name][key] for r in results)
            for key in ("frechet_distance", "precision", "recall", "fidelity")
            if results[0]["scores"][name][key] is not None
        }
        for name in names
    }
    text, control = ratios("text", BASELINE), ratios("text", CONTROL)
    return {
        "ratio": text["median"],
        "ratio_spread": [text["min"], text["max"]],
        "ratio_control": control["median"],
        "ratio_control_spread": [control["min"], control["max"]],
        "ratio_text_free": ratios("text-free", BASELINE)["median"],
        "ratio_control_text_free": ratios("text-free", CONTROL)["median"],
        "floor": statistics.median(r["floor"] for r in results),
        "medians": table,
        "seeds": results,
    }


def one_seed(arguments: argparse.Namespace, seed: int, root: Path) -> dict[str, Any]:
    """Prepare, train and judge one seed."""
    prepared, work = root / f"seed-{seed}" / "prepared", root / f"seed-{seed}" / "work"
    prepare_run(arguments, seed, prepared)
    every = arguments.ddpm_every
    ddpm = {f"expert-{k}" for k in range(arguments.clusters) if every and k % every == every - 1}
    jobs = [
        Job(str(prepared), str(work), network, network in ddpm, arguments.device)
        for network in networks_of(arguments)
    ]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        trained = list(pool.map(train_one, jobs))
    return {**judge(arguments, seed, prepared, work, ddpm), "trained": trained}


def main() -> None:
    """Parse, run every seed, print."""
    keep = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep)
    parser.add_argument("--data", default="digits", help="as for prepare: a folder, tar, parquet, or digits")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--clusters", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100, help="of an expert and of the router")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sampling-steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--feature-steps", type=int, default=300)
    parser.add_argument("--ddpm-every", type=int, default=0, help="every n-th expert learns DDPM's noise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, help="kept; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quality-") as temporary:
        root = arguments.work or Path(temporary)
        results = [one_seed(arguments, seed, root) for seed in arguments.seeds]
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "work"}
    print(json.dumps({"benchmark": "quality", **options, **summary(results)}))


if __name__ == "__main__":
    main()
