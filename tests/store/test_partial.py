"""Tests of `paris_p2p.store.partial`: writing pieces, and resuming."""

import errno
import os
import random
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from paris_p2p.errors import DiskFullError, LocalProtocolError, RemoteProtocolError, StoreError
from paris_p2p.ids import InfoHash
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.hashing import Described, describe, find_files
from paris_p2p.store.journal import Journal
from paris_p2p.store.layout import ItemFolder
from paris_p2p.store.partial import PartialItem
from paris_p2p.wire.bep52 import Buffer, Layout, check_piece, content_ref
from paris_p2p.wire.content import ContentRef
from tests.store.test_journal import outlast_the_tick

P = 1 << 14
SIZES = {"big": 5 * P + 5, "empty": 0, "sub/small": 7}
PIECES = 7


class Item:
    """An item to fetch: its bytes by piece, and what a peer would send of it."""

    def __init__(self, folder: Path) -> None:
        rng = random.Random(1)
        source = folder / "item"
        for path, size in SIZES.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(rng.randbytes(size))
        self.described: Described = describe("item", find_files(source), P)
        self.ref: ContentRef = content_ref(self.described.info)
        self.pieces = [self._piece(source, piece) for piece in range(PIECES)]

    def _piece(self, source: Path, piece: int) -> bytes:
        index, offset, length = self.described.layout.piece_span(piece)
        path = source.joinpath(*self.described.layout.files[index].path)
        return path.read_bytes()[offset : offset + length]

    def prepare(self, partial: PartialItem) -> PartialItem:
        partial.set_info(self.described.info)
        for index in partial.missing_layers():
            partial.set_layer(index, self.described.layers[index])
        return partial

    def here(self, partial: PartialItem) -> set[int]:
        """The pieces the item says are here, after reading each back."""
        found = {piece for piece in range(PIECES) if partial.has_piece(piece)}
        for piece in found:
            assert partial.read_block(piece, 0, len(self.pieces[piece])) == self.pieces[piece]
            assert partial.read_now(piece, 0, len(self.pieces[piece])) in (self.pieces[piece], None)
        assert all(partial.read_now(piece, 0, 1) is None for piece in range(PIECES) if piece not in found)
        bits = "".join(f"{byte:08b}" for byte in partial.bitfield())
        assert {piece for piece in range(len(bits)) if bits[piece] == "1"} == found
        return found


@pytest.fixture
def item(tmp_path: Path) -> Item:
    return Item(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "store")


def partial_file(store: ContentStore, ref: ContentRef, path: str) -> Path:
    return store.root / "partial" / ref.info_hash.hex() / "files" / path


def test_pieces_in_any_order_make_a_complete_item(item: Item, store: ContentStore, tmp_path: Path) -> None:
    partial = store.begin(item.ref)
    assert partial.info is None and partial.layout is None and partial.bitfield() == b""
    item.prepare(partial)
    for piece in (6, 0, 5, 3, 1, 2, 4):
        assert not store.has(item.ref.info_hash)
        assert partial.write_piece(piece, item.pieces[piece])
    folder = partial.finish()
    assert folder == store.files(item.ref.info_hash)
    for path in SIZES:
        assert (folder / path).read_bytes() == (tmp_path / "item" / path).read_bytes()
    assert store.verify(item.ref.info_hash) == [] and store.partial() == []


def test_a_finished_item_can_still_be_read_and_closed(item: Item, store: ContentStore) -> None:
    partial = item.prepare(store.begin(item.ref))
    for piece, data in enumerate(item.pieces):
        partial.write_piece(piece, data)
    partial.finish()
    assert item.here(partial) == set(range(PIECES))
    partial.close()
    assert store.has(item.ref.info_hash)


