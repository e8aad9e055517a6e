"""Files to exchange: random content, torrents of it, checks of what arrived.

Owns: that. Does not own: who exchanges it.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
BLOCK_BYTES = 16 << 10
_PROBE_BYTES = 32  # enough of a block of random bytes to tell it from zeros and from any other


@dataclass(frozen=True, slots=True)
class Content:
    """One file of random bytes and the torrents of it. Lengths in bytes."""

    path: Path
    length: int
    piece_length: int
    sha256: str


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder on disk ($BENCH_WORK, else /var/tmp: /tmp may be memory), removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="paris-bench-", dir=os.environ.get("BENCH_WORK", "/var/tmp")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_content(path: Path, length: int, piece_length: int) -> Content:
    """Write `length` bytes that do not compress."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, length, 4 * MIB):
            data = os.urandom(min(4 * MIB, length - start))
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    return Content(path, length, piece_length, digest.hexdigest())


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_torrent(content: Content, out: Path, *, version: int, tracker: str | None = None) -> None:
    """A .torrent of version 1 or 2, by libtorrent (a development dependency)."""
    import libtorrent as lt

    flags = lt.create_torrent.v1_only if version == 1 else lt.create_torrent.v2_only
    torrent = lt.create_torrent(lt.list_files(str(content.path)), content.piece_length, flags)
    if tracker is not None:
        torrent.add_tracker(tracker)
    lt.set_piece_hashes(torrent, str(content.path.parent))
    out.write_bytes(lt.bencode(torrent.generate()))


class CopyWatch:
    """Says when some folders together hold every piece of a file (as flat files, `.part` or not)."""

    def __init__(self, content: Content, folders: list[Path]) -> None:
        self._folders = folders
        self._length = content.length
        self._piece_length = content.piece_length
        self._source = content.path
        self.missing = set(range(-(-content.length // content.piece_length)))

    def complete(self) -> bool:
        """Look again, only for pieces that were nowhere so far."""
        names = [p for folder in self._folders for p in folder.rglob("*") if p.is_file()]
        with self._source.open("rb") as source:
            for path in names:
                if path.stat().st_size >= self._length:
                    with path.open("rb") as held:
                        self.missing -= {
                            i for i in self.missing if self._same(i, source.fileno(), held.fileno())
                        }
        return not self.missing

    def _same(self, piece: int, source: int, held: int) -> bool:
        start = piece * self._piece_length
        end = min(start + self._piece_length, self._length)
        return all(
            os.pread(source, _PROBE_BYTES, offset) == os.pread(held, _PROBE_BYTES, offset)
            for offset in range(start, end, BLOCK_BYTES)
        )
