"""Tests of `paris_p2p.store.journal`."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from paris_p2p.ids import FileIndex, InfoHash
from paris_p2p.store import journal as journal_module
from paris_p2p.store.hashing import describe, find_files
from paris_p2p.store.journal import Believed, Journal
from paris_p2p.store.layout import ItemFolder
from paris_p2p.wire.bep52 import Layout

P = 1 << 14
TICKED_NS = 25_000_000
ID = InfoHash(b"i" * 32)
BITS = b"\xa0"  # of three pieces: the first of `a`, and that of `b`
A, B = FileIndex(0), FileIndex(1)
NOTHING = Believed(b"\0", frozenset())


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


def written(folder: ItemFolder, layout: Layout, *, closed: bool) -> None:
    outlast_the_tick(folder)
    Journal(folder, ID, layout).flush(BITS, (A, B), closed=closed)


def read(folder: ItemFolder, layout: Layout) -> Believed:
    return Journal(folder, ID, layout).read()


def test_a_clean_close_is_believed_while_nothing_changed(folder: ItemFolder, layout: Layout) -> None:
    written(folder, layout, closed=True)
    for _ in range(2):
        assert read(folder, layout) == Believed(BITS, frozenset((A, B)))


def test_in_the_middle_of_a_fetch_there_may_be_more_than_is_noted(folder: ItemFolder, layout: Layout) -> None:
    written(folder, layout, closed=False)
    assert read(folder, layout) == Believed(BITS, frozenset())
    overwrite(folder)  # the next piece, then the crash
    assert read(folder, layout) == Believed(BITS, frozenset())


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
    with (folder.files / "b").open("ab") as file:
        file.write(b"!")


def remove(folder: ItemFolder) -> None:
    (folder.files / "b").unlink()


@pytest.mark.parametrize("change", [overwrite, replace_file, lengthen, remove])
def test_a_file_that_changed_after_a_clean_close_is_in_doubt_and_no_other(
    folder: ItemFolder, layout: Layout, change: Callable[[ItemFolder], object]
) -> None:
    written(folder, layout, closed=True)
    change(folder)
    assert read(folder, layout) == Believed(b"\x80", frozenset((A,)))


@pytest.mark.parametrize("change", [replace_file, lengthen, remove])
def test_another_file_in_the_place_of_one_in_the_middle_of_a_fetch_is_in_doubt(
    folder: ItemFolder, layout: Layout, change: Callable[[ItemFolder], object]
) -> None:
    written(folder, layout, closed=False)
    change(folder)
    assert read(folder, layout).bitfield == b"\x80"


def test_a_file_changed_long_after_the_last_note_is_in_doubt(
    folder: ItemFolder, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(folder, layout, closed=False)
    monkeypatch.setattr(journal_module, "WINDOW_NS", 2 * TICKED_NS)
    while (folder.files / "b").stat().st_ctime_ns <= folder.journal.stat().st_mtime_ns + 2 * TICKED_NS:
        overwrite(folder)
    assert read(folder, layout).bitfield == b"\x80"


def test_a_file_older_than_its_note_is_in_doubt(folder: ItemFolder, layout: Layout) -> None:
    """A power cut took back what the note speaks of, or a backup was put in its place."""
    journal = Journal(folder, ID, layout)
    journal.flush(BITS, (A, B), closed=False)
    index = next(number for number, entry in enumerate(layout.files) if entry.path == ("b",))
    stamp = journal._stamps[index]
    journal._stamps[index] = type(stamp)(stamp.inode, stamp.size, stamp.changed_ns + 1)
    journal._write(closed=False)
    assert read(folder, layout).bitfield == b"\x80"


@pytest.mark.parametrize("closed", [True, False])
def test_no_journal_with_a_changed_byte_or_a_missing_end_is_believed(
    folder: ItemFolder, layout: Layout, closed: bool
) -> None:
    written(folder, layout, closed=closed)
    whole = folder.journal.read_bytes()
    for length in range(len(whole)) if closed else ():
        folder.journal.write_bytes(whole[:length])
        assert read(folder, layout) == NOTHING
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position & 7)
        folder.journal.write_bytes(flipped)
        assert read(folder, layout) == NOTHING
    folder.journal.write_bytes(whole + b"\0")
    assert read(folder, layout) == NOTHING
    folder.journal.unlink()
    assert read(folder, layout) == NOTHING


def test_a_journal_of_another_item_is_not_believed(folder: ItemFolder, layout: Layout) -> None:
    written(folder, layout, closed=True)
    assert Journal(folder, InfoHash(b"j" * 32), layout).read() == NOTHING
    other = replace(layout, files=layout.files[:1], pieces=2, length=2 * P)
    assert Journal(folder, ID, other).read().bitfield == b"\0"


def test_a_close_in_the_tick_of_the_last_change_is_not_believed(folder: ItemFolder, layout: Layout) -> None:
    """The next write could fall into the same tick, and no time would show it."""
    (folder.files / "b").write_bytes(b"b")
    changed_ns = (folder.files / "b").stat().st_ctime_ns
    Journal(folder, ID, layout).flush(BITS, (A, B), closed=True)
    os.utime(folder.journal, ns=(changed_ns, changed_ns))  # however slow this machine is
    believed = read(folder, layout)
    assert not believed.bitfield[0] & 0x20 and B not in believed.settled


def test_writing_after_a_clean_close_leaves_what_was_closed_out_of_doubt(
    folder: ItemFolder, layout: Layout
) -> None:
    written(folder, layout, closed=True)
    journal = Journal(folder, ID, layout)
    assert journal.read().bitfield == BITS
    journal.reopen()
    overwrite(folder)
    assert read(folder, layout) == Believed(BITS, frozenset())


def test_only_what_changed_is_looked_at_again(folder: ItemFolder, layout: Layout) -> None:
    written(folder, layout, closed=True)
    journal = Journal(folder, ID, layout)
    journal.read()
    overwrite(folder)  # by somebody else, while we write to `a`
    journal.flush(BITS, (A,), closed=True)
    outlast_the_tick(folder)
    os.utime(folder.journal)
    assert read(folder, layout) == Believed(b"\x80", frozenset((A,)))
