"""`paris-node evaluate`: judge models against the images of a prepared run. Needs no network."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paris_node.bars import Bars, count_bars
from paris_node.commands.publish import load_prepared, prepared_item
from paris_node.torch_cache import keep_torch_cache
from paris_p2p.diffusion.device_names import check_device_name
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.home import Home
from paris_p2p.wire.manifest import SignedManifest

if TYPE_CHECKING:
    from paris_p2p.diffusion.evaluation import Asked, Contender, RealImages, Score
    from paris_p2p.diffusion.features import FeatureNetwork
    from paris_p2p.diffusion.pipeline import ParisPipeline

ROUTINGS = {"top1": 1, "top2": 2, "full": 0}
LEAST_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class EvaluateRequest:
    """The options of `evaluate`, as given. `routing`: names of `ROUTINGS`, or `topN`. `real_samples`: the
    most real images to compare with."""

    folder: Path
    models: tuple[Path, ...]
    out: Path
    samples: int
    steps: int | None
    guidance_scale: float | None
    routing: tuple[str, ...]
    features: str
    seed: int
    device: str
    threads: int | None
    home: Path | None
    real_samples: int | None = None


def run(request: EvaluateRequest, output: Output) -> None:
    """Evaluate every model, with every routing where it has several experts, and write the report."""
    routings = [_top_k(name) for name in request.routing]
    if request.samples < LEAST_SAMPLES:
        raise ConfigError(f"--samples {request.samples}: a distance needs {LEAST_SAMPLES} images at least")
    check_device_name(request.device)
    signed = load_prepared(request.folder)
    keep_torch_cache(Home.resolve(request.home))
    from paris_p2p.diffusion import evaluation

    models = _load_models(request)
    asked = _asked(request, signed)
    with count_bars(output) as bars:
        real = _real(request, signed, next(iter(models.values())))
        network = _features(request, signed, real, bars, output)
        real_features = network.embed(real.images)
        scores, grids = [], {"real": evaluation.picture_grid(real.images)}
        for contender in _contenders(models, routings):
            score, images = evaluation.evaluate(
                contender,
                real,
                real_features,
                network,
                asked,
                lambda done, total, name=contender.name: bars.show(name, done, total),  # type: ignore[misc]
            )
            scores.append(score)
            grids[contender.name] = evaluation.picture_grid(images)
            _tell(score, output)
    report = evaluation.Report(
        signed.manifest.name,
        network.name,
        network.accuracy,
        len(real),
        evaluation.floor(real_features, request.samples, request.seed),
        asked,
        tuple(scores),
    )
    evaluation.write_report(report, grids, request.out)
    output.event("report", f"{report.as_markdown()}\nreport and grids: {request.out}", path=str(request.out))


def _load_models(request: EvaluateRequest) -> "dict[Path, ParisPipeline]":
    import torch

    from paris_p2p.diffusion.devices import pick_device
    from paris_p2p.diffusion.pipeline import ParisPipeline

    if request.threads is not None:
        torch.set_num_threads(max(1, request.threads))
    device = pick_device(request.device)
    return {path: ParisPipeline.from_pretrained(path).to(device) for path in request.models}


def _asked(request: EvaluateRequest, signed: SignedManifest) -> "Asked":
    """What every model is asked for: the run's own settings where no other ones are given."""
    from paris_p2p.diffusion.evaluation import Asked

    defaults = signed.manifest.recipe.sampling
    return Asked(
        request.samples,
        defaults.steps if request.steps is None else request.steps,
        defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        request.seed,
    )


def _tell(score: "Score", output: Output) -> None:
    output.event(
        "evaluated",
        model=score.name,
        frechet_distance=score.frechet_distance,
        precision=score.precision,
        recall=score.recall,
        fidelity=score.fidelity,
        seconds=score.seconds,
    )


def _top_k(name: str) -> int:
    if name in ROUTINGS:
        return ROUTINGS[name]
    if re.fullmatch(r"top[1-9][0-9]{0,3}", name):
        return int(name[3:])
    raise ConfigError(f"--routing {name!r}: top1, top2, topN or full")


def _contenders(models: "dict[Path, ParisPipeline]", routings: list[int]) -> "Iterator[Contender]":
    from paris_p2p.diffusion.evaluation import Contender

    names = _names(list(models))
    for path, pipeline in models.items():
        if len(pipeline.present) == 1:
            yield Contender(names[path], pipeline, top_k=1)
            continue
        for top_k in routings:
            yield Contender(f"{names[path]} {f'top-{top_k}' if top_k else 'full'}", pipeline, top_k=top_k)


def _names(paths: list[Path]) -> dict[Path, str]:
    """Folder names, or whole paths where two folders have the same name."""
    short = [path.resolve().name for path in paths]
    if len(set(short)) == len(short):
        return dict(zip(paths, short, strict=True))
    return {path: str(path) for path in paths}


def _real(request: EvaluateRequest, signed: SignedManifest, pipeline: "ParisPipeline") -> "RealImages":
    """The images of the run, held-out ones too, as the experts' data holds them."""
    import torch

    from paris_p2p.diffusion.evaluation import real_images
    from paris_p2p.diffusion.shards import load_shard

    manifest, store = signed.manifest, ContentStore(request.folder / "store")
    most, seed = request.real_samples, request.seed
    shards = []
    for cluster in manifest.clusters:
        for ref in (cluster.train, cluster.heldout):
            folder = prepared_item(store, ref)
            shards.append((folder, load_shard(folder, manifest.recipe, cluster.index)))
    if manifest.recipe.latents.space == "pixel":
        return real_images(shards, None, most, seed)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        pictures: torch.Tensor = pipeline.decoded(latents, "pt")
        return pictures.float().cpu() * 2 - 1

    return real_images(shards, decode, most, seed)


def _features(
    request: EvaluateRequest, signed: SignedManifest, real: "RealImages", bars: Bars, output: Output
) -> "FeatureNetwork":
    """The network asked for. One trained here is kept in the report's folder, for the next evaluation."""
    from paris_p2p.diffusion import features
    from paris_p2p.diffusion.devices import pick_device

    if request.features != "trained":
        return features.named_features(request.features, pick_device(request.device))
    folder = request.out / "features"
    of = f"run {signed.run_id.hex()}, seed {request.seed}"
    kept = features.kept_features(folder, of)
    if kept is not None:
        output.event("features", f"feature network: the one in {folder}", path=str(folder))
        return kept
    labels, names, _ = features.label_images(real.captions, real.clusters)
    return features.train_features(
        real.images,
        labels,
        names,
        folder,
        seed=request.seed,
        of=of,
        progress=lambda done, total: bars.show("training the feature network", done, total),
    )
