"""Tests of `paris_p2p.components.clip_folder`: text models as the transformers library writes them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from paris_p2p.components.text import TextEncoder
from paris_p2p.components.tokenizer import Tokenizer
from paris_p2p.errors import ConfigError

WIDTH, HEADS, LAYERS, VOCABULARY, LENGTH = 8, 2, 2, 11, 6
State = dict[str, Tensor]


def state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (VOCABULARY, WIDTH),
        "embeddings.position_embedding.weight": (LENGTH, WIDTH),
    }

    def add(name: str, inputs: int | None, outputs: int) -> None:
        weight = (outputs,) if inputs is None else (outputs, inputs)
        found.update({f"{name}.weight": weight, f"{name}.bias": (outputs,)})

    add("final_layer_norm", None, WIDTH)
    for n in range(LAYERS):
        layer = f"encoder.layers.{n}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add(f"{layer}.self_attn.{part}", WIDTH, WIDTH)
        add(f"{layer}.layer_norm1", None, WIDTH)
        add(f"{layer}.layer_norm2", None, WIDTH)
        add(f"{layer}.mlp.fc1", WIDTH, 2 * WIDTH)
        add(f"{layer}.mlp.fc2", 2 * WIDTH, WIDTH)
    return {f"text_model.{k}": 0.5 * torch.randn(shape, generator=generator) for k, shape in found.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "text_encoder"
    path.mkdir()
    save_file(state(), path / "model.safetensors")
    config = {
        "model_type": "clip_text_model",
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 2 * WIDTH,
        "hidden_act": "quick_gelu",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def reference(named: State, ids: Tensor) -> Tensor:
    """CLIP's text transformer (Radford et al. 2021), spelled out."""

    def part(name: str) -> Tensor:
        return named[f"text_model.{name}"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ part(f"{name}.weight").T + part(f"{name}.bias")

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (WIDTH,), part(f"{name}.weight"), part(f"{name}.bias"))

    length = ids.shape[1]
    x = part("embeddings.token_embedding.weight")[ids] + part("embeddings.position_embedding.weight")[:length]
    future = torch.ones(length, length).triu(1).bool()
    for n in range(LAYERS):
        layer = f"encoder.layers.{n}"
        h = norm(f"{layer}.layer_norm1", x)
        q, k, v = (
            linear(f"{layer}.self_attn.{kind}_proj", h).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
            for kind in "qkv"
        )
        scores = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).masked_fill(future, -torch.inf)
        x = x + linear(f"{layer}.self_attn.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        h = linear(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", x))
        x = x + linear(f"{layer}.mlp.fc2", h * torch.sigmoid(1.702 * h))
    return norm("final_layer_norm", x)


def test_a_clip_text_model_computes_what_the_reference_computes(folder: Path) -> None:
    ids = torch.tensor([[9, 1, 2, 10, 10, 10], [9, 3, 10, 10, 10, 10]])
    encoder = TextEncoder.from_pretrained(folder)
    assert torch.allclose(encoder(ids), reference(state(), ids), atol=1e-5)
    assert TextEncoder.from_pretrained(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_is_missing_of_a_clip_text_model_is_named(folder: Path) -> None:
    tensors = state()
    del tensors["text_model.encoder.layers.1.mlp.fc2.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.fc2\.bias"):
        TextEncoder.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="convert"):
        TextEncoder.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ConfigError, match="relu"):
        TextEncoder.from_pretrained(folder)


def test_clip_s_own_tokenizer_folder_pads_with_the_end_token(tmp_path: Path) -> None:
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 8, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    # What CLIP's byte pairs make of it: start, "a", "cat", end.
    assert tokenizer(["a cat"]).tolist() == [[49406, 320, 2368, 49407, 49407, 49407, 49407, 49407]]
    tokenizer.save_pretrained(tmp_path / "again")
    again = Tokenizer.from_pretrained(tmp_path / "again")
    assert torch.equal(again(["a cat"]), tokenizer(["a cat"]))
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ConfigError, match="vocabulary"):
        Tokenizer.from_pretrained(tmp_path)
