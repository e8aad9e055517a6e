"""Tests of the published layout: `paris_p2p.diffusion.published` and `published_expert`.

The reference implementations below are straightforward and share nothing with the networks under test: plain
matrix products over a dictionary of tensors, attention spelled out.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from paris_p2p.diffusion import export, networks, published
from paris_p2p.diffusion.pipeline import ParisPipeline
from paris_p2p.diffusion.published_expert import PublishedExpert
from paris_p2p.diffusion.router import Router
from paris_p2p.errors import ConfigError

from .conftest import WIDTH, toy_expert

HIDDEN, HEADS, LAYERS, PATCH, SIDE, CHANNELS, CLUSTERS = 24, 3, 2, 2, 8, 4, 5
State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def attention(state: State, name: str, query: Tensor, context: Tensor) -> Tensor:
    weights = state[f"{name}.in_proj_weight"].chunk(3)
    biases = state[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = (
        (source @ weight.T + bias).view(*source.shape[:2], HEADS, -1).transpose(1, 2)
        for source, weight, bias in zip((query, context, context), weights, biases, strict=True)
    )
    share = (q @ k.transpose(-1, -2) / math.sqrt(HIDDEN // HEADS)).softmax(-1)
    return linear(state, f"{name}.out_proj", (share @ v).transpose(1, 2).flatten(2))


def time_embedding(state: State, t: Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    return linear(state, "time_embed.mlp.2", functional.silu(linear(state, "time_embed.mlp.0", waves)))


def patches(state: State, x: Tensor) -> Tensor:
    """Row by row, column by column."""
    found = []
    weight = state["patch_embed.weight"].flatten(1)
    for row in range(0, SIDE, PATCH):
        for column in range(0, SIDE, PATCH):
            patch = x[:, :, row : row + PATCH, column : column + PATCH].flatten(1)
            found.append(patch @ weight.T + state["patch_embed.bias"])
    return torch.stack(found, dim=1) + state["pos_embed"]


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    inside = functional.gelu(linear(state, f"{name}.0", x), approximate="tanh")
    return linear(state, f"{name}.2", inside)


def reference_expert(state: State, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    time = time_embedding(state, t)
    shared = linear(state, "t_block.1", functional.silu(time)).view(-1, 6, HIDDEN)
    text = linear(state, "text_proj", text)
    h = patches(state, x)
    for n in range(LAYERS):
        layer = f"layers.{n}"
        table = (state[f"{layer}.scale_shift_table"] + shared)[:, :, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = (table[:, i] for i in range(6))
        inside = norm(h) * (1 + scale1) + shift1
        h = h + gate1 * attention(state, f"{layer}.attn", inside, inside)
        h = h + attention(state, f"{layer}.cross_attn", h, text)
        h = h + gate2 * mlp(state, f"{layer}.mlp", norm(h) * (1 + scale2) + shift2)
    final = (state["final_layer.scale_shift_table"] + time[:, None])[:, :, None]
    out = linear(state, "final_layer.linear", norm(h) * (1 + final[:, 1]) + final[:, 0])
    image = torch.empty(len(x), CHANNELS, SIDE, SIDE)
    grid = SIDE // PATCH
    for place in range(grid * grid):
        row, column = divmod(place, grid)
        block = out[:, place].view(-1, PATCH, PATCH, CHANNELS).permute(0, 3, 1, 2)
        image[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = block
    return image


def reference_router(state: State, x: Tensor, t: Tensor) -> Tensor:
    time = time_embedding(state, t)
    h = torch.cat([state["cls_token"].expand(len(x), -1, -1), patches(state, x)], dim=1)
    for n in range(LAYERS):
        layer = f"layers.{n}"
        modulation = linear(state, f"{layer}.adaLN_modulation.1", functional.silu(time))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        inside = norm(h) * (1 + scale1) + shift1
        h = h + gate1 * attention(state, f"{layer}.attn", inside, inside)
        h = h + gate2 * mlp(state, f"{layer}.mlp", norm(h) * (1 + scale2) + shift2)
    out = functional.gelu(linear(state, "head.0", h[:, 0]))
    out = functional.gelu(norm(out) * state["head.2.weight"] + state["head.2.bias"])
    return linear(state, "head.4", out)


def shapes(router: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of the published layout, written down by hand."""
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (HIDDEN, CHANNELS, PATCH, PATCH),
        "patch_embed.bias": (HIDDEN,),
        "pos_embed": (1, (SIDE // PATCH) ** 2, HIDDEN),
    }

    def add(name: str, inputs: int, outputs: int) -> None:
        found.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    add("time_embed.mlp.0", 256, HIDDEN)
    add("time_embed.mlp.2", HIDDEN, HIDDEN)
    for n in range(LAYERS):
        layer = f"layers.{n}"
        for attn in ("attn",) if router else ("attn", "cross_attn"):
            found[f"{layer}.{attn}.in_proj_weight"] = (3 * HIDDEN, HIDDEN)
            found[f"{layer}.{attn}.in_proj_bias"] = (3 * HIDDEN,)
            add(f"{layer}.{attn}.out_proj", HIDDEN, HIDDEN)
        add(f"{layer}.mlp.0", HIDDEN, 4 * HIDDEN)
        add(f"{layer}.mlp.2", 4 * HIDDEN, HIDDEN)
        if router:
            add(f"{layer}.adaLN_modulation.1", HIDDEN, 6 * HIDDEN)
        else:
            found[f"{layer}.scale_shift_table"] = (6, HIDDEN)
    if router:
        found["cls_token"] = (1, 1, HIDDEN)
        add("head.0", HIDDEN, HIDDEN)
        found.update({"head.2.weight": (HIDDEN,), "head.2.bias": (HIDDEN,)})
        add("head.4", HIDDEN, CLUSTERS)
    else:
        add("text_proj", 768, HIDDEN)
        add("t_block.1", HIDDEN, 6 * HIDDEN)
        add("final_layer.linear", HIDDEN, PATCH * PATCH * CHANNELS)
        found["final_layer.scale_shift_table"] = (2, HIDDEN)
    return found


def random_state(seed: int, router: bool = False) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(shape, generator=generator) for name, shape in sorted(shapes(router).items())
    }


