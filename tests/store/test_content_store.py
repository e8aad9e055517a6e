"""Tests of `paris_p2p.store.content_store` (and, through it, of `store.item` and `store.layout`)."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from paris_p2p.errors import ConfigError, RemoteProtocolError, StoreError
from paris_p2p.ids import InfoHash
from paris_p2p.store.content_store import AddMode, ContentStore
from paris_p2p.store.item import full_bitfield
from paris_p2p.wire.bep52 import check_layer, info_hash
from paris_p2p.wire.content import MAX_ITEM_BYTES, ContentRef

P = 1 << 14
SIZES = {"big": 3 * P + 5, "empty": 0, "sub/exact": P, "sub/small": 7}


def make_source(folder: Path, name: str = "item") -> Path:
    rng = random.Random(1)
    for path, size in SIZES.items():
        target = folder / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(rng.randbytes(size))
    return folder / name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fetch(store: ContentStore, other: ContentStore, ref: ContentRef) -> Path:
    """Copy an item from `other` as a swarm would; the pieces already in `store` are not asked for."""
    with_item = other.open(ref.info_hash)
    partial = store.begin(ref)
    partial.set_info(with_item.info)
    for index in partial.missing_layers():
        partial.set_layer(index, with_item.layer(index))
    for piece in range(with_item.layout.pieces):
        if not partial.has_piece(piece):
            data = with_item.read_block(piece, 0, with_item.layout.piece_span(piece)[2])
            assert partial.write_piece(piece, data)
    return partial.finish()


def leftovers(store: ContentStore) -> list[str]:
    return [str(path) for name in ("staging", "locks", "partial") for path in (store.root / name).iterdir()]


@pytest.mark.parametrize("mode", ["link", "copy", "move"])
def test_an_added_folder_is_complete_with_the_same_files(tmp_path: Path, mode: AddMode) -> None:
    source = make_source(tmp_path)
    wanted = contents(source)
    store = ContentStore(tmp_path / "store")
    ref = store.add(source, piece_length=P, mode=mode)
    assert store.has(ref.info_hash) and store.complete() == [ref] and store.ref(ref.info_hash) == ref
    assert contents(store.files(ref.info_hash)) == wanted
    assert ref.length == sum(SIZES.values()) and store.verify(ref.info_hash) == []
    assert source.exists() == (mode != "move")
    if mode != "move":
        shared = (source / "big").samefile(store.files(ref.info_hash) / "big")
        assert shared == (mode == "link") and contents(source) == wanted
    assert leftovers(store) == []


def test_a_single_file_lies_in_its_folder_under_its_name(tmp_path: Path) -> None:
    (tmp_path / "manifest.paris").write_bytes(b"m" * 100)
    store = ContentStore(tmp_path / "store")
    ref = store.add(tmp_path / "manifest.paris", mode="move")
    assert contents(store.files(ref.info_hash)) == {"manifest.paris": b"m" * 100}
    assert not (tmp_path / "manifest.paris").exists()


def test_adding_again_changes_nothing_and_still_moves_the_source_away(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "store")
    ref = store.add(make_source(tmp_path), piece_length=P, mode="copy")
    inode = (store.files(ref.info_hash) / "big").stat().st_ino
    assert store.add(tmp_path / "item", piece_length=P, mode="move") == ref
    assert (store.files(ref.info_hash) / "big").stat().st_ino == inode
    assert not (tmp_path / "item").exists() and leftovers(store) == []


def test_a_source_that_cannot_be_an_item_stays_where_it_is(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    (source / "link").symlink_to(source / "big")
    store = ContentStore(tmp_path / "store")
    with pytest.raises(ConfigError, match="plain file"):
        store.add(source, mode="move")
    assert (source / "big").exists() and store.complete() == [] and leftovers(store) == []


def test_another_file_system_gets_a_copy(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev or not os.access(other, os.W_OK):
        pytest.skip("no second file system here")
    root = other / f"paris-test-{os.getpid()}"
    try:
        store = ContentStore(root)
        source = make_source(tmp_path)
        ref = store.add(source, piece_length=P, mode="link")
        assert contents(store.files(ref.info_hash)) == contents(source)
        store.remove(ref.info_hash)
    finally:
        subprocess.run(["rm", "-r", str(root)], check=True)


def test_an_open_item_gives_everything_a_peer_asks_for(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    store = ContentStore(tmp_path / "store")
    ref = store.add(source, piece_length=P)
    item = store.open(ref.info_hash)
    assert info_hash(item.info) == ref.info_hash and item.ref == ref
    assert item.layout.pieces == 6 and item.bitfield() == b"\xfc"
    assert item.has_piece(5) and not item.has_piece(6) and not item.has_piece(-1)
    big = (source / "big").read_bytes()
    assert item.read_block(0, 0, P) == big[:P] and item.read_block(3, 2, 3) == big[3 * P + 2 :]
    assert item.read_block(5, 0, 7) == (source / "sub" / "small").read_bytes()
    assert check_layer(item.layout.files[0], item.layer(0), P)
    item.close()
    assert item.read_block(0, 5, 1) == big[5:6]


def test_a_block_in_memory_is_read_at_once_and_otherwise_not_at_all(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    store = ContentStore(tmp_path / "store")
    item = store.open(store.add(source, piece_length=P).info_hash)
    assert item.read_now(0, 5, 9) is None  # its file would have to be opened
    block = item.read_block(0, 5, 9)
    assert item.read_now(0, 5, 9) in (block, None)  # None: this file system does not tell what is in memory
    assert item.read_now(3, 2, 1000) is item.read_now(99, 0, 1) is item.read_now(0, P, 1) is None
    (store.files(item.ref.info_hash) / "big").write_bytes(b"short")
    assert item.read_now(0, 0, 1) is None


@pytest.mark.parametrize(
    ("piece", "offset", "length"),
    [(6, 0, 1), (-1, 0, 1), (0, 0, P + 1), (0, P, 1), (3, 0, 6), (0, -1, 1), (0, 0, 0), (0, 5, -5)],
)
def test_a_block_outside_the_item_is_the_peers_fault(
    tmp_path: Path, piece: int, offset: int, length: int
) -> None:
    store = ContentStore(tmp_path / "store")
    item = store.open(store.add(make_source(tmp_path), piece_length=P).info_hash)
    with pytest.raises(RemoteProtocolError):
        item.read_block(piece, offset, length)


@pytest.mark.parametrize("index", [-1, 1, 2, 4])
def test_a_layer_that_does_not_exist_is_the_peers_fault(tmp_path: Path, index: int) -> None:
    store = ContentStore(tmp_path / "store")
    item = store.open(store.add(make_source(tmp_path), piece_length=P).info_hash)
    with pytest.raises(RemoteProtocolError):
        item.layer(index)


@pytest.mark.parametrize("pieces", range(18))
def test_a_full_bitfield_has_one_bit_a_piece_from_the_top(pieces: int) -> None:
    bits = "".join(f"{byte:08b}" for byte in full_bitfield(pieces))
    assert bits == ("1" * pieces).ljust(-(-pieces // 8) * 8, "0")


def test_a_file_that_changed_its_size_is_not_served(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    store = ContentStore(tmp_path / "store")
    item = store.open(store.add(source, piece_length=P).info_hash)
    item.read_block(0, 0, 10)
    with (source / "big").open("ab") as file:
        file.write(b"!")
    with pytest.raises(StoreError, match="changed after it was stored"):
        item.read_block(0, 0, 10)


def test_an_item_with_damaged_metadata_is_not_opened(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "store")
    ref = store.add(make_source(tmp_path), piece_length=P)
    folder = store.files(ref.info_hash).parent
    (folder / "layers" / "0").write_bytes(bytes(128))
    with pytest.raises(StoreError, match="damaged"):
        store.open(ref.info_hash).layer(0)
    (folder / "info").write_bytes(b"de")
    with pytest.raises(StoreError, match="damaged"):
        store.open(ref.info_hash)
    (folder / "ref").write_bytes(b"")
    with pytest.raises(StoreError, match="remove the folder"):
        store.complete()


def test_what_is_not_complete_cannot_be_opened(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "store")
    absent = InfoHash(bytes(32))
    assert not store.has(absent)
    for use in (store.open, store.files, store.ref, store.verify):
        with pytest.raises(StoreError, match="is not complete"):
            use(absent)


def test_removing_leaves_nothing_and_may_be_repeated(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    store = ContentStore(tmp_path / "store")
    ref = store.add(source, piece_length=P)
    store.remove(ref.info_hash)
    store.remove(ref.info_hash)
    assert not store.has(ref.info_hash) and store.complete() == [] and leftovers(store) == []
    assert (source / "big").exists()


def test_a_damaged_item_is_set_aside_and_only_its_bad_pieces_are_fetched_again(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    good, damaged = ContentStore(tmp_path / "good"), ContentStore(tmp_path / "damaged")
    ref = good.add(source, piece_length=P, mode="copy")
    damaged.add(source, piece_length=P, mode="link")
    item = damaged.open(ref.info_hash)
    item.read_block(1, 0, 1)
    with (source / "big").open("r+b") as file:
        file.seek(P + 3)
        file.write(b"\0\1\2")
    mine = (source / "big").read_bytes()
    assert damaged.verify(ref.info_hash) == [1]
    assert not damaged.has(ref.info_hash) and damaged.partial() == [ref]
    with pytest.raises(StoreError):
        item.read_block(1, 0, 1)
    partial = damaged.begin(ref)
    assert partial.bitfield() == b"\xbc" and partial.missing_layers() == []
    partial.close()
    assert contents(fetch(damaged, good, ref)) == contents(good.files(ref.info_hash))
    assert damaged.verify(ref.info_hash) == [] and leftovers(damaged) == []
    assert (source / "big").read_bytes() == mine, "a file the operator linked must never be written to"


def test_a_truncated_and_a_missing_file_are_fetched_again(tmp_path: Path) -> None:
    good, damaged = ContentStore(tmp_path / "good"), ContentStore(tmp_path / "damaged")
    ref = good.add(make_source(tmp_path), piece_length=P)
    damaged.add(tmp_path / "item", piece_length=P, mode="copy")
    os.truncate(damaged.files(ref.info_hash) / "big", P + 1)
    (damaged.files(ref.info_hash) / "sub" / "small").unlink()
    assert damaged.verify(ref.info_hash) == [0, 1, 2, 3, 5]  # a file of wrong length is not served at all
    partial = damaged.begin(ref)
    assert partial.bitfield() == b"\x88"  # but its good piece is kept
    partial.close()
    assert contents(fetch(damaged, good, ref)) == contents(tmp_path / "item")


def test_damaged_metadata_is_fetched_again_and_the_data_kept(tmp_path: Path) -> None:
    good, damaged = ContentStore(tmp_path / "good"), ContentStore(tmp_path / "damaged")
    ref = good.add(make_source(tmp_path), piece_length=P)
    damaged.add(tmp_path / "item", piece_length=P, mode="copy")
    folder = damaged.files(ref.info_hash).parent
    (folder / "info").write_bytes(b"?")
    (folder / "layers" / "0").write_bytes(b"?")
    assert len(damaged.verify(ref.info_hash)) > 0
    source, partial = good.open(ref.info_hash), damaged.begin(ref)
    assert partial.info is None and partial.bitfield() == b""
    partial.set_info(source.info)
    assert partial.missing_layers() == [0] and partial.bitfield() == b"\x0c"
    partial.set_layer(0, source.layer(0))
    assert partial.bitfield() == b"\xfc"
    assert contents(partial.finish()) == contents(tmp_path / "item")


def test_a_fetch_without_room_says_how_much_is_missing_and_where(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "store")
    free = store.free_bytes()
    if free >= MAX_ITEM_BYTES:
        pytest.skip("this disk has room for the largest item")
    ref = ContentRef(InfoHash(b"x" * 32), MAX_ITEM_BYTES, 1 << 20)
    with pytest.raises(StoreError, match=rf"disk full: \d+ more bytes are needed under {store.root}"):
        store.begin(ref)
    assert store.partial() == [] and leftovers(store) == []


HOLD = """
import sys
from pathlib import Path
from paris_p2p.ids import InfoHash
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.content import ContentRef
item = ContentStore(Path(sys.argv[1])).begin(ContentRef(InfoHash(b"x" * 32), 10, 1 << 14))
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_fetches_an_item(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "store")
    ref = ContentRef(InfoHash(b"x" * 32), 10, 1 << 14)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        for use in (store.begin, lambda ref: store.remove(ref.info_hash)):
            with pytest.raises(StoreError, match=f"in use by process {child.pid}"):
                use(ref)
        child.kill()
    store.begin(ref).close()


