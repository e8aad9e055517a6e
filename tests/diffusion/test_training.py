"""Tests of `paris_p2p.diffusion.training`, `resume` and `recipes`."""

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paris_p2p.diffusion import training
from paris_p2p.diffusion.networks import tensor_specs
from paris_p2p.diffusion.recipes import preset
from paris_p2p.diffusion.resume import load_resume, save_resume, save_weights
from paris_p2p.diffusion.seeds import stream
from paris_p2p.diffusion.shards import Examples, Shard
from paris_p2p.diffusion.training import Trainer, TrainingError, drop_captions, learning_rate
from paris_p2p.errors import ConfigError
from paris_p2p.ids import Role
from paris_p2p.wire.manifest import ExpertVariant, Recipe

from .conftest import TOKENS, WIDTH, short, toy_recipe, toy_trainer


def run(trainer: Trainer, steps: int) -> list[float]:
    return [float(trainer.train_step()) for _ in range(steps)]


def state(trainer: Trainer) -> list[torch.Tensor]:
    parameters = [p.detach().clone() for p in trainer.model.parameters()]
    return [*parameters, *(average.clone() for average in trainer.ema.shadow_params)]


def with_ddpm(recipe: Recipe) -> Recipe:
    flow = recipe.experts[0]
    return dataclasses.replace(
        recipe, experts=(flow, ExpertVariant("noise", "ddpm", flow.architecture, flow.training))
    )


@pytest.mark.parametrize(("role", "variant"), [("expert-0", 0), ("expert-1", 1), ("router", 0)])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path: Path, role: str, variant: int) -> None:
    recipe = with_ddpm(toy_recipe(steps=8))
    unbroken = toy_trainer(recipe, role, variant)
    losses = run(unbroken, 8)
    first = toy_trainer(recipe, role, variant)
    found = run(first, 4)
    first.heldout_loss()
    save_resume(first, tmp_path / "resume")
    second = toy_trainer(recipe, role, variant)
    load_resume(second, tmp_path / "resume")
    found += run(second, 4)
    assert found == losses
    assert second.step == 8
    assert second.finished
    assert second.heldout_loss() == unbroken.heldout_loss()
    for one, other in zip(state(unbroken), state(second), strict=True):
        assert torch.equal(one, other)


def test_batches_gathered_ahead_are_the_ones_gathered_in_time(tmp_path: Path) -> None:
    """As on a GPU; a resumed trainer throws away what was gathered for another step."""
    plain, ahead = toy_trainer(toy_recipe()), toy_trainer(toy_recipe())
    with ThreadPoolExecutor(1) as reader:
        ahead._reader = reader
        assert run(ahead, 3) == run(plain, 3)
        save_resume(plain, tmp_path / "resume")
        run(ahead, 2)
        load_resume(ahead, tmp_path / "resume")
        assert run(ahead, 4) == run(plain, 4)


def test_two_saves_of_one_state_are_the_same_bytes(tmp_path: Path) -> None:
    trainer = toy_trainer(toy_recipe())
    run(trainer, 2)
    for name in ("a", "b"):
        save_resume(trainer, tmp_path / name)
        save_weights(trainer, tmp_path / f"{name}-weights")
    for file in ("resume.safetensors", "resume.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    file = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a-weights" / file).read_bytes() == (tmp_path / "b-weights" / file).read_bytes()


def test_the_weights_file_holds_the_average_and_fits_the_manifest(tmp_path: Path) -> None:
    recipe = toy_recipe()
    trainer = toy_trainer(recipe)
    run(trainer, 3)
    save_weights(trainer, tmp_path / "weights")
    tensors = load_file(tmp_path / "weights" / "diffusion_pytorch_model.safetensors")
    expected = {spec.name: spec.shape for spec in recipe.experts[0].architecture.tensors}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    names = [name for name, _ in trainer.model.named_parameters()]
    for name, average in zip(names, trainer.ema.shadow_params, strict=True):
        assert torch.equal(tensors[name], average)
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["num_layers"] == 1


def test_training_lowers_the_held_out_loss() -> None:
    recipe = toy_recipe(steps=60)
    for role in ("expert-0", "router"):
        trainer = toy_trainer(recipe, role)
        run(trainer, 1)
        before = trainer.heldout_loss()
        run(trainer, 59)
        assert trainer.heldout_loss() < 0.9 * before


