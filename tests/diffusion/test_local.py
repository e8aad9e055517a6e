"""Tests of `paris_p2p.diffusion.local`."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paris_p2p.diffusion import local
from paris_p2p.diffusion.local import monolithic, train
from paris_p2p.diffusion.shards import Examples
from paris_p2p.diffusion.training import Trainer, TrainingError
from paris_p2p.errors import ConfigError
from paris_p2p.ids import Role
from paris_p2p.wire.manifest import Recipe

from .conftest import toy_recipe, toy_shard

EXPERT = Role("expert-0")


def data() -> Examples:
    return Examples([toy_shard(0), toy_shard(1)])


def test_the_baseline_sees_as_many_samples_in_as_many_steps() -> None:
    training = monolithic(toy_recipe(steps=8), clusters=4).experts[0].training
    assert (training.batch_size, training.steps) == (32, 8)


@pytest.mark.parametrize(("batch", "steps"), [(8, 32), (16, 16), (7, 37)])
def test_with_another_batch_size_the_samples_stay(batch: int, steps: int) -> None:
    recipe = monolithic(toy_recipe(steps=8, interval=4), clusters=4, batch_size=batch)
    assert (recipe.experts[0].training.batch_size, recipe.experts[0].training.steps) == (batch, steps)
    assert recipe.checkpoint_interval_steps == pytest.approx(steps / 2, abs=1)


@pytest.mark.parametrize("batch", [0, 257])
def test_a_batch_of_nothing_or_of_more_than_all_samples_is_refused(batch: int) -> None:
    with pytest.raises(ConfigError, match="256 samples"):
        monolithic(toy_recipe(steps=8), clusters=4, batch_size=batch)


class _Interrupt(Exception):
    pass


def test_an_interrupted_training_goes_on_and_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(steps=8, interval=3)
    whole = train(recipe, EXPERT, data(), data(), tmp_path / "whole", device="cpu")
    monkeypatch.setattr(local, "REPORT_STEPS", 1)

    def interrupt(done: int, total: int, loss: float) -> None:
        if done == 5:
            raise _Interrupt

    with pytest.raises(_Interrupt):
        train(recipe, EXPERT, data(), data(), tmp_path / "broken", device="cpu", on_step=interrupt)
    steps: list[int] = []
    again = train(
        recipe,
        EXPERT,
        data(),
        data(),
        tmp_path / "broken",
        device="cpu",
        on_step=lambda done, total, loss: steps.append(done),
    )
    assert steps == [4, 5, 6, 7, 8]
    assert (again.heldout_loss, again.samples) == (whole.heldout_loss, 64)
    name = "diffusion_pytorch_model.safetensors"
    one, other = load_file(whole.weights / name), load_file(again.weights / name)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    recipe = toy_recipe(steps=4)
    first = train(recipe, EXPERT, data(), data(), tmp_path, device="cpu")
    second = train(recipe, EXPERT, data(), data(), tmp_path, device="cpu", on_step=_fail)
    assert second == first


def test_a_training_may_start_from_other_weights(tmp_path: Path) -> None:
    recipe = toy_recipe(steps=4)
    first = train(recipe, EXPERT, data(), data(), tmp_path / "first", device="cpu")
    still = dataclasses.replace(recipe.experts[0].training, learning_rate=1e-12)
    recipe = dataclasses.replace(
        recipe, experts=(dataclasses.replace(recipe.experts[0], training=still),), checkpoint_interval_steps=4
    )
    again = train(recipe, EXPERT, data(), data(), tmp_path / "again", device="cpu", initial=first.weights)
    assert again.heldout_loss == pytest.approx(first.heldout_loss)


def _fail(done: int, total: int, loss: float) -> None:
    raise AssertionError("a step was made")


def test_a_damaged_working_folder_is_named(tmp_path: Path) -> None:
    recipe = toy_recipe(steps=4)
    train(recipe, EXPERT, data(), data(), tmp_path, device="cpu")
    (tmp_path / "checkpoint" / "resume" / "resume.json").write_text(json.dumps([]))
    with pytest.raises(ConfigError, match="remove that folder"):
        train(recipe, EXPERT, data(), data(), tmp_path, device="cpu")


def _with_nan_at(monkeypatch: pytest.MonkeyPatch, step: int, paths: set[int]) -> list[tuple[int, int]]:
    """Let a step leave weights that are none, on these streams of noise. What (path, step) were made."""
    plain, made = Trainer.train_step, list[tuple[int, int]]()

    def train_step(trainer: Trainer) -> torch.Tensor:
        loss = plain(trainer)
        made.append((trainer.path, trainer.step))
        if trainer.step == step and trainer.path in paths:
            with torch.no_grad():
                next(iter(trainer.model.parameters())).fill_(torch.nan)
        return loss

    monkeypatch.setattr(Trainer, "train_step", train_step)
    return made


@pytest.mark.parametrize("bad", [4, 5, 8])
def test_after_weights_that_are_none_it_goes_on_from_the_last_checkpoint_with_other_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bad: int
) -> None:
    made = _with_nan_at(monkeypatch, bad, {0})
    done = train(toy_recipe(steps=8, interval=4), EXPERT, data(), data(), tmp_path, device="cpu")
    assert done.steps == 8 and math.isfinite(done.heldout_loss)
    again = [step for path, step in made if path == 1]
    assert again == list(range(1 if bad == 4 else 5, 9))
    assert "with other noise" in caplog.text


def test_a_loss_that_is_no_number_is_said(tmp_path: Path) -> None:
    recipe: Recipe = toy_recipe(steps=40)
    wild = dataclasses.replace(recipe.experts[0].training, learning_rate=1e30, warmup_steps=0)
    recipe = dataclasses.replace(
        recipe, experts=(dataclasses.replace(recipe.experts[0], training=wild),), checkpoint_interval_steps=40
    )
    with pytest.raises(TrainingError, match="learning rate"):
        train(recipe, EXPERT, data(), data(), tmp_path, device="cpu")
