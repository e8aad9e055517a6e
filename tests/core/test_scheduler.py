"""What is asked of whom: sharing pieces, late peers, the endgame, blame."""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.core.pipeline import MIN_PATIENCE_S, Key
from paris_p2p.core.scheduler import MAX_REQUESTERS, SPARED_S, Scheduler
from paris_p2p.ids import PieceIndex

P = PieceIndex
BLOCK = 65_536
BLOCKS = 4
RIGHT, WRONG = bytes(BLOCK), b"\x01" * BLOCK


@dataclass
class Swarm:
    """A scheduler with peers that have everything; `asked` are unanswered requests."""

    pieces: int = 20
    blocks: int = BLOCKS
    scheduler: Scheduler[str] = field(init=False)
    asked: dict[str, list[Key]] = field(default_factory=dict)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.pieces, lambda _: self.blocks * BLOCK, (), random.Random(1))

    def add(self, *names: str, pieces: set[int] | None = None) -> None:
        for name in names:
            self.scheduler.add_peer(name, BLOCK, self.now)
            held = range(self.pieces) if pieces is None else pieces
            self.scheduler.picker.set_peer(name, set(map(P, held)))
            self.asked[name] = []

    def fill(self, name: str, room: int = 128) -> list[Key]:
        keys = self.scheduler.requests(name, room, self.now, allowed=lambda *k: k not in self.asked[name])
        self.asked[name] += keys
        return keys

    def answer(self, name: str, data: bytes = RIGHT, count: int = 1) -> list[PieceIndex]:
        """`name` answers its oldest requests; the pieces that are complete."""
        complete = []
        for _ in range(count):
            key = self.asked[name].pop(0)
            arrived = self.scheduler.block(name, key[0], key[1], data, self.now)
            for other, cancelled in arrived.cancels:
                self.asked[other].remove(cancelled)
            if arrived.piece is not None:
                complete.append(key[0])
        return complete

    def check(self, piece: PieceIndex) -> bool:
        opened = self.scheduler._checking[piece]
        return all(block == RIGHT for block in opened.data())


def test_each_block_is_asked_of_one_peer() -> None:
    swarm = Swarm()
    swarm.add("a", "b")
    keys = swarm.fill("a") + swarm.fill("b")
    assert len(keys) == len(set(keys)) == 8


def test_what_a_leaving_peer_brought_is_gone_on_with_by_another() -> None:
    swarm = Swarm(pieces=1)
    swarm.add("a", "b")
    assert len(swarm.fill("a")) == BLOCKS
    swarm.answer("a", count=2)
    assert swarm.fill("b") == []
    swarm.scheduler.remove_peer("a")
    assert len(swarm.fill("b")) == BLOCKS - 2
    assert swarm.answer("b", count=2) == [0]
    assert swarm.scheduler.good(P(0)).liars == set() and swarm.scheduler.picker.complete


def test_what_a_banned_peer_brought_is_fetched_again() -> None:
    swarm = Swarm(pieces=1)
    swarm.add("a", "b")
    swarm.fill("a")
    swarm.answer("a", count=2)
    assert swarm.scheduler.remove_peer("a", distrust=True) == 2 * BLOCK
    assert len(swarm.fill("b")) == BLOCKS


def test_a_peer_without_a_piece_of_its_own_joins_the_piece_of_another() -> None:
    swarm = Swarm(pieces=1, blocks=20)
    swarm.add("a", "b")
    assert len(swarm.fill("a")) == 4  # its window
    assert len(swarm.fill("b")) == 4


def test_the_last_blocks_are_asked_of_two_at_most_and_the_loser_is_cancelled() -> None:
    swarm = Swarm(pieces=1)
    swarm.add("slow", "b", "c")
    swarm.fill("slow")
    swarm.now = 1.0  # nothing came in a second
    keys = swarm.fill("b") + swarm.fill("c")
    assert len(keys) == len(set(keys)) == BLOCKS
    winner = "b" if swarm.asked["b"] else "c"
    key = swarm.asked[winner][0]
    swarm.answer(winner)
    assert key not in swarm.asked["slow"]


def test_nothing_is_doubled_while_the_first_is_as_fast() -> None:
    swarm = Swarm(pieces=30)
    swarm.add("a", "b")
    for _ in range(200):
        for name in ("a", "b"):
            swarm.fill(name)
            if swarm.asked[name]:
                for piece in swarm.answer(name):
                    swarm.scheduler.good(piece)
        both = set(swarm.asked["a"]) & set(swarm.asked["b"])
        assert not both
        swarm.now += 0.005
    assert swarm.scheduler.picker.complete