def test_the_held_out_loss_changes_nothing_and_repeats() -> None:
    trainer = toy_trainer(toy_recipe())
    run(trainer, 2)
    before = state(trainer)
    assert trainer.heldout_loss() == trainer.heldout_loss()
    for one, other in zip(before, state(trainer), strict=True):
        assert torch.equal(one, other)


def test_the_average_follows_its_definition() -> None:
    trainer = toy_trainer(toy_recipe())
    parameter = next(iter(trainer.model.parameters()))
    expected = parameter.detach().clone()
    for step in range(1, 6):
        run(trainer, 1)
        # diffusers warms the decay up: (1 + n) / (10 + n) after n + 1 updates, at most the recipe's.
        decay = 0.0 if step == 1 else min(0.99, step / (9 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
        assert torch.allclose(trainer.ema.shadow_params[0], expected, atol=1e-6)


def test_the_learning_rate_warms_up_and_lands_at_zero() -> None:
    recipe = toy_recipe().experts[0].training
    cosine = dataclasses.replace(recipe, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(cosine, step) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    constant = dataclasses.replace(cosine, lr_schedule="constant")
    assert learning_rate(constant, 5) == 0.6
    assert learning_rate(constant, 99) == 1.0


def test_the_recipe_s_share_of_captions_is_dropped() -> None:
    trainer = toy_trainer(toy_recipe())
    batch = trainer.train_data.gather(torch.zeros(4000, dtype=torch.int64))
    whole = batch.text.clone()
    drop_captions(batch, 0.1, stream(0, "test"))
    empty = (batch.text == batch.uncond).flatten(1).all(1)
    assert 0.08 < float(empty.float().mean()) < 0.12
    assert torch.equal(batch.text[~empty], whole[~empty])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    trainer = toy_trainer(toy_recipe())
    run(trainer, 2)
    save_resume(trainer, tmp_path / "resume")
    return tmp_path / "resume"


def test_a_successor_draws_what_the_first_one_would_have_drawn_on_its_other_path(tmp_path: Path) -> None:
    first, second, plain = (toy_trainer(toy_recipe()) for _ in range(3))
    first.take_another_path(1)
    run(first, 2)
    run(plain, 2)
    assert not torch.equal(state(first)[0], state(plain)[0])
    save_resume(first, tmp_path / "resume")
    load_resume(second, tmp_path / "resume")
    assert float(first.train_step()) == float(second.train_step())


def edit_state(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "resume.json").read_text())
    (folder / "resume.json").write_text(json.dumps({**values, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "resume.safetensors")
    change(tensors)
    save_file(tensors, folder / "resume.safetensors")


NAME = "proj_out.bias"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: edit_state(f, step=9), "step 9 of 8"),
        (lambda f: edit_state(f, step=0), "step 0 of 8"),
        (lambda f: edit_state(f, step=True), "step True"),
        (lambda f: edit_state(f, step=3), "data_cursor"),
        (lambda f: edit_state(f, role="expert-1"), "expert-1"),
        (lambda f: edit_state(f, format=1), "format"),
        (lambda f: (f / "resume.json").write_text("[" * 2000), "unreadable"),
        (lambda f: (f / "resume.json").write_text(" " * 10_000), "larger"),
        (lambda f: (f / "resume.json").unlink(), "unreadable"),
        (lambda f: (f / "resume.safetensors").write_bytes(b"\xff" * 64), "unreadable"),
        (lambda f: edit_tensors(f, lambda t: t.pop(f"ema/{NAME}")), f"ema/{NAME}"),
        (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))), "extra"),
        (lambda f: edit_tensors(f, lambda t: t.update({f"weights/{NAME}": torch.zeros(3)})), NAME),
        (lambda f: edit_tensors(f, lambda t: t[f"exp_avg/{NAME}"].fill_(torch.nan)), "not finite"),
        (lambda f: edit_tensors(f, lambda t: t[f"exp_avg_sq/{NAME}"].fill_(-1)), "negative"),
        (lambda f: edit_tensors(f, lambda t: t[f"exp_avg/{NAME}"].fill_(1e30)), "exp_avg_sq allows"),
        (lambda f: edit_tensors(f, lambda t: t[f"exp_avg_sq/{NAME}"].fill_(1e-12)), "exp_avg_sq allows"),
        (lambda f: edit_tensors(f, lambda t: t[f"exp_avg_sq/{NAME}"].fill_(1e30)), "clipped"),
        (lambda f: edit_tensors(f, lambda t: t.update(generator=torch.zeros(5056))), "generator"),
        (lambda f: edit_state(f, path=-1), "path is -1"),
        (lambda f: edit_state(f, path=True), "path is True"),
        (lambda f: edit_state(f, path=1 << 64), "path"),
    ],
)
def test_a_spoilt_resume_bundle_is_refused(bundle: Path, spoil: Callable[[Path], object], match: str) -> None:
    spoil(bundle)
    with pytest.raises(TrainingError, match=match) as caught:
        load_resume(toy_trainer(toy_recipe()), bundle)
    assert caught.value.kind == "bad_resume"


