"""What a seeder alone with a crowd shows to whom."""

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.core.superseed import ALONE_S, FIRST_PORTION_BYTES, MAX_PIECES, STUCK_S, SuperSeed
from paris_p2p.ids import PieceIndex

P = PieceIndex
PIECE = FIRST_PORTION_BYTES // 4  # so that a first portion is four pieces


@dataclass
class Crowd:
    """A seeder and what it showed to each peer; all are unchoked."""

    pieces: int = 40
    seeding: SuperSeed[str] = field(init=False)
    shown: dict[str, list[PieceIndex]] = field(default_factory=dict)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.seeding = SuperSeed(self.pieces, PIECE, random.Random(1))

    def join(self, *peers: str) -> None:
        for peer in peers:
            self.shown[peer] = []
            assert self.seeding.opened(peer, self.now) == self.seeding.active

    def reveal(self, serving: str = "") -> None:
        for peer, piece in self.seeding.reveals(list(serving or self.shown), self.now):
            if piece not in self.shown[peer]:  # a second Have for a piece is harmless
                self.shown[peer].append(piece)

    def send(self, peer: str, piece: PieceIndex) -> bool:
        """The peer asks for a piece and gets it, unless it is refused."""
        if not self.seeding.requested(peer, piece, self.now):
            self.shown[peer].remove(piece)
            return False
        self.seeding.sent(peer, piece, PIECE, self.now)
        return True


def test_each_piece_is_shown_to_one_peer_only() -> None:
    crowd = Crowd()
    crowd.join("a", "b", "c")
    crowd.reveal()
    every = [piece for pieces in crowd.shown.values() for piece in pieces]
    assert len(every) == len(set(every)) == 12


def test_what_was_sent_makes_room_for_more() -> None:
    crowd = Crowd()
    crowd.join("a", "b")
    crowd.reveal()
    assert crowd.send("a", crowd.shown["a"][0])
    crowd.reveal()
    assert len(crowd.shown["a"]) > 4


def test_who_passes_nothing_on_gets_no_more_than_its_portion() -> None:
    crowd = Crowd(pieces=400)
    crowd.join("a", "b", "mute")
    for _ in range(60):
        crowd.reveal()
        for peer in ("a", "b", "mute"):
            for piece in crowd.shown[peer][-4:]:
                crowd.send(peer, piece)
            if peer != "mute":
                other = "b" if peer == "a" else "a"
                crowd.seeding.has(other, crowd.shown[peer], crowd.now)
        crowd.now += 0.1
    assert 3 * len(crowd.shown["mute"]) < len(crowd.shown["a"])


def test_everything_is_shown_once_each_piece_was_sent() -> None:
    crowd = Crowd(pieces=6)
    crowd.join("a", "b")
    for _ in range(5):
        crowd.reveal()
        for peer in crowd.shown:
            for piece in list(crowd.shown[peer]):
                crowd.send(peer, piece)
    assert not crowd.seeding.active
    assert {peer: len(pieces) for peer, pieces in crowd.shown.items()} == {"a": 6, "b": 6}
    assert crowd.seeding.opened("c", 1.0) is False


def test_a_single_peer_is_shown_everything_soon() -> None:
    crowd = Crowd(pieces=500)
    crowd.join("a")
    crowd.reveal()
    assert len(crowd.shown["a"]) > 100
    crowd.now = ALONE_S
    crowd.reveal()
    assert len(crowd.shown["a"]) > 400 and crowd.seeding.active


def test_pieces_the_peers_hold_already_are_not_shown() -> None:
    crowd = Crowd(pieces=8)
    crowd.join("a", "b")
    crowd.seeding.has("a", map(P, range(6)), 0.0)
    crowd.reveal()
    assert {*crowd.shown["a"], *crowd.shown["b"]} == {6, 7}


def test_what_a_leaving_peer_alone_had_is_shown_to_another() -> None:
    crowd = Crowd(pieces=8)
    crowd.join("a", "b")
    crowd.reveal()
    for piece in crowd.shown["a"]:
        crowd.send("a", piece)
    lost = set(crowd.shown.pop("a"))
    crowd.seeding.closed("a")
    crowd.join("c")
    crowd.reveal()
    for piece in list(crowd.shown["b"]):
        crowd.send("b", piece)
    crowd.reveal()
    assert lost <= {*crowd.shown["b"], *crowd.shown["c"]}


def test_a_piece_nobody_asked_for_is_taken_over_at_the_end_and_refused_to_the_first() -> None:
    crowd = Crowd(pieces=8)
    crowd.join("idle", "b")
    crowd.reveal()
    for _ in range(4):
        for piece in list(crowd.shown["b"]):
            crowd.send("b", piece)
        crowd.reveal()
    taken = set(crowd.shown["idle"]) & set(crowd.shown["b"])
    assert taken and not crowd.send("idle", taken.pop())


