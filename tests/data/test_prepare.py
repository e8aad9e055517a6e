"""`data.prepare`: from a folder of pictures to a signed run, resumable and repeatable."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import SafetensorError, safe_open

from paris_p2p.components.text import TextEncoder
from paris_p2p.components.tokenizer import Tokenizer
from paris_p2p.data import prepare as module
from paris_p2p.data import shards
from paris_p2p.data.prepare import PrepareOptions, PrepareReport, StageProgress, example_prompts, prepare
from paris_p2p.diffusion.recipes import preset
from paris_p2p.diffusion.shards import load_shard
from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.ids import ROUTER, Role
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import Recipe, check_manifest

ORGANISER = Identity(bytes(32))
MakeFolder = Callable[[int], Path]


def run(options: PrepareOptions, progress: Callable[[StageProgress], None] = lambda _: None) -> PrepareReport:
    return prepare(options, identity=ORGANISER, make_recipe=preset, progress=progress)


class Prepared(NamedTuple):
    options: PrepareOptions
    report: PrepareReport


@pytest.fixture
def options(tmp_path: Path, image_folder: MakeFolder) -> PrepareOptions:
    """40 pictures, one of them broken; training as short as can be."""
    folder = image_folder(40)
    (folder / "039.png").write_bytes(b"broken")
    return PrepareOptions(str(folder), tmp_path / "run", clusters=2, steps=5, clip_steps=5)


@pytest.fixture
def prepared(options: PrepareOptions) -> Prepared:
    return Prepared(options, run(options))


def test_a_prepared_run_is_signed_complete_and_readable(prepared: Prepared) -> None:
    options, report = prepared
    manifest = check_manifest((options.out / "manifest.paris").read_bytes(), report.run_id).manifest
    store = ContentStore(options.out / "store")
    assert manifest.name == "pictures" and set(manifest.components) == {"text_encoder", "tokenizer"}
    assert len(store.complete()) == 2 * 2 + 2 + 1  # shards, components, the manifest itself
    assert sum(cluster.images for cluster in report.clusters) == 39
    for cluster in manifest.clusters:
        for ref, images in ((cluster.train, cluster.images), (cluster.heldout, cluster.heldout_images)):
            shard = load_shard(store.files(ref.info_hash), manifest.recipe, cluster.index)
            assert len(shard) == images >= 1
    assert [one.name for one in report.skipped] == ["039.png"]
    assert set(manifest.example_prompts) == {
        f"a {colour} square" for colour in ("red", "green", "blue", "black")
    }


def test_the_components_encode_captions_as_the_shards_do(prepared: Prepared) -> None:
    options, _ = prepared
    manifest = check_manifest((options.out / "manifest.paris").read_bytes()).manifest
    store = ContentStore(options.out / "store")
    folders = {name: store.files(ref.info_hash) for name, ref in manifest.components.items()}
    tokenizer, encoder = (
        Tokenizer.from_pretrained(folders["tokenizer"]),
        TextEncoder.from_pretrained(folders["text_encoder"]),
    )
    shard_file = store.files(manifest.clusters[0].train.info_hash) / shards.FILE_NAME
    with safe_open(shard_file, framework="pt") as shard:
        captions = json.loads(shard.get_tensor("caption_texts").numpy().tobytes())
        expected = {
            **dict(zip(captions, shard.get_tensor("captions"), strict=True)),
            "": shard.get_tensor("uncond"),
        }
    for caption, encoding in expected.items():
        torch.testing.assert_close(
            encoder.encode_in_batches(tokenizer([caption]))[0], encoding, atol=1e-5, rtol=1e-5
        )


def test_the_report_is_written_beside_the_manifest(prepared: Prepared) -> None:
    options, report = prepared
    written = json.loads((options.out / "prepare.json").read_text())
    assert written["run_id"] == report.run_id.hex()
    assert [one["images"] for one in written["clusters"]] == [one.images for one in report.clusters]
    assert written["skipped"][0]["name"] == "039.png" and set(written["seconds"]) == set(module.STAGES)


def test_the_same_input_gives_the_same_run_and_another_seed_another(
    prepared: Prepared, tmp_path: Path
) -> None:
    options, report = prepared
    assert run(replace(options, out=tmp_path / "again")).run_id == report.run_id
    assert run(replace(options, out=tmp_path / "other", seed=1)).run_id != report.run_id


def test_preparing_again_reuses_everything(prepared: Prepared) -> None:
    again = run(prepared.options)
    assert again.run_id == prepared.report.run_id
    assert again.reused == ("ingest", "clip", "embed", "cluster", "cards", "encode", "shards")


@pytest.mark.parametrize("stage", ["clip", "shards"])
def test_an_interrupted_prepare_goes_on_and_ends_the_same(
    options: PrepareOptions, tmp_path: Path, stage: str
) -> None:
    def interrupt(progress: StageProgress) -> None:
        if progress.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(options, interrupt)
    report = run(options)
    assert report.reused == module.STAGES[: module.STAGES.index(stage)]
    assert report.run_id == run(replace(options, out=tmp_path / "unbroken")).run_id


def test_changed_options_redo_what_depends_on_them_and_drop_the_old_items(prepared: Prepared) -> None:
    changed = run(replace(prepared.options, clusters=3))
    assert changed.run_id != prepared.report.run_id and len(changed.clusters) == 3
    assert changed.reused == ("ingest", "clip", "embed", "encode")
    assert len(ContentStore(prepared.options.out / "store").complete()) == 2 * 3 + 2 + 1


def test_a_changed_source_is_read_again(prepared: Prepared) -> None:
    shutil.copy(Path(prepared.options.source) / "000.png", Path(prepared.options.source) / "039.png")
    report = run(prepared.options)
    assert report.reused == () and report.skipped == ()


def test_progress_names_the_stages_in_order(options: PrepareOptions) -> None:
    seen: list[StageProgress] = []
    run(options, seen.append)
    assert tuple(dict.fromkeys(one.stage for one in seen)) == module.STAGES
    assert all(one.total is None or one.done <= one.total for one in seen)


def test_more_clusters_than_images_is_refused_before_the_training(options: PrepareOptions) -> None:
    seen: list[StageProgress] = []
    with pytest.raises(ConfigError, match="more clusters than images"):
        prepare(replace(options, clusters=21), identity=ORGANISER, make_recipe=preset, progress=seen.append)
    assert {one.stage for one in seen} == {"ingest"}


@pytest.mark.parametrize(
    "change",
    [
        {"clusters": 0},
        {"preset": "xxl"},
        {"steps": 0},
        {"clip_steps": 0},
        {"name": ""},
        {"seed": -1},
        {"source": "nowhere"},
    ],
)
def test_unusable_options_are_refused_before_anything_is_written(
    options: PrepareOptions, change: dict[str, object]
) -> None:
    with pytest.raises(ConfigError):
        run(replace(options, **change))  # type: ignore[arg-type]
    assert not options.out.exists()


def test_too_little_room_is_said_before_the_work(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(StoreError, match=r"disk full: .* bytes under .*run"):
        run(options)


def test_a_disk_that_fills_up_on_the_way_is_the_operators_matter(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:  # as safetensors words it
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "write_shard", full)
    with pytest.raises(StoreError, match=r"disk full while preparing a run: .*free some space"):
        run(options)


def test_example_prompts_are_all_captions_when_few_and_the_most_frequent_when_many() -> None:
    assert example_prompts(["b", "a", "b", "x" * 300], 0) == ("b", "a")
    many = [f"caption {index}" for index in range(30)]
    chosen = example_prompts([*many, "caption 7"], 0)
    assert len(chosen) == 10 and chosen[0] == "caption 7"
    assert chosen == example_prompts([*many, "caption 7"], 0)


def test_initial_weights_become_items_of_the_run(options: PrepareOptions) -> None:
    def add(recipe: Recipe, folder: Path) -> tuple[str, ...]:
        for number in range(len(recipe.experts)):
            (folder / f"initial-{number}").mkdir()
            (folder / f"initial-{number}" / "weights").write_bytes(b"the same start")
        return ("all of it from elsewhere",)

    report = prepare(
        options, identity=ORGANISER, make_recipe=preset, progress=lambda _: None, add_initial=add
    )
    assert report.initial == ("all of it from elsewhere",)
    manifest = check_manifest(report.manifest.read_bytes()).manifest
    (ref,) = manifest.initial(Role("expert-1"))
    assert manifest.initial(ROUTER) == ()
    assert ref is not None
    store = ContentStore(options.out / "store")
    assert (store.files(ref.info_hash) / "weights").read_bytes() == b"the same start"


def test_an_expert_s_kind_may_be_chosen_and_is_then_no_other_s(prepared: Prepared) -> None:
    options = replace(prepared.options, variant_of=((1, "tiny:ddpm"),), variants=("tiny-published",))
    make_recipe = partial(preset, variants=options.kinds)
    report = prepare(options, identity=ORGANISER, make_recipe=make_recipe, progress=lambda _: None)
    manifest = check_manifest(report.manifest.read_bytes()).manifest
    names = [one.name for one in manifest.recipe.experts]
    assert names == ["tiny", "tiny-published", "tiny:ddpm"]
    assert [manifest.variants(role) for role in manifest.roles] == [(0, 1), (2,), (0,)]
    assert [one.variants for one in report.clusters] == [("tiny", "tiny-published"), ("tiny:ddpm",)]
    assert "Its expert is tiny:ddpm." in (options.out / "cards" / "index.md").read_text()
    with pytest.raises(ConfigError, match="expert-0 to expert-1"):
        run(replace(options, variant_of=((2, "tiny:ddpm"),)))
