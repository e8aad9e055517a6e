"""Tests of `paris_p2p.dht.sharing`."""

from paris_p2p.dht.sharing import MAX_KNOWN, Allowance, in_turns, levelled


def test_who_wants_little_gets_it_and_the_others_share_what_is_left() -> None:
    assert levelled({"a": 10, "b": 500, "c": 900}, 610) == {"a": 10, "b": 300, "c": 300}
    assert levelled({"a": 10, "b": 20}, 100) == {"a": 10, "b": 20}
    assert levelled({}, 100) == {}
    assert sum(levelled(dict.fromkeys(range(7), 50), 100).values()) == 100


def test_everybody_has_a_turn_before_anybody_has_a_second_one() -> None:
    assert in_turns([["a1", "a2", "a3"], ["b1"], [], ["c1", "c2"]]) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_what_was_taken_comes_back_in_time_and_nobody_takes_anothers() -> None:
    allowance = Allowance(10, 2.0)
    assert allowance.take("flood", 1000, 0.0) == 10 and allowance.take("flood", 1, 0.4) == 0
    assert allowance.take("other", 3, 0.4) == 3
    assert allowance.take("flood", 1000, 2.4) == 4
    assert allowance.take("flood", 1000, 1000.0) == 10


def test_a_bounded_number_of_peers_is_remembered() -> None:
    allowance = Allowance(1, 0.0)
    for number in range(3 * MAX_KNOWN):
        assert allowance.take(number, 1, 0.0) == 1
    assert len(allowance._left) == MAX_KNOWN and allowance.take(3 * MAX_KNOWN - 1, 1, 0.0) == 0
