"""Text encoders and tokenizers as the transformers library writes them, read into our own.

Owns: recognising such folders, the key map of a CLIP text tower. Does not own: the tower (`text`), the byte
pairs (`tokenizer`). Nothing here needs transformers.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from paris_p2p.errors import ConfigError

MAX_JSON_BYTES = 16 << 20
WEIGHTS_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.safetensors")
CLIP_VOCABULARY = 49408
ACTIVATIONS = {"quick_gelu": True, "gelu": False}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file. Raises `ConfigError` when it is damaged."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
        plain: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    return plain if isinstance(plain, dict) else {}


def is_clip_folder(folder: Path) -> bool:
    """Whether `folder` holds a CLIP text model as transformers writes it."""
    config = read_json(folder / "config.json")
    return str(config.get("model_type", "")).startswith("clip") and "_class_name" not in config


def encoder_arguments(folder: Path) -> dict[str, Any]:
    """`TextEncoder`'s arguments for the model in `folder`. Raises `ConfigError` naming what is missing."""
    config = read_json(folder / "config.json")
    config = {**config, **config.get("text_config", {})}
    try:
        if config["hidden_act"] not in ACTIVATIONS:
            raise ConfigError(f"{folder} uses the activation {config['hidden_act']!r}, not one of CLIP's")
        return {
            "vocab_size": config["vocab_size"],
            "context_length": config["max_position_embeddings"],
            "width": config["hidden_size"],
            "heads": config["num_attention_heads"],
            "layers": config["num_hidden_layers"],
            "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
            "quick_gelu": ACTIVATIONS[config["hidden_act"]],
        }
    except (KeyError, TypeError, ArithmeticError) as error:
        raise ConfigError(
            f"{folder / 'config.json'} does not describe a CLIP text model: {error!r}"
        ) from None


def encoder_state(folder: Path, layers: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tower's tensors under our names. Raises `ConfigError`; pickles are not read."""
    path = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise ConfigError(f"{folder} holds no safetensors weights: convert its weights to safetensors")
    try:
        found = {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
        state = {own: torch.cat([found[name] for name in names]) for own, names in _names(layers)}
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except KeyError as error:
        raise ConfigError(f"{path} lacks the tensor {error.args[0]} of a CLIP text model") from None
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def _names(layers: int) -> Iterable[tuple[str, tuple[str, ...]]]:
    """(our name, the transformers names that make it, concatenated)."""
    yield "tower.token_embedding.weight", ("embeddings.token_embedding.weight",)
    yield "tower.positional_embedding", ("embeddings.position_embedding.weight",)
    pairs = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        yield f"tower.ln_final.{kind}", (f"final_layer_norm.{kind}",)
        for n in range(layers):
            ours, theirs = f"tower.transformer.resblocks.{n}", f"encoder.layers.{n}"
            inputs = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            yield f"{ours}.attn.in_proj_{kind}", inputs
            yield f"{ours}.attn.out_proj.{kind}", (f"{theirs}.self_attn.out_proj.{kind}",)
            for own, name in pairs.items():
                yield f"{ours}.{own}.{kind}", (f"{theirs}.{name}.{kind}",)


def tokenizer_arguments(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`Tokenizer`'s arguments if `config` is that of transformers' CLIP tokenizer in `folder`; None if not.

    Raises `ConfigError` when its vocabulary is not CLIP's: the merges are those that ship with open_clip."""
    if not str(config.get("tokenizer_class", "")).startswith("CLIPTokenizer"):
        return None
    vocabulary = read_json(folder / "vocab.json")
    if vocabulary and len(vocabulary) != CLIP_VOCABULARY:
        raise ConfigError(
            f"{folder} has a vocabulary of {len(vocabulary)} tokens, CLIP's has {CLIP_VOCABULARY}"
        )
    special = read_json(folder / "special_tokens_map.json")
    pad = config.get("pad_token", special.get("pad_token", "<|endoftext|>"))
    content = pad.get("content") if isinstance(pad, dict) else pad
    length = config.get("model_max_length", 77)
    return {
        "context_length": length if type(length) is int and length <= 4096 else 77,
        "pad_with_end": content == "<|endoftext|>",
    }