def test_an_item_is_readable_at_the_very_moment_it_becomes_complete(item: Item, store: ContentStore) -> None:
    """A peer is served while the files move from the partial to the complete items."""
    partial = item.prepare(store.begin(item.ref))
    for piece, data in enumerate(item.pieces):
        partial.write_piece(piece, data)
    moved, reading = threading.Event(), threading.Event()
    move = partial._complete

    def move_slowly(folder: ItemFolder) -> ItemFolder:
        target = move(folder)
        moved.set()
        assert reading.wait(10)
        return target

    partial._complete = move_slowly
    read: list[bytes] = []

    def serve() -> None:
        assert moved.wait(10)
        threading.Timer(0.05, reading.set).start()  # the move ends after the read has begun
        read.append(partial.read_block(6, 0, 7))

    server = threading.Thread(target=serve)
    server.start()
    partial.finish()
    server.join()
    assert read == [item.pieces[6]]


def test_a_wrong_piece_is_refused_and_nothing_is_written(item: Item, store: ContentStore) -> None:
    partial = item.prepare(store.begin(item.ref))
    before = partial_file(store, item.ref, "big").read_bytes()
    for wrong in (b"", item.pieces[1], item.pieces[0][:-1], item.pieces[0] + b"\0", bytes(P)):
        assert not partial.write_piece(0, wrong)
    assert item.here(partial) == set() and partial_file(store, item.ref, "big").read_bytes() == before
    assert partial.write_piece(0, item.pieces[0])
    assert partial.write_piece(0, b"whatever it is, the piece is here already")
    assert item.here(partial) == {0}


def test_room_is_made_without_writing(item: Item, store: ContentStore) -> None:
    item.prepare(store.begin(item.ref))
    status = partial_file(store, item.ref, "big").stat()
    assert status.st_size == SIZES["big"] and status.st_blocks == 0
    assert partial_file(store, item.ref, "empty").stat().st_size == 0


def test_info_and_layers_of_another_item_are_refused(item: Item, store: ContentStore, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"x" * (3 * P))
    other = describe("other", find_files(tmp_path / "other"), P)
    partial = store.begin(item.ref)
    with pytest.raises(RemoteProtocolError):
        partial.set_info(other.info)
    with pytest.raises(LocalProtocolError, match="not known yet"):
        partial.set_layer(0, item.described.layers[0])
    partial.set_info(item.described.info)
    partial.set_info(item.described.info)
    for index, hashes in ((0, other.layers[0]), (0, b""), (2, item.described.layers[0]), (-1, b""), (9, b"")):
        with pytest.raises(RemoteProtocolError):
            partial.set_layer(index, hashes)
    with pytest.raises(LocalProtocolError, match="layer"):
        partial.write_piece(0, item.pieces[0])
    with pytest.raises(RemoteProtocolError):
        partial.layer(0)
    partial.set_layer(0, item.described.layers[0])
    assert partial.layer(0) == item.described.layers[0] and partial.missing_layers() == []


def test_what_is_not_here_is_not_read_and_cannot_be_finished(item: Item, store: ContentStore) -> None:
    partial = store.begin(item.ref)
    with pytest.raises(RemoteProtocolError):
        partial.read_block(0, 0, 1)
    item.prepare(partial)
    partial.write_piece(0, item.pieces[0])
    for piece in (1, -1, PIECES, 1000):
        with pytest.raises(RemoteProtocolError):
            partial.read_block(piece, 0, 1)
    with pytest.raises(RemoteProtocolError):
        partial.read_block(0, 0, P + 1)
    with pytest.raises(LocalProtocolError, match="6 pieces are missing"):
        partial.finish()
    partial.close()


def test_a_closed_item_takes_nothing_more(item: Item, store: ContentStore) -> None:
    partial = item.prepare(store.begin(item.ref))
    partial.close()
    partial.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        partial.write_piece(0, item.pieces[0])
    with pytest.raises(LocalProtocolError, match="closed"):
        partial.finish()


def test_a_closed_fetch_resumes_where_it_was(item: Item, store: ContentStore) -> None:
    partial = item.prepare(store.begin(item.ref))
    for piece in (0, 3, 6):
        partial.write_piece(piece, item.pieces[piece])
    partial.close()
    again = store.begin(item.ref)
    assert item.here(again) == {0, 3, 6} and again.missing_layers() == []
    assert again.info == item.described.info
    again.close()


