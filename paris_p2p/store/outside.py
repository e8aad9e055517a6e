"""Items whose files lie outside the store, where a person has them: seeded in place, or handed out.

Owns: the link from an item's folder to such files, and noticing that they changed.
Does not own: the store's folders and locks (`store.content_store`), handing files out (the same).

A *placed* item's folder holds reference, info, layers and a journal of all pieces as any other; `files` is a
symbolic link to the folder that holds the files. They are read there, never written.
"""

from collections.abc import Sequence
from pathlib import Path

from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.ids import FileIndex, InfoHash
from paris_p2p.store.durable import disk
from paris_p2p.store.hashing import SourceFile, describe, find_files, item_name
from paris_p2p.store.item import full_bitfield, load_info
from paris_p2p.store.journal import Believed, Journal
from paris_p2p.store.layout import ItemFolder
from paris_p2p.wire.bep52 import Layout, info_hash


def place_of(source: Path) -> Path:
    """The folder in which an item made of `source` finds its files: a folder itself, a file's parent.

    Raises `ConfigError` for a link to a file of another name: no path below a folder would lead to it.
    """
    resolved = source.resolve()
    if resolved.is_dir():
        return resolved
    if resolved.name != item_name(source):
        raise ConfigError(f"{source} is a link to {resolved}: name that file instead")
    return resolved.parent


def put_place(folder: ItemFolder, place: Path, info_hash: InfoHash, layout: Layout) -> None:
    """Make the item's `files` lead to `place`, all of whose pieces were just verified. Raises `OSError`."""
    folder.files.symlink_to(place, target_is_directory=True)
    journal = Journal(folder, info_hash, layout)
    for index in map(FileIndex, range(len(layout.files))):
        journal.note(index)
    journal.flush(full_bitfield(layout.pieces), (), closed=True)


def is_placed(folder: ItemFolder) -> bool:
    """Whether the item's files lie outside the store."""
    return folder.files.is_symlink()


def still_placed(
    folder: ItemFolder, place: Path, name: str, files: Sequence[SourceFile], piece_length: int | None
) -> bool:
    """Whether the item is what hashing `files` again as `name` would give: same files, none changed since."""
    if not is_placed(folder) or folder.files.readlink() != place:
        return False
    try:
        ref = folder.read_ref()
        _, layout = load_info(folder, ref)
    except StoreError:  # damaged: hashed again
        return False
    same = {entry.path: entry.length for entry in layout.files} == {file.path: file.length for file in files}
    if layout.name != name or not same or piece_length not in (None, layout.piece_length):
        return False
    whole = Believed(full_bitfield(layout.pieces), frozenset(map(FileIndex, range(len(layout.files)))))
    return Journal(folder, ref.info_hash, layout).read() == whole


def same_files(folder: Path, target: Path, layout: Layout) -> bool:
    """Whether `target` (the item's file or folder) is the very files of the item in `folder`."""
    with disk("comparing files", target.parent):
        for entry in layout.files:
            theirs = target if target.is_file() else target.joinpath(*entry.path)
            if not theirs.is_file() or not folder.joinpath(*entry.path).samefile(theirs):
                return False
    return True


def is_item(target: Path, layout: Layout, wanted: InfoHash) -> bool:
    """Whether `target` holds the same bytes under the same names as the item `wanted`. Hashes it."""
    try:
        described = describe(layout.name, find_files(target), layout.piece_length)
    except ConfigError:  # it holds what no item can
        return False
    return info_hash(described.info) == wanted
