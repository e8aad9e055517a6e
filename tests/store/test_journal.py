"""Tests of `paris_p2p.store.journal`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from paris_p2p.store.hashing import describe, find_files
from paris_p2p.store.journal import drop_journal, read_journal, write_journal
from paris_p2p.store.layout import ItemFolder
from paris_p2p.wire.bep52 import Layout

P = 1 << 14
TICKED_NS = 25_000_000
ID = b"i" * 32
BITS = b"\xa0"


@pytest.fixture
def folder(tmp_path: Path) -> ItemFolder:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_bytes(b"a" * (2 * P))
    (tmp_path / "files" / "b").write_bytes(b"b")
    return ItemFolder(tmp_path)


@pytest.fixture
def layout(folder: ItemFolder) -> Layout:
    return describe("item", find_files(folder.files), P).layout


def outlast_the_tick(folder: ItemFolder) -> None:
    """Until the file system's clock has moved on from the last change, as it has after any real fetch."""
    changed_ns = max(path.stat().st_ctime_ns for path in folder.files.iterdir())
    probe = folder.root / "probe"
    probe.touch()
    while probe.stat().st_mtime_ns < changed_ns + TICKED_NS:
        probe.touch()


def closed(folder: ItemFolder, layout: Layout) -> None:
    outlast_the_tick(folder)
    write_journal(folder, ID, layout, BITS)


def test_a_journal_is_believed_while_nothing_changed(folder: ItemFolder, layout: Layout) -> None:
    closed(folder, layout)
    assert read_journal(folder, ID, layout) == BITS
    assert read_journal(folder, ID, layout) == BITS


def overwrite(folder: ItemFolder) -> None:
    """In place, same length, and the modification time put back."""
    path = folder.files / "b"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"c")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_file(folder: ItemFolder) -> None:
    (folder.root / "new").write_bytes(b"b")
    (folder.root / "new").replace(folder.files / "b")


def lengthen(folder: ItemFolder) -> None:
    with (folder.files / "a").open("ab") as file:
        file.write(b"!")


@pytest.mark.parametrize(
    "change",
    [
        overwrite,
        replace_file,
        lengthen,
        lambda folder: (folder.files / "a").unlink(),
        lambda folder: folder.journal.unlink(),
        lambda folder: folder.journal.write_bytes(b""),
        lambda folder: folder.journal.write_bytes(folder.journal.read_bytes()[:-1]),
    ],
)
def test_a_journal_is_not_believed_after_a_change(
    folder: ItemFolder, layout: Layout, change: Callable[[ItemFolder], object]
) -> None:
    closed(folder, layout)
    change(folder)
    assert read_journal(folder, ID, layout) is None


def test_a_journal_of_another_item_or_size_is_not_believed(folder: ItemFolder, layout: Layout) -> None:
    closed(folder, layout)
    assert read_journal(folder, b"j" * 32, layout) is None
    write_journal(folder, ID, layout, b"\0\0")
    assert read_journal(folder, ID, layout) is None


def test_a_journal_written_in_the_tick_of_the_last_change_is_not_believed(
    folder: ItemFolder, layout: Layout
) -> None:
    """The next write could fall into the same tick, and no time would show it."""
    (folder.files / "b").write_bytes(b"b")
    changed_ns = (folder.files / "b").stat().st_ctime_ns
    write_journal(folder, ID, layout, BITS)
    os.utime(folder.journal, ns=(changed_ns, changed_ns))  # however slow this machine is
    assert read_journal(folder, ID, layout) is None


def test_a_dropped_journal_is_gone(folder: ItemFolder, layout: Layout) -> None:
    closed(folder, layout)
    drop_journal(folder)
    drop_journal(folder)
    assert read_journal(folder, ID, layout) is None and not folder.journal.exists()
