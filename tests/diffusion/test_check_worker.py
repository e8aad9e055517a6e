"""Tests of `paris_p2p.diffusion.check_worker`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paris_p2p.diffusion.check_worker import WEIGHTS_NAME, measure
from paris_p2p.diffusion.resume import save_weights

from .conftest import CLUSTERS, toy_manifest, toy_recipe, toy_shard, toy_trainer, write_shard


def question(root: Path, role: str, clusters: tuple[int, ...]) -> dict[str, Any]:
    (root / "manifest.paris").write_bytes(toy_manifest(toy_recipe()).data)
    folders = {cluster: write_shard(root / f"heldout-{cluster}", toy_shard(cluster)) for cluster in clusters}
    return {
        "type": "measure",
        "manifest": str(root / "manifest.paris"),
        "role": role,
        "variant": 0,
        "weights": str(root / "weights"),
        "shards": [{"cluster": cluster, "heldout": str(folder)} for cluster, folder in folders.items()],
    }


@pytest.mark.parametrize(("role", "clusters"), [("expert-0", (0,)), ("router", tuple(range(CLUSTERS)))])
def test_weights_measure_as_their_trainer_measured_them(
    tmp_path: Path, role: str, clusters: tuple[int, ...]
) -> None:
    message = question(tmp_path, role, clusters)
    trainer = toy_trainer(toy_recipe(), role)
    for _ in range(2):
        trainer.train_step()
    save_weights(trainer, tmp_path / "weights")
    answer = measure(message)
    again = measure(message)
    assert answer == again and answer["loss"] == pytest.approx(trainer.heldout_loss(), rel=1e-5)
    assert 0 < answer["loss"] < 2 * answer["baseline"]


def test_noise_measures_worse_than_saying_nothing(tmp_path: Path) -> None:
    message = question(tmp_path, "expert-0", (0,))
    save_weights(toy_trainer(toy_recipe()), tmp_path / "weights")
    path = tmp_path / "weights" / WEIGHTS_NAME
    generator = torch.Generator().manual_seed(0)
    noise = {name: 3 * torch.randn(one.shape, generator=generator) for name, one in load_file(path).items()}
    save_file(noise, path)
    answer = measure(message)
    assert answer["loss"] > 1.5 * answer["baseline"]
