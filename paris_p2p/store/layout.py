"""Names of everything in a store's folder.

    complete/<info-hash>/   an item all of whose pieces were verified; never changed, only renamed away
    partial/<info-hash>/    an item being fetched
        ref                 canonical msgpack of its `ContentRef`
        info                the bencoded info dictionary, once known
        layers/<n>          the piece layer of file n, once known
        files/…             the item's files (a single file: that file)
        journal             partial only: what is verified and flushed (`store.journal`)
    staging/<random>/       an item being added, or removed
    locks/<info-hash>       held by who writes to the item

Folders move between these by one rename, so an item is never seen half there.
"""

from dataclasses import dataclass
from pathlib import Path

from paris_p2p.errors import RemoteProtocolError, StoreError
from paris_p2p.ids import InfoHash
from paris_p2p.store.durable import disk, write_atomic
from paris_p2p.wire import canonical
from paris_p2p.wire.content import ContentRef

_MAX_REF_BYTES = 256


@dataclass(frozen=True, slots=True)
class ItemFolder:
    """The folder of one item."""

    root: Path

    @property
    def info(self) -> Path:
        return self.root / "info"

    @property
    def ref(self) -> Path:
        return self.root / "ref"

    @property
    def files(self) -> Path:
        return self.root / "files"

    @property
    def layers(self) -> Path:
        return self.root / "layers"

    @property
    def journal(self) -> Path:
        return self.root / "journal"

    def layer(self, file_index: int) -> Path:
        return self.layers / str(file_index)

    def file(self, path: tuple[str, ...]) -> Path:
        return self.files.joinpath(*path)

    def read_ref(self) -> ContentRef:
        """The item's reference. Raises `StoreError` when it is damaged."""
        with disk("reading an item's reference", self.root):
            data = self.ref.read_bytes()
        try:
            return canonical.decode(ContentRef, data, _MAX_REF_BYTES)
        except RemoteProtocolError as error:
            raise StoreError(f"{self.ref} is damaged ({error}): remove the folder {self.root}") from None

    def write_ref(self, ref: ContentRef) -> None:
        """Store the item's reference. Raises `OSError`."""
        write_atomic(self.ref, canonical.encode(ref), sync=False)


@dataclass(frozen=True, slots=True)
class StoreFolders:
    """The folders of a store."""

    root: Path

    def make(self) -> None:
        """Create what is missing. Raises `OSError`."""
        for name in ("complete", "partial", "staging", "locks"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def complete(self, info_hash: InfoHash) -> ItemFolder:
        return ItemFolder(self.root / "complete" / info_hash.hex())

    def partial(self, info_hash: InfoHash) -> ItemFolder:
        return ItemFolder(self.root / "partial" / info_hash.hex())

    def lock(self, info_hash: InfoHash) -> Path:
        return self.root / "locks" / info_hash.hex()

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    def listed(self, name: str) -> list[ItemFolder]:
        """The item folders in `complete` or `partial`, in order of their ids."""
        with disk("listing items", self.root):
            names = sorted(entry.name for entry in (self.root / name).iterdir())
        return [ItemFolder(self.root / name / entry) for entry in names if _is_info_hash(entry)]


def _is_info_hash(name: str) -> bool:
    return len(name) == 64 and not name.strip("0123456789abcdef")
