"""From captioned images to a run: everything `paris-node prepare` does.

Owns: the order of the stages and what passes between them; the folder DIR: `manifest.paris`, `store/`,
`prepare.json` (report), and `work/` with the finished stages, which only a repeated prepare needs.
Does not own: each stage's work (the other modules here, `components`), the recipe (given by the caller).

The same source, options and identity give the same run id, on the same kind of CPU and library versions.
"""

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from errno import ENOSPC
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from paris_p2p import clock
from paris_p2p.components.image import ImageEncoder
from paris_p2p.components.text import TextEncoder
from paris_p2p.components.tiny_clip import TinyClipConfig, embed_images, reproducible, train_tiny_clip
from paris_p2p.components.tokenizer import Tokenizer
from paris_p2p.data import ingest, shards
from paris_p2p.data.cluster import cluster_features, require_enough
from paris_p2p.data.ingest import Ingested
from paris_p2p.data.sources import Skipped, Source, open_source
from paris_p2p.data.stages import Stages, open_stages
from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.ids import NodeId, RunId
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.durable import disk, write_atomic
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import (
    FORMAT,
    MAX_CLUSTERS,
    Cluster,
    LeaseTimes,
    Manifest,
    Recipe,
    SignedManifest,
    sign_manifest,
)

TINY_LEASE = LeaseTimes(ttl_s=20.0, renew_s=6.0, settle_s=2.0, poll_s=3.0)
STAGES = ("ingest", "clip", "embed", "cluster", "encode", "shards", "manifest")
PIXEL_PRESETS = ("tiny", "small")
MAX_EXAMPLES = 10
MAX_EXAMPLE_CHARACTERS = 200
MAX_NAME_CHARACTERS = 64
_SMALL_SIDE = 16  # pixels; up to here half the steps separate the captions


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """What the organiser chose. None: `clusters` 4 for digits and 8 otherwise; `image_size` the images' own
    when small (`ingest.native_side`); `steps` the preset's; `clip_steps`, the small CLIP's training, by image
    size; `name` the source's. `restricted`: only the organiser, the `claimants` and nodes with a pass may claim
    roles."""

    source: str
    out: Path
    clusters: int | None = None
    preset: str = "tiny"
    image_size: int | None = None
    steps: int | None = None
    clip_steps: int | None = None
    seed: int = 0
    name: str | None = None
    lease: LeaseTimes = TINY_LEASE
    replicas: int = 2
    restricted: bool = False
    claimants: tuple[NodeId, ...] = ()


