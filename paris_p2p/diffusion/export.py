"""Writing a model in the published folder layout: what `paris-node export-model` does.

Owns: the conversion, part by part, so that one network is in memory at a time. Does not own: the layout's
reading (`published`), its names (`published_names`).

Experts of the published architecture and routers are written as they are. A run's own (PixArt) experts need
one thing the published layout lacks: two layers over the text, written as `text_proj.0` and `text_proj.2`,
with `"text_projection": "mlp"` in config.json. Text encoder, tokenizer, VAE and scheduler are copied.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from paris_p2p.diffusion import published_expert
from paris_p2p.diffusion.parts import OnPart, check_part, is_part, load_part, read_index
from paris_p2p.diffusion.published import ROUTER_WEIGHTS_NAME
from paris_p2p.diffusion.published_expert import PublishedExpert
from paris_p2p.diffusion.published_names import as_published
from paris_p2p.diffusion.router import Router
from paris_p2p.errors import ConfigError
from paris_p2p.store.durable import disk
from paris_p2p.store.files import share_tree
from paris_p2p.store.model_folder import CONFIG_NAME, INDEX_NAME, NETWORK_CLASSES, WEIGHTS_NAME


@dataclass(frozen=True, slots=True)
class Exported:
    """`parts`: what was written. `extended`: experts that use the layout's extension for their text."""

    folder: Path
    parts: tuple[str, ...]
    extended: tuple[str, ...]


def export(
    model: Path, out: Path, dtype: torch.dtype | None = None, on_part: OnPart = lambda *_: None
) -> Exported:
    """Write the model in folder `model` to the new folder `out`, in the published layout, F32 or `dtype`.

    `on_part(done, total, part)` is called before each part and after the last. Raises `ConfigError` when
    `model` is none or `out` is taken, `StoreError` when the disk refuses.
    """
    index = read_index(model)
    parts = [name for name in index if is_part(name)]
    for name in parts:
        check_part(model / name, index[name])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists: name a new folder with --out")
    with disk("exporting a model", out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            new.chmod(0o755)  # mkdtemp's folders are private
            extended = _fill(new, model, index, parts, dtype, on_part)
            if out.exists():
                out.rmdir()
            new.rename(out)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return Exported(out, tuple(parts), tuple(extended))


def _fill(
    new: Path,
    model: Path,
    index: dict[str, Any],
    parts: list[str],
    dtype: torch.dtype | None,
    on_part: OnPart,
) -> list[str]:
    extended = []
    for done, name in enumerate(parts):
        on_part(done, len(parts), name)
        if index[name][1] not in NETWORK_CLASSES:
            share_tree(model / name, new / name)
            continue
        network = load_part(model / name, index[name], dtype)
        if write_network(network, new / name, index["objectives"].get(name)):
            extended.append(name)
        index[name] = NETWORK_CLASSES["Router" if name == "router" else published_expert.MODEL_CLASS]
        del network
    on_part(len(parts), len(parts), "")
    header = {"_class_name": "ParisPipeline"}
    (new / INDEX_NAME).write_text(json.dumps(header | index, indent=2) + "\n", encoding="utf-8")
    summary = {"num_experts": index["clusters"], "sampling": index["sampling"], "latents": index["latents"]}
    (new / CONFIG_NAME).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return extended


def write_network(network: nn.Module, folder: Path, objective: str | None = None) -> bool:
    """Write an expert or a router into `folder`, making it, in the published layout and its own dtype.

    `objective`: an expert's, for its config.json. Returns whether it needs the extension."""
    folder.mkdir(parents=True)
    if isinstance(network, Router | PublishedExpert):
        tensors = network.state_dict()
        config = {key: value for key, value in network.config.items() if not key.startswith("_")}
        config.pop("time_scale", None)  # the layout counts time from 0 to 1000
    else:
        tensors, config = as_published(network), _published_config(dict(network.config))  # type: ignore[arg-type]
    if objective is not None:
        config["objective"] = objective
    name = ROUTER_WEIGHTS_NAME if isinstance(network, Router) else WEIGHTS_NAME
    dense = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(dense, folder / name, {"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config.get("text_projection") == "mlp"


def _published_config(own: dict[str, Any]) -> dict[str, Any]:
    """`PublishedExpert`'s arguments for the expert that has these PixArt ones."""
    if own["caption_channels"] is None or own["use_additional_conditions"]:
        raise ConfigError("an expert without text, or with PixArt's size conditions, has no published form")
    return {
        "num_layers": own["num_layers"],
        "num_attention_heads": own["num_attention_heads"],
        "hidden_size": own["num_attention_heads"] * own["attention_head_dim"],
        "in_channels": own["in_channels"],
        "out_channels": own["out_channels"],
        "patch_size": own["patch_size"],
        "sample_size": own["sample_size"],
        "text_width": own["caption_channels"],
        "text_projection": "mlp",
        "norm_eps": own["norm_eps"],
    }