def test_a_late_peer_loses_its_blocks_to_another_and_is_tried_with_one() -> None:
    swarm = Swarm(pieces=1)
    swarm.add("late", "b")
    keys = swarm.fill("late")
    swarm.now = MIN_PATIENCE_S + 1.0
    assert {key for _, key in swarm.scheduler.overdue(swarm.now)} == set(keys)
    assert len(swarm.fill("late")) == 0  # its requests for them are still unanswered
    assert set(swarm.fill("b")) == set(keys)
    swarm.add("late")
    swarm.scheduler._peers["late"].pipeline.snubbed = True
    swarm.scheduler.remove_peer("b")
    assert len(swarm.fill("late")) == 1


def test_the_only_holder_is_given_all_the_time_the_session_gives() -> None:
    swarm = Swarm()
    swarm.add("only")
    swarm.fill("only")
    assert swarm.scheduler.overdue(100.0) == []


def test_a_refused_piece_goes_elsewhere() -> None:
    swarm = Swarm()
    swarm.add("a", "b")
    keys = swarm.fill("a")
    piece = keys[0][0]
    for key in keys:
        if key[0] == piece:
            swarm.scheduler.rejected("a", key, lacks=True)
            swarm.asked["a"].remove(key)
    assert piece not in {key[0] for key in swarm.fill("a")}
    swarm.fill("b")
    assert not swarm.scheduler.picker.peer_has("a", piece) and swarm.scheduler.picker.peer_has("b", piece)


def test_blocks_fit_what_a_peer_accepts() -> None:
    swarm = Swarm(pieces=1)
    swarm.add("large")
    swarm.scheduler.add_peer("small", BLOCK // 4, 0.0)
    swarm.asked["small"] = []
    swarm.scheduler.picker.set_peer("small", {P(0)})
    swarm.fill("large")
    swarm.answer("large")
    assert swarm.fill("small") == []
    swarm.scheduler.remove_peer("large")
    keys = swarm.fill("small")
    assert {key[2] for key in keys} == {BLOCK // 4} and sum(key[2] for key in keys) == 3 * BLOCK


def test_unmeasured_peers_are_tried_before_the_slower_half() -> None:
    swarm = Swarm(pieces=100)
    swarm.add("fast", "middle", "slow", "new")
    for name, count in (("fast", 4), ("middle", 3), ("slow", 1)):
        swarm.fill(name)
        swarm.answer(name, count=count)
    assert swarm.scheduler.ranked(1.0)[0] == "fast" and swarm.scheduler.ranked(1.0)[-1] == "slow"
    assert swarm.scheduler.rate("new", 1.0) is None


# -- blame ---------------------------------------------------------------------------------------


def test_who_sent_all_of_a_bad_piece_is_named_at_once() -> None:
    swarm = Swarm(pieces=1)
    swarm.add("liar")
    swarm.fill("liar")
    swarm.answer("liar", WRONG, BLOCKS)
    assert swarm.scheduler.bad(P(0)) == {"liar"}
    swarm.scheduler.remove_peer("liar", distrust=True)
    swarm.add("honest")
    swarm.fill("honest")
    swarm.answer("honest", count=BLOCKS)
    assert swarm.scheduler.good(P(0)).liars == set()


def mixed_piece(swarm: Swarm) -> None:
    """Half from an honest peer that then leaves its work to a liar."""
    swarm.add("honest", "liar")
    swarm.fill("honest", room=2)
    swarm.answer("honest", count=2)
    for key in swarm.fill("liar", room=2):
        assert key[0] == 0
    assert swarm.answer("liar", WRONG, 2) == [0]


def test_the_liar_in_a_mixed_piece_is_proven_by_fetching_it_from_one_peer() -> None:
    swarm = Swarm(pieces=1)
    mixed_piece(swarm)
    assert swarm.scheduler.bad(P(0)) == set()  # nobody is blamed by guess
    swarm.add("third")
    assert swarm.fill("honest") == [] and swarm.fill("liar") == []  # who sent no part of it comes first
    swarm.fill("third")
    assert swarm.answer("third", count=BLOCKS) == [0]
    assert swarm.scheduler.good(P(0)).liars == {"liar"}


def test_without_a_third_peer_one_of_the_two_fetches_it_alone() -> None:
    swarm = Swarm(pieces=1)
    mixed_piece(swarm)
    assert swarm.scheduler.bad(P(0)) == set()
    assert len(swarm.fill("liar")) == BLOCKS and swarm.fill("honest") == []
    swarm.answer("liar", WRONG, BLOCKS)
    assert swarm.scheduler.bad(P(0)) == {"liar"}
    swarm.scheduler.remove_peer("liar", distrust=True)
    swarm.fill("honest")
    swarm.answer("honest", count=BLOCKS)
    assert swarm.scheduler.good(P(0)).liars == {"liar"}


def test_a_bad_piece_does_not_wait_for_ever_for_a_peer_that_chokes_us() -> None:
    swarm = Swarm(pieces=1)
    swarm.add("a", "b", "chokes")
    swarm.fill("a", room=2)
    swarm.fill("b", room=2)
    swarm.answer("a", count=2)
    assert swarm.answer("b", WRONG, count=2) == [0] and swarm.scheduler.bad(P(0)) == set()
    assert swarm.fill("a") == swarm.fill("b") == []  # the third one had no part in it
    swarm.now += SPARED_S
    complete: list[PieceIndex] = []
    while not complete:
        assert swarm.fill("a", room=1)
        complete = swarm.answer("a")
    assert swarm.scheduler.good(P(0)).liars == {"b"}


def test_a_bad_piece_does_not_wait_for_a_peer_that_was_late() -> None:
    swarm = Swarm(pieces=1)
    swarm.add("a", "b", "late")
    swarm.scheduler._peers["late"].pipeline.snubbed = True
    swarm.fill("a", room=2)
    swarm.fill("b", room=2)
    swarm.answer("a", count=2)
    swarm.answer("b", WRONG, count=2)
    assert swarm.scheduler.bad(P(0)) == set() and len(swarm.fill("a")) == BLOCKS


# -- properties ----------------------------------------------------------------------------------

KINDS = ["fill", "fill", "block", "block", "reject", "timeout", "leave", "join", "wait", "late"]
events = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.sampled_from(["a", "b", "c", "liar"]),
        st.integers(0, 3),
    ),
    max_size=120,
)


