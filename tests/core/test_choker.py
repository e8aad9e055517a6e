"""Upload slots."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.core.choker import (
    OPTIMISTIC_S,
    TENURE_S,
    Candidate,
    Choker,
    choose_unchoked,
    rank_by_giving,
)


def rng() -> random.Random:
    return random.Random(5)


def test_only_the_interested_get_a_slot() -> None:
    peers = [Candidate("a", True, False, 0.0), Candidate("b", False, False, 0.0)]
    assert choose_unchoked(peers, 1.0) == {"a"}


def test_a_holder_that_wants_nothing_keeps_its_slot_until_someone_needs_it() -> None:
    peers = [Candidate("a", True, False, 0.0), Candidate("b", False, True, 0.0)]
    assert choose_unchoked(peers, 1.0, slots=2) == {"a", "b"}
    assert choose_unchoked(peers, 1.0, slots=1) == {"a"}


def test_a_new_holder_keeps_its_slot_for_its_tenure() -> None:
    peers = [Candidate("old", True, False, 0.0), Candidate("holder", True, True, 5.0)]
    assert choose_unchoked(peers, 5.0 + TENURE_S - 0.1, slots=1) == {"holder"}


def test_after_its_tenure_the_longest_waiting_takes_over() -> None:
    peers = [
        Candidate("holder", True, True, 0.0),
        Candidate("late", True, False, 3.0),
        Candidate("early", True, False, 1.0),
    ]
    assert choose_unchoked(peers, TENURE_S, slots=1) == {"early"}


def test_nobody_loses_a_slot_for_which_nobody_waits() -> None:
    peers = [Candidate("a", True, True, 0.0), Candidate("b", True, True, 0.0)]
    assert choose_unchoked(peers, 1000.0, slots=2) == {"a", "b"}


def test_every_waiting_peer_is_served_in_turn() -> None:
    since = dict.fromkeys("abcde", 0.0)
    unchoked: set[str] = set()
    served: set[str] = set()
    for step in range(30):
        now = float(step * 5)
        chosen = choose_unchoked([Candidate(p, True, p in unchoked, since[p]) for p in since], now, slots=2)
        for peer in chosen ^ unchoked:
            since[peer] = now
        unchoked = chosen
        served |= chosen
        assert len(chosen) == 2
    assert served == set("abcde")


def candidates(
    gives: dict[str, float | None], unchoked: set[str], joined: dict[str, float] | None = None
) -> list[Candidate[str]]:
    times = joined or {}
    return [Candidate(p, True, p in unchoked, 0.0, times.get(p, 0.0), rate) for p, rate in gives.items()]


def test_everyone_is_served_while_there_are_slots() -> None:
    choker: Choker[str] = Choker(slots=8)
    assert choker.choose(candidates(dict.fromkeys("abcdefgh", 1.0), set()), 0.0, rng()) == set("abcdefgh")


def test_who_gives_most_gets_a_slot() -> None:
    choker: Choker[str] = Choker(slots=4)
    gives: dict[str, float | None] = {p: 1000.0 * n for n, p in enumerate("abcdefgh")}
    chosen = choker.choose(candidates(gives, set()), 100.0, rng())
    assert len(chosen) == 4 and len(chosen & set("efgh")) >= 3


def test_rates_of_about_the_same_height_change_nothing() -> None:
    gives: dict[str, float | None] = {"a": 1000.0, "b": 1100.0, "c": 1200.0, "d": 1290.0}
    assert rank_by_giving(candidates(gives, {"a"}), 0.0)[0].peer == "a"
    gives["d"] = 1310.0
    assert rank_by_giving(candidates(gives, {"a"}), 0.0)[0].peer == "d"


def test_between_two_rankings_the_slots_stay() -> None:
    choker: Choker[str] = Choker(slots=3)
    gives: dict[str, float | None] = {"a": 9.0, "b": 8.0, "c": 1.0, "d": 1.0, "e": 1.0}
    first = choker.choose(candidates(gives, set()), 0.0, rng())
    gives |= {"c": 90.0, "d": 80.0}
    assert {"a", "b"} <= choker.choose(candidates(gives, first), TENURE_S - 1, rng())
    later = choker.choose(candidates(gives, first), TENURE_S, rng())
    assert {"c", "d"} <= later


def test_the_optimistic_slot_reaches_everyone_and_newcomers_most() -> None:
    choker: Choker[str] = Choker(slots=3)
    gives: dict[str, float | None] = dict.fromkeys("abcdefgh", 0.0)
    gives |= {"x": 99.0, "y": 98.0}
    joined = {"a": 1e6}  # a newcomer whenever it is looked at
    seen: list[str] = []
    chance = rng()
    for step in range(400):
        chosen = choker.choose(candidates(gives, {"x", "y"}, joined), step * OPTIMISTIC_S, chance)
        assert {"x", "y"} <= chosen
        seen += chosen - {"x", "y"}
    assert set(seen) == set("abcdefgh")
    assert seen.count("a") > 2 * seen.count("b")


def test_who_only_takes_keeps_a_share_beside_those_who_give() -> None:
    choker: Choker[str] = Choker(slots=4)
    gives: dict[str, float | None] = {"a": 9.0, "b": 8.0, "c": 7.0, "x": None, "y": None, "z": None}
    chosen = choker.choose(candidates(gives, set()), 0.0, rng())
    assert len(chosen) == 4 and chosen & set("abc") and chosen & set("xyz")


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.floats(0, 100), st.one_of(st.none(), st.floats(0, 1e6))),
        max_size=20,
    ),
    st.integers(1, 6),
    st.lists(st.floats(0, 40), min_size=1, max_size=4),
)
def test_slots_are_never_exceeded_and_never_left_empty_while_someone_waits(
    peers: list[tuple[bool, bool, float, float | None]], slots: int, steps: list[float]
) -> None:
    choker: Choker[int] = Choker(slots)
    unchoked = {n for n, peer in enumerate(peers) if peer[1]}
    now = 0.0
    for step in steps:
        now += step
        seen = [Candidate(n, i, n in unchoked, s, s, g) for n, (i, _, s, g) in enumerate(peers)]
        unchoked = choker.choose(seen, now, random.Random(1))
        interested = {n for n, peer in enumerate(peers) if peer[0]}
        assert len(unchoked) <= slots
        assert len(unchoked & interested) == min(slots, len(interested))
