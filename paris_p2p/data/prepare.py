"""From captioned images to a run: everything `paris-node prepare` does.

Owns: the order of the stages and what passes between them; the folder DIR: `manifest.paris`, `store/`,
`prepare.json` (report), `cards/` (what each cluster is like), `parts/` (`parts`), and `work/` with the
finished stages, which only a repeated prepare needs.
Does not own: each stage's work (the other modules here, `components`), the recipe (given by the caller).

The same source, options and identity give the same run id, on the same kind of CPU and library versions.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_p2p import clock
from paris_p2p.components.image import ImageEncoder
from paris_p2p.components.text import TextEncoder
from paris_p2p.components.tiny_clip import TinyClipConfig, embed_images, reproducible, train_tiny_clip
from paris_p2p.components.tokenizer import Tokenizer
from paris_p2p.data import cards, ingest, items, parts, shards
from paris_p2p.data.blocks import Encoders
from paris_p2p.data.cluster import Rows, coarse_clusters, fine_clusters, require_enough
from paris_p2p.data.duplicates import listed, near_duplicates
from paris_p2p.data.ingest import Ingested
from paris_p2p.data.options import (
    AddInitial,
    MakeRecipe,
    OnProgress,
    PrepareOptions,
    StageProgress,
    allowed_variants,
    check_options,
    check_recipe,
    check_variant_of,
    default_name,
    latents_of,
    load_encoders,
)
from paris_p2p.data.parts import COMPONENTS_NAME, Part, PartReport, Share
from paris_p2p.data.report import ClusterReport, Duplicates, PrepareReport, example_prompts, report_json
from paris_p2p.data.room import bytes_needed, full_disk, require_room
from paris_p2p.data.sources import Source, open_source
from paris_p2p.data.stages import Stages, open_stages
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.durable import disk, write_atomic
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import (
    FORMAT,
    Latents,
    Manifest,
    Recipe,
    SignedManifest,
    sign_manifest,
)

__all__ = [
    "STAGES",
    "AddInitial",
    "MakeRecipe",
    "PrepareOptions",
    "PrepareReport",
    "StageProgress",
    "example_prompts",
    "merge",
    "prepare",
    "prepare_part",
]

STAGES = ("ingest", "clip", "embed", "cluster", "cards", "encode", "shards", "manifest")
COMPONENTS = ("text_encoder", "tokenizer", "vae")
_SMALL_SIDE = 16  # pixels; up to here half the steps separate the captions


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
    check_options(options)
    source = open_source(options.source)
    with open_stages(options.out) as stages, disk("preparing a run", options.out), full_disk():
        work = _Preparation(options, stages, identity, make_recipe, progress)
        work.add_initial = add_initial
        encoders = load_encoders(options)
        if options.side is not None or encoders.vae is None:
            side = options.side or ingest.MAX_NATIVE_SIDE
            check_recipe(options, make_recipe, side, latents_of(encoders.vae, side))
        return work.run(lambda: work.read(source, encoders), _kept(options, source, encoders))


def prepare_part(
    options: PrepareOptions, share: Share, *, make_recipe: MakeRecipe, progress: OnProgress
) -> PartReport:
    """Read and encode the part `share` into `options.out`/parts/I-of-N, going on where it stopped.

    Raises as `prepare` does.
    """
    check_options(options)
    source = open_source(options.source)
    folder = options.out / "parts" / share.name
    with disk("preparing a part of a run", options.out), full_disk(), _steady(options):
        encoders = load_encoders(options)
        side = ingest.checked_side(source, options.side)
        check_recipe(options, make_recipe, side, latents_of(encoders.vae, side))
        kept = _kept(options, source, encoders)

        def report(done: int, total: int | None) -> None:
            progress(StageProgress("ingest", done, total))

        return parts.write_part(source, folder, share, side, encoders, kept, report)


def merge(
    options: PrepareOptions,
    folders: Sequence[Path],
    *,
    identity: Identity,
    make_recipe: MakeRecipe,
    progress: OnProgress,
    add_initial: AddInitial | None = None,
) -> PrepareReport:
    """Make the run in `options.out` of the parts in `folders`: bit for bit what one `prepare` makes.

    The parts say what `options.source`, `preset` and the encoders were. Raises as `prepare` does.
    """
    found = parts.find_parts(folders)
    kept = found[0].key
    options = replace(options, preset=str(kept["preset"]))
    check_options(options)
    with open_stages(options.out) as stages, disk("merging a run", options.out), full_disk():
        work = _Preparation(options, stages, identity, make_recipe, progress)
        work.add_initial = add_initial
        side = int(kept["side"])
        check_recipe(options, make_recipe, side, _first_latents(found, side, kept["vae_scale"]))
        return work.run(lambda: work.join(found), kept)


def _kept(options: PrepareOptions, source: Source, encoders: Encoders) -> dict[str, Any]:
    """What a merge must know beside the samples."""
    vae = encoders.vae
    return {
        "preset": options.preset,
        "name": default_name(options.source),
        "kind": source.kind,
        "captions_from": source.captions_from,
        "vae_scale": None if vae is None else [vae.scale, vae.shift],
    }


def _first_latents(found: Sequence[Part], side: int, scale: Sequence[float] | None) -> Latents | None:
    """The latents that the first block of the parts holds, if the run has a VAE's."""
    first = next(parts.walk(found), None)
    if first is None or "latents" not in first.tensors or scale is None:
        return None
    return _latents(first.tensors["latents"].shape[1:], side, scale)


