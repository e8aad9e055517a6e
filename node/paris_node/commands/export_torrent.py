"""`paris-node export-torrent`: an item as a BitTorrent v2 `.torrent`, for other clients."""

from dataclasses import dataclass
from pathlib import Path

from paris_node.sharing import place
from paris_p2p.errors import ConfigError
from paris_p2p.ids import InfoHash
from paris_p2p.programs import Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.durable import disk, write_atomic
from paris_p2p.store.home import Home
from paris_p2p.wire.torrent import MAX_TORRENT_BYTES, build_torrent, magnet_link, parse_item_id, read_torrent

MIN_PREFIX = 8


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """`item`: an id (or its beginning) of the home's store, or the path of a file or folder."""

    item: str
    out: Path
    piece_length: int | None
    home: Path | None


def run(request: ExportRequest, output: Output) -> None:
    """Write the torrent and print the magnet link."""
    _check_target(request.out)
    store, info_hash = _find(request, Home.resolve(request.home), output)
    item = store.open(info_hash)
    data = build_torrent(item.info, {index: item.layer(index) for index in item.layout.layered()})
    with disk("writing the torrent", request.out.parent, len(data)):
        write_atomic(request.out, data)
    magnet = magnet_link(info_hash, item.layout.name)
    output.event(
        "exported",
        f"wrote {request.out}; as a magnet link:\n{magnet}",
        path=str(request.out.resolve()),
        info_hash=info_hash.hex(),
        magnet=magnet,
        name=item.layout.name,
        bytes=item.layout.length,
    )


def _check_target(out: Path) -> None:
    """An older torrent is replaced, nothing else is: `--out` may name the content by mistake."""
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: name the file to write, such as {out / 'NAME.torrent'}")
    if not out.exists():
        return
    with disk("looking at what is there", out.parent), out.open("rb") as file:
        data = file.read(MAX_TORRENT_BYTES + 1)
    try:
        read_torrent(data)
    except ConfigError:
        raise ConfigError(f"{out} exists and is no torrent: choose another --out") from None


def _find(request: ExportRequest, home: Home, output: Output) -> tuple[ContentStore, InfoHash]:
    text, store = request.item, home.store()
    path = Path(text)
    if path.exists():
        placed, ref = place(home, path, request.piece_length, output)
        return placed, ref.info_hash
    whole = parse_item_id(text)
    prefix = whole.hex() if whole is not None else text.lower()
    found = [item for item in store.ids() if len(prefix) >= MIN_PREFIX and item.hex().startswith(prefix)]
    if len(found) != 1:
        why = "several items begin so" if found else f"no such item is complete in {store.root}"
        raise ConfigError(
            f"{text!r}: {why}; name an item's id (at least {MIN_PREFIX} digits), or a file or folder"
        )
    return store, found[0]