def write(folder: Path, state: State, name: str, config: dict[str, Any] | None) -> None:
    folder.mkdir(parents=True)
    save_file(state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model as published: two of five experts, the router, nothing else."""
    root = tmp_path / "published"
    for k in (0, 3):
        write(
            root / f"expert_{k}", random_state(k), "diffusion_pytorch_model.safetensors", {"num_heads": HEADS}
        )
    write(root / "router", random_state(9, True), "pytorch_model.safetensors", {"num_heads": HEADS})
    (root / "config.json").write_text(json.dumps({"num_experts": CLUSTERS}))
    (root / "model_index.json").write_text(json.dumps({"_class_name": "Other", "expert_0": ["other", "DiT"]}))
    return root


def example(count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator)
    return x, 1000 * torch.rand(count, generator=generator), torch.randn(count, 7, 768, generator=generator)


def test_a_published_expert_computes_what_the_reference_computes(model: Path) -> None:
    x, t, text = example()
    pipe = ParisPipeline.from_pretrained(model)
    for k, network in ((0, pipe.expert_0), (3, pipe.expert_3)):
        found = network(x, encoder_hidden_states=text, timestep=t).sample
        assert torch.allclose(found, reference_expert(random_state(k), x, t, text), atol=1e-4)
    one = pipe.expert_3(x, encoder_hidden_states=text, timestep=t[0]).sample
    expected = reference_expert(random_state(3), x, t[:1].expand(3), text)
    assert torch.allclose(one, expected, atol=1e-4)


def test_the_published_router_computes_what_the_reference_computes(model: Path) -> None:
    x, t, _ = example()
    pipe = ParisPipeline.from_pretrained(model)
    assert torch.allclose(pipe.router(x, t), reference_router(random_state(9, True), x, t), atol=1e-4)


def test_what_a_published_folder_does_not_say_is_as_published(model: Path) -> None:
    pipe = ParisPipeline.from_pretrained(model)
    assert pipe.present == [0, 3]
    assert pipe.config["clusters"] == CLUSTERS
    assert pipe.config["missing"] == ["expert_1", "expert_2", "expert_4"]
    assert pipe.config["latents"] == {
        "space": "vae",
        "channels": 4,
        "size": 8,
        "image_size": 64,
        "scale": 0.18215,
        "shift": 0.0,
    }
    assert pipe.config["sampling"] == {
        "steps": 50,
        "guidance_scale": 7.5,
        "top_k": 2,
        "scheduler": "euler",
    }


def test_missing_components_are_named_when_they_are_needed(model: Path) -> None:
    pipe = ParisPipeline.from_pretrained(model)
    with pytest.raises(ConfigError, match="vae"):
        pipe("a cat")
    with pytest.raises(ConfigError, match=r"tokenizer|text_encoder"):
        pipe("a cat", output_type="latent")


def test_wrapped_half_precision_weights_and_unknown_tensors_are_taken(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {f"module.{name}": tensor.bfloat16() for name, tensor in random_state(0).items()}
    state["module.extra"] = torch.zeros(1)
    write(tmp_path / "e", state, "diffusion_pytorch_model.safetensors", {"model": {"num_heads": HEADS}})
    network = published.load_network(tmp_path / "e")
    assert isinstance(network, PublishedExpert)
    assert network.dtype == torch.float32
    assert "extra" in caplog.text
    assert published.load_network(tmp_path / "e", torch.bfloat16).dtype == torch.bfloat16
    x, t, text = example()
    rounded = {name: tensor.bfloat16().float() for name, tensor in random_state(0).items()}
    found = network(x, encoder_hidden_states=text, timestep=t).sample
    assert torch.allclose(found, reference_expert(rounded, x, t, text), atol=1e-4)


def test_what_cannot_be_loaded_is_named(model: Path, tmp_path: Path) -> None:
    state = random_state(0)
    del state["layers.1.mlp.2.bias"]
    write(tmp_path / "a", state, "diffusion_pytorch_model.safetensors", None)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.2\.bias"):
        published.load_network(tmp_path / "a")
    state = random_state(0) | {"text_proj.bias": torch.zeros(3)}
    write(tmp_path / "b", state, "diffusion_pytorch_model.safetensors", None)
    with pytest.raises(ConfigError, match=r"text_proj\.bias"):
        published.load_network(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="is a pickle"):
        published.weights_file(tmp_path / "c")


def test_an_expert_of_another_size_of_image_is_refused(model: Path) -> None:
    _, t, text = example()
    with pytest.raises(ValueError, match="4 x 8 x 8"):
        ParisPipeline.from_pretrained(model).expert_0(
            torch.zeros(3, 4, 16, 16), encoder_hidden_states=text, timestep=t
        )


def test_a_run_s_own_expert_survives_the_published_layout(tmp_path: Path) -> None:
    own = networks.build(toy_expert(), 0).eval()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    export.write_network(own, tmp_path / "expert_0")
    again = published.load_network(tmp_path / "expert_0")
    x, text = torch.randn(2, 1, 8, 8), torch.randn(2, 4, WIDTH)
    arguments = {"encoder_hidden_states": text, "timestep": torch.tensor([3.0, 700.0])}
    assert torch.allclose(own(x, **arguments).sample, again(x, **arguments).sample, atol=1e-5)


def test_published_weights_survive_a_round_trip_bit_by_bit(model: Path, tmp_path: Path) -> None:
    done = export.export(model, tmp_path / "copy")
    assert done.folder == tmp_path / "copy"
    for part in (
        "expert_0/diffusion_pytorch_model",
        "expert_3/diffusion_pytorch_model",
        "router/pytorch_model",
    ):
        first, second = (load_file(root / f"{part}.safetensors") for root in (model, tmp_path / "copy"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    x, t, _ = example()
    pipe = ParisPipeline.from_pretrained(tmp_path / "copy")
    assert torch.allclose(pipe.router(x, t), reference_router(random_state(9, True), x, t), atol=1e-4)
    assert pipe.config["missing"] == ["expert_1", "expert_2", "expert_4"]
    with pytest.raises(ConfigError, match="exists"):
        export.export(model, tmp_path / "copy")


def test_gradient_checkpointing_changes_no_gradient(model: Path) -> None:
    x, t, text = example()
    network = published.load_network(model / "expert_0").requires_grad_(True).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]  # ModelMixin's, untyped
        network.zero_grad()
        loss = network(x, encoder_hidden_states=text, timestep=t).sample.square().mean()
        torch.autograd.backward(loss)
        grads.append(network.layers[0].attn.in_proj_weight.grad.clone())  # type: ignore[union-attr, index]
    assert torch.allclose(*grads)


def test_a_run_s_router_counts_time_from_0_to_1_a_published_one_from_0_to_1000(model: Path) -> None:
    assert Router(**networks_router()).config["time_scale"] == 1000.0
    assert published.load_network(model / "router").config["time_scale"] == 1.0  # type: ignore[index]


def networks_router() -> dict[str, Any]:
    return {"clusters": 2, "sample_size": 4, "hidden_size": 8, "num_layers": 1, "num_attention_heads": 1}
