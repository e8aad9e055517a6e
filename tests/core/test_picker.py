"""The picker, driven through a small notation after libtorrent's: availability and what is here."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.core.picker import MAX_OWNERS, Picker, make_bitfield, read_bitfield
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


def test_a_piece_is_assigned_to_one_peer_until_the_endgame() -> None:
    picker = setup_picker("11")
    picker.set_peer("second", piece_set("**"))
    assert sorted(picks(picker)) == [0, 1]
    assert picker.pick("second") is None
    assert picker.pick("second", endgame=True) is not None


def test_the_endgame_doubles_the_longest_assigned_piece_and_no_more_than_twice() -> None:
    picker = setup_picker("1")
    for name in ("second", "third"):
        picker.set_peer(name, piece_set("*"))
    piece = picker.pick(PEER)
    assert piece is not None
    assert picker.pick("second", endgame=True) == piece
    assert picker.pick("third", endgame=True) is None
    assert len(picker.owners(piece)) == MAX_OWNERS


def test_a_piece_that_waits_for_its_hash_is_not_doubled() -> None:
    picker = setup_picker("1")
    picker.set_peer("second", piece_set("*"))
    piece = picker.pick(PEER)
    assert piece is not None
    picker.delivered(piece)
    assert picker.pick("second", endgame=True) is None
    picker.release(PEER, piece)  # its hash was wrong
    assert picker.pick("second") == piece


def test_a_verified_piece_names_those_who_still_fetch_it() -> None:
    picker = setup_picker("1")
    picker.set_peer("second", piece_set("*"))
    piece = picker.pick(PEER)
    assert piece is not None
    picker.pick("second", endgame=True)
    assert picker.verified(piece) == [PEER, "second"]
    assert picker.complete


def test_a_leaving_peer_frees_what_it_was_fetching() -> None:
    picker = setup_picker("11")
    picker.set_peer("second", piece_set("**"))
    picks(picker)
    picker.remove_peer(PEER)
    assert sorted(picks(picker, "second")) == [0, 1]


def test_what_this_peer_began_is_preferred() -> None:
    picker = setup_picker("1199")
    assert picker.pick(PEER, prefer=[PieceIndex(3)]) == 3


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
        st.sampled_from(["set", "got", "gone", "pick", "endgame", "release", "verified"]),
        st.integers(0, 3),
        st.integers(0, 11),
    ),
    max_size=60,
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(actions, st.integers(0, 2**32))
def test_the_books_stay_right_whatever_happens(todo: list[tuple[str, int, int]], seed: int) -> None:
    """Compares against a naive model: availability, ownership, and rarest-first of every pick."""
    pieces = 12
    picker: Picker[int] = Picker(pieces, (), random.Random(seed))
    held: dict[int, set[PieceIndex]] = {}
    rng = random.Random(seed)
    for name, peer, number in todo:
        piece = PieceIndex(number)
        if name == "set":
            held[peer] = {PieceIndex(p) for p in range(pieces) if rng.randrange(4) or number == 0}
            picker.set_peer(peer, held[peer])
        elif name == "got":
            held.setdefault(peer, set()).add(piece)
            picker.peer_got(peer, piece)
        elif name == "gone":
            held.pop(peer, None)
            picker.remove_peer(peer)
        elif name in ("pick", "endgame"):
            free = [p for p in held.get(peer, ()) if not picker.has(p) and not picker.owners(p)]
            levels = {p: picker.availability(p) for p in free}
            picked = picker.pick(peer, endgame=name == "endgame")
            if free:
                assert picked in free
                assert picker.done < 4 or levels[picked] == min(levels.values())
            elif name == "pick":
                assert picked is None
        elif name == "release":
            picker.release(peer, piece)
        elif not picker.has(piece) and picker.owners(piece):
            picker.verified(piece)
        for p in map(PieceIndex, range(pieces)):
            assert picker.availability(p) == sum(p in have for have in held.values())
            assert len(picker.owners(p)) <= MAX_OWNERS
            assert all(owner in held for owner in picker.owners(p))
