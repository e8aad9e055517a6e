"""`paris-node prepare` and `prepare-merge`: make a run out of captioned images, or a part, or of parts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from paris_node.torch_cache import keep_torch_cache
from paris_p2p.data.sources import open_source
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import node_id_from_peer_id

if TYPE_CHECKING:
    from paris_p2p.data.options import PrepareOptions, StageProgress
    from paris_p2p.data.parts import PartReport
    from paris_p2p.data.report import PrepareReport
    from paris_p2p.ids import NodeId

_TITLES = {
    "ingest": "reading images",
    "clip": "training the encoders",
    "embed": "embedding images",
    "cluster": "clustering",
    "cards": "drawing the cluster cards",
    "encode": "encoding captions",
    "shards": "writing shards",
    "manifest": "signing the manifest",
}
SHOWN_SKIPPED = 10


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """The options of `prepare` and `prepare-merge`, as given. `shard`: only that part; `parts`: the folders
    to merge, instead of a source."""

    source: str
    out: Path
    clusters: int | None = None
    preset: str = "tiny"
    image_size: int | None = None
    steps: int | None = None
    seed: int = 0
    name: str | None = None
    home: Path | None = None
    restricted: bool = False
    allow: tuple[str, ...] = ()
    init_from: Path | None = None
    variants: tuple[str, ...] = ()
    variant_of: tuple[str, ...] = ()
    router_text: bool = True
    image_encoder: str | None = None
    text_encoder: str | None = None
    vae: str | None = None
    device: str = "auto"
    shard: str | None = None
    balanced: bool = False
    drop_duplicates: bool = False
    parts: tuple[Path, ...] = ()


def run(request: PrepareRequest, output: Output) -> None:
    """Prepare the run, or its part, and say what came of it."""
    if not request.parts:
        open_source(request.source)  # a mistyped source is said at once, not after seconds of imports
    claimants = tuple(dict.fromkeys(node_id_from_peer_id(text) for text in request.allow))
    home = Home.resolve(request.home)
    keep_torch_cache(home)
    from paris_p2p.data.parts import parse_share
    from paris_p2p.data.prepare import merge, prepare, prepare_part
    from paris_p2p.diffusion.initial import add_initial
    from paris_p2p.diffusion.recipes import preset

    share = None if request.shard is None else parse_share(request.shard)
    source = request.init_from
    initial = partial(add_initial, source, request.seed) if source is not None else None
    options = _options(request, claimants)
    make_recipe = partial(preset, variants=options.kinds, router_text=request.router_text)
    with _bars(output) as show:
        if share is not None:
            _say_part(prepare_part(options, share, progress=show), request, output)
            return
        identity = home.identity()
        make = partial(merge, options, request.parts) if request.parts else partial(prepare, options)
        report = make(identity=identity, make_recipe=make_recipe, progress=show, add_initial=initial)
    _say(report, request.out, output)


def _options(request: PrepareRequest, claimants: "tuple[NodeId, ...]") -> "PrepareOptions":
    from paris_p2p.data.options import PrepareOptions
    from paris_p2p.diffusion.devices import pick_device

    return PrepareOptions(
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
        image_encoder=request.image_encoder,
        text_encoder=request.text_encoder,
        vae=request.vae,
        device=pick_device(request.device),
        balanced=request.balanced,
        drop_duplicates=request.drop_duplicates,
        variants=request.variants,
        variant_of=tuple(map(_assignment, request.variant_of)),
    )


def _assignment(text: str) -> tuple[int, str]:
    """`expert-3=small:ddpm` as (3, "small:ddpm"). Raises `ConfigError`."""
    role, equals, kind = text.partition("=")
    number = role.removeprefix("expert-")
    if equals and kind and number != role and number.isascii() and number.isdigit():
        return int(number), kind
    raise ConfigError(f"--variant-of {text!r}: write ROLE=KIND, for example expert-3=small:ddpm")


@contextmanager
def _bars(output: Output) -> "Iterator[Callable[[StageProgress], None]]":
    """A progress bar for each stage, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=output.as_json) as progress:
        bars: dict[str, TaskID] = {}

        def show(state: "StageProgress") -> None:
            if state.stage not in bars:
                for earlier in progress.tasks:  # one of unknown length is over when the next begins
                    progress.update(earlier.id, total=earlier.completed)
                bars[state.stage] = progress.add_task(_TITLES[state.stage], total=state.total)
            progress.update(bars[state.stage], completed=state.done, total=state.total)

        yield show


def _say_part(report: "PartReport", request: PrepareRequest, output: Output) -> None:
    output.event(
        "prepared_part",
        f"part {request.shard}: {report.images} images, {report.skipped} skipped, in {report.folder}\n"
        f"next, when all parts are there: paris-node prepare-merge {request.out} (and the other parts' "
        "--out, where that is another folder)",
        shard=request.shard,
        images=report.images,
        skipped=report.skipped,
        blocks=report.blocks,
        reused=report.reused,
        path=str(report.folder.resolve()),
    )


def _say(report: "PrepareReport", out: Path, output: Output) -> None:
    lines = [f"skipped {skipped.name}: {skipped.reason}" for skipped in report.skipped[:SHOWN_SKIPPED]]
    if len(report.skipped) > SHOWN_SKIPPED:
        lines.append(f"… {len(report.skipped)} skipped in all: {out / 'prepare.json'} lists them")
    found = report.duplicates
    if found.images:
        fate = "left out" if found.dropped else "kept; --drop-duplicates leaves them out"
        lines.append(f"{found.images} near-duplicates, {fate}: {out / 'prepare.json'} lists them")
    lines += report.initial
    lines += [f"expert-{one.index} is {' or '.join(one.variants)}" for one in report.clusters if one.variants]
    sizes = ", ".join(str(cluster.images) for cluster in report.clusters)
    lines += [
        f"run {report.run_id.hex()[:12]}: {len(report.clusters)} clusters of {sizes} images",
        f"look at the clusters: {out / 'cards' / 'index.md'}",
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
        duplicates=report.duplicates.images,
        skipped=len(report.skipped),
        skipped_files=[{"name": one.name, "reason": one.reason} for one in report.skipped],
        path=str(out.resolve()),
    )
