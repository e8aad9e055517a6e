"""Parts: the share of the reading and encoding that one machine does, and putting them together.

Owns: the folder of a part (`part.json`, `key.json`, block files, in the first part `components/`), going on
where an interrupted one stopped, and the flat files a merge makes of all of them. Does not own: a block's
contents (`blocks`), what follows (`prepare`).

Part i of n takes every n-th packed file of the source, or every n-th block where there are fewer files than
parts. A block is the same bits whoever makes it, so n leaves no trace in the result.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from paris_p2p.data import blocks
from paris_p2p.data.blocks import Block, Encoders
from paris_p2p.data.sources import Skipped, Source
from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.store.durable import write_atomic
from paris_p2p.store.locks import holder, try_lock

FORMAT = 2
PART_NAME = "part.json"
KEY_NAME = "key.json"
COMPONENTS_NAME = "components"
MAX_PARTS = 100_000
MAX_PART_BYTES = 1 << 28
Count = Callable[[int, int | None], None]
"""(done, total): told how far a stage is."""


@dataclass(frozen=True, slots=True)
class Share:
    """Part `index` (from 1) of `of`."""

    index: int
    of: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.index}-of-{self.of}"

    def takes(self, unit: int, units: int, block: int) -> bool:
        """Whether block `block` of unit `unit` is this part's."""
        place = unit if units >= self.of else unit + block
        return place % self.of == self.index - 1


def parse_share(text: str) -> Share:
    """`i/n`, 1 <= i <= n. Raises `ConfigError`."""
    left, slash, right = text.partition("/")
    if slash and left.isascii() and right.isascii() and left.isdigit() and right.isdigit():
        share = Share(int(left), int(right))
        if 1 <= share.index <= share.of <= MAX_PARTS:
            return share
    raise ConfigError(f"--shard {text!r}: write I/N, part I of N, I from 1 to N; for example 3/8")


@dataclass(frozen=True, slots=True)
class PartReport:
    """`images` usable and `skipped` of the part's `blocks`, `reused` of which were there already."""

    folder: Path
    images: int
    skipped: int
    blocks: int
    reused: int


def write_part(
    source: Source,
    folder: Path,
    share: Share,
    side: int,
    encoders: Encoders,
    options: dict[str, Any],
    progress: Count,
    *,
    replace: bool = False,
) -> PartReport:
    """Make or finish the part in `folder`. `options`: what a merge must know, and all parts agree about.

    Raises `ConfigError` when the folder holds another part, unless it is to `replace` that; `StoreError` when
    another process is at it.
    """
    key = {"format": FORMAT, "source": source.listing, "side": side, **encoders.identity(), **options}
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _claim(folder, {**key, "files": source.fingerprint}, replace)
        if share.index == 1:
            _save_components(folder, encoders)
        entries, counts, reused = _write_blocks(source, folder, share, side, encoders, progress)
        part = {"share": [share.index, share.of], "key": key, "blocks": entries, "counts": counts}
        write_atomic(folder / PART_NAME, (json.dumps(part, indent=1) + "\n").encode())
    images = sum(entry["images"] for entry in entries)
    skipped = sum(entry["skipped"] for entry in entries)
    return PartReport(folder, images, skipped, len(entries), reused)


def _write_blocks(
    source: Source, folder: Path, share: Share, side: int, encoders: Encoders, progress: Count
) -> tuple[list[dict[str, Any]], dict[str, int], int]:
    """The entries of the part's blocks, how many blocks each unit read has, and how many were there."""
    entries, counts, reused, samples = list[dict[str, Any]](), dict[str, int](), 0, 0
    units = len(source.units)
    for unit, walk in enumerate(source.units):
        if units >= share.of and not share.takes(unit, units, 0):
            continue  # not even opened
        number = -1
        for number, chunk in enumerate(blocks.cut(walk())):
            if share.takes(unit, units, number):
                path = folder / f"block-{unit:06d}-{number:08d}.safetensors"
                there = path.is_file()
                block = None if there else blocks.make_block(chunk, side, encoders)
                entries.append(_entry(path, unit, number, block))
                reused += there
                samples += len(chunk)
                progress(samples, None)
        counts[str(unit)] = number + 1
    return entries, counts, reused