def test_a_complete_item_is_not_fetched_again(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "store")
    ref = store.add(make_source(tmp_path))
    with pytest.raises(StoreError, match="complete already"):
        store.begin(ref)
    assert leftovers(store) == []


def test_an_item_added_while_it_is_fetched_ends_as_one_item(tmp_path: Path) -> None:
    good, store = ContentStore(tmp_path / "good"), ContentStore(tmp_path / "store")
    ref = good.add(make_source(tmp_path), piece_length=P)
    source, partial = good.open(ref.info_hash), store.begin(ref)
    partial.set_info(source.info)
    partial.set_layer(0, source.layer(0))
    for piece in range(source.layout.pieces):
        partial.write_piece(piece, source.read_block(piece, 0, source.layout.piece_span(piece)[2]))
    assert store.add(tmp_path / "item", piece_length=P) == ref
    assert partial.finish() == store.files(ref.info_hash)
    assert store.verify(ref.info_hash) == [] and leftovers(store) == []


def test_adding_an_item_drops_its_unfinished_fetch(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "store")
    ref = ContentStore(tmp_path / "other").add(make_source(tmp_path), piece_length=P)
    store.begin(ref).close()
    assert store.partial() == [ref]
    store.add(tmp_path / "item", piece_length=P)
    assert store.partial() == [] and leftovers(store) == []


