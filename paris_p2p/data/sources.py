"""Where captioned images come from: what the SOURCE argument of `prepare` may be.

Owns: telling the kinds of source apart, and walking each of them, one sample at a time. Does not own:
decoding images (`images`), what is done with them (`ingest`).

Folders and tars are read here rather than through `datasets`: its imagefolder loader silently drops images
without metadata, and its webdataset loader refuses an archive in which one sample lacks a caption or has
another image format, and dies of one caption that is not UTF-8. Such samples must be skipped and listed.
Parquet files are read by `datasets`, streaming.
"""

import csv
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from paris_p2p.data.images import EXTENSIONS, MAX_FILE_BYTES, RawImage
from paris_p2p.errors import ConfigError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_KEYS = ("text", "caption", "txt", "prompt")
IMAGE_KEYS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
MAX_CAPTION_CHARACTERS = 1000
MAX_TEXT_BYTES = 1 << 20
MAX_METADATA_LINE = 1 << 20
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its caption, still undecoded. `caption` is None when there is none."""

    name: str
    image: RawImage
    caption: str | None


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that is not used, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Source:
    """A source of samples. `fingerprint` changes when its files do; `listing` only when their names or sizes
    do, wherever they lie; `captions_from` tells the user where a caption is looked for. Each of `units` walks
    a piece of it anew (a packed file, or all of a folder), in a fixed order, with constant memory."""

    kind: str
    fingerprint: str
    listing: str
    captions_from: str
    units: tuple[Callable[[], Iterator[Sample | Skipped]], ...]

    def samples(self) -> Iterator[Sample | Skipped]:
        """All of it, unit by unit."""
        return chain.from_iterable(unit() for unit in self.units)


def open_source(text: str) -> Source:
    """The source the user named: `digits`, a folder, a parquet file, a tar, or a pattern of tars.

    Raises `ConfigError` saying what was looked for.
    """
    if text == "digits":
        return Source("digits", "digits", "digits", "the digit's name", (_digits,))
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _files([path])
    matches = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else []
    if matches:
        return _files(matches)
    raise ConfigError(
        f"there is no {text!r}: give 'digits', a folder of images, a .parquet file, or webdataset tars"
    )


def _folder(folder: Path) -> Source:
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    files.sort(key=lambda file: file.relative_to(folder).as_posix())
    images = [file for file in files if _extension(file.name) in EXTENSIONS]
    if not images:
        packed = [file for file in files if file.parent == folder and _is_packed(file)]
        if packed:
            return _files(packed)
        raise ConfigError(
            f"{folder} holds no images: looked for .{', .'.join(sorted(EXTENSIONS))} files in it and below, "
            "and for .tar (webdataset) and .parquet files in it"
        )
    metadata = [file for file in files if file.name in METADATA_NAMES]
    sidecars = [image.with_suffix(".txt") for image in images]
    read = [*images, *metadata, *(file for file in sidecars if file.is_file())]
    captions_from = (
        f"a row of {METADATA_NAMES[0]} (file_name, text), or a .txt file of the same name beside it"
    )
    walk = partial(_folder_samples, folder, images, metadata)
    return Source("folder", _fingerprint(read), _listing(folder, read), captions_from, (walk,))


def _files(paths: list[Path]) -> Source:
    """Parquet files or tars, one kind at a time."""
    if not all(_is_packed(path) for path in paths):
        other = next(path for path in paths if not _is_packed(path))
        raise ConfigError(f"{other} is neither a .parquet file nor a .tar (webdataset)")
    parquet = [path for path in paths if path.suffix == ".parquet"]
    if parquet and len(parquet) < len(paths):
        raise ConfigError(f"{paths[0].parent} mixes .parquet files and tars: name the ones to use")
    stamps = _fingerprint(paths), _listing(paths[0].parent, paths)
    if parquet:
        where = f"a column {' / '.join(CAPTION_KEYS)}"
        prefixes = [f"{path.name} " if len(paths) > 1 else "" for path in paths]
        walks = [
            partial(_parquet_samples, path, prefix) for path, prefix in zip(paths, prefixes, strict=True)
        ]
        return Source("parquet", *stamps, where, tuple(walks))
    where = f"a member of the same key ending in .txt, or .json with {' / '.join(CAPTION_KEYS)}"
    return Source("webdataset", *stamps, where, tuple(partial(_tar_samples, path) for path in paths))


def _is_packed(path: Path) -> bool:
    return path.name.endswith((".tar", ".tar.gz", ".tgz", ".parquet"))


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix.lower().removeprefix(".")


def _fingerprint(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _listing(folder: Path, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
    return digest.hexdigest()


def clean_caption(value: object) -> str | None:
    """The caption in a text field; None for an empty one, or for something that is no text."""
    if not isinstance(value, str):
        return None
    return " ".join(value.split())[:MAX_CAPTION_CHARACTERS] or None


def _caption_in(row: dict[str, Any]) -> str | None:
    return next((caption for key in CAPTION_KEYS if (caption := clean_caption(row.get(key)))), None)


# --- the sources, one generator each -------------------------------------------------------------------


def _digits() -> Iterator[Sample | Skipped]:
    """scikit-learn's 1,797 handwritten digits: 8 x 8 pixels, 17 grey levels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype("uint8")  # (1797, 8, 8)
    for index, (image, digit) in enumerate(zip(grey, digits.target, strict=True)):
        yield Sample(f"digit {index:04d}", image, f"a handwritten digit {DIGITS[digit]}")


