"""`paris-node content-id`: the BitTorrent v2 id of a file or folder."""

import hashlib
from pathlib import Path

from paris_node.sizes import check_piece_length
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.hashing import content_id
from paris_p2p.wire.content import default_piece_length


def run(path: Path, piece_length: int | None, output: Output) -> None:
    """Hash `path` and print its id."""
    check_piece_length(piece_length)
    chosen = piece_length if piece_length is not None else default_piece_length(_size(path))
    info, layout = content_id(path, chosen)
    info_hash = hashlib.sha256(info).hexdigest()
    files = [
        {"path": "/".join(file.path), "length": file.length, "pieces_root": file.pieces_root.hex()}
        for file in layout.files
    ]
    if output.as_json:
        output.data({"info_hash": info_hash, "piece_length": chosen, "files": files})
        return
    output.say(f"urn:btmh:1220{info_hash}  piece length {chosen}")
    for file in files:
        output.say(f"{file['pieces_root'] or '-' * 64}  {file['length']:>12}  {file['path']}")


def _size(path: Path) -> int:
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    if path.is_file():
        return path.stat().st_size
    return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
