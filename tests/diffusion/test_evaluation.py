"""Tests of `paris_p2p.diffusion.evaluation`, `features` and the command `evaluate`, on toy models."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from paris_node.commands import evaluate as command
from paris_node.commands import train_monolithic
from paris_p2p.components.image import ImageEncoder
from paris_p2p.diffusion import evaluation, features
from paris_p2p.diffusion.evaluation import Asked, RealImages, Report, Score
from paris_p2p.diffusion.features import TrainingConfig, label_images, load_features, train_features
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output

from .conftest import toy_shard, write_shard
from .test_train_monolithic import prepared, request

SMALL = TrainingConfig(width=8, steps=60, batch_size=32)


def shades(count: int = 120) -> RealImages:
    """Light and dark images, called so."""
    dark = torch.arange(count) % 2 == 0
    images = torch.where(dark, -0.6, 0.6).view(-1, 1, 1, 1) + 0.1 * torch.randn(
        count, 1, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    return RealImages(images, tuple("dark" if d else "light" for d in dark.tolist()), (0,) * count)


def test_the_small_network_learns_the_captions_and_is_read_back_the_same(tmp_path: Path) -> None:
    real = shades()
    labels, names, of_captions = label_images(real.captions, real.clusters)
    assert (names, of_captions) == (("dark", "light"), True)
    network = train_features(real.images, labels, names, tmp_path, seed=0, of="this run", config=SMALL)
    assert network.accuracy == 1.0
    again = load_features(tmp_path)
    assert (again.labels, again.accuracy) == (names, 1.0)
    assert np.array_equal(again.embed(real.images), network.embed(real.images))
    assert network.classify is not None
    assert [names[i] for i in network.classify(real.images)] == list(real.captions)
    assert features.kept_features(tmp_path, "another run") is None
    kept = features.kept_features(tmp_path, "this run")
    assert kept is not None
    assert kept.labels == names
    assert features.kept_features(tmp_path / "nowhere", "this run") is None


def test_many_captions_are_no_labels_the_clusters_are() -> None:
    captions = [f"caption {number}" for number in range(300)]
    labels, names, of_captions = label_images(captions, [0, 1, 2] * 100)
    assert (labels[:4], names, of_captions) == ([0, 1, 2, 0], ("cluster 0", "cluster 1", "cluster 2"), False)


def test_a_folder_without_features_and_unknown_networks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no feature network that evaluate trained"):
        load_features(tmp_path)
    with pytest.raises(ConfigError, match="timm:NAME"):
        features.pretrained_features("inception")
    with pytest.raises(ConfigError, match="cannot be had"):
        features.pretrained_features("timm:there_is_no_such_network")
    with pytest.raises(ConfigError, match="pickle"):
        features.pretrained_features("open_clip:ViT-B-32/weights.pt")


def test_the_folder_of_a_pretrained_network_or_of_a_trained_one_may_be_named(tmp_path: Path) -> None:
    ImageEncoder(16, 8, 8, 2, 1).save_pretrained(tmp_path / "image_encoder")
    images = torch.zeros(3, 3, 16, 16)
    seen = features.named_features(str(tmp_path / "image_encoder")).embed(images)
    assert seen.shape[0] == 3
    assert np.array_equal(seen, features.pretrained_features(str(tmp_path / "image_encoder")).embed(images))
    with pytest.raises(ConfigError, match="cannot be had"):
        features.named_features(str(tmp_path))


def test_real_images_may_be_a_sample_that_follows_the_seed(tmp_path: Path) -> None:
    shards = []
    for cluster in range(2):
        shard = toy_shard(cluster)
        shards.append((write_shard(tmp_path / str(cluster), shard), shard))
    whole = evaluation.real_images(shards, None)
    some = evaluation.real_images(shards, None, most=9, seed=4)
    assert len(some) == len(some.captions) == len(some.clusters) == 9
    assert torch.equal(some.images, evaluation.real_images(shards, None, most=9, seed=4).images)
    assert not torch.equal(some.images, evaluation.real_images(shards, None, most=9, seed=5).images)
    for image, caption, cluster in zip(some.images, some.captions, some.clusters, strict=True):
        (place,) = (n for n, one in enumerate(whole.images) if torch.equal(one, image))
        assert (whole.captions[place], whole.clusters[place]) == (caption, cluster)
    assert len(evaluation.real_images(shards, None, most=10_000)) == len(whole)


def test_pretrained_networks_see_colour_in_their_own_scale() -> None:
    grey = torch.zeros(2, 1, 8, 8)
    seen = features.prepared(grey, 16, (0.5, 0.4, 0.3), (0.5, 0.5, 0.5))
    assert seen.shape == (2, 3, 16, 16)
    assert torch.allclose(seen[0, :, 3, 3], torch.tensor([0.0, 0.2, 0.4]), atol=1e-5)


def test_prompts_are_as_frequent_as_in_the_data_and_follow_the_seed() -> None:
    real = dataclasses.replace(shades(), captions=("dark",) * 90 + ("light",) * 30)
    asked = Asked(2000, 5, 1.0, seed=3)
    prompts = evaluation.prompts_for(real, asked)
    assert prompts == evaluation.prompts_for(real, asked)
    assert prompts.count("dark") == pytest.approx(1500, abs=80)


def test_where_captions_are_names_fidelity_asks_for_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shades(40)
    named = dataclasses.replace(
        real, captions=tuple(f"thing {number}" for number in range(40)), kinds=real.captions
    )
    network = features.FeatureNetwork(
        "mean",
        lambda images: images.flatten(1).double().numpy(),
        ("dark", "light"),
        lambda images: (images.mean(dim=(1, 2, 3)) > 0).long().numpy(),
    )
    asked = Asked(20, 5, 1.0, seed=3)
    drawn = real.images[evaluation.drawn(named, asked)]
    monkeypatch.setattr(evaluation, "generate", lambda *_: drawn)
    contender = evaluation.Contender("the real ones", None)  # type: ignore[arg-type]  # nothing is sampled
    for data, fidelity in ((named, 1.0), (real, 1.0), (dataclasses.replace(named, kinds=()), None)):
        score, _ = evaluation.evaluate(contender, data, network.embed(real.images), network, asked)
        assert score.fidelity == fidelity


def test_the_report_lists_the_best_first() -> None:
    scores = (Score("a", 3.0, 0.5, 0.25, None, 1.0), Score("b", 2.0, 0.5, 0.25, 0.75, 1.0))
    report = Report("digits", "trained", 0.9, 100, 0.5, Asked(16, 5, 2.0, 0), scores)
    rows = [line for line in report.as_markdown().splitlines() if line.startswith("| ")][2:]
    assert "No prompt fidelity" in report.as_markdown()
    assert rows == ["| b | 2.00 | 0.500 | 0.250 | 0.750 |", "| a | 3.00 | 0.500 | 0.250 | - |"]
    assert json.loads(report.as_json())["scores"][0]["frechet_distance"] == 3.0


def test_real_images_are_at_almost_no_distance_from_each_other() -> None:
    rows = np.random.default_rng(0).normal(size=(4000, 4))
    assert evaluation.floor(rows, 1000, 0) < 0.05


def test_evaluating_writes_the_report_and_the_grids(
    tmp_path: Path, make_components: Callable[[], dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path, make_components())
    train_monolithic.run(request(tmp_path), Output(as_json=True, stdout=io.StringIO()))
    monkeypatch.setattr(features, "TrainingConfig", lambda: SMALL)
    said = io.StringIO()
    asked = command.EvaluateRequest(
        folder=tmp_path,
        models=(tmp_path / "model",),
        out=tmp_path / "report",
        samples=16,
        steps=2,
        guidance_scale=None,
        routing=("top2",),
        features="trained",
        seed=0,
        device="cpu",
        threads=1,
        home=tmp_path / "home",
    )
    command.run(asked, Output(as_json=True, stdout=said))
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["evaluated", "report"]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["scores"][0]["name"] == "model"
    assert report["scores"][0]["frechet_distance"] == events[0]["frechet_distance"] > report["floor"]
    for name in ("grid-model.png", "grid-real.png"):
        with Image.open(tmp_path / "report" / name) as picture:
            assert picture.size[0] > 96
    said = io.StringIO()
    command.run(asked, Output(as_json=True, stdout=said))
    assert json.loads(said.getvalue().splitlines()[0])["event"] == "features"  # not trained again
    assert json.loads((tmp_path / "report" / "report.json").read_text())["scores"][0]["frechet_distance"] == (
        pytest.approx(events[0]["frechet_distance"])
    )
    for changes, match in (({"samples": 3}, "16 images"), ({"routing": ("best",)}, "topN")):
        with pytest.raises(ConfigError, match=match):
            command.run(dataclasses.replace(asked, **changes), Output(as_json=True, stdout=io.StringIO()))
