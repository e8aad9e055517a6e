"""The published folder layout: recognising it, loading its networks, writing it.

Owns: names and shapes of published tensors, the settings that stand in for what such a folder does not say,
conversion from diffusers' PixArt names. Does not own: the networks (`published_expert`, `router`), the
pipeline's other parts (`parts`), text encoders in foreign layouts (`components.clip_folder`).

    config.json, model_index.json               read where they help; neither is needed
    expert_<i>/{config.json,diffusion_pytorch_model.safetensors}
    router/{config.json,pytorch_model.safetensors}
    vae/, text_encoder/, tokenizer/, scheduler/ each may be absent

Sizes and depth are read off the tensors. Only the number of attention heads cannot be: it is taken from
config.json, under any of the usual names, else it is the one DiT uses at that width.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from paris_p2p.components.clip_folder import read_json
from paris_p2p.components.presets import VAE_FACTOR, VAE_SCALE
from paris_p2p.diffusion import published_expert, router
from paris_p2p.diffusion.published_expert import PublishedExpert
from paris_p2p.diffusion.router import Router
from paris_p2p.errors import ConfigError
from paris_p2p.store.model_folder import COMPONENT_CLASSES, NETWORK_CLASSES, WEIGHTS_NAME

log = logging.getLogger(__name__)

ROUTER_WEIGHTS_NAME = "pytorch_model.safetensors"
EXPERT_FOLDER = re.compile(r"expert_(0|[1-9][0-9]{0,3})")
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What training wrappers put before every name."""
_LAYER = re.compile(r"layers\.([0-9]{1,4})\.")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "heads", "nhead")
_HEAD_DIMS = ("attention_head_dim", "head_dim")
_EPS = ("norm_eps", "layer_norm_eps", "eps")
_OBJECTIVES = ("objective", "prediction_type", "training_objective")


def weights_file(folder: Path) -> Path:
    """The safetensors file of the network in `folder`. Raises `ConfigError`: pickles are not read."""
    for name in (WEIGHTS_NAME, ROUTER_WEIGHTS_NAME, "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    pickles = [
        path.name for path in sorted(folder.glob("*")) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    ]
    hint = f": {pickles[0]} is a pickle, convert it to safetensors" if pickles else ""
    raise ConfigError(f"{folder} holds no safetensors weights{hint}")


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a weights file, without wrappers' prefixes. Raises `ConfigError`."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return _stripped(found)


def is_published(folder: Path) -> bool:
    """Whether the network in `folder` has published names, not a run's own."""
    try:
        names = shapes(weights_file(folder)).keys()
    except ConfigError:
        return False
    own_router = read_json(folder / "config.json").get("_class_name") == router.MODEL_CLASS
    return {"patch_embed.weight", "pos_embed"} <= names and not own_router


def read_config(folder: Path) -> dict[str, Any]:
    """What `folder`'s config.json says, nested objects flattened; nothing if there is none."""
    plain = read_json(folder / "config.json")
    nested = [value for value in plain.values() if isinstance(value, dict)]
    return {key: value for part in (*nested, plain) for key, value in part.items()}


def expert_config(shape: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, Any]:
    """`PublishedExpert`'s arguments for tensors of these shapes. Raises `ConfigError`."""
    hidden, channels, patch, sample = _image_sizes(shape)
    mlp = "text_proj.0.weight" in shape
    text = shape.get("text_proj.0.weight" if mlp else "text_proj.weight", (hidden, 768))
    return {
        "num_layers": _layers(shape),
        "num_attention_heads": _heads(config, hidden),
        "hidden_size": hidden,
        "in_channels": channels,
        "out_channels": shape.get("final_layer.linear.weight", (channels * patch**2,))[0] // patch**2,
        "patch_size": patch,
        "sample_size": sample,
        "text_width": text[1],
        "text_projection": "mlp" if mlp else "linear",
        "norm_eps": _number(config, _EPS, 1e-5),
    }


