"""Tests of `paris_p2p.diffusion.initial`: experts that start from a published model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from paris_p2p.diffusion import export, initial, networks
from paris_p2p.diffusion.published_expert import MODEL_CLASS
from paris_p2p.diffusion.shards import Examples
from paris_p2p.diffusion.training import Trainer
from paris_p2p.errors import ConfigError
from paris_p2p.ids import Role
from paris_p2p.wire.manifest import Architecture

from .conftest import TOKENS, WIDTH, toy_expert, toy_recipe, toy_shard

WEIGHTS = "diffusion_pytorch_model.safetensors"


def published() -> Architecture:
    config = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "patch_size": 4,
        "sample_size": 8,
        "text_width": WIDTH,
    }
    return networks.describe(MODEL_CLASS, config)


@torch.no_grad()
def shaken(network: torch.nn.Module) -> torch.nn.Module:
    for parameter in network.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(len(parameter)))
    return network.eval()


def test_a_pixart_model_with_variance_gives_all_that_fits(tmp_path: Path) -> None:
    config = dict(toy_expert().config) | {"out_channels": 2, "caption_channels": 32, "num_layers": 2}
    source = shaken(PixArtTransformer2DModel(**config))
    source.save_pretrained(tmp_path / "pixart" / "transformer")  # type: ignore[operator]
    made = initial.write_initial(toy_expert(), 0, tmp_path / "pixart", tmp_path / "item")
    assert made.fresh == ("caption_projection.linear_1",)  # its text is of another width
    network = networks.build(toy_expert(), 5, initial=tmp_path / "item")
    theirs, ours = source.state_dict(), network.state_dict()
    for name in ("transformer_blocks.0.attn1.to_q.weight", "adaln_single.linear.bias", "scale_shift_table"):
        assert torch.equal(ours[name], theirs[name])
    # The output's rows are (patch row, patch column, channel); channel 1 is the variance.
    assert torch.equal(ours["proj_out.weight"], theirs["proj_out.weight"][::2])


def test_every_expert_of_a_variant_starts_from_the_same_weights(tmp_path: Path) -> None:
    shaken(networks.build(toy_expert(), 0)).save_pretrained(tmp_path / "source")  # type: ignore[operator]
    recipe = toy_recipe()
    said = initial.add_initial(tmp_path / "source", 0, recipe, tmp_path)
    assert said == (f"tiny: 100.0 % of {parameters(toy_expert())} parameters from source",)
    states = [
        networks.build(toy_expert(), seed, f"expert-{seed}", initial=tmp_path / "initial-0").state_dict()
        for seed in (1, 2)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_trainer_starts_from_the_run_s_initial_weights(tmp_path: Path) -> None:
    shaken(networks.build(toy_expert(), 0)).save_pretrained(tmp_path / "source")  # type: ignore[operator]
    shard = Examples([toy_shard(1)])
    trainer = Trainer(toy_recipe(), Role("expert-1"), 0, shard, shard, "cpu", tmp_path / "source")
    wanted = load_file(tmp_path / "source" / WEIGHTS)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in trainer.model.state_dict().items())
    # The average starts there too.
    names = [name for name, _ in trainer.model.named_parameters()]
    averages = dict(zip(names, trainer.ema.shadow_params, strict=True))
    assert all(torch.equal(averages[name], wanted[name]) for name in names)


def parameters(architecture: Architecture) -> int:
    return sum(torch.Size(spec.shape).numel() for spec in architecture.tensors)


def test_published_weights_start_a_published_expert_exactly(tmp_path: Path) -> None:
    source = shaken(networks.build(published(), 0))
    export.write_network(source, tmp_path / "expert_0")
    made = initial.write_initial(published(), 1, tmp_path / "expert_0", tmp_path / "item")
    assert (made.taken, made.fresh) == (made.parameters, ())
    network = networks.build(published(), 2, initial=tmp_path / "item").eval()
    x, text, t = torch.randn(2, 1, 8, 8), torch.randn(2, TOKENS, WIDTH), torch.tensor([10.0, 900.0])
    arguments = {"encoder_hidden_states": text, "timestep": t}
    assert torch.equal(network(x, **arguments).sample, source(x, **arguments).sample)


def test_published_weights_start_a_run_s_own_expert_but_for_its_text(tmp_path: Path) -> None:
    source = shaken(networks.build(published(), 0))
    export.write_network(source, tmp_path / "expert_0")
    made = initial.write_initial(toy_expert(), 1, tmp_path / "expert_0", tmp_path / "item")
    assert made.fresh == ("caption_projection.linear_1", "caption_projection.linear_2")
    ours = load_file(tmp_path / "item" / WEIGHTS)
    fused = source.state_dict()["layers.0.attn.in_proj_weight"]
    assert torch.equal(ours["transformer_blocks.0.attn1.to_k.weight"], fused[16:32])


def test_a_class_conditional_dit_gives_its_image_side(tmp_path: Path) -> None:
    source = shaken(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=1,
            out_channels=2,
            num_layers=1,
            sample_size=8,
            patch_size=4,
            num_embeds_ada_norm=10,
        )
    )
    source.save_pretrained(tmp_path / "dit")  # type: ignore[operator]
    made = initial.write_initial(toy_expert(), 0, tmp_path / "dit", tmp_path / "item")
    ours, theirs = load_file(tmp_path / "item" / WEIGHTS), source.state_dict()
    for name in ("pos_embed.proj.weight", "transformer_blocks.0.ff.net.2.weight"):
        assert torch.equal(ours[name], theirs[name])
    time = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight"
    assert torch.equal(ours["adaln_single.emb.timestep_embedder.linear_1.weight"], theirs[time])
    assert "transformer_blocks.*.attn2.to_q" in made.fresh
    assert "proj_out" not in made.fresh


def test_what_cannot_start_anything_is_named(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    save_file({"conv.weight": torch.zeros(3, 3)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ConfigError, match="nothing in"):
        initial.write_initial(toy_expert(), 0, tmp_path / "other", tmp_path / "item")
    with pytest.raises(ConfigError, match="no safetensors"):
        initial.write_initial(toy_expert(), 0, tmp_path / "nowhere", tmp_path / "item")


def test_initial_weights_that_do_not_fit_the_recipe_are_refused(tmp_path: Path) -> None:
    shaken(networks.build(published(), 0)).save_pretrained(tmp_path / "source")  # type: ignore[operator]
    with pytest.raises(ConfigError, match="do not fit"):
        networks.build(toy_expert(), 0, initial=tmp_path / "source")
    broken = dataclasses.replace(toy_expert())
    state = networks.build(broken, 0).state_dict()
    state["scale_shift_table"][0, 0] = float("nan")
    (tmp_path / "nan").mkdir()
    save_file(state, tmp_path / "nan" / WEIGHTS)
    with pytest.raises(ConfigError, match="not finite"):
        networks.build(broken, 0, initial=tmp_path / "nan")