def _latents(shape: Sequence[int], side: int, scale: Sequence[float]) -> Latents:
    """A VAE's, of `shape` (C, S, S)."""
    return Latents("vae", shape[0], shape[1], side, scale=scale[0], shift=scale[1])


def _steady(options: PrepareOptions) -> Any:
    """On CPU: results that do not depend on the number of cores. A GPU's kernels are steady in themselves."""
    return reproducible(0) if options.device == "cpu" else nullcontext()


class _Preparation:
    """One `prepare` or `merge`: the stages in order."""

    def __init__(
        self,
        options: PrepareOptions,
        stages: Stages,
        identity: Identity,
        make_recipe: MakeRecipe,
        progress: OnProgress,
    ) -> None:
        self.options = options
        self.stages = stages
        self.identity = identity
        self.make_recipe = make_recipe
        self.progress = progress
        self.clusters = 0
        self.seconds: dict[str, float] = {}
        self.add_initial: AddInitial | None = None
        self.initial: tuple[str, ...] = ()

    def run(self, read: Callable[[], Path], kept: Mapping[str, Any]) -> PrepareReport:
        """All stages. `read` is the first one's; `kept` as of `_kept`."""
        self.clusters = self.options.clusters or (4 if kept["kind"] == "digits" else 8)
        check_variant_of(self.options, self.clusters)
        folder = read()
        data = ingest.load(folder)
        clip = TinyClipConfig(steps=self.options.clip_steps or (100 if data.side <= _SMALL_SIDE else 200))
        require_enough(len(data.names), self.clusters)
        recipe = self._recipe(data, clip, kept["vae_scale"])
        require_room(self.options.out, bytes_needed(data, clip))
        towers = self._clip(data, clip)
        self._embed(data, towers)
        clustered = self._cluster(data, self._features(data))
        made = self._cards(data, self._features(data), clustered, self._kinds(recipe))
        sharded = self._shards(data, clustered.labels, *self._encode(data, towers, clip))
        places = {name: folder / COMPONENTS_NAME / name for name in COMPONENTS}
        either = {name: place if place.is_dir() else towers / name for name, place in places.items()}
        found = {name: item for name, item in either.items() if item.is_dir()}
        name = self.options.name or str(kept["name"])
        return self._manifest(data, recipe, name, found, sharded, clustered, made)

    def read(self, source: Source, encoders: Encoders) -> Path:
        """Stage `ingest` of a source."""

        def make(folder: Path) -> None:
            scratch = self.options.out / "parts" / "whole"
            side = ingest.checked_side(source, self.options.side)
            check_recipe(self.options, self.make_recipe, side, latents_of(encoders.vae, side))
            with _steady(self.options):
                ingest.ingest(source, folder, side, self._counter("ingest"), encoders, scratch)

        inputs = {
            "source": source.fingerprint,
            "side": self.options.side,
            "format": ingest.FORMAT,
            **encoders.identity(),
        }
        return self._stage("ingest", (), inputs, make)

    def join(self, found: Sequence[Part]) -> Path:
        """Stage `ingest` of finished parts."""

        def make(folder: Path) -> None:
            ingest.collect(found, folder, str(found[0].key["captions_from"]), self._counter("ingest"))

        blocks = sorted(digest for part in found for digest in part.blocks.values())
        return self._stage("ingest", (), {"parts": found[0].key, "blocks": blocks}, make)

    def _recipe(self, data: Ingested, clip: TinyClipConfig, vae_scale: Sequence[float] | None) -> Recipe:
        latents = None
        if data.latents is not None and vae_scale is not None:
            latents = _latents(data.latents.shape[1:], data.side, vae_scale)
        tokens, width = data.text.shape[1:] if data.text is not None else (clip.context_length, clip.width)
        return self.make_recipe(
            self.options.preset,
            channels=data.images.shape[3],
            image_size=data.side,
            clusters=self.clusters,
            tokens=tokens,
            text_width=width,
            steps=self.options.steps,
            seed=self.options.seed,
            latents=latents,
        )

    def _kinds(self, recipe: Recipe) -> dict[int, tuple[str, ...]]:
        """For each expert that may not be of every kind of the recipe the kinds that it may be."""
        allowed = {n: allowed_variants(self.options, recipe, n) for n in range(self.clusters)}
        return {n: tuple(recipe.experts[k].name for k in some) for n, some in allowed.items() if some}

    def _clip(self, data: Ingested, config: TinyClipConfig) -> Path:
        """Train the towers that no pretrained one stands in for. The folder holds `image_encoder`,
        `text_encoder`, `tokenizer`."""

        def make(folder: Path) -> None:
            if data.features is not None and data.text is not None:
                return
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

    def _embed(self, data: Ingested, towers: Path) -> None:
        def make(folder: Path) -> None:
            if data.features is None:
                encoder = ImageEncoder.from_pretrained(towers / "image_encoder")
                features = embed_images(encoder, data.images, self._counter("embed"))
                (folder / "features.f32").write_bytes(features.tobytes())

        self._stage("embed", ("clip",), {}, make)

    def _features(self, data: Ingested) -> NDArray[np.float32]:
        """(N, W), mapped from disk."""
        if data.features is not None:
            return data.features
        path = self.options.out / "work" / "embed" / "features.f32"
        return np.memmap(path, np.float32, "r").reshape(len(data.names), -1)

    def _cluster(self, data: Ingested, features: NDArray[np.float32]) -> "_Clustered":
        def make(folder: Path) -> None:
            count = self._counter("cluster")
            fine = fine_clusters(features, self.clusters, self.options.seed)
            repeats = near_duplicates(fine)
            keep = repeats < 0 if self.options.drop_duplicates else None
            labels = coarse_clusters(
                fine, self.clusters, self.options.seed, keep=keep, balanced=self.options.balanced
            )
            (folder / "labels.i64").write_bytes(labels.tobytes())
            (folder / "repeats.i64").write_bytes(repeats.tobytes())
            (folder / "scale.f32").write_bytes(fine.rows.mean.tobytes() + fine.rows.deviation.tobytes())
            count(len(labels), len(data.names))

        inputs = {
            "clusters": self.clusters,
            "seed": self.options.seed,
            "balanced": self.options.balanced,
            "drop": self.options.drop_duplicates,
        }
        folder = self._stage("cluster", ("embed",), inputs, make)
        mean, deviation = np.fromfile(folder / "scale.f32", np.float32).reshape(2, -1)
        labels, repeats = (np.fromfile(folder / f"{name}.i64", np.int64) for name in ("labels", "repeats"))
        return _Clustered(labels, repeats, mean, deviation)

    def _cards(
        self,
        data: Ingested,
        features: NDArray[np.float32],
        clustered: "_Clustered",
        kinds: Mapping[int, tuple[str, ...]],
    ) -> list[tuple[str, ...]]:
        """Write DIR/cards. Returns each cluster's words."""

        def make(folder: Path) -> None:
            rows = Rows(features, clustered.mean, clustered.deviation)
            made = cards.make_cards(rows, clustered.labels, data.captions, self.clusters)
            cards.write_cards(folder, made, data.images, data.names, kinds)
            (folder / "words.json").write_text(json.dumps([one.words for one in made]), encoding="utf-8")
            self._counter("cards")(len(made), len(made))

        folder = self._stage("cards", ("cluster",), {"kinds": sorted(kinds.items())}, make)
        shutil.rmtree(self.options.out / "cards", ignore_errors=True)
        shutil.copytree(folder, self.options.out / "cards", ignore=shutil.ignore_patterns("words.json"))
        return [tuple(words) for words in json.loads((folder / "words.json").read_text(encoding="utf-8"))]

    def _encode(
        self, data: Ingested, towers: Path, clip: TinyClipConfig
    ) -> tuple[shards.Floats, dict[str, int]]:
        """The encodings of "" and of all distinct captions, (1 + M, T, W), mapped; each one's row."""
        texts = ["", *sorted(set(data.captions))]

        def make(folder: Path) -> None:
            if data.text is not None:
                return
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
        if data.text is not None and data.text_rows is not None:
            return data.text, data.text_rows
        flat = np.memmap(folder / "text.f32", np.float32, "r")
        rows = {text: row for row, text in enumerate(texts)}
        return flat.reshape(len(texts), clip.context_length, clip.width), rows

    def _shards(
        self,
        data: Ingested,
        labels: NDArray[np.int64],
        encodings: shards.Floats,
        text_rows: dict[str, int],
    ) -> Path:
        def make(folder: Path) -> None:
            out = shards.held_out(data.names, labels, self.options.seed)
            report = self._counter("shards")
            for cluster in range(self.clusters):
                for part, held in zip(items.PARTS, (False, True), strict=True):
                    chosen = np.flatnonzero((labels == cluster) & (out == held))
                    shards.write_shard(
                        folder / items.shard_name(cluster, part),
                        cluster,
                        shards.pick_latents(data.latents, data.images, chosen),
                        [data.captions[index] for index in chosen],
                        text_rows,
                        encodings,
                        encodings[text_rows[""]],
                    )
                report(cluster + 1, self.clusters)
            counts = [_counts(labels, out, cluster) for cluster in range(self.clusters)]
            (folder / items.COUNTS_NAME).write_text(json.dumps(counts), encoding="utf-8")

        return self._stage("shards", ("cluster", "encode"), {"seed": self.options.seed}, make)

    def _manifest(
        self,
        data: Ingested,
        recipe: Recipe,
        name: str,
        components: Mapping[str, Path],
        folder: Path,
        clustered: "_Clustered",
        words: Sequence[tuple[str, ...]],
    ) -> PrepareReport:
        """Put everything into the store, sign, and report."""
        began = clock.monotonic()
        out = self.options.out
        store = ContentStore(out / "store", clean=True)
        recipe, self.initial = items.with_initial(store, recipe, self.add_initial, out)
        signed = sign_manifest(
            Manifest(
                format=FORMAT,
                name=name,
                organiser=self.identity.node_id,
                recipe=recipe,
                clusters=items.add_clusters(
                    store,
                    folder,
                    lambda cluster: allowed_variants(self.options, recipe, cluster),
                    self._counter("manifest"),
                ),
                components={name: store.add(place) for name, place in components.items()},
                lease=self.options.lease_times,
                replicas=self.options.replicas,
                example_prompts=example_prompts(data.captions, self.options.seed),
                restricted=self.options.restricted or bool(self.options.claimants),
                claimants=self.options.claimants,
            ),
            self.identity,
        )
        write_atomic(out / "manifest.paris", signed.data)
        items.keep_only(store, signed.manifest, store.add(out / "manifest.paris"))
        self.seconds["manifest"] = round(clock.monotonic() - began, 3)
        report = self._report(data, signed, clustered, words)
        write_atomic(out / "prepare.json", report_json(report))
        return report

    def _report(
        self,
        data: Ingested,
        signed: SignedManifest,
        clustered: "_Clustered",
        words: Sequence[tuple[str, ...]],
    ) -> PrepareReport:
        repeats = clustered.repeats
        groups = tuple(listed(repeats, data.names))
        kinds = self._kinds(signed.manifest.recipe)
        return PrepareReport(
            run_id=signed.run_id,
            manifest=self.options.out / "manifest.paris",
            clusters=tuple(
                ClusterReport(
                    one.index,
                    one.images + one.heldout_images,
                    one.heldout_images,
                    words[one.index],
                    kinds.get(one.index, ()),
                )
                for one in signed.manifest.clusters
            ),
            skipped=data.skipped,
            reused=tuple(self.stages.reused),
            seconds=self.seconds,
            duplicates=Duplicates(int((repeats >= 0).sum()), self.options.drop_duplicates, groups),
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


@dataclass(frozen=True, slots=True)
class _Clustered:
    """Each image's cluster (-1: dropped), which image it repeats (-1: none), how features are compared."""

    labels: NDArray[np.int64]
    repeats: NDArray[np.int64]
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]


def _counts(labels: NDArray[np.int64], out: NDArray[np.bool_], cluster: int) -> tuple[int, int]:
    """Images to train on, and held out."""
    of_cluster = labels == cluster
    return int((of_cluster & ~out).sum()), int((of_cluster & out).sum())