def _folder_samples(folder: Path, images: list[Path], metadata: list[Path]) -> Iterator[Sample | Skipped]:
    """Images in order of their names; a caption from metadata wins over a sidecar."""
    captions: dict[Path, str | None] = {}
    for path in metadata:
        for number, row in enumerate(_metadata_rows(path), 1):
            name = row.get("file_name")
            if isinstance(name, str):
                captions[Path(os.path.normpath(path.parent / name))] = _caption_in(row)
            else:
                yield Skipped(f"{path.relative_to(folder)} row {number}", "not a row with a file_name")
    present = {Path(os.path.normpath(image)) for image in images}
    for path in captions:
        if path not in present:
            yield Skipped(os.path.relpath(path, folder), "named in the metadata, but not there")
    for image in images:
        caption = captions.get(Path(os.path.normpath(image))) or _sidecar(image)
        yield Sample(image.relative_to(folder).as_posix(), image, caption)


def _sidecar(image: Path) -> str | None:
    try:
        with image.with_suffix(".txt").open("rb") as file:
            return clean_caption(file.read(MAX_TEXT_BYTES).decode("utf-8", errors="replace"))
    except OSError:
        return None


def _metadata_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metadata file; an unreadable line yields an empty row."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
            return
        while line := file.readline(MAX_METADATA_LINE):
            if line.strip():
                yield _json_object(line)


def _json_object(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows, streamed by `datasets`; image columns undecoded. Raises `ConfigError`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing here is on a hub
    import datasets

    # Even streaming, the library leaves a lock file in its cache: give it one that goes away.
    with tempfile.TemporaryDirectory(prefix="paris-parquet-") as cache:
        try:
            rows = datasets.load_dataset(
                "parquet",
                data_files={"train": [str(path)]},
                split="train",
                streaming=True,
                cache_dir=cache,
            )
            for name, feature in (rows.features or {}).items():
                if isinstance(feature, datasets.Image):
                    rows = rows.cast_column(name, datasets.Image(decode=False))
            yield from rows
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(f"{path} cannot be read as parquet: {error}") from None


def _parquet_samples(path: Path, prefix: str) -> Iterator[Sample | Skipped]:
    """Rows in order; `prefix` tells the files of a source apart."""
    for number, row in enumerate(_parquet_rows(path)):
        key = next((key for key in IMAGE_KEYS if key in row), None)
        if key is None:
            raise ConfigError(
                f"{path} has no image column: looked for {', '.join(IMAGE_KEYS)}, found {', '.join(row)}"
            )
        value = row[key]
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            yield Sample(f"{prefix}row {number}", data, _caption_in(row))
        else:
            yield Skipped(f"{prefix}row {number}", f"column {key} holds no image bytes")


def _tar_samples(path: Path) -> Iterator[Sample | Skipped]:
    """Webdataset: members that share a name up to the first dot are one sample."""
    key, parts = "", dict[str, bytes]()
    for name, data in _tar_members(path):
        if data is None:
            yield Skipped(f"{path.name}:{name}", "the archive is damaged from here, or the member too large")
            continue
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if f"{folder}/{stem}" != key:
            yield from _tar_sample(path, key, parts)
            key, parts = f"{folder}/{stem}", {}
        parts[extension.lower()] = data
    yield from _tar_sample(path, key, parts)


def _tar_members(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Name and contents of each plain member, in order; None for contents that cannot be had."""
    name = "start"
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = member.name
                if not member.isfile():
                    continue
                file = archive.extractfile(member) if member.size <= MAX_FILE_BYTES else None
                yield name, file.read() if file else None
    except (tarfile.TarError, OSError, EOFError) as error:
        if name == "start":
            raise ConfigError(f"{path} cannot be read as a tar: {error}") from None
        yield f"after {name}", None


def _tar_sample(path: Path, key: str, parts: dict[str, bytes]) -> Iterator[Sample | Skipped]:
    image = next((extension for extension in parts if extension in EXTENSIONS), None)
    if image is None:
        return  # labels, indices and the like without an image
    texts = [parts[key].decode("utf-8", errors="replace") for key in CAPTION_KEYS if key in parts]
    caption = next(filter(None, map(clean_caption, texts)), None)
    if caption is None:
        caption = _caption_in(_json_object(parts.get("json", b"{}")))
    yield Sample(f"{path.name}:{key.lstrip('/')}.{image}", parts[image], caption)