@dataclass(frozen=True, slots=True)
class StageProgress:
    """How far a stage of `STAGES` is: `done` of `total` (images, steps, shards), None when not known."""

    stage: str
    done: int
    total: int | None


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """One cluster: `images` in all, `heldout_images` of them held out."""

    index: int
    images: int
    heldout_images: int


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What was made. `reused`: the stages found finished; `seconds`: how long each stage took; `initial`: a
    sentence on what each variant of expert starts from, where that is not chance."""

    run_id: RunId
    manifest: Path
    clusters: tuple[ClusterReport, ...]
    skipped: tuple[Skipped, ...]
    reused: tuple[str, ...]
    seconds: dict[str, float]
    initial: tuple[str, ...] = ()


AddInitial = Callable[[Recipe, Path], tuple[str, ...]]
"""Writes the initial weights of the recipe's variant n into the folder `initial-<n>` of the given one, and
returns a sentence on each for people."""


class MakeRecipe(Protocol):
    """`diffusion.recipes.preset`, given from above: `data` must not import `diffusion`."""

    def __call__(
        self,
        name: str,
        *,
        channels: int,
        image_size: int,
        clusters: int,
        tokens: int,
        text_width: int,
        steps: int | None,
        seed: int,
    ) -> Recipe: ...


OnProgress = Callable[[StageProgress], None]


def prepare(
    options: PrepareOptions,
    *,
    identity: Identity,
    make_recipe: MakeRecipe,
    progress: OnProgress,
    add_initial: AddInitial | None = None,
) -> PrepareReport:
    """Make the run in `options.out`, going on where an interrupted prepare of the same stopped.

    `add_initial`: what every expert starts from, instead of random weights of its own.
    Raises `ConfigError` for unusable input, `StoreError` when the disk refuses.
    """
    _check(options)
    source = open_source(options.source)
    with open_stages(options.out) as stages, disk("preparing a run", options.out), _full_disk():
        work = _Preparation(options, source, stages, identity, make_recipe, progress)
        work.add_initial = add_initial
        return work.run()


class _Preparation:
    """One `prepare`: the stages in order."""

    def __init__(
        self,
        options: PrepareOptions,
        source: Source,
        stages: Stages,
        identity: Identity,
        make_recipe: MakeRecipe,
        progress: OnProgress,
    ) -> None:
        self.options = options
        self.source = source
        self.stages = stages
        self.identity = identity
        self.make_recipe = make_recipe
        self.progress = progress
        self.clusters = options.clusters or (4 if source.kind == "digits" else 8)
        self.seconds: dict[str, float] = {}
        self.add_initial: AddInitial | None = None
        self.initial: tuple[str, ...] = ()

    def run(self) -> PrepareReport:
        data = self._ingest()
        side, channels = data.images.shape[1], data.images.shape[3]
        clip = TinyClipConfig(steps=self.options.clip_steps or (100 if side <= _SMALL_SIDE else 200))
        require_enough(len(data.names), self.clusters)
        recipe = self.make_recipe(
            self.options.preset,
            channels=channels,
            image_size=side,
            clusters=self.clusters,
            tokens=clip.context_length,
            text_width=clip.width,
            steps=self.options.steps,
            seed=self.options.seed,
        )
        require_room(self.options.out, _bytes_needed(data, clip))
        towers = self._clip(data, clip)
        labels = self._cluster(data, self._embed(data, towers))
        folder = self._shards(data, labels, self._encode(data, towers, clip))
        return self._manifest(data, recipe, towers, folder)

    def _ingest(self) -> Ingested:
        def make(folder: Path) -> None:
            ingest.ingest(self.source, folder, self.options.image_size, self._counter("ingest"))

        inputs = {"source": self.source.fingerprint, "side": self.options.image_size}
        return ingest.load(self._stage("ingest", (), inputs, make))

    def _clip(self, data: Ingested, config: TinyClipConfig) -> Path:
        """Train the towers. The folder holds `image_encoder`, `text_encoder`, `tokenizer`."""

        def make(folder: Path) -> None:
            report = self._counter("clip")
            clip = train_tiny_clip(
                data.images,
                data.captions,
                config=config,
                seed=self.options.seed,
                progress=lambda step, steps, _: report(step, steps),
            )
            clip.image.save_pretrained(folder / "image_encoder")
            clip.text.save_pretrained(folder / "text_encoder")
            clip.tokenizer.save_pretrained(folder / "tokenizer")

        return self._stage("clip", ("ingest",), {"config": asdict(config), "seed": self.options.seed}, make)

    def _embed(self, data: Ingested, towers: Path) -> NDArray[np.float32]:
        def make(folder: Path) -> None:
            encoder = ImageEncoder.from_pretrained(towers / "image_encoder")
            features = embed_images(encoder, data.images, self._counter("embed"))
            (folder / "features.f32").write_bytes(features.tobytes())

        folder = self._stage("embed", ("clip",), {}, make)
        return np.fromfile(folder / "features.f32", np.float32).reshape(len(data.names), -1)

    def _cluster(self, data: Ingested, features: NDArray[np.float32]) -> NDArray[np.int64]:
        def make(folder: Path) -> None:
            labels = cluster_features(features, self.clusters, self.options.seed)
            (folder / "labels.i64").write_bytes(labels.tobytes())
            self._counter("cluster")(len(labels), len(data.names))

        inputs = {"clusters": self.clusters, "seed": self.options.seed}
        return np.fromfile(self._stage("cluster", ("embed",), inputs, make) / "labels.i64", np.int64)

    def _encode(self, data: Ingested, towers: Path, clip: TinyClipConfig) -> NDArray[np.float32]:
        """The encodings of "" and of all distinct captions in order: (1 + M, T, W), mapped from disk."""

        texts = ["", *sorted(set(data.captions))]

        def make(folder: Path) -> None:
            tokenizer = Tokenizer.from_pretrained(towers / "tokenizer")
            encoder = TextEncoder.from_pretrained(towers / "text_encoder")
            report = self._counter("encode")
            # Not written through a memory map: a disk that fills up under one kills the process (SIGBUS).
            with reproducible(0), (folder / "text.f32").open("wb") as file:
                for start in range(0, len(texts), 256):
                    batch = encoder.encode_in_batches(tokenizer(texts[start : start + 256]))
                    file.write(batch.numpy().tobytes())
                    report(min(start + 256, len(texts)), len(texts))

        folder = self._stage("encode", ("clip",), {}, make)
        flat = np.memmap(folder / "text.f32", np.float32, "r")
        return flat.reshape(len(texts), clip.context_length, clip.width)

    def _shards(self, data: Ingested, labels: NDArray[np.int64], encodings: NDArray[np.float32]) -> Path:
        def make(folder: Path) -> None:
            out = shards.held_out(data.names, labels, self.options.seed)
            report = self._counter("shards")
            column = {caption: index for index, caption in enumerate(sorted(set(data.captions)), 1)}
            for cluster in range(self.clusters):
                for part, held in (("train", False), ("heldout", True)):
                    chosen = np.flatnonzero((labels == cluster) & (out == held))
                    shards.write_shard(
                        folder / _shard_name(cluster, part),
                        cluster,
                        shards.pixel_latents(data.images[chosen]),
                        [data.captions[index] for index in chosen],
                        column,
                        encodings,
                        encodings[0],
                    )
                report(cluster + 1, self.clusters)
            counts = [_counts(labels, out, cluster) for cluster in range(self.clusters)]
            (folder / "counts.json").write_text(json.dumps(counts), encoding="utf-8")

        return self._stage("shards", ("cluster", "encode"), {"seed": self.options.seed}, make)

    def _manifest(self, data: Ingested, recipe: Recipe, towers: Path, folder: Path) -> PrepareReport:
        """Put everything into the store, sign, and report."""
        began = clock.monotonic()
        out = self.options.out
        store = ContentStore(out / "store", clean=True)
        recipe = self._with_initial(store, recipe)
        signed = sign_manifest(
            Manifest(
                format=FORMAT,
                name=self.options.name or _default_name(self.options.source),
                organiser=self.identity.node_id,
                recipe=recipe,
                clusters=self._add_clusters(store, folder),
                components={name: store.add(towers / name) for name in ("text_encoder", "tokenizer")},
                lease=self.options.lease,
                replicas=self.options.replicas,
                example_prompts=example_prompts(data.captions, self.options.seed),
                restricted=self.options.restricted or bool(self.options.claimants),
                claimants=self.options.claimants,
            ),
            self.identity,
        )
        write_atomic(out / "manifest.paris", signed.data)
        _keep_only(store, signed.manifest, store.add(out / "manifest.paris"))
        self.seconds["manifest"] = round(clock.monotonic() - began, 3)
        report = self._report(data, signed)
        write_atomic(out / "prepare.json", _report_json(report))
        return report

    def _with_initial(self, store: ContentStore, recipe: Recipe) -> Recipe:
        """`recipe` with the items its experts start from, if they do not start from random weights."""
        if self.add_initial is None:
            return recipe
        with tempfile.TemporaryDirectory(prefix=".initial-", dir=self.options.out) as scratch:
            self.initial = self.add_initial(recipe, Path(scratch))
            refs = [store.add(Path(scratch) / f"initial-{n}") for n in range(len(recipe.experts))]
        pairs = zip(recipe.experts, refs, strict=True)
        return replace(recipe, experts=tuple(replace(variant, initial=ref) for variant, ref in pairs))

    def _add_clusters(self, store: ContentStore, folder: Path) -> tuple[Cluster, ...]:
        counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
        clusters = []
        for index, (images, heldout_images) in enumerate(counts):
            train, heldout = (store.add(folder / _shard_name(index, part)) for part in ("train", "heldout"))
            clusters.append(Cluster(index, images, heldout_images, train, heldout))
            self._counter("manifest")(index + 1, len(counts))
        return tuple(clusters)

    def _report(self, data: Ingested, signed: SignedManifest) -> PrepareReport:
        return PrepareReport(
            run_id=signed.run_id,
            manifest=self.options.out / "manifest.paris",
            clusters=tuple(
                ClusterReport(one.index, one.images + one.heldout_images, one.heldout_images)
                for one in signed.manifest.clusters
            ),
            skipped=data.skipped,
            reused=tuple(self.stages.reused),
            seconds=self.seconds,
            initial=self.initial,
        )

    def _stage(
        self, name: str, after: tuple[str, ...], inputs: Mapping[str, object], make: Callable[[Path], None]
    ) -> Path:
        began = clock.monotonic()
        folder = self.stages.run(name, after, inputs, make)
        self.seconds[name] = round(clock.monotonic() - began, 3)
        return folder

    def _counter(self, stage: str) -> Callable[[int, int | None], None]:
        return lambda done, total: self.progress(StageProgress(stage, done, total))


def require_room(folder: Path, needed: int) -> None:
    """Raises `StoreError` when fewer than `needed` bytes are free where `folder` is: better now than after
    minutes of work."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"disk full: preparing this run needs about {needed} bytes under {folder}, {needed - free} more "
            "than are free; free some space, or choose another --out"
        )