ADD_AND_DIE = """
import os, signal, sys
from pathlib import Path
from paris_p2p.store import content_store
content_store.describe = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
content_store.ContentStore(Path(sys.argv[1])).add(Path(sys.argv[2]))
"""


def test_what_a_killed_process_left_half_added_is_swept(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "store")
    source = make_source(tmp_path)
    subprocess.run([sys.executable, "-c", ADD_AND_DIE, str(store.root), str(source)], check=False)
    assert len(leftovers(store)) == 2  # the staged folder and its lock's file
    ContentStore(tmp_path / "store")
    assert len(leftovers(store)) == 2
    ContentStore(tmp_path / "store", clean=True)
    assert leftovers(store) == [] and (source / "big").exists()


def test_a_store_where_none_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="opening the content store"):
        ContentStore(tmp_path / "file" / "store")


def test_an_adopted_item_shares_its_bytes_with_the_other_store(tmp_path: Path) -> None:
    other, store = ContentStore(tmp_path / "other"), ContentStore(tmp_path / "store")
    ref = other.add(make_source(tmp_path), piece_length=P)
    store.begin(ref).close()
    assert store.adopt(other, ref.info_hash) == ref and store.adopt(other, ref.info_hash) == ref
    assert (store.files(ref.info_hash) / "big").samefile(other.files(ref.info_hash) / "big")
    assert store.verify(ref.info_hash) == [] and leftovers(store) == []
    with pytest.raises(StoreError, match="is not complete"):
        store.adopt(other, InfoHash(bytes(32)))


def test_repairing_an_adopted_item_leaves_the_other_store_alone(tmp_path: Path) -> None:
    good, other, store = (ContentStore(tmp_path / name) for name in ("good", "other", "store"))
    ref = good.add(make_source(tmp_path), piece_length=P, mode="copy")
    other.add(tmp_path / "item", piece_length=P, mode="move")
    store.adopt(other, ref.info_hash)
    with (other.files(ref.info_hash) / "big").open("r+b") as file:
        file.write(b"\0")
    damaged = contents(other.files(ref.info_hash))
    assert store.verify(ref.info_hash) == [0]
    assert contents(fetch(store, good, ref)) == contents(good.files(ref.info_hash))
    assert contents(other.files(ref.info_hash)) == damaged and other.verify(ref.info_hash) == [0]
