"""Tests of `paris_p2p.diffusion.devices`, and of trainers that compute in one precision or the other."""

import dataclasses

import pytest
import torch

from paris_p2p.diffusion import devices
from paris_p2p.diffusion.devices import precision_for
from paris_p2p.diffusion.training import Trainer
from paris_p2p.errors import ConfigError
from paris_p2p.ids import Role
from paris_p2p.wire.manifest import Recipe

from .conftest import toy_recipe, toy_trainer


def bf16_recipe() -> Recipe:
    recipe = toy_recipe()
    expert = recipe.experts[0]
    training = dataclasses.replace(expert.training, precision="bf16")
    return dataclasses.replace(recipe, experts=(dataclasses.replace(expert, training=training),))


def forced(recipe: Recipe, precision: str | None) -> Trainer:
    examples = toy_trainer(recipe).train_data
    return Trainer(recipe, Role("expert-0"), 0, examples, examples, "cpu", precision=precision)


@pytest.mark.parametrize("gains", [True, False])
def test_bf16_is_computed_where_it_gains_and_where_it_is_forced(
    monkeypatch: pytest.MonkeyPatch, gains: bool
) -> None:
    monkeypatch.setattr(devices, "gains_from_bf16", lambda _: gains)
    assert precision_for("cpu", "bf16") == ("bf16" if gains else "fp32")
    assert precision_for("cpu", "bf16", "bf16") == "bf16"
    assert precision_for("cpu", "bf16", "fp32") == "fp32"
    assert precision_for("cpu", "fp32") == "fp32"
    with pytest.raises(ConfigError, match="fp8"):
        precision_for("cpu", "bf16", "fp8")


def test_one_process_trains_in_both_precisions_to_nearly_the_same_loss() -> None:
    """A checker measures roles of both kinds in one process."""
    full, half = forced(bf16_recipe(), "fp32"), forced(bf16_recipe(), "bf16")
    dtypes: dict[str, torch.dtype] = {}
    for trainer in (full, half):
        layer = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.Linear))
        layer.register_forward_hook(
            lambda _m, _i, output, name=trainer.precision: dtypes.update({name: output.dtype})
        )
    for _ in range(3):
        losses = [float(trainer.train_step()) for trainer in (full, half)]
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]  # only the first step's are equal: every fresh network answers zero
    assert dtypes == {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
