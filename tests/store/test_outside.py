"""Tests of `paris_p2p.store.outside`, through the store: seeding in place, handing out."""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from paris_p2p.errors import ConfigError, DiskFullError, RemoteProtocolError, StoreError
from paris_p2p.ids import InfoHash
from paris_p2p.store import content_store, files
from paris_p2p.store.content_store import ContentStore, ItemBusyError
from paris_p2p.store.hashing import Described, describe, find_files, item_name
from paris_p2p.store.layout import ItemFolder
from paris_p2p.wire.bep52 import content_ref
from paris_p2p.wire.content import ContentRef, MagnetRef

P = 1 << 14
LONG_AGO_NS = 1_600_000_000 * 10**9


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for path, size in {"a": 3 * P + 1, "sub/b": 2 * P, "sub/c": 9, "empty": 0}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(Random(size).randbytes(size))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "store")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the items that were hashed."""
    names: list[str] = []

    def counted(name: str, *arguments: object, **options: object) -> Described:
        names.append(name)
        return describe(name, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(content_store, "describe", counted)
    return names


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files just written count as written long enough ago for their times to mean something."""
    monkeypatch.setattr("paris_p2p.store.journal._TICK_NS", -(10**9))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def described_as(source: Path) -> tuple[ContentRef, Described]:
    described = describe(item_name(source), find_files(source), P)
    return content_ref(described.info), described


@pytest.mark.parametrize("what", ["", "a"])
def test_a_placed_item_is_served_from_where_it_lies(store: ContentStore, source: Path, what: str) -> None:
    ref = store.place(source / what, piece_length=P, threads=3)
    assert ref == described_as(source / what)[0]
    item = store.open(ref.info_hash)
    assert item.read_block(0, 0, P) == (source / "a").read_bytes()[:P]
    assert all(item.piece_is_good(piece) for piece in range(item.layout.pieces))
    assert store.holdings()[0].bytes_on_disk < 30_000 and (source / "a").stat().st_nlink == 1


@pytest.mark.usefixtures("settled")
def test_it_is_hashed_once_as_long_as_nothing_changes(
    store: ContentStore, source: Path, hashed: list[str]
) -> None:
    first = store.place(source, piece_length=P)
    assert ContentStore(store.root).place(source) == first and hashed == ["source"]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "change",
    [
        lambda folder: damage(folder / "sub/c"),
        lambda folder: os.utime(folder / "a", ns=(LONG_AGO_NS, LONG_AGO_NS)),
        lambda folder: (folder / "more").write_bytes(b"x"),
        lambda folder: (folder / "empty").unlink(),
    ],
)
def test_any_change_is_noticed(
    store: ContentStore, source: Path, hashed: list[str], change: Callable[[Path], object]
) -> None:
    store.place(source, piece_length=P)
    change(source)
    ref = store.place(source, piece_length=P)
    assert hashed == ["source", "source"] and ref == described_as(source)[0]


def test_another_piece_length_is_another_item(store: ContentStore, source: Path) -> None:
    assert store.place(source, piece_length=P) != store.place(source, piece_length=2 * P)


def test_a_file_that_moved_is_served_from_its_new_place(
    store: ContentStore, source: Path, tmp_path: Path
) -> None:
    ref = store.place(source / "a", piece_length=P)
    (tmp_path / "new").mkdir()
    (source / "a").rename(tmp_path / "new/a")
    with pytest.raises(StoreError):
        store.open(ref.info_hash).read_block(0, 0, 1)
    assert store.place(tmp_path / "new/a", piece_length=P) == ref
    assert store.open(ref.info_hash).piece_is_good(0)


def test_a_link_of_another_name_is_refused_with_the_name_to_use(store: ContentStore, source: Path) -> None:
    (source.parent / "alias").symlink_to(source / "a")
    with pytest.raises(ConfigError, match="name that file instead"):
        store.place(source.parent / "alias")


def test_a_damaged_placed_item_is_forgotten_and_its_files_left_alone(
    store: ContentStore, source: Path
) -> None:
    ref = store.place(source, piece_length=P)
    damage(source / "a")
    before = (source / "a").read_bytes()
    assert store.verify(ref.info_hash) == [3]
    assert not store.has(ref.info_hash) and store.partial() == [] and (source / "a").read_bytes() == before


