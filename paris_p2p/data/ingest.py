"""The samples of a run on disk: equal images as plain bytes, captions, and what encoders made of them.

Owns: the folder of flat files `images.raw` (uint8, N x S x S x C), where the run has such encoders
`features.raw` (float32), `latents.raw`, `text.raw` (float16), and `samples.json` (captions, names, skipped,
shapes and types); choosing the side; refusing a source without a usable image. All are read through memory
maps. Does not own: reading and encoding (`blocks`), sharing that among machines (`parts`).
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_p2p.data import parts
from paris_p2p.data.blocks import NO_CAPTION, Encoders
from paris_p2p.data.images import UnreadableImageError, image_size
from paris_p2p.data.parts import COMPONENTS_NAME, Count, Flat, Part, Share
from paris_p2p.data.sources import Sample, Skipped, Source
from paris_p2p.errors import ConfigError

FORMAT = 2  # of the folder
MAX_NATIVE_SIDE = 64
MIN_SIDE, MAX_SIDE = 4, 1024
_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Ingested:
    """What was read, mapped from disk. `images`: (N, S, S, C) uint8, C being 1 when every image is grey, S at
    most `blocks.THUMBNAIL` when there are latents. `features`: (N, W), `latents`: (N, C, S, S), `text`:
    (1 + M, T, W) with the row `text_rows[caption]` of each caption and of ""; None where no pretrained
    encoder made them. `side`: the images', as asked for."""

    side: int
    images: NDArray[np.uint8]
    captions: tuple[str, ...]
    names: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    features: NDArray[np.float32] | None = None
    latents: NDArray[np.float16] | None = None
    text: NDArray[np.float16] | None = None
    text_rows: dict[str, int] | None = None


def ingest(
    source: Source,
    folder: Path,
    side: int | None,
    progress: Count,
    encoders: Encoders | None = None,
    scratch: Path | None = None,
) -> None:
    """Read all of `source` into `folder`, images `side` pixels wide and high (chosen here when None).

    `scratch`: where blocks lie meanwhile; an interrupted ingest goes on with those of the same kind there.
    Raises `ConfigError` when nothing usable is found.
    """
    place = scratch or folder / "blocks"
    used, whole = checked_side(source, side), Share(1, 1)
    parts.write_part(source, place, whole, used, encoders or Encoders(), {}, progress, replace=True)
    collect(parts.find_parts([place]), folder, source.captions_from, lambda *_: None)
    shutil.rmtree(place)


def checked_side(source: Source, side: int | None) -> int:
    """`side`, or the source's native one. Raises `ConfigError`."""
    if side is None:
        side = native_side(source)
    if not MIN_SIDE <= side <= MAX_SIDE:
        raise ConfigError(f"an image size of {side} pixels is not in {MIN_SIDE} to {MAX_SIDE}")
    return side


def collect(found: Sequence[Part], folder: Path, captions_from: str, progress: Count) -> None:
    """Make the flat files in `folder` of the parts `found`, and `components/` of the first part's.

    Raises `ConfigError`."""
    flat = parts.flatten(found, folder, progress)
    if (found[0].folder / COMPONENTS_NAME).is_dir():
        shutil.copytree(found[0].folder / COMPONENTS_NAME, folder / COMPONENTS_NAME)
    _require_samples(captions_from, flat)
    channels = 1 if flat.grey else 3
    flat.shapes["images"][-1] = channels
    _keep_channels(folder, len(flat.names), flat.shapes["images"][0], channels)
    details = {
        "side": found[0].key["side"],
        "shapes": flat.shapes,
        "dtypes": flat.dtypes,
        "captions": flat.captions,
        "names": flat.names,
        "skipped": [asdict(one) for one in flat.skipped],
        "texts": list(flat.text_rows),
    }
    (folder / "samples.json").write_text(json.dumps(details), encoding="utf-8")


def load(folder: Path) -> Ingested:
    """What `collect` left in `folder`."""
    details = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    maps: dict[str, NDArray[Any]] = {
        name: np.memmap(folder / f"{name}.raw", details["dtypes"][name], "r").reshape(-1, *shape)
        for name, shape in details["shapes"].items()
    }
    return Ingested(
        side=details["side"],
        images=maps["images"],
        captions=tuple(details["captions"]),
        names=tuple(details["names"]),
        skipped=tuple(Skipped(**one) for one in details["skipped"]),
        features=maps.get("features"),
        latents=maps.get("latents"),
        text=maps.get("text"),
        text_rows={text: row for row, text in enumerate(details["texts"])} or None,
    )


def native_side(source: Source) -> int:
    """The images' own shorter side when all have the same and it is at most 64, else 64; a multiple of 4,
    since models cut images into patches. Reads headers only."""
    sizes: set[int] = set()  # shorter sides
    for sample in source.samples():
        if isinstance(sample, Sample):
            try:
                sizes.add(min(image_size(sample.image)))
            except UnreadableImageError:
                continue  # reported when the image is read
            if len(sizes) > 1 or max(sizes) > MAX_NATIVE_SIDE:
                return MAX_NATIVE_SIDE
    return max(MIN_SIDE, min(sizes) // 4 * 4) if sizes else MAX_NATIVE_SIDE


def _require_samples(captions_from: str, flat: Flat) -> None:
    if flat.names:
        return
    uncaptioned = next((one.name for one in flat.skipped if one.reason == NO_CAPTION), None)
    if uncaptioned is not None:
        raise ConfigError(
            f"captions are missing: {uncaptioned} has none, nor has any other image. A caption is "
            f"{captions_from}"
        )
    skipped = flat.skipped
    first = f"; the first, {skipped[0].name}: {skipped[0].reason}" if skipped else ""
    raise ConfigError(f"the source holds no readable images ({len(skipped)} skipped{first})")


def _keep_channels(folder: Path, count: int, side: int, channels: int) -> None:
    """Keep one of the three channels of `images.raw` when all images are grey."""
    if channels == 3:
        return
    colours = np.memmap(folder / "images.raw", np.uint8, "r", shape=(count, side, side, 3))
    with (folder / "grey.raw").open("wb") as file:
        for start in range(0, count, _CHUNK):
            file.write(np.ascontiguousarray(colours[start : start + _CHUNK, ..., :1]).tobytes())
    (folder / "grey.raw").replace(folder / "images.raw")