def router_config(shape: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, Any]:
    """`Router`'s arguments for tensors of these shapes. Raises `ConfigError`."""
    hidden, channels, patch, sample = _image_sizes(shape)
    return {
        "clusters": shape.get("head.4.weight", (0,))[0],
        "in_channels": channels,
        "sample_size": sample,
        "patch_size": patch,
        "hidden_size": hidden,
        "num_layers": _layers(shape),
        "num_attention_heads": _heads(config, hidden),
        "text_width": shape["text_embed.norm.weight"][0] if "text_embed.norm.weight" in shape else None,
        "norm_eps": _number(config, _EPS, 1e-5),
        "time_scale": 1.0,  # t on the scale 0..1000, as its experts take it
    }


def load_network(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The expert or router in `folder`, F32 or `dtype`, in evaluation mode; its tensors are mapped from the
    file where they need no conversion. Raises `ConfigError` naming what is missing or does not fit."""
    path = weights_file(folder)
    shape, config = shapes(path), read_config(folder)
    try:
        with torch.device("meta"):
            network: nn.Module = (
                Router(**router_config(shape, config))
                if "cls_token" in shape
                else PublishedExpert(**expert_config(shape, config))
            )
        state = _fitting(folder, network, _stripped(load_file(path)), dtype or torch.float32)
        network.load_state_dict(state, assign=True)
    except (OSError, SafetensorError, ValueError, RuntimeError, ArithmeticError, TypeError) as error:
        raise ConfigError(f"{folder} cannot be loaded: {error}") from None
    return network.eval().requires_grad_(False)


def _fitting(
    folder: Path, network: nn.Module, found: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """`found`'s tensors for `network`. Raises `ConfigError` for missing or misshapen ones."""
    wanted = network.state_dict()
    if missing := sorted(wanted.keys() - found.keys()):
        raise ConfigError(f"{folder} lacks {len(missing)} tensors, {', '.join(missing[:3])} among them")
    if extra := sorted(found.keys() - wanted.keys()):
        log.warning("%s: %d unknown tensors ignored: %s", folder, len(extra), ", ".join(extra[:3]))
    state = {name: found[name] for name in wanted}
    if state["pos_embed"].ndim == 2:
        state["pos_embed"] = state["pos_embed"][None]
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise ConfigError(
                f"{folder}: {name} is {tuple(tensor.shape)}, the other tensors make it "
                f"{tuple(wanted[name].shape)}"
            )
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def read_index(folder: Path) -> dict[str, Any] | None:
    """The pipeline's index, parts and settings, for a model in the published layout; None if it is not one.

    Entries are (module, class) as in our own `model_index.json`. Raises `ConfigError` for a damaged file.
    """
    experts = {
        int(found[1]): path
        for path in folder.glob("expert_*")
        if (found := EXPERT_FOLDER.fullmatch(path.name))
    }
    has_router = (folder / "router").is_dir()
    networks = [*(experts[k] for k in sorted(experts)), *([folder / "router"] if has_router else [])]
    if not networks or not is_published(networks[0]):
        return None
    parts: dict[str, Any] = {
        f"expert_{k}": NETWORK_CLASSES[published_expert.MODEL_CLASS] for k in sorted(experts)
    }
    if has_router:
        parts["router"] = NETWORK_CLASSES[router.MODEL_CLASS]
    parts |= {name: entry for name, entry in COMPONENT_CLASSES.items() if (folder / name).is_dir()}
    parts |= _scheduler(folder)
    return {**parts, **_settings(folder, experts, has_router)}


def _settings(folder: Path, experts: Mapping[int, Path], has_router: bool) -> dict[str, Any]:
    """The settings of a model in the published layout: as published, where the folder says nothing."""
    config = read_config(folder) | read_json(folder / "model_index.json")
    clusters = max(experts, default=-1) + 1
    if has_router:
        clusters = max(clusters, shapes(weights_file(folder / "router")).get("head.4.weight", (0,))[0])
    some = experts[min(experts)] if experts else folder / "router"
    shape = shapes(weights_file(some))
    _, channels, _, size = _image_sizes(shape)
    text = shape.get("text_proj.weight", shape.get("text_proj.0.weight", (0, 768)))[1]
    missing = [f"expert_{k}" for k in range(clusters) if k not in experts]
    return {
        "run_id": "",
        "clusters": clusters,
        "latents": _latents(folder, channels, size),
        "captions": {"tokens": 77, "width": text},
        "sampling": {
            "steps": int(_number(config, ("num_inference_steps",), 50)),
            "guidance_scale": _number(config, ("guidance_scale", "cfg_scale"), 7.5),
            "top_k": int(_number(config, ("top_k",), 2)),
            "scheduler": "euler",
        },
        "objectives": {f"expert_{k}": _objective(read_config(path)) for k, path in experts.items()},
        "missing": missing + ([] if has_router else ["router"]),
    }


def _latents(folder: Path, channels: int, size: int) -> dict[str, Any]:
    """Four channels are a VAE's; one or three are pixels."""
    if channels in (1, 3):
        return {
            "space": "pixel",
            "channels": channels,
            "size": size,
            "image_size": size,
            "scale": 1.0,
            "shift": 0.0,
        }
    vae = read_json(folder / "vae" / "config.json")
    scale, shift = _number(vae, ("scaling_factor",), VAE_SCALE), _number(vae, ("shift_factor",), 0.0)
    levels = vae.get("block_out_channels")
    factor = 2 ** (len(levels) - 1) if isinstance(levels, list) and levels else VAE_FACTOR
    return {
        "space": "vae",
        "channels": channels,
        "size": size,
        "image_size": size * factor,
        "scale": scale,
        "shift": shift,
    }


def _scheduler(folder: Path) -> dict[str, Any]:
    """The folder's scheduler, if it is one for flow matching; else the pipeline makes its own."""
    name = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    known = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
    return {"scheduler": ("diffusers", name)} if name in known else {}


def _objective(config: Mapping[str, Any]) -> str:
    said = {str(config[key]).lower() for key in _OBJECTIVES if key in config}
    return "ddpm" if said & {"ddpm", "epsilon", "eps"} else "flow_matching"


def _image_sizes(shape: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """Hidden size, channels, patch and sample size."""
    weight, positions = shape.get("patch_embed.weight", ()), shape.get("pos_embed", ())
    if len(weight) != 4 or len(positions) < 2:
        raise ConfigError(
            "these are no weights in the published layout: patch_embed and pos_embed are missing"
        )
    grid = math.isqrt(positions[-2])
    if grid * grid != positions[-2]:
        raise ConfigError(f"pos_embed has {positions[-2]} positions, which is no square")
    return weight[0], weight[1], weight[3], grid * weight[3]


def _layers(shape: Iterable[str]) -> int:
    return 1 + max((int(found[1]) for name in shape if (found := _LAYER.match(name))), default=-1)


def _heads(config: Mapping[str, Any], hidden: int) -> int:
    if dim := int(_number(config, _HEAD_DIMS, 0)):
        return int(_number(config, _HEADS, hidden // dim))
    default = DIT_HEADS.get(hidden, max(1, hidden // 64))
    heads = int(_number(config, _HEADS, default))
    if hidden not in DIT_HEADS and not any(name in config for name in _HEADS):
        log.warning("config.json does not say how many attention heads: %d are taken", heads)
    return heads


def _number(config: Mapping[str, Any], names: Iterable[str], default: float) -> float:
    """The first number in `config` under one of `names`."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return default


def _stripped(named: Mapping[str, Any]) -> dict[str, Any]:
    """`named` without the prefixes that every name has."""
    for prefix in _PREFIXES:
        if named and all(name.startswith(prefix) for name in named):
            return _stripped({name.removeprefix(prefix): value for name, value in named.items()})
    return dict(named)
