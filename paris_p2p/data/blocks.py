"""Blocks: what is read and encoded at once, and the files that hold it.

A block is `BLOCK` consecutive samples of one unit of the source. Its images are encoded together and with no
others, so what comes out is the same bits whoever reads it, and however many share the work.

Owns: cutting a source into blocks, decoding and encoding one, its file. Does not own: which blocks a machine
takes (`parts`), the encoders (`components`).
File: safetensors `images` U8 (N, s, s, 3), and where the run has such encoders `features` F32 (N, W),
`latents` F16 (N, C, S, S), `text` F16 (1 + M, T, W) of "" and the block's M distinct captions in order.
Metadata `block`: JSON of captions, names, skipped and a checksum.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

from paris_p2p.components.image_features import ImageFeatures
from paris_p2p.components.pretrained import Text, Vae, digest
from paris_p2p.data.images import UnreadableImageError, square
from paris_p2p.data.sources import Sample, Skipped
from paris_p2p.errors import ConfigError

BLOCK = 256
THUMBNAIL = 64
"""Pixels a side of the images kept where experts see latents: for the cards, and a small CLIP."""
NO_CAPTION = "no caption"


@dataclass(frozen=True, slots=True)
class Encoders:
    """The pretrained parts of a run. None: it has no such part (pixels are its latents), or one trained on
    its own data."""

    image: ImageFeatures | None = None
    text: Text | None = None
    vae: Vae | None = None

    def networks(self) -> list[Any]:
        """The parts' networks."""
        parts = (
            self.image and self.image.network,
            self.text and self.text.encoder,
            self.vae and self.vae.network,
        )
        return [network for network in parts if network is not None]

    def identity(self) -> dict[str, str | None]:
        """What blocks made with equal encoders have in common."""
        return {
            "image_encoder": None if self.image is None else self.image.identity,
            "text_encoder": None if self.text is None else digest(self.text.encoder),
            "vae": None
            if self.vae is None
            else f"{digest(self.vae.network)} {self.vae.scale} {self.vae.shift}",
        }


@dataclass(frozen=True, slots=True)
class Block:
    """What was made of a block. `tensors`: as in the file; none when no image was usable."""

    captions: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def distinct(self) -> list[str]:
        """The captions that the rows of `text` encode, after that of ""."""
        return sorted(set(self.captions))


def cut(samples: Iterator[Sample | Skipped]) -> Iterator[list[Sample | Skipped]]:
    """A unit's samples, `BLOCK` at a time."""
    while block := list(islice(samples, BLOCK)):
        yield block


def make_block(samples: list[Sample | Skipped], side: int, encoders: Encoders) -> Block:
    """Decode and encode; images `side` pixels a side."""
    captions, names, skipped, squares = list[str](), list[str](), list[Skipped](), list[NDArray[np.uint8]]()
    for sample in samples:
        outcome = _decoded(sample, side)
        if isinstance(outcome, Skipped):
            skipped.append(outcome)
        else:
            names.append(sample.name)
            captions.append(outcome[0])
            squares.append(outcome[1])
    block = Block(tuple(captions), tuple(names), tuple(skipped))
    if squares:
        block.tensors.update(_encoded(np.stack(squares), block.distinct, encoders))
    return block


def _decoded(sample: Sample | Skipped, side: int) -> tuple[str, NDArray[np.uint8]] | Skipped:
    if isinstance(sample, Skipped):
        return sample
    try:
        pixels = square(sample.image, side)
    except UnreadableImageError as error:
        return Skipped(sample.name, str(error))
    return Skipped(sample.name, NO_CAPTION) if sample.caption is None else (sample.caption, pixels)


def _encoded(images: NDArray[np.uint8], distinct: list[str], encoders: Encoders) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {"images": images}
    if encoders.image is not None:
        tensors["features"] = encoders.image(images)
    if encoders.vae is not None:
        tensors["latents"] = halved(encoders.vae.latents(images))
        tensors["images"] = thumbnails(images)
    if encoders.text is not None:
        tensors["text"] = halved(encoders.text.encode(["", *distinct]))
    return tensors


def halved(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """`values` in half the bytes, what is beyond a half's range at its end: networks trained in bf16 see an
    eighth of a half's precision, and at the published sizes a caption is 236 kB in F32."""
    largest = np.finfo(np.float16).max
    return np.clip(values, -largest, largest).astype(np.float16)


def thumbnails(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, S, S, 3) no larger than `THUMBNAIL` pixels a side."""
    if images.shape[1] <= THUMBNAIL:
        return images
    size = (THUMBNAIL, THUMBNAIL)
    small = [Image.fromarray(image).resize(size, Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, dtype=np.uint8) for image in small])


def pack(block: Block) -> bytes:
    """The file's bytes, the same ones for the same block."""
    described = {
        "captions": block.captions,
        "names": block.names,
        "skipped": [asdict(one) for one in block.skipped],
        "sha256": _checksum(block.tensors),
    }
    ordered = {name: np.ascontiguousarray(block.tensors[name]) for name in sorted(block.tensors)}
    data: bytes = save(ordered, {"block": json.dumps(described, sort_keys=True)})
    return data


def unpack(data: bytes, path: str) -> Block:
    """The block in the bytes of the file `path`. Raises `ConfigError`."""
    try:
        length = int.from_bytes(data[:8], "little")
        described = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["block"])
        skipped = tuple(Skipped(**one) for one in described["skipped"])
        block = Block(tuple(described["captions"]), tuple(described["names"]), skipped, load(data))
        if _checksum(block.tensors) != described["sha256"]:
            raise ValueError("its checksum is wrong")
        return block
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}; delete it and prepare its part again") from None


def _checksum(tensors: dict[str, NDArray[Any]]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(np.ascontiguousarray(tensors[name]).tobytes())
    return whole.hexdigest()
