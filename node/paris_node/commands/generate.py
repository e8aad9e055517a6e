"""`paris-node generate`: draw images with a fetched model. Needs no network."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from paris_node.torch_cache import keep_torch_cache
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.home import Home

if TYPE_CHECKING:
    from paris_p2p.diffusion.generate import Generated, Progress

_BYTES = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?) ?([KMGT]?)(i?)B?", re.IGNORECASE)
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
    home = Home.resolve(request.home)
    model = request.model if request.model is not None else remembered_model(home)
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
        max_memory=parse_bytes(request.max_memory) if request.max_memory is not None else None,
        offload=request.offload,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), disable=output.as_json) as bars:
        shown: dict[str, TaskID] = {}

        def show(state: "Progress") -> None:
            if state.phase not in shown:
                shown[state.phase] = bars.add_task(_TITLES[state.phase], total=state.total)
            bars.update(shown[state.phase], completed=state.done, total=state.total)

        made = generate(model, wanted, request.out or Path(), grid_path=request.grid, on_progress=show)
    _say(made, output)


def parse_bytes(text: str) -> int:
    """`2000000000`, `2GB`, `1.5 GiB`, `800M` as bytes. Raises `ConfigError`."""
    found = _BYTES.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"{text!r} is no amount of memory: write, for example, 2GB or 800MiB")
    step = 1024 if found[3] else 1000
    power = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
    return int(float(found[1]) * step**power)


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
