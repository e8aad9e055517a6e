"""Training data: shards on disk, and the order in which a role reads them.

Owns: loading and checking `shard.safetensors`, gathering batches over several shards, the deterministic data
order. Does not own: making shards (`data`), fetching them (`net`), noise and dropout (`training`).

A shard's tensors: `latents` (N, C, S, S); `caption_index` I64 (N,); `captions` (M, T, W), the encodings of
its M distinct captions; `uncond` (T, W), the encoding of ""; `caption_texts` U8, a JSON list of the captions.
Floats are F32 or F16 (a batch's latents F32). Metadata: `format`, `cluster`. The tensors are memory-mapped:
only the rows of a batch are read, and the captions' texts when they are asked for.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paris_p2p.diffusion.seeds import stream
from paris_p2p.errors import ConfigError
from paris_p2p.wire.manifest import Recipe

FORMAT = "2"
FILE_NAME = "shard.safetensors"
_FLOATS = (torch.float32, torch.float16)
_DTYPES = {
    "latents": _FLOATS,
    "caption_index": (torch.int64,),
    "captions": _FLOATS,
    "uncond": _FLOATS,
}


TEXTS = "caption_texts"


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One cluster's images. Shapes as in the module's header."""

    cluster: int
    latents: Tensor
    caption_index: Tensor
    captions: Tensor
    uncond: Tensor

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """latents: (B, C, S, S) F32; text: (B, T, W) and uncond: (T, W), both F32 or F16; cluster: (B,) int64."""

    latents: Tensor
    text: Tensor
    uncond: Tensor
    cluster: Tensor

    def rows(self, rows: Tensor) -> "Batch":
        """Some of its images: (M,) rising indices below B."""
        if len(rows) == len(self.latents):
            return self  # text is large: not copied for nothing
        return Batch(self.latents[rows], self.text[rows], self.uncond, self.cluster[rows])


def load_shard(folder: Path, recipe: Recipe, cluster: int) -> Shard:
    """The shard in `folder`, checked against the recipe. Raises `ConfigError` naming what does not fit.

    The bytes were verified against the manifest's hash, so a misfit is the organiser's mistake.
    """
    path = folder / FILE_NAME
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            names = {*_DTYPES, TEXTS}
            if set(file.keys()) != names:
                raise ConfigError(f"{path} holds {sorted(file.keys())}, a shard holds {sorted(names)}")
            tensors = {name: file.get_tensor(name) for name in _DTYPES}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read as a shard: {error}") from None
    if metadata.get("format") != FORMAT or metadata.get("cluster") != str(cluster):
        raise ConfigError(
            f"{path} is a shard of format {metadata.get('format')!r}, cluster {metadata.get('cluster')!r}; "
            f"wanted is format {FORMAT!r} for cluster {str(cluster)!r}"
        )
    _check(path, tensors, recipe)
    return Shard(cluster, **tensors)


def caption_texts(folder: Path) -> list[str]:
    """The captions of the shard in `folder`, M of them, as they were written. Raises `ConfigError`."""
    try:
        with safe_open(folder / FILE_NAME, framework="np") as file:
            texts = json.loads(file.get_tensor(TEXTS).tobytes())
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ConfigError(f"the captions of the shard in {folder} cannot be read: {error}") from None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"the shard in {folder} does not name its captions: run prepare again")
    return texts


def _check(path: Path, tensors: dict[str, Tensor], recipe: Recipe) -> None:
    images, captions = len(tensors["caption_index"]), len(tensors["captions"])
    latents, text = recipe.latents, recipe.captions
    shapes = {
        "latents": (images, latents.channels, latents.size, latents.size),
        "caption_index": (images,),
        "captions": (captions, text.tokens, text.width),
        "uncond": (text.tokens, text.width),
    }
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in _DTYPES[name]:
            raise ConfigError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"the recipe wants {' or '.join(map(str, _DTYPES[name]))} {shape}"
            )
    if images == 0:
        raise ConfigError(f"{path} holds no image")
    index = tensors["caption_index"]
    if int(index.min()) < 0 or int(index.max()) >= captions:
        raise ConfigError(f"{path}: caption_index points outside its {captions} captions")


class Examples:
    """The images of one or several shards as one numbered sequence."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        if not shards:
            raise ConfigError("a role needs at least one shard")
        self.shards = tuple(shards)
        self.starts = torch.tensor([0, *(len(shard) for shard in shards)]).cumsum(0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, indices: Tensor) -> Batch:
        """The images numbered `indices`: (B,), each 0 <= i < len. The tensors are the caller's to change."""
        first = self.shards[0]
        if len(self.shards) == 1:
            text = first.captions[first.caption_index[indices]]
            cluster = torch.full((len(indices),), first.cluster)
            return Batch(first.latents[indices].float(), text, first.uncond.to(text.dtype), cluster)
        owner = torch.searchsorted(self.starts, indices, right=True) - 1  # (B,)
        latents = torch.empty(len(indices), *first.latents.shape[1:])  # (B, C, S, S)
        text = torch.empty(len(indices), *first.uncond.shape)  # (B, T, W)
        for number in torch.unique(owner).tolist():
            shard, rows = self.shards[number], owner == number
            local = indices[rows] - self.starts[number]
            latents[rows] = shard.latents[local].float()
            text[rows] = shard.captions[shard.caption_index[local]].float()
        clusters = torch.tensor([shard.cluster for shard in self.shards])
        return Batch(latents, text, first.uncond.float(), clusters[owner])


def batch_indices(seed: int, role: str, images: int, step: int, batch_size: int) -> Tensor:
    """Which images step `step` (0-based) trains on: (batch_size,).

    The data is an endless sequence of epochs, each a permutation fixed by (seed, role, epoch); step s takes
    images s * batch_size and on. So the data cursor is the step, and nothing else need be remembered.
    """
    places = torch.arange(step * batch_size, (step + 1) * batch_size)
    indices = torch.empty(batch_size, dtype=torch.int64)
    for epoch in torch.unique(places // images).tolist():
        here = places // images == epoch
        indices[here] = _permutation(seed, role, images, epoch)[places[here] % images]
    return indices


@lru_cache(maxsize=4)
def _permutation(seed: int, role: str, images: int, epoch: int) -> Tensor:
    return torch.randperm(images, generator=stream(seed, role, "order", epoch))
