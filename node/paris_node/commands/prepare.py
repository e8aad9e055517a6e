"""`paris-node prepare`: make a run out of captioned images."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from paris_node.torch_cache import keep_torch_cache
from paris_p2p.data.sources import open_source
from paris_p2p.programs import Output
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import node_id_from_peer_id

if TYPE_CHECKING:
    from paris_p2p.data.prepare import PrepareReport, StageProgress

_TITLES = {
    "ingest": "reading images",
    "clip": "training the encoders",
    "embed": "embedding images",
    "cluster": "clustering",
    "encode": "encoding captions",
    "shards": "writing shards",
    "manifest": "signing the manifest",
}
SHOWN_SKIPPED = 10


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """The options of `prepare`, as given."""

    source: str
    out: Path
    clusters: int | None
    preset: str
    image_size: int | None
    steps: int | None
    seed: int
    name: str | None
    home: Path | None
    restricted: bool = False
    allow: tuple[str, ...] = ()
    init_from: Path | None = None
    variants: tuple[str, ...] = ()
    router_text: bool = True


def run(request: PrepareRequest, output: Output) -> None:
    """Prepare the run and say what came of it."""
    open_source(request.source)  # a mistyped source is said at once, not after seconds of imports
    claimants = tuple(dict.fromkeys(node_id_from_peer_id(text) for text in request.allow))
    home = Home.resolve(request.home)
    keep_torch_cache(home)
    from paris_p2p.data.prepare import PrepareOptions, prepare
    from paris_p2p.diffusion.initial import add_initial
    from paris_p2p.diffusion.recipes import preset

    source = request.init_from
    initial = partial(add_initial, source, request.seed) if source is not None else None
    options = PrepareOptions(
        source=request.source,
        out=request.out,
        clusters=request.clusters,
        preset=request.preset,
        image_size=request.image_size,
        steps=request.steps,
        seed=request.seed,
        name=request.name,
        restricted=request.restricted,
        claimants=claimants,
    )
    identity = home.identity()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=output.as_json) as progress:
        bars: dict[str, TaskID] = {}

        def show(state: "StageProgress") -> None:
            if state.stage not in bars:
                bars[state.stage] = progress.add_task(_TITLES[state.stage], total=state.total)
            progress.update(bars[state.stage], completed=state.done, total=state.total)

        make_recipe = partial(preset, variants=request.variants, router_text=request.router_text)
        report = prepare(
            options, identity=identity, make_recipe=make_recipe, progress=show, add_initial=initial
        )
    _say(report, request.out, output)


def _say(report: "PrepareReport", out: Path, output: Output) -> None:
    lines = [f"skipped {skipped.name}: {skipped.reason}" for skipped in report.skipped[:SHOWN_SKIPPED]]
    if len(report.skipped) > SHOWN_SKIPPED:
        lines.append(f"… {len(report.skipped)} skipped in all: {out / 'prepare.json'} lists them")
    lines += report.initial
    sizes = ", ".join(str(cluster.images) for cluster in report.clusters)
    lines += [
        f"run {report.run_id.hex()[:12]}: {len(report.clusters)} clusters of {sizes} images",
        f"next: paris-node publish {out} --bootstrap ADDR",
    ]
    output.event(
        "prepared",
        "\n".join(lines),
        run_id=report.run_id.hex(),
        clusters=[
            {"id": cluster.index, "images": cluster.images, "heldout_images": cluster.heldout_images}
            for cluster in report.clusters
        ],
        initial=list(report.initial),
        skipped=len(report.skipped),
        skipped_files=[{"name": one.name, "reason": one.reason} for one in report.skipped],
        path=str(out.resolve()),
    )
