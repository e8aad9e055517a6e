"""`paris-node prepare` and `prepare-merge`: make a run out of captioned images, or a part, or of parts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paris_node.bars import count_bars
from paris_node.text import counted
from paris_node.torch_cache import keep_torch_cache
from paris_p2p.data.sources import open_source
from paris_p2p.diffusion.device_names import check_device_name
from paris_p2p.errors import ConfigError
from paris_p2p.ids import ROUTER
from paris_p2p.programs import Output
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import node_id_from_peer_id

if TYPE_CHECKING:
    from paris_p2p.data.options import PrepareOptions, StageProgress
    from paris_p2p.data.parts import PartReport
    from paris_p2p.data.report import PrepareReport
    from paris_p2p.ids import NodeId
    from paris_p2p.wire.manifest import Recipe

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
_OF_MERGE = {
    "clusters": "--clusters",
    "variants": "--variant",
    "variant_of": "--variant-of",
    "router_text": "--published-router",
    "init_from": "--init-from",
    "init_share": "--init-share",
    "steps": "--steps",
    "seed": "--seed",
    "name": "--name",
    "balanced": "--balanced",
    "drop_duplicates": "--drop-duplicates",
    "allow": "--allow",
    "restricted": "--restricted",
    "short_lease": "--short-lease",
}
"""What `prepare --shard` has no use for: `prepare-merge` takes it."""


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
    init_share: float | None = None
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
    short_lease: bool = False


def run(request: PrepareRequest, output: Output) -> None:
    """Prepare the run, or its part, and say what came of it."""
    if request.shard is not None:
        _check_shard(request)
    if request.init_share is not None and request.init_from is None:
        raise ConfigError("--init-share is the share of the samples that --init-from has seen: name it too")
    if not request.parts:
        open_source(request.source)  # a mistyped source is said at once, not after seconds of imports
    check_device_name(request.device)
    claimants = tuple(dict.fromkeys(node_id_from_peer_id(text) for text in request.allow))
    home = Home.resolve(request.home)
    keep_torch_cache(home)
    from paris_p2p.data.parts import parse_share
    from paris_p2p.data.prepare import merge, prepare, prepare_part
    from paris_p2p.diffusion.initial import add_initial, source_file
    from paris_p2p.diffusion.recipes import check_kinds, preset

    share = None if request.shard is None else parse_share(request.shard)
    source = request.init_from
    if source is not None:
        source_file(source)  # that there is one; read at the very end
    initial = partial(add_initial, source, request.seed) if source is not None else None
    options = _options(request, claimants)
    check_kinds(options.kinds)
    make_recipe = partial(
        _made, partial(preset, variants=options.kinds, router_text=request.router_text), request.init_share
    )
    with count_bars(output) as bars:

        def show(state: "StageProgress") -> None:
            bars.show(_TITLES[state.stage], state.done, state.total)

        if share is not None:
            _say_part(prepare_part(options, share, make_recipe=make_recipe, progress=show), request, output)
            return
        identity = home.identity()
        make = partial(merge, options, request.parts) if request.parts else partial(prepare, options)
        report = make(identity=identity, make_recipe=make_recipe, progress=show, add_initial=initial)
    _say(report, request.out, home, output)


def _check_shard(request: PrepareRequest) -> None:
    """Refuse what a part cannot heed: its reader would think it is done. Raises `ConfigError`."""
    fresh = PrepareRequest(request.source, request.out)
    given = [option for name, option in _OF_MERGE.items() if getattr(request, name) != getattr(fresh, name)]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: with --shard images are only read and encoded. Leave it out here, and give "
            "it to `paris-node prepare-merge` when all parts are there"
        )


def _made(make: "Callable[..., Recipe]", share: float | None, name: str, **sizes: Any) -> "Recipe":
    """A preset's recipe; of experts whose start has seen `share` of the samples, what is left to do."""
    from paris_p2p.diffusion.start import after_start

    recipe = make(name, **sizes)
    return recipe if share is None else after_start(recipe, share)


def _options(request: PrepareRequest, claimants: "tuple[NodeId, ...]") -> "PrepareOptions":
    from paris_p2p.data.options import SHORT_LEASE, PrepareOptions
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
        lease=SHORT_LEASE if request.short_lease else None,
    )


def _assignment(text: str) -> tuple[int, str]:
    """`expert-3=small:ddpm` as (3, "small:ddpm"). Raises `ConfigError`."""
    role, equals, kind = text.partition("=")
    number = role.removeprefix("expert-")
    if equals and kind and number != role and number.isascii() and number.isdigit():
        return int(number), kind
    raise ConfigError(f"--variant-of {text!r}: write ROLE=KIND, for example expert-3=small:ddpm")


def _decided(path: Path) -> str:
    """What was chosen where no option said it, of the manifest in the file `path`."""
    from paris_node.run_node import run_items
    from paris_p2p.wire.manifest import check_manifest

    manifest = check_manifest(path.read_bytes()).manifest
    latents, kinds = manifest.recipe.latents, "/".join(kind.name for kind in manifest.recipe.experts)
    experts = [manifest.training(role).steps for role in manifest.roles if role != ROUTER]
    size = sum(ref.length for ref in set(run_items(manifest))) / 1e6
    return (
        f"chosen: images of {latents.image_size} px, experts of kind {kinds}, "
        f"{len(experts)} x {max(experts)} steps and a router of {manifest.training(ROUTER).steps}, "
        f"a checkpoint every {manifest.recipe.checkpoint_interval_steps}; {size:.1f} MB to publish"
    )


def _say_part(report: "PartReport", request: PrepareRequest, output: Output) -> None:
    output.event(
        "prepared_part",
        f"part {request.shard}: {counted(report.images, 'image')}, {report.skipped} skipped, in "
        f"{report.folder}\n"
        f"next, when all parts are there: paris-node prepare-merge {request.out} (and the other parts' "
        "--out, where that is another folder)",
        shard=request.shard,
        images=report.images,
        skipped=report.skipped,
        blocks=report.blocks,
        reused=report.reused,
        path=str(report.folder.resolve()),
    )


def _say(report: "PrepareReport", out: Path, home: Home, output: Output) -> None:
    lines = [f"skipped {skipped.name}: {skipped.reason}" for skipped in report.skipped[:SHOWN_SKIPPED]]
    if len(report.skipped) > SHOWN_SKIPPED:
        lines.append(f"… {len(report.skipped)} skipped in all: {out / 'prepare.json'} lists them")
    found = report.duplicates
    if found.images:
        fate = "left out" if found.dropped else "kept; --drop-duplicates leaves them out"
        lines.append(f"{counted(found.images, 'near-duplicate')}, {fate}: {out / 'prepare.json'} lists them")
    lines += report.initial
    lines += [f"expert-{one.index} is {' or '.join(one.variants)}" for one in report.clusters if one.variants]
    sizes = ", ".join(str(cluster.images) for cluster in report.clusters)
    lines += [
        f"run {report.run_id.hex()[:12]}: {len(report.clusters)} clusters of {sizes} images",
        _decided(report.manifest),
        f"only the key {home.path / 'identity.key'} can publish it as its organiser: keep a copy",
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