@pytest.mark.parametrize("pieces", [1, 5])
@settings(deadline=None, derandomize=True, max_examples=60)
@given(script=events)
def test_whatever_happens_everything_is_fetched_in_the_end_and_only_liars_are_blamed(
    pieces: int, script: list[tuple[str, str, int]]
) -> None:
    swarm = Swarm(pieces=pieces, blocks=2)
    swarm.add("a", "b", "liar")
    blamed: set[str] = set()

    def verify(found: list[PieceIndex]) -> None:
        for piece in found:
            good = swarm.check(piece)
            liars = swarm.scheduler.good(piece).liars if good else swarm.scheduler.bad(piece)
            for liar in liars & set(swarm.asked):
                swarm.scheduler.remove_peer(liar, distrust=True)
                del swarm.asked[liar]
            blamed.update(liars)

    def requesters_are_bounded() -> None:
        live = Counter(key for s in swarm.scheduler._peers.values() for key in s.pipeline.asked)
        assert max(live.values(), default=0) <= MAX_REQUESTERS

    def step(name: str, peer: str, number: int) -> None:
        here = peer in swarm.asked
        if name == "join" and not here and peer not in blamed:
            swarm.add(peer)
        elif name == "wait":
            swarm.now += number
        elif name == "late":
            swarm.scheduler.overdue(swarm.now)
        elif here and name == "fill":
            swarm.fill(peer, room=number + 1)
        elif here and name == "leave":
            swarm.scheduler.remove_peer(peer)
            del swarm.asked[peer]
        elif here and swarm.asked[peer]:
            if name == "block":
                lying = peer == "liar" and number
                verify(swarm.answer(peer, WRONG if lying else RIGHT))
            elif name == "reject":
                swarm.scheduler.rejected(peer, swarm.asked[peer].pop(0), lacks=False)
            elif name == "timeout":
                swarm.scheduler.timed_out(peer, swarm.asked[peer][-1])

    for name, peer, number in script:
        step(name, peer, number)
        requesters_are_bounded()
    if "a" not in swarm.asked:
        swarm.add("a")
    for _ in range(40 * pieces):  # from here on one honest peer answers everything
        swarm.now += 1.0
        swarm.scheduler.overdue(swarm.now)
        for peer in list(swarm.asked):
            swarm.fill(peer)
        while swarm.asked["a"]:
            verify(swarm.answer("a"))
        for peer in list(swarm.asked):
            if peer != "a" and swarm.asked[peer]:
                swarm.scheduler.rejected(peer, swarm.asked[peer].pop(0), lacks=True)
    assert swarm.scheduler.picker.complete
    assert blamed <= {"liar"}
    assert not swarm.scheduler._open and not swarm.scheduler._checking and not swarm.scheduler._unasked
    assert swarm.scheduler._open_bytes == 0
