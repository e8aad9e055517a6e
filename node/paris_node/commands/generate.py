"""`paris-node generate`: draw images with a fetched model. Needs no network."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paris_node.bars import count_bars
from paris_node.sizes import read_bytes
from paris_node.torch_cache import keep_torch_cache
from paris_p2p.diffusion.device_names import check_device_name
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.home import Home

if TYPE_CHECKING:
    from paris_p2p.diffusion.generate import Generated, Progress

_TITLES = {"load": "loading", "sample": "sampling"}


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """The options of `generate`, as given."""

    prompts: tuple[str, ...]
    model: Path | None
    n: int
    seed: int
    steps: int | None
    guidance: float | None
    top_k: int | None
    threshold: float | None
    temperature: float
    scheduler: str | None
    device: str
    dtype: str
    max_memory: str | None
    offload: bool
    out: Path | None
    grid: Path | None
    home: Path | None


def run(request: GenerateRequest, output: Output) -> None:
    """Draw the images and say where they are."""
    check_device_name(request.device)
    max_memory = read_bytes(request.max_memory, "--max-memory")
    home = Home.resolve(request.home)
    model = chosen_model(request.model, home)
    keep_torch_cache(home)
    from paris_p2p.diffusion.generate import Request, generate

    wanted = Request(
        prompts=request.prompts,
        count=request.n,
        seed=request.seed,
        steps=request.steps,
        guidance_scale=request.guidance,
        top_k=request.top_k,
        threshold=request.threshold,
        temperature=request.temperature,
        scheduler=request.scheduler,
        device=request.device,
        dtype=request.dtype,
        max_memory=max_memory,
        offload=request.offload,
    )
    with count_bars(output) as bars:

        def show(state: "Progress") -> None:
            bars.show(_TITLES[state.phase], state.done, state.total)

        made = generate(model, wanted, request.out or Path(), grid_path=request.grid, on_progress=show)
    _say(made, output)


def chosen_model(model: Path | None, home: Home) -> Path:
    """The folder asked for, else the remembered one. Raises `ConfigError` when there is none: before the
    seconds that importing torch takes."""
    chosen = model if model is not None else remembered_model(home)
    if not chosen.is_dir():
        raise ConfigError(
            f"{chosen} is no model folder: run paris-node fetch-model, or name one with --model"
        )
    return chosen


def remembered_model(home: Home) -> Path:
    """The folder `fetch-model` wrote last from this home; `ConfigError` if there is none."""
    remembered = home.context().get("model")
    if remembered is None:
        raise ConfigError("no model was fetched here yet: run paris-node fetch-model, or pass --model DIR")
    return Path(remembered)


def _say(made: "Generated", output: Output) -> None:
    used = ", ".join(f"{name} x{calls}" for name, calls in sorted(made.experts.items()) if calls)
    files = [str(path) for path in made.paths] + ([str(made.grid)] if made.grid else [])
    output.event(
        "image",
        "\n".join(files) + f"\n{len(made.paths)} images in {made.seconds:.1f} s; experts used: {used}",
        paths=[str(path.resolve()) for path in made.paths],
        grid=str(made.grid.resolve()) if made.grid else None,
        seconds=round(made.seconds, 3),
        seed=made.seed,
        experts=made.experts,
    )