def _entry(path: Path, unit: int, number: int, block: Block | None) -> dict[str, Any]:
    """Write `block`, or read the one that is there, for the list in `part.json`."""
    if block is None:
        data = path.read_bytes()
        block = blocks.unpack(data, str(path))
    else:
        data = blocks.pack(block)
        write_atomic(path, data)
    return {
        "unit": unit,
        "block": number,
        "sha256": hashlib.sha256(data).hexdigest(),
        "images": len(block.names),
        "skipped": len(block.skipped),
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / "part.lock"
    lock = try_lock(path)
    if lock is None:
        raise StoreError(f"{folder} is being prepared by {holder(path)}")
    try:
        yield
    finally:
        lock.release()


def _claim(folder: Path, key: dict[str, Any], replace: bool) -> None:
    """Note what the part is made of; refuse, or empty, a folder in which something else was begun."""
    path = folder / KEY_NAME
    data = (json.dumps(key, sort_keys=True) + "\n").encode()
    if path.exists() and path.read_bytes() == data:
        return
    if path.exists() and not replace:
        raise ConfigError(
            f"{folder} was begun from another source, with other options or other encoders: delete it, or "
            "choose another --out"
        )
    (folder / PART_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder / COMPONENTS_NAME, ignore_errors=True)
    for block in folder.glob("block-*"):
        block.unlink()
    write_atomic(path, data)


def _save_components(folder: Path, encoders: Encoders) -> None:
    target = folder / COMPONENTS_NAME
    if encoders.text is not None and not (target / "tokenizer").is_dir():
        encoders.text.save(target)
    if encoders.vae is not None and not (target / "vae").is_dir():
        encoders.vae.save(target)


@dataclass(frozen=True, slots=True)
class Part:
    """A finished part, as its `part.json` tells."""

    folder: Path
    share: Share
    key: dict[str, Any]
    blocks: dict[tuple[int, int], str]
    counts: dict[int, int]


def find_parts(folders: Sequence[Path]) -> list[Part]:
    """The parts in the `folders` (`DIR/parts/*`, or a part's own), one complete set of them, in order.

    Raises `ConfigError` naming what is missing or does not belong.
    """
    places = [place for folder in folders for place in _part_folders(folder)]
    parts = sorted((_read_part(place) for place in places), key=lambda part: part.share.index)
    if not parts:
        looked = ", ".join(str(folder) for folder in folders)
        raise ConfigError(f"no finished part in {looked}: run `paris-node prepare … --shard I/N` first")
    first = parts[0]
    for part in parts[1:]:
        differ = sorted(k for k in {*part.key, *first.key} if part.key.get(k) != first.key.get(k))
        if differ or part.share.of != first.share.of:
            what = ", ".join(differ) or "the number of parts"
            raise ConfigError(
                f"{part.folder} and {first.folder} do not belong together: they differ in {what}"
            )
    _require_all(parts)
    return parts


def _part_folders(folder: Path) -> list[Path]:
    if (folder / PART_NAME).is_file():
        return [folder]
    found = sorted(path.parent for path in (folder / "parts").glob(f"*/{PART_NAME}"))
    return found or sorted(path.parent for path in folder.glob(f"*/{PART_NAME}"))


def _read_part(folder: Path) -> Part:
    path = folder / PART_NAME
    try:
        if path.stat().st_size > MAX_PART_BYTES:
            raise ValueError(f"larger than {MAX_PART_BYTES} bytes")
        plain = json.loads(path.read_text(encoding="utf-8"))
        index, of = plain["share"]
        found = {(int(one["unit"]), int(one["block"])): str(one["sha256"]) for one in plain["blocks"]}
        counts = {int(unit): int(count) for unit, count in plain["counts"].items()}
        return Part(folder, Share(int(index), int(of)), dict(plain["key"]), found, counts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}; delete {folder} and prepare it again") from None


def _require_all(parts: Sequence[Part]) -> None:
    """Every part once, every block of every unit once."""
    of = parts[0].share.of
    there = [part.share.index for part in parts]
    missing = sorted(set(range(1, of + 1)) - set(there))
    if missing:
        names = ", ".join(f"{index}/{of}" for index in missing[:10])
        raise ConfigError(
            f"{len(missing)} of {of} parts are missing or not finished: {names}. Name the folders they are "
            f"in as well, or run `paris-node prepare … --shard {missing[0]}/{of}` with the same options"
        )
    if len(there) != of:
        twice = next(index for index in there if there.count(index) > 1)
        raise ConfigError(f"part {twice}/{of} is given twice")
    wanted = {
        (unit, block) for part in parts for unit, count in part.counts.items() for block in range(count)
    }
    held = {place for part in parts for place in part.blocks}
    if wanted != held:
        raise ConfigError(
            f"the parts do not hold each block of the source once ({len(held)} of {len(wanted)}): it changed "
            "while they were made; delete them and prepare them again"
        )


def walk(parts: Sequence[Part]) -> Iterator[Block]:
    """All blocks in the source's order, each checked. Raises `ConfigError` for a damaged one."""
    owner = {place: part for part in parts for place in part.blocks}
    for unit, number in sorted(owner):
        part = owner[unit, number]
        path = part.folder / f"block-{unit:06d}-{number:08d}.safetensors"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing: prepare its part again") from None
        if hashlib.sha256(data).hexdigest() != part.blocks[unit, number]:
            raise ConfigError(f"{path} is damaged: delete it and prepare its part again")
        yield blocks.unpack(data, str(path))


@dataclass(slots=True)
class Flat:
    """Counts and texts gathered while the tensors go to the files of `folder`, one a kind, row after row."""

    captions: list[str]
    names: list[str]
    skipped: list[Skipped]
    text_rows: dict[str, int]
    shapes: dict[str, list[int]]
    dtypes: dict[str, str]
    grey: bool = True


def flatten(parts: Sequence[Part], folder: Path, progress: Count) -> Flat:
    """Write `images.raw`, `features.raw`, `latents.raw` and `text.raw` (the encoding of "", then of each
    caption where it first occurs). Memory: one block, and the texts."""
    flat = Flat([], [], [], {}, {}, {})
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for block in walk(parts):
            for name, rows in _rows(block, flat):
                if name not in files:
                    files[name] = stack.enter_context((folder / f"{name}.raw").open("wb"))
                    flat.shapes[name], flat.dtypes[name] = list(rows.shape[1:]), rows.dtype.name
                files[name].write(rows.tobytes())
            flat.captions.extend(block.captions)
            flat.names.extend(block.names)
            flat.skipped.extend(block.skipped)
            progress(len(flat.names) + len(flat.skipped), None)
    return flat


def _rows(block: Block, flat: Flat) -> Iterator[tuple[str, Any]]:
    """What a block adds to each file."""
    for name, tensor in block.tensors.items():
        if name == "images":
            flat.grey = flat.grey and bool((tensor == tensor[..., :1]).all())
        if name != "text":
            yield name, tensor
            continue
        texts = ["", *block.distinct]
        new = [row for row, text in enumerate(texts) if text not in flat.text_rows]
        flat.text_rows.update({texts[row]: len(flat.text_rows) + place for place, row in enumerate(new)})
        yield name, tensor[new]
