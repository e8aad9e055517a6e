"""Tests of `paris_p2p.diffusion.memory`, and of a trainer that runs out of it."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paris_p2p.diffusion import memory, networks
from paris_p2p.diffusion.memory import StepMemory, StepPlan, choose, smaller
from paris_p2p.diffusion.shards import Batch
from paris_p2p.diffusion.training import Trainer, TrainingError, fitting_variant, plan, step_memory
from paris_p2p.ids import Role
from paris_p2p.wire.manifest import ExpertVariant

from .conftest import toy_recipe, toy_router, toy_trainer

MB = 1_000_000


def test_the_whole_batch_is_computed_at_once_where_it_fits() -> None:
    assert choose(StepMemory(100 * MB, 10 * MB, MB), 64, 2000 * MB) == StepPlan(64, False)


def test_less_memory_makes_micro_batches_and_little_memory_checkpointing() -> None:
    need = StepMemory(100 * MB, 10 * MB, MB)
    assert choose(need, 64, 400 * MB) == StepPlan(16, False)
    assert choose(need, 64, 170 * MB) == StepPlan(32, True)
    assert choose(need, 64, 50 * MB) == StepPlan(1, True)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 10**9), st.integers(1, 10**9), st.integers(1, 512), st.integers(0, 10**11), st.data())
def test_a_plan_fits_or_is_the_smallest(
    fixed: int, per_image: int, batch: int, free: int, data: st.DataObject
) -> None:
    need = StepMemory(fixed, per_image, data.draw(st.integers(1, per_image)))
    chosen = choose(need, batch, free)
    per = need.per_image_checkpointed if chosen.checkpointing else per_image
    assert 1 <= chosen.micro_batch <= batch
    assert fixed + chosen.micro_batch * per <= free * memory.SHARE or chosen == StepPlan(1, True)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 4096), st.booleans())
def test_shrinking_ends_at_one_image_with_checkpointing(batch: int, checkpointing: bool) -> None:
    current: StepPlan | None = StepPlan(batch, checkpointing)
    for _ in range(20):
        assert current is not None
        following = smaller(current)
        if following is None:
            break
        assert following != current
        current = following
    assert current == StepPlan(1, True)


class _Stack(nn.Module):
    """Two linear layers: what they keep can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(2))
        self.checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        self.checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_a_step_keeps_is_counted_once_and_weights_are_not() -> None:
    need = memory.measure(_Stack, lambda network: network(torch.empty(3, 10).requires_grad_()), bf16=False)
    assert need.fixed == 2 * 110 * memory.STATE_BYTES_PER_PARAMETER
    assert need.per_image == 2 * 3 * 10 * 4  # both layers keep their input


@pytest.mark.parametrize("role", ["expert-0", "router"])
def test_checkpointing_keeps_less_and_gives_the_same_step(role: str) -> None:
    recipe = toy_recipe()
    four = networks.describe(toy_router().model_class, {**toy_router().config, "num_layers": 4})
    deeper = dataclasses.replace(recipe.router, architecture=four)  # of one layer it would keep more
    recipe = dataclasses.replace(recipe, router=deeper)
    architecture = recipe.router.architecture if role == "router" else recipe.experts[0].architecture
    need = step_memory(architecture, plan(recipe, Role(role), 0), recipe, "fp32")
    assert 0 < need.per_image_checkpointed < need.per_image
    one, other = toy_trainer(recipe, role), toy_trainer(recipe, role)
    other._use(StepPlan(8, True))
    for _ in range(3):
        assert float(one.train_step()) == pytest.approx(float(other.train_step()), rel=1e-5)


def test_micro_batches_add_up_to_the_batch() -> None:
    one, other = toy_trainer(toy_recipe()), toy_trainer(toy_recipe())
    other._use(StepPlan(3, False))
    for _ in range(3):
        assert float(one.train_step()) == pytest.approx(float(other.train_step()), rel=1e-5)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


class _Cramped(Trainer):
    """A trainer on a device that holds `room` images at once (twice as many with checkpointing)."""

    room = 0

    def losses(self, batch: Batch, t: Tensor, eps: Tensor) -> Tensor:
        room = 2 * self.room if self.memory_plan.checkpointing else self.room
        if len(t) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().losses(batch, t, eps)


def cramped(room: int) -> _Cramped:
    examples = toy_trainer(toy_recipe()).train_data
    trainer = _Cramped(toy_recipe(), Role("expert-0"), 0, examples, examples, "cpu")
    trainer.room = room
    return trainer


@pytest.mark.parametrize("room", [1, 2, 4])
def test_running_out_of_memory_shrinks_the_step_and_changes_nothing_else(room: int) -> None:
    roomy, trainer = toy_trainer(toy_recipe()), cramped(room)
    for _ in range(3):
        assert float(roomy.train_step()) == pytest.approx(float(trainer.train_step()), rel=1e-5)
    assert trainer.memory_plan.micro_batch <= 2 * room
    assert trainer.step == 3


def test_when_one_image_does_not_fit_it_is_said() -> None:
    trainer = cramped(0)
    with pytest.raises(TrainingError, match="one image at a time") as caught:
        trainer.train_step()
    assert caught.value.kind == "oom"


def test_other_errors_are_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(toy_recipe())

    def broken(*_: object) -> Tensor:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(trainer, "losses", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer.train_step()


def test_the_first_variant_that_fits_is_taken_and_else_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy_recipe()
    small = recipe.experts[0]
    config = {**small.architecture.config, "num_layers": 4}
    large = ExpertVariant(
        "large",
        "flow_matching",
        networks.describe(small.architecture.model_class, config),
        small.training,
    )
    both = dataclasses.replace(recipe, experts=(large, small))
    needs = [step_memory(v.architecture, plan(both, Role("expert-0"), n), both, "fp32").fixed for n, v in
             enumerate(both.experts)]  # fmt: skip
    for free, variant in ((100 * needs[0], 0), (4 * needs[1], 1), (0, 1)):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        assert fitting_variant(both, Role("expert-0"), "cpu", (0, 1)) == variant
        assert fitting_variant(both, Role("expert-0"), "cpu", (1,)) == 1
    assert fitting_variant(both, Role("router"), "cpu", (0,)) == 0


def test_the_cpu_s_free_memory_is_known() -> None:
    assert memory.free_bytes(torch.device("cpu")) > 0
