"""Tests of `paris_node.commands.train_monolithic`, on a prepared folder made by hand."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from paris_node.commands.train_monolithic import MonolithicRequest, run, variant_number
from paris_p2p.diffusion.initial import write_initial
from paris_p2p.diffusion.pipeline import ParisPipeline
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.manifest import Cluster, SignedManifest, sign_manifest

from .conftest import CLUSTERS, ORGANISER, toy_manifest, toy_recipe, toy_shard, write_shard


def prepared(root: Path, components: dict[str, Path]) -> SignedManifest:
    """A folder as `paris-node prepare` leaves it."""
    store = ContentStore(root / "store")
    made = []
    for index in range(CLUSTERS):
        shard = store.add(write_shard(root / f"cluster-{index}", toy_shard(index)), mode="copy")
        made.append(Cluster(index, 20, 20, shard, shard))
    recipe = toy_recipe(steps=6, interval=3)
    manifest = dataclasses.replace(
        toy_manifest(recipe).manifest,
        clusters=tuple(made),
        components={name: store.add(path, mode="copy") for name, path in components.items()},
    )
    signed = sign_manifest(manifest, ORGANISER)
    (root / "manifest.paris").write_bytes(signed.data)
    return signed


def request(root: Path, **changes: object) -> MonolithicRequest:
    plain = MonolithicRequest(root, root / "model", None, "0", "cpu", 1, root / "home")
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_the_baseline_is_trained_on_all_data_and_draws(
    tmp_path: Path, make_components: Callable[[], dict[str, Path]]
) -> None:
    signed = prepared(tmp_path, make_components())
    said = io.StringIO()
    run(request(tmp_path), Output(as_json=True, stdout=said))
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    assert events[0] == {"event": "training", "images": 40, "total_steps": 6, "batch_size": 16}
    assert events[-1]["event"] == "trained"
    assert events[-1]["samples"] == 96
    summary = json.loads((tmp_path / "model" / "paris.json").read_text())
    assert summary["missing"] == ["router"]
    assert summary["run_id"] == signed.run_id.hex()
    assert len(ParisPipeline.from_pretrained(tmp_path / "model")("seven", num_inference_steps=2).images) == 1
    assert not list(tmp_path.glob(".model*"))


def test_a_start_keeps_its_rate_and_says_how_a_run_goes_on_from_it(
    tmp_path: Path, make_components: Callable[[], dict[str, Path]]
) -> None:
    prepared(tmp_path, make_components())
    with pytest.raises(ConfigError, match="leave --batch-size out"):
        run(request(tmp_path, start=0.5, batch_size=4), Output(as_json=True, stdout=io.StringIO()))
    said = io.StringIO()
    run(request(tmp_path, start=0.5), Output(as_json=False, stdout=said))
    assert "6 steps of 8" in said.getvalue()
    expert = tmp_path / "model" / "expert_0"
    assert f"--init-from {expert} --init-share 0.5" in said.getvalue()
    made = write_initial(toy_recipe().experts[0].architecture, 0, expert, tmp_path / "item")
    assert (made.taken, made.fresh) == (made.parameters, ())


def test_a_variant_that_the_recipe_lacks_and_data_that_is_gone_are_named(
    tmp_path: Path, make_components: Callable[[], dict[str, Path]]
) -> None:
    signed = prepared(tmp_path, make_components())
    with pytest.raises(ConfigError, match="--variant 1: the run's experts may be 0 or "):
        run(request(tmp_path, variant="1"), Output(as_json=True, stdout=io.StringIO()))
    ContentStore(tmp_path / "store").remove(signed.manifest.clusters[1].train.info_hash)
    with pytest.raises(ConfigError, match="run prepare again"):
        run(request(tmp_path), Output(as_json=True, stdout=io.StringIO()))


def test_another_interrupted_training_and_a_folder_of_something_else_are_refused_first(
    tmp_path: Path, make_components: Callable[[], dict[str, Path]]
) -> None:
    prepared(tmp_path, make_components())
    quiet = Output(as_json=True, stdout=io.StringIO())
    with pytest.raises(ConfigError, match="not a model"):
        run(request(tmp_path, out=tmp_path / "store"), quiet)
    left = tmp_path / ".model.training"
    left.mkdir()
    (left / "of.txt").write_text("run 00, variant 0, 6 x 16\n")
    with pytest.raises(ConfigError, match="other options"):
        run(request(tmp_path), quiet)


def test_a_variant_is_chosen_by_name_or_number() -> None:
    recipe = toy_recipe()
    one = recipe.experts[0]
    both = dataclasses.replace(recipe, experts=(one, dataclasses.replace(one, name="small:ddpm")))
    assert [variant_number(both, text) for text in ("0", "1", one.name, "small:ddpm")] == [0, 1, 0, 1]
    for text in ("2", "-1", "", "ddpm", "\N{SUPERSCRIPT ONE}", "9" * 5000):
        with pytest.raises(ConfigError, match="1 or small:ddpm"):
            variant_number(both, text)