def example_prompts(captions: Sequence[str], seed: int) -> tuple[str, ...]:
    """At most ten captions to show newcomers: all of them, in order of appearance, when there are no more;
    else the most frequent, equally frequent ones drawn by a hash."""
    counts = Counter(caption for caption in captions if len(caption) <= MAX_EXAMPLE_CHARACTERS)
    if len(counts) <= MAX_EXAMPLES:
        return tuple(counts)

    def rank(caption: str) -> tuple[int, bytes]:
        return -counts[caption], hashlib.sha256(f"{seed}\0{caption}".encode()).digest()

    return tuple(sorted(counts, key=rank)[:MAX_EXAMPLES])


def _check(options: PrepareOptions) -> None:
    """What can be refused before any work."""
    if options.clusters is not None and not 1 <= options.clusters <= MAX_CLUSTERS:
        raise ConfigError(f"{options.clusters} clusters: a run has 1 to {MAX_CLUSTERS}")
    if options.preset not in PIXEL_PRESETS:
        raise ConfigError(
            f"preset {options.preset!r} cannot be prepared; there are: {', '.join(PIXEL_PRESETS)}"
        )
    if any(steps is not None and steps < 1 for steps in (options.steps, options.clip_steps)):
        raise ConfigError("training takes at least 1 step")
    if options.name is not None and not 1 <= len(options.name) <= MAX_NAME_CHARACTERS:
        raise ConfigError(f"a run's name has 1 to {MAX_NAME_CHARACTERS} characters")
    if not 0 <= options.seed < 1 << 32:
        raise ConfigError(f"seed {options.seed} is not in 0 to {(1 << 32) - 1}")