def test_removing_a_placed_item_leaves_its_files(store: ContentStore, source: Path) -> None:
    store.remove(store.place(source).info_hash)
    assert (source / "sub/b").exists() and store.ids() == []


# --- handing out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["", "a"])
@pytest.mark.parametrize("links", [True, False])
def test_an_item_gets_its_name_without_a_copy(
    store: ContentStore, source: Path, tmp_path: Path, what: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    info_hash = store.add(source / what, mode="copy").info_hash
    inode = store.files(info_hash).joinpath("a").stat().st_ino
    if not links:
        monkeypatch.setattr(files, "link", lambda source, target: False)
    out = tmp_path / "out"
    out.mkdir()
    target = store.hand_out(info_hash, out)
    assert target == out / item_name(source / what) and list(out.iterdir()) == [target]
    assert described_as(target)[0] == described_as(source / what)[0]
    assert (target / "a" if not what else target).stat().st_ino == inode
    assert store.has(info_hash) is links


def test_handing_out_twice_gives_the_same_files(store: ContentStore, source: Path, tmp_path: Path) -> None:
    info_hash = store.add(source, mode="copy").info_hash
    out = tmp_path / "out"
    out.mkdir()
    first = store.hand_out(info_hash, out)
    inode = (first / "a").stat().st_ino
    assert store.hand_out(info_hash, out) == first and (first / "a").stat().st_ino == inode


def test_a_copy_that_is_there_already_will_do(store: ContentStore, source: Path) -> None:
    info_hash = store.add(source, mode="copy").info_hash
    assert store.hand_out(info_hash, source.parent) == source


@pytest.mark.parametrize("what", ["", "a"])
def test_something_else_of_that_name_is_never_replaced(
    store: ContentStore, source: Path, tmp_path: Path, what: str
) -> None:
    info_hash = store.add(source / what).info_hash
    out = tmp_path / "out"
    out.mkdir()
    (out / item_name(source / what)).write_text("mine")
    with pytest.raises(ConfigError, match="move it away"):
        store.hand_out(info_hash, out)
    assert (out / item_name(source / what)).read_text() == "mine" and store.has(info_hash)


# --- items known by their id ---------------------------------------------------------------------


def fill(store: ContentStore, source: Path, ref: ContentRef | MagnetRef, described: Described) -> Path:
    partial = store.begin(ref)
    if partial.info is None:
        partial.set_info(described.info)
    for index in partial.missing_layers():
        partial.set_layer(index, described.layers[index])
    for piece in range(described.layout.pieces):
        index, offset, length = described.layout.piece_span(piece)
        path = source.joinpath(*described.layout.files[index].path)
        assert partial.write_piece(piece, path.read_bytes()[offset : offset + length])
    return partial.finish()


def test_an_item_is_fetched_by_its_id_alone(store: ContentStore, source: Path) -> None:
    ref, described = described_as(source)
    fill(store, source, MagnetRef(ref.info_hash), described)
    assert store.ref(ref.info_hash) == ref and store.verify(ref.info_hash) == []


def test_the_sizes_are_kept_for_the_next_time(store: ContentStore, source: Path) -> None:
    ref, described = described_as(source)
    partial = store.begin(MagnetRef(ref.info_hash))
    assert partial.ref == MagnetRef(ref.info_hash) and store.partial() == []
    partial.set_info(described.info)
    partial.close()
    assert store.partial() == [ref]
    again = store.begin(MagnetRef(ref.info_hash))
    assert again.ref == ref and again.layout == described.layout
    again.close()


def test_a_fetch_that_learned_nothing_leaves_nothing(store: ContentStore, source: Path) -> None:
    store.begin(MagnetRef(described_as(source)[0].info_hash)).close()
    assert store.holdings() == [] and list(store.root.joinpath("partial").iterdir()) == []


def test_an_info_dictionary_of_another_item_is_refused(store: ContentStore, source: Path) -> None:
    partial = store.begin(MagnetRef(InfoHash(bytes(32))))
    with pytest.raises(RemoteProtocolError):
        partial.set_info(described_as(source)[1].info)
    partial.close()


def test_there_must_be_room_as_soon_as_the_sizes_are_known(
    store: ContentStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, described = described_as(source)
    monkeypatch.setattr(ContentStore, "free_bytes", lambda self: 100)
    partial = store.begin(MagnetRef(ref.info_hash))
    with pytest.raises(DiskFullError, match="disk full"):
        partial.set_info(described.info)
    partial.close()


def test_what_a_torrent_tells_need_not_be_asked_for(store: ContentStore, source: Path) -> None:
    ref, described = described_as(source)
    store.foretell(ref, described.info, described.layers)
    partial = store.begin(ref)
    with pytest.raises(ItemBusyError):
        store.foretell(ref, described.info, described.layers)
    assert partial.layout == described.layout and partial.missing_layers() == []
    partial.close()
    store.foretell(ref, described.info, {})  # begun: nothing changes
    fill(store, source, ref, described)
    store.foretell(ref, described.info, {})
    assert store.partial() == []


# --- what is left of damaged items ---------------------------------------------------------------


def test_a_damaged_reference_is_written_again_from_the_info(store: ContentStore, source: Path) -> None:
    ref = store.add(source, piece_length=P)
    folder = ItemFolder(store.root / "complete" / ref.info_hash.hex())
    folder.ref.write_bytes(b"?")
    assert store.verify(ref.info_hash) == [] and store.ref(ref.info_hash) == ref


def test_an_item_of_which_nothing_can_be_proved_is_removed(store: ContentStore, source: Path) -> None:
    ref = store.add(source, piece_length=P)
    folder = ItemFolder(store.root / "complete" / ref.info_hash.hex())
    folder.ref.write_bytes(b"?")
    folder.info.write_bytes(b"?")
    with pytest.raises(StoreError, match="removed"):
        store.verify(ref.info_hash)
    assert store.ids() == []


# --- quota ---------------------------------------------------------------------------------------


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    made = []
    for number in range(4):
        made.append(tmp_path / f"file-{number}")
        made[-1].write_bytes(bytes([number]) * 200_000)
    return made


def kept(store: ContentStore, refs: list[ContentRef]) -> list[int]:
    return [number for number, ref in enumerate(refs) if store.has(ref.info_hash)]


def test_a_fetch_displaces_what_was_used_longest_ago(store: ContentStore, four: list[Path]) -> None:
    refs = [store.add(path, mode="copy") for path in four[:3]]
    for age, ref in zip((3, 1, 2), refs, strict=True):
        folder = store.root / "complete" / ref.info_hash.hex()
        os.utime(folder, ns=(LONG_AGO_NS - age * 10**9,) * 2)
    store.limit(700_000, lambda: ())
    store.begin(described_as(four[3])[0]).close()
    assert kept(store, refs) == [1, 2]
    store.open(refs[1].info_hash)  # used: now the other one is older
    store.limit(500_000, lambda: ())
    store.add(four[0], mode="copy")
    assert kept(store, refs) == [0, 1]


def test_pinned_items_stay_and_the_fetch_is_refused(store: ContentStore, four: list[Path]) -> None:
    refs = [store.add(path, mode="copy") for path in four[:3]]
    store.limit(700_000, lambda: [ref.info_hash for ref in refs])
    with pytest.raises(DiskFullError, match="quota of 700000 bytes"):
        store.begin(described_as(four[3])[0])
    assert kept(store, refs) == [0, 1, 2]


def test_a_fetch_under_way_counts_whole_and_is_not_collected(store: ContentStore, four: list[Path]) -> None:
    under_way = store.begin(described_as(four[0])[0])
    store.limit(450_000, lambda: ())
    second = store.begin(described_as(four[1])[0])
    with pytest.raises(DiskFullError):
        store.begin(described_as(four[2])[0])
    under_way.close()
    second.close()
    store.begin(described_as(four[2])[0]).close()


def test_what_is_made_here_is_kept_even_beyond_the_quota(store: ContentStore, four: list[Path]) -> None:
    store.limit(100_000, lambda: ())
    assert store.has(store.add(four[0]).info_hash)
