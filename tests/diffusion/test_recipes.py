"""Tests of `paris_p2p.diffusion.recipes`: the presets and their exact sizes, on the meta device."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from paris_p2p.diffusion import networks
from paris_p2p.diffusion.recipes import preset
from paris_p2p.diffusion.shards import Examples, Shard
from paris_p2p.diffusion.training import Trainer
from paris_p2p.errors import ConfigError
from paris_p2p.ids import Role
from paris_p2p.wire.manifest import Architecture, Latents, Recipe


def make(name: str, **changes: Any) -> Recipe:
    big = name in ("b2", "xl2")
    arguments: dict[str, Any] = {
        "channels": 3,
        "image_size": 256 if big else 32,
        "clusters": 8,
        "tokens": 77,
        "text_width": 768,
    }
    return preset(name, **(arguments | changes))


def parameters(architecture: Architecture) -> int:
    return sum(math.prod(spec.shape) for spec in architecture.tensors)


@pytest.mark.parametrize(
    ("name", "expert", "router"),
    [
        ("tiny", 1_334_448, 675_464),
        ("small", 4_073_328, 972_296),
        ("b2", 118_960_912, 129_136_904),
        ("xl2", 607_003_792, 129_136_904),
    ],
)
def test_a_preset_has_exactly_its_documented_parameters(name: str, expert: int, router: int) -> None:
    recipe = make(name, router_text=False)
    assert parameters(recipe.experts[0].architecture) == expert
    assert parameters(recipe.router.architecture) == router


def test_the_published_architecture_has_exactly_its_known_parameters() -> None:
    recipe = make("xl2", variants=("xl2-published",))
    assert [variant.name for variant in recipe.experts] == ["xl2", "xl2-published"]
    assert parameters(recipe.experts[1].architecture) == 605_970_448


def test_big_presets_see_the_published_latents_and_sample_as_published() -> None:
    recipe = make("b2")
    assert recipe.latents == Latents("vae", 4, 32, 256, 0.18215, 0.0)
    assert (recipe.sampling.steps, recipe.sampling.guidance_scale, recipe.sampling.top_k) == (50, 7.5, 2)
    assert recipe.experts[0].training.batch_size == 32  # 256, divided among 8 experts
    assert make("tiny").latents.space == "pixel"


def test_any_preset_sees_the_latents_it_is_given() -> None:
    latents = Latents("vae", 4, 8, 64, 0.5, 0.0)
    for name in ("tiny", "small", "b2"):
        config = make(name, latents=latents).experts[0].architecture.config
        assert (config["in_channels"], config["sample_size"]) == (4, 8)


def test_variants_of_other_sizes_and_objectives_see_the_same_latents() -> None:
    recipe = make("b2", variants=("b2:ddpm", "small"))
    found = [(variant.name, variant.objective) for variant in recipe.experts]
    assert found == [("b2", "flow_matching"), ("b2:ddpm", "ddpm"), ("small", "flow_matching")]
    assert {variant.architecture.config["sample_size"] for variant in recipe.experts} == {32}
    assert {variant.training.steps for variant in recipe.experts} == {120_000}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("huge", {}, "no preset"),
        ("b2", {"channels": 1}, "RGB"),
        ("xl2", {"image_size": 250}, "steps of 16"),
        ("tiny", {"image_size": 256}, "128"),
        ("tiny", {"variants": ("big",)}, "no expert variant"),
        ("tiny", {"variants": ("tiny:edm",)}, "no expert variant"),
        ("tiny", {"variants": ("small", "small")}, "named twice"),
        ("b2", {"latents": Latents("vae", 4, 33, 264, 1.0, 0.0)}, "do not divide"),
    ],
)
def test_what_a_preset_cannot_do_is_named(name: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make(name, **changes)


def test_the_small_preset_trains_a_step_with_every_variant() -> None:
    recipe = make(
        "small", image_size=8, clusters=1, tokens=4, text_width=8, variants=("small-published", "small:ddpm")
    )
    variants = [replace(one, training=replace(one.training, batch_size=16)) for one in recipe.experts]
    recipe = replace(recipe, experts=tuple(variants))
    latents = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shard = Shard(0, latents, torch.zeros(16, dtype=torch.int64), torch.ones(1, 4, 8), torch.zeros(4, 8))
    for variant in range(3):
        trainer = Trainer(recipe, Role("expert-0"), variant, Examples([shard]), Examples([shard]), "cpu")
        before = trainer.model.state_dict()
        before = {name: tensor.clone() for name, tensor in before.items()}
        # The zero function misses v = eps - x0 by 1 + E x0^2, and eps by 1.
        expected = 1.0 if variant == 2 else 1.0 + float(latents.square().mean())
        assert float(trainer.train_step()) == pytest.approx(expected, abs=0.1)
        moved = [
            name for name, tensor in trainer.model.state_dict().items() if (tensor != before[name]).any()
        ]
        assert any(name.startswith(("proj_out", "final_layer.linear")) for name in moved)


def test_a_recipe_s_networks_are_the_ones_the_builders_make() -> None:
    recipe = make("small", variants=("small-published",))
    for architecture in (*(variant.architecture for variant in recipe.experts), recipe.router.architecture):
        again = networks.describe(architecture.model_class, architecture.config)
        assert again == architecture
