"""Judging models against the real images of a prepared run: distances, coverage, prompt fidelity, a report.

Owns: which real images and prompts, the evaluation of one pipeline, JSON, Markdown and PNG of the result.
Does not own: features (`features`), formulas (`metrics`), sampling (`pipeline`).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from paris_p2p import clock
from paris_p2p.diffusion.features import FeatureNetwork
from paris_p2p.diffusion.grid import grid
from paris_p2p.diffusion.metrics import frechet_distance, precision_recall
from paris_p2p.diffusion.pipeline import ParisPipeline
from paris_p2p.diffusion.seeds import stream
from paris_p2p.diffusion.shards import Shard, caption_texts
from paris_p2p.errors import ConfigError
from paris_p2p.store.durable import disk

MANIFOLD_IMAGES = 5000
"""Precision and recall compare every pair; more images than this add minutes and little else."""
GRID_IMAGES = 64


@dataclass(frozen=True, slots=True, eq=False)
class RealImages:
    """images: (N, C, S, S) in [-1, 1]; captions and clusters: one each. `kinds`: what each image is of, one
    each, where captions say more than that (names of things, say); empty: its caption."""

    images: Tensor
    captions: tuple[str, ...]
    clusters: tuple[int, ...]
    kinds: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True)
class Asked:
    """How every model is sampled. `samples` images, their prompts drawn from the real captions."""

    samples: int
    steps: int
    guidance_scale: float
    seed: int
    batch_size: int = 250


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the report: a pipeline and how it routes (`top_k`: 0 is all experts)."""

    name: str
    pipeline: ParisPipeline
    top_k: int | None = None
    threshold: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Score:
    """What came of one contender. `fidelity`: the share of images that the feature network reads as what the
    prompt asked for; None when it does not know such labels."""

    name: str
    frechet_distance: float
    precision: float
    recall: float
    fidelity: float | None
    seconds: float


def real_images(
    shards: Sequence[tuple[Path, Shard]],
    decode: Callable[[Tensor], Tensor] | None,
    most: int | None = None,
    seed: int = 0,
) -> RealImages:
    """The images of a run's shards (folder and contents). `decode`: latents (N, C, S, S) to images, for runs
    with a VAE. `most`: take this many of them by chance, where there are more; they are all held in memory.
    Raises `ConfigError` for a shard without its captions' texts."""
    taken = _taken([len(shard) for _, shard in shards], most, seed)
    images: list[Tensor] = []
    captions: list[str] = []
    clusters: list[int] = []
    for (folder, shard), rows in zip(shards, taken, strict=True):
        if len(rows) == 0:
            continue
        texts = _texts(folder, len(shard.captions))
        captions += [texts[index] for index in shard.caption_index[rows].tolist()]
        clusters += [shard.cluster] * len(rows)
        latents = shard.latents[rows].to(torch.float32)
        images.append(latents if decode is None else torch.cat([decode(p) for p in torch.split(latents, 16)]))
    return RealImages(torch.cat(images), tuple(captions), tuple(clusters))


def _taken(lengths: Sequence[int], most: int | None, seed: int) -> list[Tensor]:
    """The rising rows to take of shards that are so long: all, or `most` of them all together."""
    total = sum(lengths)
    if most is None or most >= total:
        return [torch.arange(length) for length in lengths]
    chosen = torch.randperm(total, generator=stream(seed, "evaluation", "real"))[:most].sort().values
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    return [
        chosen[(chosen >= start) & (chosen < end)] - start for start, end in zip(starts, ends, strict=True)
    ]


def _texts(folder: Path, count: int) -> list[str]:
    texts = caption_texts(folder)
    if len(texts) != count:
        raise ConfigError(f"the shard in {folder} does not name its captions: run prepare again")
    return texts


def prompts_for(real: RealImages, asked: Asked) -> list[str]:
    """The captions of randomly drawn real images, so that prompts are as frequent as in the data."""
    return [real.captions[index] for index in drawn(real, asked)]


def drawn(real: RealImages, asked: Asked) -> list[int]:
    """Which real images lend their captions as prompts."""
    generator = stream(asked.seed, "evaluation", "prompts")
    indices: list[int] = torch.randint(len(real), (asked.samples,), generator=generator).tolist()
    return indices


def generate(
    contender: Contender, prompts: Sequence[str], asked: Asked, progress: Callable[[int, int], None]
) -> Tensor:
    """One image a prompt: (N, C, S, S) in [-1, 1]. Each starts from noise of its own, the same for every
    contender."""
    made: list[Tensor] = []
    for start in range(0, len(prompts), asked.batch_size):
        batch = list(prompts[start : start + asked.batch_size])
        made.append(_batch(contender, batch, asked, start))
        progress(start + len(batch), len(prompts))
    return torch.cat(made)


