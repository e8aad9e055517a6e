"""Tests of `paris_p2p.diffusion.networks`, `expert` and `router`."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from paris_p2p.diffusion import expert, networks, objectives, router
from paris_p2p.errors import ConfigError
from paris_p2p.wire.manifest import Architecture

from .conftest import TOKENS, WIDTH, toy_expert, toy_router


def parameters(architecture: Architecture) -> int:
    return sum(math.prod(spec.shape) for spec in architecture.tensors)


def published(num_layers: int, heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "sample_size": 32,
        "caption_channels": 768,
        "use_additional_conditions": False,
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [(published(12, 12, 64), 118_960_912), (published(28, 16, 72), 607_003_792)],
    ids=["B/2", "XL/2"],
)
def test_the_full_size_experts_have_the_known_parameter_counts(config: dict[str, Any], expected: int) -> None:
    assert parameters(networks.describe(expert.MODEL_CLASS, config)) == expected


def test_the_published_router_has_the_known_parameter_count_and_names() -> None:
    described = networks.describe(router.MODEL_CLASS, {})
    assert parameters(described) == 129_136_904
    names = {spec.name for spec in described.tensors}
    assert {
        "patch_embed.weight",
        "pos_embed",
        "cls_token",
        "time_embed.mlp.0.weight",
        "time_embed.mlp.2.bias",
        "layers.11.attn.in_proj_weight",
        "layers.11.attn.out_proj.bias",
        "layers.11.mlp.2.weight",
        "layers.11.adaLN_modulation.1.weight",
        "head.0.weight",
        "head.2.weight",
        "head.4.bias",
    } <= names


def test_a_fresh_expert_is_the_zero_function() -> None:
    module = networks.build(toy_expert(), 0)
    x, text = torch.randn(3, 1, 8, 8), torch.randn(3, TOKENS, WIDTH)
    assert torch.equal(expert.predict(module, x, torch.rand(3), text), torch.zeros(3, 1, 8, 8))


def test_an_expert_reads_its_text_and_its_time() -> None:
    module = networks.build(toy_expert(), 0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    x, text, t = torch.randn(2, 1, 8, 8), torch.randn(2, TOKENS, WIDTH), torch.tensor([0.2, 0.9])
    base = expert.predict(module, x, t, text)
    assert not torch.allclose(base, expert.predict(module, x, t, text + 1))
    assert not torch.allclose(base, expert.predict(module, x, t.flip(0), text))


def test_an_expert_without_cross_attention_is_refused() -> None:
    config = {**toy_expert().config, "cross_attention_dim": None}
    with pytest.raises(ConfigError, match="cross_attention_dim"):
        networks.describe(expert.MODEL_CLASS, config)


@pytest.mark.parametrize("config", [{"num_layers": "three"}, {"surprise": 1}, {"patch_size": 0}])
def test_a_config_that_cannot_be_built_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be built"):
        networks.describe(expert.MODEL_CLASS, {**toy_expert().config, **config})


def test_an_unknown_model_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="UNet"):
        networks.describe("UNet", {})


def test_a_config_that_gives_other_tensors_than_the_manifest_lists_is_refused() -> None:
    architecture = toy_expert()
    with pytest.raises(ConfigError, match="another version"):
        networks.build(dataclasses.replace(architecture, tensors=architecture.tensors[:-1]), 0)


def test_initial_weights_depend_on_seed_and_stream_only() -> None:
    def weights(seed: int, stream: str) -> torch.Tensor:
        torch.rand(1)
        return torch.cat([p.flatten() for p in networks.build(toy_expert(), seed, stream).parameters()])

    assert torch.equal(weights(1, "a"), weights(1, "a"))
    assert not torch.equal(weights(1, "a"), weights(2, "a"))
    assert not torch.equal(weights(1, "a"), weights(1, "b"))


def test_a_fresh_router_is_undecided() -> None:
    module = networks.build(toy_router(clusters=5), 0)
    logits = module(torch.randn(3, 1, 8, 8), torch.rand(3), torch.randn(3, TOKENS, WIDTH))
    assert torch.equal(logits, torch.zeros(3, 5))


def test_a_text_aware_router_asks_for_text_and_a_published_one_ignores_it() -> None:
    x, t, text = torch.randn(2, 1, 8, 8), torch.rand(2), torch.randn(2, TOKENS, WIDTH)
    with pytest.raises(ValueError, match="text-aware"):
        networks.build(toy_router(text=True), 0)(x, t)
    plain = networks.build(toy_router(text=False), 0)
    assert torch.equal(plain(x, t), plain(x, t, text))


def test_a_trained_router_knows_the_exact_posterior_of_a_mixture() -> None:
    means, std, shares = torch.tensor([-0.8, 0.1, 0.6]), 0.2, torch.tensor([0.5, 0.3, 0.2])
    generator = torch.Generator().manual_seed(0)

    def noisy(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cluster, x_t and t of images of one shade, drawn from a mixture of three Gaussians."""
        cluster = torch.multinomial(shares, count, True, generator=generator)
        shade = means[cluster] + std * torch.randn(count, generator=generator)
        x0 = shade.view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
        t = torch.rand(count, generator=generator)
        return cluster, objectives.noised(x0, torch.randn(x0.shape, generator=generator), t), t

    config = {"clusters": 3, "in_channels": 1, "sample_size": 2, "patch_size": 2, "hidden_size": 32}
    sizes = {"num_layers": 1, "num_attention_heads": 2}
    module = networks.build(networks.describe(router.MODEL_CLASS, config | sizes), 0)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (150 - step) / 75)
        cluster, x, t = noisy(256)
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(module(x, t), cluster))
        optimizer.step()
    _, x, t = noisy(2000)
    # Of x_t the mean over its 4 pixels says all: N((1 - t) mean, (1 - t)^2 std^2 + t^2 / 4).
    mean, t = x.flatten(1).mean(1)[:, None], t[:, None]
    variance = (1 - t) ** 2 * std**2 + t**2 / 4
    exact = (shares.log() - 0.5 * (mean - (1 - t) * means) ** 2 / variance).softmax(1)
    found = module(x, t[:, 0]).detach().softmax(1)
    assert float((found - exact).abs().mean()) < 0.04
    assert float((shares - exact).abs().mean()) > 0.2  # the prior alone is far off