def _default_name(source: str) -> str:
    name = Path(source).expanduser().absolute().name if source != "digits" else source
    return name.split(".")[0][:MAX_NAME_CHARACTERS] or "run"


def _shard_name(cluster: int, part: str) -> str:
    return f"cluster-{cluster:02d}-{part}"


def _counts(labels: NDArray[np.int64], out: NDArray[np.bool_], cluster: int) -> tuple[int, int]:
    """Images to train on, and held out."""
    of_cluster = labels == cluster
    return int((of_cluster & ~out).sum()), int((of_cluster & out).sum())


def _bytes_needed(data: Ingested, clip: TinyClipConfig) -> int:
    """Latents once; caption encodings once for all and at most twice more in the shards; some change."""
    captions = len(set(data.captions)) * clip.context_length * clip.width * 4
    return data.images.size * 4 + 3 * captions + (32 << 20)


def _keep_only(store: ContentStore, manifest: Manifest, own: ContentRef) -> None:
    """Drop what an earlier prepare with other options left: a publisher seeds all that is in the store."""
    wanted = {own.info_hash, *(ref.info_hash for ref in manifest.components.values())}
    wanted |= {one.initial.info_hash for one in manifest.recipe.experts if one.initial is not None}
    for cluster in manifest.clusters:
        wanted |= {cluster.train.info_hash, cluster.heldout.info_hash}
    for ref in store.complete():
        if ref.info_hash not in wanted:
            store.remove(ref.info_hash)


def _report_json(report: PrepareReport) -> bytes:
    plain = {
        "run_id": report.run_id.hex(),
        "clusters": [
            {"id": one.index, "images": one.images, "heldout_images": one.heldout_images}
            for one in report.clusters
        ],
        "skipped": [asdict(one) for one in report.skipped],
        "reused": list(report.reused),
        "seconds": report.seconds,
        "initial": list(report.initial),
    }
    return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def _full_disk() -> Iterator[None]:
    """safetensors reports a full disk as text."""
    try:
        yield
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(ENOSPC, str(error)) from error
        raise
