"""Reading a source into a folder: equal images as plain bytes, with their captions.

Owns: the folder `images.raw` (uint8, N x S x S x C), `samples.json` (captions, names, skipped); choosing the
side; counting what is skipped. Memory stays constant: one decoded image at a time, the rest on disk.
Does not own: the sources (`sources`), decoding (`images`).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paris_p2p.data.images import UnreadableImageError, image_size, square
from paris_p2p.data.sources import Sample, Skipped, Source
from paris_p2p.errors import ConfigError

MAX_NATIVE_SIDE = 64
MIN_SIDE, MAX_SIDE = 4, 1024
_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Ingested:
    """What was read. `images`: (N, S, S, C) uint8, mapped from disk; C is 1 when every image is grey."""

    images: NDArray[np.uint8]
    captions: tuple[str, ...]
    names: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def ingest(
    source: Source, folder: Path, side: int | None, progress: Callable[[int, int | None], None]
) -> None:
    """Read all of `source` into `folder`, images `side` pixels wide and high (chosen here when None).

    Raises `ConfigError` when nothing usable is found.
    """
    if side is None:
        side = native_side(source)
    if not MIN_SIDE <= side <= MAX_SIDE:
        raise ConfigError(f"an image size of {side} pixels is not in {MIN_SIDE} to {MAX_SIDE}")
    captions: list[str] = []
    names: list[str] = []
    skipped: list[Skipped] = []
    uncaptioned: list[str] = []
    grey = True
    with (folder / "rgb.raw").open("wb") as file:
        for outcome in _squares(source, side):
            if isinstance(outcome, Skipped):
                skipped.append(outcome)
            elif outcome[0].caption is None:
                uncaptioned.append(outcome[0].name)
                skipped.append(Skipped(outcome[0].name, "no caption"))
            else:
                sample, pixels = outcome
                grey = grey and bool((pixels == pixels[..., :1]).all())
                file.write(pixels.tobytes())
                captions.append(outcome[0].caption)
                names.append(sample.name)
            progress(len(names) + len(skipped), None)
    _require_samples(source, names, skipped, uncaptioned)
    _keep_channels(folder, len(names), side, 1 if grey else 3)
    details = {
        "side": side,
        "channels": 1 if grey else 3,
        "captions": captions,
        "names": names,
        "skipped": [asdict(one) for one in skipped],
    }
    (folder / "samples.json").write_text(json.dumps(details), encoding="utf-8")


def load(folder: Path) -> Ingested:
    """What `ingest` left in `folder`."""
    details = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    side, channels, count = details["side"], details["channels"], len(details["names"])
    images = np.memmap(folder / "images.raw", np.uint8, "r", shape=(count, side, side, channels))
    skipped = tuple(Skipped(**one) for one in details["skipped"])
    return Ingested(images, tuple(details["captions"]), tuple(details["names"]), skipped)


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


def _squares(source: Source, side: int) -> Iterator[tuple[Sample, NDArray[np.uint8]] | Skipped]:
    for sample in source.samples():
        if isinstance(sample, Skipped):
            yield sample
            continue
        try:
            yield sample, square(sample.image, side)
        except UnreadableImageError as error:
            yield Skipped(sample.name, str(error))


def _require_samples(
    source: Source, names: list[str], skipped: list[Skipped], uncaptioned: list[str]
) -> None:
    if names:
        return
    if uncaptioned:
        raise ConfigError(
            f"captions are missing: {uncaptioned[0]} has none, nor has any other image. A caption is "
            f"{source.captions_from}"
        )
    first = f"; the first, {skipped[0].name}: {skipped[0].reason}" if skipped else ""
    raise ConfigError(f"the source holds no readable images ({len(skipped)} skipped{first})")


def _keep_channels(folder: Path, count: int, side: int, channels: int) -> None:
    """Make `images.raw` of `rgb.raw`, keeping one of the three channels when all images are grey."""
    if channels == 3:
        (folder / "rgb.raw").rename(folder / "images.raw")
        return
    colours = np.memmap(folder / "rgb.raw", np.uint8, "r", shape=(count, side, side, 3))
    with (folder / "images.raw").open("wb") as file:
        for start in range(0, count, _CHUNK):
            file.write(np.ascontiguousarray(colours[start : start + _CHUNK, ..., :1]).tobytes())
    (folder / "rgb.raw").unlink()