def test_an_item_of_empty_files_needs_no_pieces(store: ContentStore, tmp_path: Path) -> None:
    (tmp_path / "nothing").touch()
    described = describe("nothing", find_files(tmp_path / "nothing"), P)
    partial = store.begin(content_ref(described.info))
    partial.set_info(described.info)
    assert partial.bitfield() == b""
    assert (partial.finish() / "nothing").read_bytes() == b""


WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from paris_p2p.store.content_store import ContentStore
store, other = ContentStore(Path(sys.argv[1])), ContentStore(Path(sys.argv[2]))
(ref,) = other.complete()
source, partial = other.open(ref.info_hash), store.begin(ref)
partial.set_info(source.info)
for index in partial.missing_layers():
    partial.set_layer(index, source.layer(index))
for piece in map(int, sys.argv[3].split()):
    length = source.layout.piece_span(piece)[2]
    assert partial.write_piece(piece, source.read_block(piece, 0, length))
os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_while_writing(store: ContentStore, folder: Path, pieces: str) -> None:
    other = ContentStore(folder / "other")
    other.add(folder / "item", piece_length=P)
    arguments = [str(store.root), str(other.root), pieces]
    done = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, *arguments], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()


def test_a_killed_fetch_keeps_every_piece_it_had(item: Item, store: ContentStore, tmp_path: Path) -> None:
    kill_while_writing(store, tmp_path, "0 4 6")
    partial = store.begin(item.ref)
    assert item.here(partial) == {0, 4, 6}
    partial.write_piece(1, item.pieces[1])
    partial.close()
    kill_while_writing(store, tmp_path, "2 3")
    partial = store.begin(item.ref)
    assert item.here(partial) == {0, 1, 2, 3, 4, 6}
    partial.write_piece(5, item.pieces[5])
    partial.finish()
    assert store.verify(item.ref.info_hash) == []


def test_what_changed_after_a_kill_is_not_believed(item: Item, store: ContentStore, tmp_path: Path) -> None:
    kill_while_writing(store, tmp_path, "0 1 2")
    with partial_file(store, item.ref, "big").open("r+b") as file:
        file.seek(P + 9)
        file.write(b"\0\0\0")
    assert item.here(store.begin(item.ref)) == {0, 2}


def crash(partial: PartialItem, store: ContentStore) -> None:
    """The process is gone: nothing is flushed, noted or closed; its lock is free."""
    partial._release()
    store.close()


