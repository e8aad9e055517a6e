"""Tests of `paris_p2p.diffusion.start`: what a shared start does, and what it leaves to the experts."""

import dataclasses
from pathlib import Path

import pytest

from paris_p2p.diffusion.local import train
from paris_p2p.diffusion.shards import Examples
from paris_p2p.diffusion.start import after_start, start_recipe
from paris_p2p.diffusion.training import learning_rate
from paris_p2p.errors import ConfigError
from paris_p2p.ids import Role
from paris_p2p.wire.manifest import Recipe

from .conftest import toy_recipe, toy_shard


def recipe_of(steps: int, warmup: int = 4) -> Recipe:
    recipe = toy_recipe(steps=steps, interval=steps // 4)
    training = dataclasses.replace(
        recipe.experts[0].training, lr_schedule="cosine", warmup_steps=warmup, learning_rate=1e-2
    )
    return dataclasses.replace(recipe, experts=(dataclasses.replace(recipe.experts[0], training=training),))


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_start_and_experts_see_as_many_samples_as_experts_alone(share: float) -> None:
    recipe = recipe_of(steps=200)
    start = start_recipe(recipe, 8, share).experts[0].training
    rest = after_start(recipe, share).experts[0].training
    assert start.steps * start.batch_size + 8 * rest.steps * rest.batch_size == 8 * 200 * 8
    assert start.steps == 1600 * share


def test_the_start_keeps_its_rate_and_the_experts_bring_it_down() -> None:
    recipe = recipe_of(steps=40)
    start = start_recipe(recipe, 4, 0.75).experts[0].training
    assert [learning_rate(start, step) for step in (3, 60, 119)] == [1e-2] * 3
    rest = after_start(recipe, 0.75).experts[0].training
    rates = [learning_rate(rest, step) for step in range(rest.steps)]
    assert rates[0] == 1e-2  # a warm-up of a tenth of its steps at most
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-3


def test_the_router_keeps_its_length_and_checkpoints_stay_as_frequent_as_the_shorter_role_needs() -> None:
    recipe = recipe_of(steps=200)
    shorter = after_start(recipe, 0.75)
    assert shorter.router == recipe.router
    assert (recipe.checkpoint_interval_steps, shorter.checkpoint_interval_steps) == (50, 12)
    assert start_recipe(recipe, 8, 0.75).checkpoint_interval_steps == 300
    rare = dataclasses.replace(recipe, checkpoint_interval_steps=5)
    assert after_start(rare, 0.75).checkpoint_interval_steps == 5


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_start_without_samples_or_with_all_of_them_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        start_recipe(recipe_of(8), 4, share)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        after_start(recipe_of(8), share)


def test_an_expert_goes_on_from_the_start(tmp_path: Path) -> None:
    recipe = recipe_of(steps=24, warmup=2)
    everything = Examples([toy_shard(0), toy_shard(1)])
    role = Role("expert-0")
    start = train(
        start_recipe(recipe, 2, 0.75), role, everything, everything, tmp_path / "start", device="cpu"
    )
    own = Examples([toy_shard(0)])
    rest = after_start(recipe, 0.75)
    fresh = train(rest, role, own, own, tmp_path / "fresh", device="cpu")
    expert = train(rest, role, own, own, tmp_path / "expert", device="cpu", initial=start.weights)
    assert (start.steps, expert.steps) == (36, 6)
    assert expert.heldout_loss < min(start.heldout_loss, 0.9 * fresh.heldout_loss)
