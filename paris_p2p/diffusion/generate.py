"""Generating pictures from a model folder: what `paris-node generate` does.

Owns: loading what is needed, sampling, PNG files with their parameters inside. Needs no network.
Does not own: options, progress bars.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from paris_p2p import clock
from paris_p2p.diffusion.devices import pick_device
from paris_p2p.diffusion.grid import grid
from paris_p2p.diffusion.pipeline import ParisPipeline
from paris_p2p.errors import ConfigError, StoreError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL_PARAMETERS = 20_000_000
MAX_STEM = 48
"""Characters of a prompt that go into a file's name."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate: `count` images a prompt. `None`: the model's default (seed: a random one).

    `threshold`, `temperature`: `sampling.Routing`. `dtype`: of `DTYPES`. `max_memory`: bytes of weights held
    at once, `offload`: in main memory else (`ParisPipeline.from_pretrained`).
    """

    prompts: tuple[str, ...]
    count: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    top_k: int | None = None
    threshold: float | None = None
    temperature: float = 1.0
    scheduler: str | None = None
    device: str = "auto"
    dtype: str = "fp32"
    max_memory: int | None = None
    offload: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """`phase` is `load` (`item`: the part) or `sample` (`item` empty); `done` of `total`.

    An expert is loaded when it first gets weight: `load` goes on, with a larger `total`, while sampling."""

    phase: str
    done: int
    total: int
    item: str = ""


@dataclass(frozen=True, slots=True)
class Generated:
    """`paths`: the images in order; `grid`: the sheet of all, if several. `seconds`: of sampling, with the
    loading of the experts it needed. `experts`: samples each expert there is computed."""

    paths: tuple[Path, ...]
    grid: Path | None
    seconds: float
    seed: int
    experts: dict[str, int]


OnProgress = Callable[[Progress], None]


def generate(
    model: Path,
    request: Request,
    out: Path,
    *,
    grid_path: Path | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Generated:
    """Load what is needed of the model in folder `model`, make the pictures, write them as PNGs.

    `out` is a folder, or a `.png` file for exactly one image. With more than one image a grid is written as
    well, a row a prompt, to `grid_path` or into `out`. Raises `ConfigError`, `StoreError`.
    """
    if _is_file(out) and len(request.prompts) * request.count != 1:
        raise ConfigError(
            f"{out} is one file, and several images are asked for: give a folder with --out, and --grid for "
            "one file with all of them"
        )
    pipe = load(model, request, on_progress)
    started = clock.monotonic()
    images = pipe(
        list(request.prompts),
        num_images_per_prompt=request.count,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        top_k=request.top_k,
        threshold=request.threshold,
        temperature=request.temperature,
        seed=request.seed,
        scheduler=request.scheduler,
        on_step=lambda done, total: on_progress(Progress("sample", done, total)),
    ).images
    seconds = clock.monotonic() - started
    paths, sheet = _save(pipe, request, images, out, grid_path)
    return Generated(paths, sheet, seconds, pipe.seed_used or 0, pipe.experts_used)


def load(model: Path, request: Request, on_progress: OnProgress = lambda _: None) -> ParisPipeline:
    """The pipeline in folder `model` as `request` wants it, experts not loaded yet. Raises `ConfigError`."""
    wanted = pick_device(request.device)
    if request.dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {request.dtype!r}; there are: {', '.join(DTYPES)}")
    pipe = ParisPipeline.from_pretrained(
        model,
        on_part=lambda done, total, name: on_progress(Progress("load", done, total, name)),
        lazy_experts=True,
        torch_dtype=DTYPES[request.dtype],
        max_memory=request.max_memory,
        offload=request.offload,
    )
    pipe.to(wanted)
    if torch.device(wanted).type == "cpu":
        _spare_threads(model, pipe.present)
    return pipe


def _spare_threads(model: Path, experts: Iterable[int]) -> None:
    """One thread for small networks: their operations are shorter than handing them out takes, and on a busy
    machine several threads wait for each other (8 digits: 28 s with two threads, 1.7 s with one)."""
    if all(_parameters(model / f"expert_{cluster}") < SMALL_PARAMETERS for cluster in experts):
        torch.set_num_threads(1)


def _parameters(folder: Path) -> int:
    """About how many parameters the network in `folder` has, by the size of its F32 weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 4


def parameters(pipe: ParisPipeline, request: Request, prompt: str, seed: int) -> dict[str, Any]:
    """What made an image, for its metadata: everything needed to make it again."""
    defaults = pipe.config["sampling"]
    return {
        "prompt": prompt,
        "seed": seed,
        "steps": defaults["steps"] if request.steps is None else request.steps,
        "guidance": defaults["guidance_scale"] if request.guidance_scale is None else request.guidance_scale,
        **asdict(pipe.routing(request.top_k, request.threshold, request.temperature)),
        "dtype": request.dtype,
        "scheduler": request.scheduler or defaults["scheduler"],
        "run_id": pipe.config["run_id"],
        "experts": pipe.experts_used,
        "missing": pipe.config["missing"],
    }


def _save(
    pipe: ParisPipeline, request: Request, images: list[Image.Image], out: Path, grid_path: Path | None
) -> tuple[tuple[Path, ...], Path | None]:
    seed = pipe.seed_used or 0
    paths = []
    try:
        folder = out.parent if _is_file(out) else out
        folder.mkdir(parents=True, exist_ok=True)
        for place, image in enumerate(images):
            prompt, number = request.prompts[place // request.count], seed + place % request.count
            name = out.name if _is_file(out) else f"{place // request.count:02d}-{_stem(prompt)}-{number}.png"
            path = folder / name
            image.save(path, pnginfo=_metadata(parameters(pipe, request, prompt, number)))
            paths.append(path)
        if len(images) == 1 and grid_path is None:
            return tuple(paths), None
        sheet = grid_path if grid_path is not None else folder / f"grid-{seed}.png"
        sheet.parent.mkdir(parents=True, exist_ok=True)
        first = parameters(pipe, request, " | ".join(request.prompts), seed)
        grid(images, request.count, request.prompts).save(sheet, pnginfo=_metadata(first))
    except OSError as error:
        raise StoreError(f"the images cannot be written to {out}: {error}") from None
    return tuple(paths), sheet


def _is_file(out: Path) -> bool:
    """Whether `out` names one image, and no folder."""
    return out.suffix.lower() == ".png" and not out.is_dir()


def _metadata(values: dict[str, Any]) -> PngInfo:
    """One text chunk a parameter; what is no text is JSON."""
    info = PngInfo()
    for name, value in values.items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    return info


def _stem(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:MAX_STEM].rstrip("-") or "image"
