"""`.torrent` files and magnet links of BitTorrent v2 items (BEP 3, BEP 9, BEP 52).

Owns: writing them for other clients, and reading what a person hands to us. Does not own: the info
dictionary and the piece layers inside (`wire.bep52`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs, quote

from paris_p2p.errors import ConfigError, RemoteProtocolError
from paris_p2p.ids import InfoHash
from paris_p2p.wire.bencode import Bencoded, bdecode, bencode
from paris_p2p.wire.bep52 import (
    HASH_BYTES,
    MAX_INFO_BYTES,
    MAX_PIECES,
    Layout,
    check_layer,
    content_ref,
    read_layout,
)
from paris_p2p.wire.content import ContentRef

MAX_TORRENT_BYTES = MAX_INFO_BYTES + MAX_PIECES * HASH_BYTES + (4 << 20)
"""Info, every piece layer, and 4 MiB for trackers, comments and signatures."""
_MULTIHASH_SHA256 = "1220"
"""SHA-256 of 32 bytes, as a multihash says it: how `urn:btmh:` names a v2 info-hash (BEP 9)."""


@dataclass(frozen=True, slots=True)
class Torrent:
    """What a `.torrent` says of an item. `info`: bencoded; `layers`: checked piece layers by file."""

    ref: ContentRef
    info: bytes
    layout: Layout
    layers: Mapping[int, bytes]


def build_torrent(info: bytes, layers: Mapping[int, bytes]) -> bytes:
    """A v2 `.torrent` without trackers. `layers`: the piece layer of every file larger than one piece."""
    layout = read_layout(info)
    by_root: dict[bytes, Bencoded] = {layout.files[i].pieces_root: layers[i] for i in layout.layered()}
    return bencode({b"info": bdecode(info, MAX_INFO_BYTES), b"piece layers": by_root})


def read_torrent(data: bytes) -> Torrent:
    """The item of a `.torrent`. Missing piece layers are left out: peers have them.

    Raises `ConfigError` saying why it cannot be used.
    """
    try:
        value = bdecode(data, MAX_TORRENT_BYTES)
        info = value.get(b"info") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(info, dict):
            raise ConfigError("it is no .torrent: it has no info dictionary")
        if b"pieces" in info or b"meta version" not in info:
            raise ConfigError("it is a v1 or hybrid torrent: only v2 torrents name items of this network")
        raw = bencode(info)
        ref, layout = content_ref(raw), read_layout(raw)
    except RemoteProtocolError as error:
        raise ConfigError(f"it cannot be used: {error}") from None
    return Torrent(ref, raw, layout, _layers(value.get(b"piece layers"), layout))


def _layers(value: Bencoded | None, layout: Layout) -> dict[int, bytes]:
    by_root = value if isinstance(value, dict) else {}
    found: dict[int, bytes] = {}
    for index in layout.layered():
        entry = layout.files[index]
        hashes = by_root.get(entry.pieces_root)
        if hashes is None:
            continue
        if not isinstance(hashes, bytes) or not check_layer(entry, hashes, layout.piece_length):
            raise ConfigError(f"it is damaged: the piece layer of {'/'.join(entry.path)!r} is wrong")
        found[index] = hashes
    return found


def magnet_link(info_hash: InfoHash, name: str) -> str:
    """The magnet link of an item, which other v2 clients open too."""
    return f"magnet:?xt=urn:btmh:{_MULTIHASH_SHA256}{info_hash.hex()}&dn={quote(name, safe='')}"


def parse_item_id(text: str) -> InfoHash | None:
    """The id in 64 hexadecimal digits, `urn:btmh:1220…`, or a magnet link with one; None for other text."""
    if text.startswith("magnet:?"):
        names = parse_qs(text.removeprefix("magnet:?")).get("xt", [])
        text = next((name for name in names if name.startswith("urn:btmh:")), "")
    if text.startswith("urn:btmh:"):
        text = text.removeprefix("urn:btmh:").removeprefix(_MULTIHASH_SHA256)
    if len(text) != 2 * HASH_BYTES or text.lower().strip("0123456789abcdef"):
        return None
    return InfoHash(bytes.fromhex(text))