def test_a_piece_that_does_not_get_on_is_taken_over() -> None:
    crowd = Crowd(pieces=8)
    crowd.join("stuck", "b")
    crowd.reveal()
    for piece in crowd.shown["stuck"]:
        assert crowd.seeding.requested("stuck", piece, 0.0)
    for piece in list(crowd.shown["b"]):
        crowd.send("b", piece)
    crowd.reveal()
    assert len(crowd.shown["b"]) == 4
    crowd.now = STUCK_S + 1.0
    crowd.reveal()
    assert set(crowd.shown["stuck"]) <= set(crowd.shown["b"])


def test_peers_that_ask_for_nothing_do_not_hand_a_piece_back_and_forth_for_ever() -> None:
    crowd = Crowd(pieces=2)
    crowd.join("idle", "idle too", "x", "y")
    got: dict[str, set[PieceIndex]] = {"x": set(), "y": set()}
    for _ in range(12):
        crowd.now += STUCK_S / 2
        crowd.reveal()
        for peer, mine in got.items():
            mine.update(piece for piece in set(crowd.shown[peer]) - mine if crowd.send(peer, piece))
    assert got == {"x": {0, 1}, "y": {0, 1}}


def test_a_choked_peer_is_shown_one_piece_so_that_it_wants_a_slot() -> None:
    crowd = Crowd()
    crowd.join("a", "b")
    crowd.reveal(serving="a")
    assert len(crowd.shown["a"]) == 4 and len(crowd.shown["b"]) == 1


def test_a_seeder_among_others_shows_all_from_the_start() -> None:
    seeding: SuperSeed[str] = SuperSeed(8, PIECE, random.Random(1), active=False)
    assert seeding.opened("a", 0.0) is False and seeding.reveals(["a"], 0.0) == []
    assert seeding.requested("a", P(3), 0.0)


def test_an_item_of_very_many_pieces_is_shown_at_once() -> None:
    assert not SuperSeed[str](MAX_PIECES + 1, PIECE, random.Random(1)).active


def test_a_late_second_peer_of_a_large_item_gets_its_portion_and_the_first_one_goes_on() -> None:
    crowd = Crowd(pieces=3000)
    crowd.join("a")
    crowd.reveal()
    crowd.now = ALONE_S
    crowd.reveal()
    crowd.join("b")
    crowd.reveal()
    for piece in list(crowd.seeding._peers["a"].waiting):
        assert crowd.send("a", piece)
    crowd.seeding.has("b", list(crowd.seeding._peers["a"].debt), crowd.now)
    crowd.reveal()
    assert len(crowd.shown["a"]) == 3000 and len(crowd.shown["b"]) == 4
    assert len(crowd.seeding._hidden) > 2000


actions = st.lists(
    st.tuples(
        st.sampled_from(["reveal", "reveal", "send", "send", "has", "join", "leave", "wait"]),
        st.sampled_from("abcd"),
        st.integers(0, 30),
    ),
    max_size=80,
)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(actions, st.integers(1, 12))
def test_nobody_ever_waits_for_a_piece_for_ever(script: list[tuple[str, str, int]], pieces: int) -> None:
    """Whatever happened before, peers that go on get everything."""
    crowd = Crowd(pieces=pieces)
    for name, peer, number in script:
        here = peer in crowd.shown
        if name == "join" and not here:
            crowd.join(peer)
        elif name == "leave" and here:
            crowd.seeding.closed(peer)
            del crowd.shown[peer]
        elif name == "reveal":
            crowd.reveal()
        elif name == "wait":
            crowd.now += number / 3
        elif name == "send" and here and crowd.shown[peer]:
            crowd.send(peer, crowd.shown[peer][number % len(crowd.shown[peer])])
        elif name == "has" and here:
            crowd.seeding.has(peer, [P(number % pieces)], crowd.now)
    for peer in "xy":
        crowd.join(peer)
    got: dict[str, set[PieceIndex]] = {"x": set(), "y": set()}
    for _ in range(6 * pieces + 30):
        crowd.now += STUCK_S / 4
        crowd.reveal()
        for peer, mine in got.items():
            for piece in [piece for piece in crowd.shown[peer] if piece not in mine]:
                if crowd.send(peer, piece):
                    mine.add(piece)
                    crowd.seeding.has(peer, [piece], crowd.now)
    for peer, mine in got.items():
        bitfield = not crowd.shown[peer]  # who came when everything was shown already learnt it by bitfield
        assert len(mine) == pieces or (bitfield and not crowd.seeding.active)