def _batch(contender: Contender, prompts: list[str], asked: Asked, start: int) -> Tensor:
    pictures: Tensor = contender.pipeline(
        prompts,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        top_k=contender.top_k,
        threshold=contender.threshold,
        temperature=contender.temperature,
        latents=_noise(contender.pipeline, asked.seed, start, len(prompts)),
        output_type="pt",
    ).images
    return pictures.float().cpu() * 2 - 1


def _noise(pipeline: ParisPipeline, seed: int, start: int, count: int) -> Tensor:
    """The noise of images `start` and on: one stream an image, so that no two are alike."""
    latents = pipeline.config["latents"]
    shape = (latents["channels"], latents["size"], latents["size"])
    rows = [
        torch.randn(shape, generator=stream(seed, "evaluation", "noise", start + i)) for i in range(count)
    ]
    return torch.stack(rows)


def evaluate(
    contender: Contender,
    real: RealImages,
    real_features: NDArray[np.float64],
    network: FeatureNetwork,
    asked: Asked,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Score, Tensor]:
    """The score of one contender, and the images it is of."""
    began = clock.monotonic()
    prompts = prompts_for(real, asked)
    images = generate(contender, prompts, asked, progress)
    features = network.embed(images)
    few = np.random.default_rng(asked.seed)
    precision, recall = precision_recall(
        _some(real_features, MANIFOLD_IMAGES, few), _some(features, MANIFOLD_IMAGES, few)
    )
    score = Score(
        contender.name,
        frechet_distance(real_features, features),
        precision,
        recall,
        _fidelity(network, images, [(real.kinds or real.captions)[index] for index in drawn(real, asked)]),
        round(clock.monotonic() - began, 1),
    )
    return score, images


def _some(rows: NDArray[np.float64], most: int, rng: np.random.Generator) -> NDArray[np.float64]:
    return rows if len(rows) <= most else rows[rng.choice(len(rows), most, replace=False)]


def _fidelity(network: FeatureNetwork, images: Tensor, wanted: Sequence[str]) -> float | None:
    if network.classify is None or not set(wanted) <= set(network.labels):
        return None
    read = network.classify(images)
    return float(np.mean([network.labels[label] == kind for label, kind in zip(read, wanted, strict=True)]))


def floor(real_features: NDArray[np.float64], samples: int, seed: int) -> float:
    """The distance of `samples` real images to the others: what no model can be expected to beat."""
    order = np.random.default_rng(seed).permutation(len(real_features))
    some = min(samples, len(order) // 2)
    return frechet_distance(real_features[order[some:]], real_features[order[:some]])


@dataclass(frozen=True, slots=True)
class Report:
    """A whole evaluation: against `real_images` images, `floor` being the distance of real ones to others."""

    run: str
    features: str
    feature_accuracy: float | None
    real_images: int
    floor: float
    asked: Asked
    scores: tuple[Score, ...]

    def as_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def as_markdown(self) -> str:
        """The report as a table for people, best distance first."""
        lines = [
            f"# Evaluation of {self.run}",
            "",
            f"{self.asked.samples} images each ({self.asked.steps} steps, "
            f"guidance {self.asked.guidance_scale:g}, seed {self.asked.seed}) against {self.real_images} "
            f"real ones; features: {self.features}"
            + ("" if self.feature_accuracy is None else f" (accuracy {self.feature_accuracy:.3f})")
            + f"; real against real: {self.floor:.2f}.",
            "",
            "| model | Frechet distance | precision | recall | prompt fidelity |",
            "| --- | --- | --- | --- | --- |",
        ]
        for score in sorted(self.scores, key=lambda score: score.frechet_distance):
            fidelity = "-" if score.fidelity is None else f"{score.fidelity:.3f}"
            lines.append(
                f"| {score.name} | {score.frechet_distance:.2f} | {score.precision:.3f} | "
                f"{score.recall:.3f} | {fidelity} |"
            )
        if any(score.fidelity is None for score in self.scores):
            lines += ["", "No prompt fidelity: the feature network does not know the prompts as labels."]
        return "\n".join(lines) + "\n"


def picture_grid(images: Tensor) -> Image.Image:
    """The first images of (N, C, S, S) in [-1, 1], eight a row."""
    pixels = ((images[:GRID_IMAGES].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)  # (n, C, S, S)
    rows = pixels.permute(0, 2, 3, 1).numpy()  # (n, S, S, C)
    return grid([Image.fromarray(row.squeeze(-1) if row.shape[-1] == 1 else row) for row in rows], 8)


def write_report(report: Report, grids: Mapping[str, Image.Image], folder: Path) -> None:
    """`report.json`, `report.md` and one `grid-<name>.png` each into `folder`, making it. `StoreError`."""
    with disk("writing the report", folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(report.as_json(), encoding="utf-8")
        (folder / "report.md").write_text(report.as_markdown(), encoding="utf-8")
        for name, sheet in grids.items():
            sheet.save(folder / f"grid-{re.sub('[^A-Za-z0-9.-]+', '-', name).strip('-')}.png")
