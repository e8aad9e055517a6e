"""Writing the shards experts train on, and choosing what each cluster holds out.

Owns: the shard file's making (`shard.safetensors`, one a content item), row by row, so that a shard may be
larger than memory; the held-out split. Does not own: reading shards (`diffusion`), which image is in which
cluster (`cluster`).

Tensors: `latents` (N, C, S, S); `caption_index` I64 (N,); `captions` (M, T, W), the encodings of the shard's
M distinct captions; `uncond` (T, W), the encoding of ""; `caption_texts` U8, a JSON list of the M captions in
UTF-8. Floats are F32, or F16 where pretrained encoders made them. Metadata: `format`, `cluster`. The captions
are no metadata because a safetensors header ends at 100 MB, which is a million of them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FORMAT = "2"
FILE_NAME = "shard.safetensors"
HELD_OUT_SHARE = 0.05
CHUNK = 256  # rows in memory at once

Array = NDArray[np.float32]
Floats = NDArray[np.float32] | NDArray[np.float16]
_KINDS = {"float32": ("F32", 4), "float16": ("F16", 2), "int64": ("I64", 8), "uint8": ("U8", 1)}


@dataclass(frozen=True, slots=True)
class Picked:
    """Rows of an array that may be mapped from disk, gathered as they are asked for.

    `rows`: (N,) of `array`; `shape`: of what `made` (by default nothing is made) leaves of them, (N, …)."""

    array: Floats | NDArray[np.uint8]
    rows: NDArray[np.int64]
    shape: tuple[int, ...]
    made: Callable[[NDArray[np.uint8]], Array] | None = None

    @property
    def dtype(self) -> str:
        """Of the chunks."""
        return "float32" if self.made is not None else self.array.dtype.name

    def chunks(self) -> Iterator[Floats]:
        """All of it in order, `CHUNK` rows at a time."""
        for start in range(0, len(self.rows), CHUNK):
            part = self.array[self.rows[start : start + CHUNK]]
            yield np.ascontiguousarray(part if self.made is None else self.made(part), self.dtype)  # type: ignore[arg-type]


def held_out(names: Sequence[str], labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Which images are held out: about `HELD_OUT_SHARE` of them, at least one of each cluster.

    An image's fate hangs on a hash of its name, so other clusters or more images leave it as it is.
    Every cluster must have two images or more.
    """
    draws = np.array([_draw(name, seed) for name in names])  # (N,) in [0, 1)
    chosen: NDArray[np.bool_] = draws < HELD_OUT_SHARE
    for cluster in np.unique(labels):
        members = np.flatnonzero(labels == cluster)
        if not chosen[members].any():
            chosen[members[draws[members].argmin()]] = True
        if chosen[members].all():
            chosen[members[draws[members].argmax()]] = False
    return chosen


def _draw(name: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def pixel_latents(images: NDArray[np.uint8]) -> Array:
    """Images (N, S, S, C) as pixel-space latents: (N, C, S, S) in [-1, 1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(127.5) - 1


def pick_latents(latents: Floats | None, images: NDArray[np.uint8], rows: NDArray[np.int64]) -> Picked:
    """The `rows` of `latents`, or where there are none of the `images` (N, S, S, C), as pixel latents."""
    if latents is not None:
        return Picked(latents, rows, (len(rows), *latents.shape[1:]))
    side, _, channels = images.shape[1:]
    return Picked(images, rows, (len(rows), channels, side, side), pixel_latents)


def write_shard(
    folder: Path,
    cluster: int,
    latents: Picked,
    captions: Sequence[str],
    caption_row: dict[str, int],
    encodings: Floats,
    uncond: Floats,
) -> None:
    """Write `folder`/shard.safetensors, byte for byte the same for the same input. Raises `OSError`.

    latents: (N, C, S, S) of the images with these N `captions`; encodings: (all, T, W), the row of a caption
    being `caption_row[caption]`; uncond: (T, W).
    """
    distinct = sorted(set(captions))
    row = {caption: index for index, caption in enumerate(distinct)}
    index = np.array([row[caption] for caption in captions], dtype=np.int64)
    rows = np.array([caption_row[caption] for caption in distinct], dtype=np.int64)
    encoded = Picked(encodings, rows, (len(rows), *encodings.shape[1:]))
    texts = json.dumps(distinct, ensure_ascii=False).encode("utf-8", "surrogatepass")
    texts += b" " * (-len(texts) % 8)  # what follows starts where its numbers may stand
    shapes = {
        "caption_index": ("int64", index.shape),
        "caption_texts": ("uint8", (len(texts),)),
        "captions": (encoded.dtype, encoded.shape),
        "latents": (latents.dtype, latents.shape),
        "uncond": (uncond.dtype.name, uncond.shape),
    }
    metadata = {"format": FORMAT, "cluster": str(cluster)}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE_NAME).open("wb") as file:
        file.write(_header(shapes, metadata))
        file.write(index.tobytes())
        file.write(texts)
        for chunk in encoded.chunks():
            file.write(chunk.tobytes())
        for chunk in latents.chunks():
            file.write(chunk.tobytes())
        file.write(np.ascontiguousarray(uncond).tobytes())


def _header(shapes: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """A safetensors header for tensors that follow in this order. The library itself writes metadata in an
    order that changes from run to run, which would change the content id, and wants all tensors in memory."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in shapes.items():
        kind, size = _KINDS[dtype]
        begin, end = end, end + int(np.prod(shape)) * size
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text
