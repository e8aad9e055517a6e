"""Writing the shards experts train on, and choosing what each cluster holds out.

Owns: the shard file's making (`shard.safetensors`, one a content item), the held-out split. Does not own:
reading shards (`diffusion`), which image is in which cluster (`cluster`).

Tensors: `latents` F32 (N, C, S, S); `caption_index` I64 (N,); `captions` F32 (M, T, W), the encodings of the
shard's M distinct captions; `uncond` F32 (T, W), the encoding of "". Metadata: `format`, `cluster`, and
`captions`, a JSON list of the M captions.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

FORMAT = "1"
FILE_NAME = "shard.safetensors"
HELD_OUT_SHARE = 0.05


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


def pixel_latents(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images (N, S, S, C) as pixel-space latents: (N, C, S, S) in [-1, 1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(127.5) - 1


def write_shard(
    folder: Path,
    cluster: int,
    latents: NDArray[np.float32],
    captions: Sequence[str],
    caption_column: dict[str, int],
    encodings: NDArray[np.float32],
    uncond: NDArray[np.float32],
) -> None:
    """Write `folder`/shard.safetensors, byte for byte the same for the same input. Raises `OSError`.

    latents: (N, C, S, S) of the images with these N `captions`; encodings: (all, T, W), the row of a caption
    being `caption_column[caption]`; uncond: (T, W).
    """
    distinct = sorted(set(captions))
    row = {caption: index for index, caption in enumerate(distinct)}
    tensors = {
        "latents": latents,
        "caption_index": np.array([row[caption] for caption in captions], dtype=np.int64),
        "captions": np.ascontiguousarray(encodings[[caption_column[caption] for caption in distinct]]),
        "uncond": np.ascontiguousarray(uncond),
    }
    metadata = {"format": FORMAT, "cluster": str(cluster), "captions": json.dumps(distinct)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE_NAME, metadata)
    sort_header(folder / FILE_NAME)


def sort_header(path: Path) -> None:
    """Put a safetensors header's keys in order, in place: the library writes metadata in an order that
    changes from run to run, which would change the content id."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) > length:
            raise ValueError(f"{path}: the sorted header does not fit its place")
        file.seek(8)
        file.write(ordered.ljust(length))
