"""The parts of a model folder: which there are, of which classes, and loading each.

Owns: `model_index.json`, the table of classes that may be loaded, the order and progress of loading. Does not
own: the pipeline, the published layout (`published`), what is in memory when (`residency`).

Classes are looked up in a fixed table: nothing in a folder can name other code to run. Weights are
safetensors only.
"""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paris_p2p.diffusion import published
from paris_p2p.errors import ConfigError
from paris_p2p.store.model_folder import COMPONENT_CLASSES, INDEX_NAME, NETWORK_CLASSES, SCHEDULERS

EXPERT_NAME = re.compile(r"expert_(0|[1-9][0-9]{0,3})")
PART_NAMES = ("scheduler", "router", "text_encoder", "tokenizer", "vae")
LOADABLE = frozenset(
    {
        *NETWORK_CLASSES.values(),
        *COMPONENT_CLASSES.values(),
        *(("diffusers", class_name) for class_name, _ in SCHEDULERS.values()),
    }
)
MAX_INDEX_BYTES = 4 << 20

OnPart = Callable[[int, int, str], None]
"""Called with (parts loaded, parts asked for so far, the part that is next: empty if that is all)."""


def is_part(name: str) -> bool:
    """Whether `name` is a part of the pipeline, not a setting."""
    return name in PART_NAMES or EXPERT_NAME.fullmatch(name) is not None


def is_network(entry: Any) -> bool:
    """Whether `entry` of the index is something with weights."""
    _, class_name = entry
    return class_name != "Tokenizer" and not class_name.endswith("Scheduler")


def read_index(folder: Path) -> dict[str, Any]:
    """The parts there are and the settings in a model folder: from its `model_index.json`, or, in the
    published layout, from what lies there. Raises `ConfigError`."""
    path = folder / INDEX_NAME
    index = _own_index(path) if path.is_file() else {}
    if "sampling" in index:
        return index
    found = published.read_index(folder)
    if found is not None:
        return found
    if path.is_file():
        raise ConfigError(f"{path} is not a model of this program, nor are there experts as published")
    raise ConfigError(
        f"{folder} holds no model ({INDEX_NAME} is missing): fetch one with paris-node fetch-model"
    )


def _own_index(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"larger than {MAX_INDEX_BYTES} bytes")
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in index.items() if not name.startswith("_")}
        return {name: value for name, value in kept.items() if not is_part(name) or value[0] is not None}
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def check_part(folder: Path, entry: Any) -> None:
    """Whether `entry` of the index, (module, class), may be loaded from `folder`. Raises `ConfigError`."""
    if tuple(entry) not in LOADABLE:
        raise ConfigError(f"{folder.parent / INDEX_NAME} names an unknown class for {folder.name}: {entry}")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is missing, though {INDEX_NAME} lists it: fetch the model again")


def load_part(folder: Path, entry: Any, dtype: torch.dtype | None) -> Any:
    """The part in `folder`; `entry` is its (module, class) in the index, as `check_part` allows it.

    Networks come in F32 or `dtype`, in evaluation mode. Raises `ConfigError`."""
    module_name, class_name = entry
    kind = getattr(importlib.import_module(module_name), class_name)
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(folder)
    if class_name in NETWORK_CLASSES and published.is_published(folder):
        return published.load_network(folder, dtype)
    try:
        # Without use_safetensors diffusers would fall back to unpickling.
        network = kind.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype or torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder} cannot be loaded: {error}") from None
    return network.eval().requires_grad_(False)


def weights_bytes(folder: Path, dtype: torch.dtype | None) -> int:
    """Bytes of the network in `folder` once it is loaded; 0 if that cannot be told yet."""
    try:
        shapes = published.shapes(published.weights_file(folder))
    except ConfigError:
        return 0  # loading it will say what is wrong
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    return elements * (dtype or torch.float32).itemsize


class Loader:
    """Loads parts of the model in `root`, one after another, and tells `on_part`.

    `total`: how many are asked for at first."""

    def __init__(self, root: Path, dtype: torch.dtype | None, on_part: OnPart | None, total: int) -> None:
        self._root, self._dtype, self._on_part = root, dtype, on_part
        self._done, self._total = 0, total

    def load(self, name: str, entry: Any) -> Any:
        """The part `name`, one of the `total`. Raises `ConfigError`."""
        self._tell(name)
        part = load_part(self._root / name, entry, self._dtype)
        self._done += 1
        if self._done == self._total:
            self._tell("")
        return part

    def load_one_more(self, name: str, entry: Any) -> Any:
        """The part `name`, in addition to the `total` so far. Raises `ConfigError`."""
        self._total = self._done + 1
        return self.load(name, entry)

    def _tell(self, name: str) -> None:
        if self._on_part is not None:
            self._on_part(self._done, self._total, name)
