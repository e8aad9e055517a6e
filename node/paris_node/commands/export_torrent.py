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
from paris_p2p.wire.torrent import build_torrent, magnet_link, parse_item_id

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
    store, info_hash = _find(request, Home.resolve(request.home))
    item = store.open(info_hash)
    data = build_torrent(item.info, {index: item.layer(index) for index in item.layout.layered()})
    with disk("writing the torrent", request.out.parent, len(data)):
        write_atomic(request.out, data)
    magnet = magnet_link(info_hash, item.layout.name)
    output.event(
        "exported",
        magnet,
        path=str(request.out.resolve()),
        info_hash=info_hash.hex(),
        magnet=magnet,
        name=item.layout.name,
        bytes=item.layout.length,
    )


def _find(request: ExportRequest, home: Home) -> tuple[ContentStore, InfoHash]:
    text, store = request.item, home.store()
    path = Path(text)
    if path.exists():
        placed, ref = place(home, path, request.piece_length)
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
