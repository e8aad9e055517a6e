"""The picker, driven through a small notation after libtorrent's: availability and what is here."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.core.picker import FEW, Picker, make_bitfield, read_bitfield
from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import PieceIndex

PEER = "peer"


def piece_set(text: str) -> set[PieceIndex]:
    return {PieceIndex(i) for i, mark in enumerate(text) if mark not in " ."}


def setup_picker(availability: str, have: str = "", peer: str | None = None, seed: int = 1) -> Picker[str]:
    """`availability`: one digit a piece, how many other peers have it; `have`: `*` where it is here.

    `peer`: what `PEER` has (`*`), everything when None. Four filler pieces at the end are here already,
    so that the random start is over.
    """
    pieces = len(availability) + 4
    here = piece_set(have) | {PieceIndex(pieces - 1 - i) for i in range(4)}
    picker: Picker[str] = Picker(pieces, here, random.Random(seed))
    for level in range(1, 10):
        held = {PieceIndex(i) for i, digit in enumerate(availability) if int(digit) >= level}
        if held:
            picker.set_peer(f"other{level}", held)
    everything = set(map(PieceIndex, range(pieces)))
    picker.set_peer(PEER, everything if peer is None else piece_set(peer))
    return picker


def picks(picker: Picker[str], peer: str = PEER) -> list[int]:
    out = []
    while (piece := picker.pick(peer)) is not None:
        out.append(int(piece))
    return out


def test_the_rarest_piece_is_picked_first() -> None:
    assert picks(setup_picker("2132"))[:2] in ([1, 0], [1, 3])


def test_what_is_here_is_not_picked() -> None:
    assert sorted(picks(setup_picker("1123", "  * "))) == [0, 1, 3]


def test_only_what_the_peer_has_is_picked() -> None:
    assert picks(setup_picker("1123", peer="  **")) == [2, 3]


def test_ties_are_shuffled() -> None:
    orders = {tuple(picks(setup_picker("11111111", seed=seed))) for seed in range(10)}
    assert len(orders) > 5


def test_the_first_pieces_are_random_not_rarest() -> None:
    firsts = set()
    for seed in range(20):
        picker: Picker[str] = Picker(6, (), random.Random(seed))
        picker.set_peer("rare", piece_set("***** "))
        picker.set_peer(PEER, piece_set("******"))
        firsts.add(picker.pick(PEER))
    assert len(firsts) > 3


def test_a_piece_is_begun_once() -> None:
    picker = setup_picker("11")
    picker.set_peer("second", piece_set("**"))
    assert sorted(picks(picker)) == [0, 1]
    assert picker.pick("second") is None and picker.free == 0


def test_a_piece_that_nobody_works_on_any_more_is_free_again() -> None:
    picker = setup_picker("1")
    piece = picker.pick(PEER)
    assert piece is not None
    picker.put_back(piece)
    picker.put_back(piece)
    assert picker.free == 1 and picker.pick(PEER) == piece


def test_what_a_peer_refused_it_is_not_asked_for_until_it_announces_it() -> None:
    picker = setup_picker("11")
    picker.peer_lacks(PEER, PieceIndex(0))
    assert not picker.peer_has(PEER, PieceIndex(0)) and not picker.peer_has_all(PEER)
    assert picks(picker) == [1]
    assert picker.peer_got(PEER, PieceIndex(0))
    assert picks(picker) == [0]


def test_a_seed_that_refuses_and_announces_again_and_again_moves_one_piece_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strangers choose how many pieces an item has: no message of a few bytes may cost a look at each."""
    moved: list[int] = []
    adjust = Picker._adjust

    def counted(picker: Picker[str], piece: PieceIndex, by: int) -> None:
        moved.append(piece)
        adjust(picker, piece, by)

    picker = setup_picker("1" * 500)
    monkeypatch.setattr(Picker, "_adjust", counted)
    for number in range(20):
        picker.peer_lacks(PEER, PieceIndex(number))
        assert picker.peer_got(PEER, PieceIndex(number)) and picker.peer_has_all(PEER)
        assert not picker.peer_got(PEER, PieceIndex(number))
    assert len(moved) == 40 and picker.pick(PEER) is not None


def test_a_seed_is_interesting_unless_it_refused_all_that_is_missing() -> None:
    picker = setup_picker("11", "* ")
    assert picker.interesting(PEER)
    picker.peer_lacks(PEER, PieceIndex(1))
    assert not picker.interesting(PEER) and picker.pick(PEER) is None
    assert picker.peer_got(PEER, PieceIndex(1)) and picker.interesting(PEER)
    picker.peer_lacks(PEER, PieceIndex(1))
    picker.set_peer("second", {PieceIndex(1)})
    assert {"second", PEER} <= set(picker.verified(PieceIndex(1))) and not picker.interesting(PEER)


def test_what_a_seed_refused_no_longer_counts_once_it_is_here() -> None:
    picker = setup_picker("111")
    picker.peer_lacks(PEER, PieceIndex(0))
    for piece in (0, 1):
        picker.verified(PieceIndex(piece))
        assert picker.interesting(PEER)