def test_moments_as_steep_as_gradients_can_make_them_are_accepted(tmp_path: Path) -> None:
    """Gradients that grow as (b2 / b1)^k come closest to the bound; and those that are nearly nothing."""
    trainer = toy_trainer(toy_recipe(steps=60))
    parameters = list(trainer.model.parameters())
    for k in range(50):
        for parameter in parameters[1:]:
            parameter.grad = torch.full_like(parameter, 1e-8 * (0.999 / 0.9) ** k)
        parameters[0].grad = torch.full_like(parameters[0], 1e-25)
        trainer.optimizer.step()
    moments = trainer.optimizer.optimizer.state[parameters[1]]
    assert float((moments["exp_avg"] ** 2 / moments["exp_avg_sq"]).max()) > 52
    trainer.step = 50
    save_resume(trainer, tmp_path / "resume")
    load_resume(toy_trainer(toy_recipe(steps=60)), tmp_path / "resume", 50)


def test_a_bundle_of_another_step_than_the_signed_one_is_refused(bundle: Path) -> None:
    with pytest.raises(TrainingError, match="of step 2, its signed statement of step 3") as caught:
        load_resume(toy_trainer(toy_recipe()), bundle, 3)
    assert caught.value.kind == "bad_resume"
    trainer = toy_trainer(toy_recipe())
    load_resume(trainer, bundle, 2)
    assert trainer.step == 2


def test_a_finished_bundle_is_taken_only_if_the_signed_statement_says_so(bundle: Path) -> None:
    edit_state(bundle, step=8, data_cursor=64)
    for signed_step in (None, 2):
        with pytest.raises(TrainingError, match="signed statement") as caught:
            load_resume(toy_trainer(toy_recipe()), bundle, signed_step)
        assert caught.value.kind == "bad_resume"
    trainer = toy_trainer(toy_recipe())
    load_resume(trainer, bundle, 8)
    assert trainer.finished


@pytest.mark.parametrize("index", ["2", "99", "-1", "01", "x", ""])
def test_an_accelerator_is_chosen_by_index_if_it_is_there(
    monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert training.pick_device("cuda:0") == "cuda:0"
    assert training.pick_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match=f"cuda:{index}"):
        training.pick_device(f"cuda:{index}")


def test_a_missing_device_or_variant_is_named() -> None:
    with pytest.raises(ConfigError, match="quantum"):
        training.pick_device("quantum")
    with pytest.raises(ConfigError, match="numbered 3"):
        toy_trainer(toy_recipe(), variant=3)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3)])
def test_the_tiny_preset_trains_at_both_of_its_sizes(size: int, channels: int) -> None:
    recipe = preset(
        "tiny", channels=channels, image_size=size, clusters=3, tokens=TOKENS, text_width=WIDTH, steps=30
    )
    assert recipe.experts[0].training.steps == recipe.router.training.steps == 30
    assert recipe.checkpoint_interval_steps == 7
    one = dataclasses.replace(recipe.experts[0], training=short(recipe.experts[0].training, 1))
    images = torch.rand(8, channels, size, size, generator=stream(0, "images")) * 2 - 1
    captions, uncond = torch.ones(1, TOKENS, WIDTH), torch.zeros(TOKENS, WIDTH)
    data = Examples([Shard(0, images, torch.zeros(8, dtype=torch.int64), captions, uncond)])
    trainer = Trainer(dataclasses.replace(recipe, experts=(one,)), Role("expert-0"), 0, data, data, "cpu")
    assert tensor_specs(trainer.model) == recipe.experts[0].architecture.tensors
    assert float(trainer.train_step()) > 0


def test_unknown_presets_and_sizes_are_refused() -> None:
    for name, size, match in (("huge", 8, "huge"), ("tiny", 10, "steps of 4")):
        with pytest.raises(ConfigError, match=match):
            preset(name, channels=1, image_size=size, clusters=2, tokens=TOKENS, text_width=WIDTH)