def test_only_what_is_in_doubt_after_a_crash_is_hashed(
    item: Item, store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []

    def counted(layout: Layout, piece: int, data: Buffer, layer: bytes | None) -> bool:
        hashed.append(piece)
        return check_piece(layout, piece, data, layer)

    partial = item.prepare(store.begin(item.ref))
    for piece in (0, 3, 6):
        partial.write_piece(piece, item.pieces[piece])
    assert partial.unflushed_bytes == 2 * P + 7
    partial.flush()
    assert partial.unflushed_bytes == 0
    partial.write_piece(4, item.pieces[4])
    crash(partial, store)
    monkeypatch.setattr("paris_p2p.store.partial.check_piece", counted)
    again = store.begin(item.ref)
    assert item.here(again) == {0, 3, 4, 6} and hashed == [4]
    outlast_the_tick(again._folder)
    again.close()
    del hashed[:]
    last = store.begin(item.ref)
    assert item.here(last) == {0, 3, 4, 6} and hashed == []
    last.write_piece(5, item.pieces[5])
    crash(last, store)
    del hashed[:]
    assert item.here(store.begin(item.ref)) == {0, 3, 4, 5, 6} and 0 not in hashed and 3 not in hashed


class PowerCut:
    """What of an item's folder has reached the disk: of a file what it held when it was last flushed; names
    at once, which is the worst that can happen to the order."""

    def __init__(self) -> None:
        self._flushed: dict[int, bytes] = {}

    def fsync(self, fd: int) -> None:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            self._flushed[status.st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()

    def strike(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                status = path.stat()
                lost = bytes(status.st_size) if "files" in path.parts else b""
                with path.open("r+b") as file:
                    file.truncate(0)
                    file.write(self._flushed.get(status.st_ino, lost))


def test_a_power_cut_never_leaves_a_journal_that_names_what_was_lost(
    item: Item, store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, cut = random.Random(3), PowerCut()
    monkeypatch.setattr(os, "fsync", cut.fsync)
    folder = store.root / "partial" / item.ref.info_hash.hex()
    partial = item.prepare(store.begin(item.ref))
    written, safe = set[int](), set[int]()
    for _ in range(80):
        action, piece = rng.choice(["write", "write", "flush", "close", "cut"]), rng.randrange(PIECES)
        if action == "write":
            assert partial.write_piece(piece, item.pieces[piece])
            written.add(piece)
        elif action == "flush":
            partial.flush()
            safe = set(written)
        else:
            if action == "close":
                partial.close()
                safe = set(written)
            else:
                crash(partial, store)
                cut.strike(folder)
            partial = item.prepare(store.begin(item.ref))
            assert safe <= item.here(partial) <= written
            written = item.here(partial)
    partial.close()


def test_a_flush_that_fails_leaves_what_it_had_to_flush_for_the_next(
    item: Item, store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = item.prepare(store.begin(item.ref))
    partial.write_piece(0, item.pieces[0])

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr("paris_p2p.store.journal.write_atomic", full)
        with pytest.raises(DiskFullError):
            partial.flush()
    assert partial._unsynced == {0}
    partial.flush()
    assert partial._unsynced == set()
    crash(partial, store)
    assert item.here(store.begin(item.ref)) == {0}


def refuse_once(patch: pytest.MonkeyPatch, name: str) -> None:
    """The disk refuses to flush that file once, and then says that all is well, as Linux does."""
    fsync, refusals = os.fsync, [OSError(errno.EIO, "Input/output error")]

    def refuse(fd: int) -> None:
        if refusals and Path(f"/proc/self/fd/{fd}").readlink().name == name:
            raise refusals.pop()
        fsync(fd)

    patch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("killed", [False, True])
def test_a_file_that_could_once_not_be_flushed_is_hashed_on_the_next_start(
    killed: bool, item: Item, store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = item.prepare(store.begin(item.ref))
    partial.write_piece(0, item.pieces[0])
    partial.flush()
    for piece in (1, 6):
        partial.write_piece(piece, item.pieces[piece])
    refuse_once(monkeypatch, "big")
    with pytest.raises(StoreError):
        partial.flush()
    partial.write_piece(2, item.pieces[2])
    partial.flush()
    assert Journal(partial._folder, item.ref.info_hash, item.described.layout).read().bitfield == b"\x02"
    if killed:
        crash(partial, store)
    else:
        partial.close()
    with partial_file(store, item.ref, "big").open("r+b") as file:
        file.seek(P)
        file.write(bytes(P))  # what the disk refused, as it is read once the system's memory of it has gone
    assert item.here(store.begin(item.ref)) == {0, 2, 6}


def test_an_item_is_not_complete_while_the_disk_may_lack_some_of_it(
    item: Item, store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = item.prepare(store.begin(item.ref))
    for piece, data in enumerate(item.pieces):
        partial.write_piece(piece, data)
    refuse_once(monkeypatch, "small")
    for _ in range(2):
        with pytest.raises(StoreError):
            partial.finish()
    partial.close()
    again = store.begin(item.ref)
    assert item.here(again) == set(range(PIECES))
    again.finish()
    assert store.verify(item.ref.info_hash) == []


def test_pieces_may_be_written_while_others_are_flushed(
    item: Item, store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = item.prepare(store.begin(item.ref))
    partial.write_piece(0, item.pieces[0])
    flushing, written, fsync = threading.Event(), threading.Event(), os.fsync

    def slow(fd: int) -> None:
        flushing.set()
        assert written.wait(10)
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", slow)
        flusher = threading.Thread(target=partial.flush)
        flusher.start()
        assert flushing.wait(10)
        assert partial.write_piece(1, item.pieces[1]) and partial.bitfield() == b"\xc0"
        written.set()
        flusher.join()
    assert partial.unflushed_bytes == P  # the second is in doubt until the next flush
    crash(partial, store)
    assert item.here(store.begin(item.ref)) == {0, 1}


def test_what_changed_after_a_clean_close_is_not_believed(item: Item, store: ContentStore) -> None:
    partial = item.prepare(store.begin(item.ref))
    for piece in (0, 1, 6):
        partial.write_piece(piece, item.pieces[piece])
    partial.close()
    path = partial_file(store, item.ref, "big")
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"\0\0\0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert item.here(store.begin(item.ref)) == {1, 6}


@pytest.mark.parametrize("damage", ["info", "layers/0", "files/big", "files/sub/small", "journal", "ref"])
def test_any_missing_part_of_a_partial_item_is_made_up_for(
    item: Item, store: ContentStore, damage: str
) -> None:
    partial = item.prepare(store.begin(item.ref))
    for piece in (0, 1, 6):
        partial.write_piece(piece, item.pieces[piece])
    partial.close()
    (store.root / "partial" / item.ref.info_hash.hex() / damage).unlink()
    again = item.prepare(store.begin(item.ref))
    lost = {"files/big": {0, 1}, "files/sub/small": {6}}
    assert item.here(again) == {0, 1, 6} - lost.get(damage, set())
    for piece, data in enumerate(item.pieces):
        assert again.write_piece(piece, data)
    again.finish()
    assert store.verify(item.ref.info_hash) == []


def test_a_link_planted_in_a_partial_item_is_not_followed(
    item: Item, store: ContentStore, tmp_path: Path
) -> None:
    item.prepare(store.begin(item.ref)).close()
    victim = tmp_path / "victim"
    victim.write_bytes(b"v" * SIZES["big"])
    path = partial_file(store, item.ref, "big")
    path.unlink()
    path.symlink_to(victim)
    partial = store.begin(item.ref)
    assert partial.write_piece(0, item.pieces[0])
    assert victim.read_bytes() == b"v" * SIZES["big"] and not path.is_symlink()


def test_threads_may_write_and_read_at_once(item: Item, store: ContentStore) -> None:
    partial = item.prepare(store.begin(item.ref))
    failures: list[int] = []

    def work(seed: int) -> None:
        order = random.Random(seed).sample(range(PIECES), PIECES)
        for piece in order:
            written = partial.write_piece(piece, item.pieces[piece])
            length = len(item.pieces[piece])
            if not written or partial.read_block(piece, 0, length) != item.pieces[piece]:
                failures.append(piece)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and item.here(partial) == set(range(PIECES))
    partial.finish()


def test_whatever_happens_only_right_bytes_count_as_here(item: Item, store: ContentStore) -> None:
    rng = random.Random(7)
    held: set[int] = set()
    partial = item.prepare(store.begin(item.ref))
    for _ in range(150):
        action, piece = rng.choice(["write", "wrong", "reopen", "damage"]), rng.randrange(PIECES)
        if action == "write":
            assert partial.write_piece(piece, item.pieces[piece])
            held.add(piece)
        elif action == "wrong" and piece not in held:
            assert not partial.write_piece(piece, rng.randbytes(len(item.pieces[piece])))
        elif action in ("reopen", "damage"):
            partial.close()
            if action == "damage" and piece < 6:
                with partial_file(store, item.ref, "big").open("r+b") as file:
                    file.seek(piece * P)
                    file.write(rng.randbytes(5))
                held.discard(piece)
            partial = store.begin(item.ref)
        assert item.here(partial) == held
    partial.close()


def test_an_item_nobody_has_seen_needs_its_info_first(store: ContentStore) -> None:
    partial = store.begin(ContentRef(InfoHash(bytes(32)), 10, P))
    assert partial.missing_layers() == [] and not partial.has_piece(0)
    for use in (lambda: partial.write_piece(0, b""), partial.finish):
        with pytest.raises(LocalProtocolError, match="info"):
            use()
    partial.close()