def test_few_pieces_that_everybody_else_has_too_are_found_without_looking_at_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paris_p2p.core.picker.FEW", 2)
    picker = setup_picker("0" * 500 + "9" * 5)
    picker.set_peer("rare", {PieceIndex(500 + n) for n in range(5)})
    looked = {"few": 0}
    of_few = picker._of_few

    def counted(wanted: set[PieceIndex]) -> PieceIndex | None:
        looked["few"] += 1
        return of_few(wanted)

    monkeypatch.setattr(picker, "_of_few", counted)
    assert picker.pick("rare") in range(500, 505) and looked == {"few": 1}


def test_a_verified_piece_names_the_peers_that_are_of_no_more_use() -> None:
    picker = setup_picker("11", peer="* ")
    picker.set_peer("second", piece_set("**"))
    assert picker.verified(PieceIndex(0)) == [PEER]
    assert not picker.interesting(PEER) and picker.interesting("second")


def test_the_search_among_few_and_among_many_finds_the_rarest_alike() -> None:
    pieces = FEW * 3
    for held in (FEW // 2, FEW * 2):
        picker: Picker[str] = Picker(pieces, map(PieceIndex, range(held, pieces)), random.Random(3))
        picker.set_peer(PEER, set(map(PieceIndex, range(held))))
        picker.set_peer("other", set(map(PieceIndex, range(held - 1))))
        assert picker.pick(PEER) == held - 1


def test_a_peer_is_interesting_while_it_has_something_we_lack() -> None:
    picker = setup_picker("11", "* ", peer="* ")
    assert not picker.interesting(PEER)
    picker.peer_got(PEER, PieceIndex(1))
    assert picker.interesting(PEER)


@pytest.mark.parametrize(("bits", "pieces"), [(b"", 1), (b"\x80\x00", 8), (b"\x01", 7), (b"\xff", 3)])
def test_a_malformed_bitfield_is_refused(bits: bytes, pieces: int) -> None:
    with pytest.raises(RemoteProtocolError):
        read_bitfield(bits, pieces)


@given(st.lists(st.booleans(), max_size=40))
def test_bitfields_round_trip(flags: list[bool]) -> None:
    held = {PieceIndex(i) for i, flag in enumerate(flags) if flag}
    assert read_bitfield(make_bitfield(flags), len(flags)) == held


actions = st.lists(
    st.tuples(
        st.sampled_from(["set", "got", "gone", "lacks", "pick", "put_back", "verified"]),
        st.integers(0, 3),
        st.integers(0, 11),
    ),
    min_size=20,
    max_size=60,
)


@pytest.mark.parametrize("few", [FEW, 0])
@settings(deadline=None, derandomize=True, max_examples=100)
@given(todo=actions, seed=st.integers(0, 2**32))
def test_the_books_stay_right_whatever_happens(few: int, todo: list[tuple[str, int, int]], seed: int) -> None:
    """Compares against a naive model: availability, what is free, and rarest-first of every pick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paris_p2p.core.picker.FEW", few)
        patch.setattr("paris_p2p.core.picker.MANY", few)
        _compare_with_a_naive_model(todo, seed)


def _compare_with_a_naive_model(todo: list[tuple[str, int, int]], seed: int) -> None:
    pieces = 16
    here = map(PieceIndex, range(12, 16) if seed % 2 else ())  # else the first ones are picked by chance
    picker: Picker[int] = Picker(pieces, here, random.Random(seed))
    held: dict[int, set[PieceIndex]] = {}
    begun: set[PieceIndex] = set()
    rng = random.Random(seed)
    for name, peer, number in todo:
        piece = PieceIndex(number)
        if name == "set":
            held[peer] = {PieceIndex(p) for p in range(pieces) if rng.randrange(4) or number < 4}
            picker.set_peer(peer, held[peer])
        elif name == "got":
            held.setdefault(peer, set()).add(piece)
            picker.peer_got(peer, piece)
        elif name == "gone":
            held.pop(peer, None)
            picker.remove_peer(peer)
        elif name == "lacks":
            held.get(peer, set()).discard(piece)
            picker.peer_lacks(peer, piece)
        elif name == "pick":
            free = [p for p in held.get(peer, ()) if not picker.has(p) and p not in begun]
            levels = {p: picker.availability(p) for p in free}
            picked = picker.pick(peer)
            assert (picked in free) if free else picked is None
            if picked is not None:
                assert picker.done < 4 or levels[picked] == min(levels.values())
                begun.add(picked)
        elif name == "put_back":
            picker.put_back(piece)
            begun.discard(piece)
        elif piece in begun:
            useless = picker.verified(piece)
            begun.discard(piece)
            assert all(not picker.interesting(other) for other in useless)
        for p in map(PieceIndex, range(pieces)):
            assert picker.availability(p) == sum(p in have for have in held.values())
        assert picker.free == pieces - picker.done - len(begun)
        for other, have in held.items():
            assert picker.interesting(other) == any(not picker.has(p) for p in have)
            assert picker.peer_has_all(other) == (len(have) == pieces)
            assert all(picker.peer_has(other, PieceIndex(p)) == (p in have) for p in range(pieces))
