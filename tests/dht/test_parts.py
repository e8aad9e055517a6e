"""Is the network one? What looks through several bootstrap nodes say, without any network."""

from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from paris_p2p.dht.parts import MAX_COMPARED, UNSEEN_ROUNDS, Comparison, Part, missing

A, B = "/ip4/203.0.113.1/tcp/1/p2p/a", "/ip4/203.0.113.2/tcp/1/p2p/b"
CLAIMS = 7


def part(address: str, nodes: set[int], owners: str = "") -> Part:
    found: dict[int, dict[str, Any]] = {CLAIMS: dict.fromkeys(owners)}
    return Part(address, frozenset(nodes), {}, found)


def found(comparison: Comparison, *parts: Part) -> tuple[int, int, bool]:
    """How many pairs are suspected, how many proven apart, and whether all is well."""
    verdict = comparison.judge(parts)
    return len(verdict.suspects), len(verdict.proven), verdict.whole


def test_parts_without_a_common_node_are_a_split() -> None:
    assert found(Comparison(), part(A, {1, 2}), part(B, {3, 4})) == (1, 1, False)
    assert found(Comparison(), part(A, {1, 2}), part(B, {2, 3})) == (0, 0, True)


def test_a_lone_bootstrap_node_is_a_split_only_when_it_stays_alone() -> None:
    comparison = Comparison()
    assert found(comparison, part(A, {1, 2}), part(B, {1, 2})) == (0, 0, True)
    assert found(comparison, part(A, {1}), part(B, {2, 3})) == (1, 0, False)
    assert found(comparison, part(B, {2, 3}), part(A, {1})) == (1, 1, False)  # whichever is looked at first


def test_a_record_missing_in_one_part_twice_running_is_a_split() -> None:
    comparison = Comparison()
    whole, lacking = part(A, {1, 2}, "op"), part(B, {1, 2}, "o")
    assert found(comparison, whole, lacking) == (1, 0, True)
    assert found(comparison, lacking, whole) == (1, 1, False)
    assert found(comparison, whole, part(B, {1, 2}, "op")) == (0, 0, True)


def test_new_records_at_every_look_do_not_keep_a_split_alive() -> None:
    comparison = Comparison()
    for owner in "pqrstu":  # there is always one that was stored between the two looks
        assert found(comparison, part(A, {1, 2}, "o" + owner), part(B, {1, 2}, "o")) == (1, 0, True)


def test_a_flooded_key_is_no_split() -> None:
    flood = Part(A, frozenset({1, 2}), {}, {CLAIMS: dict.fromkeys(range(MAX_COMPARED + 1))})
    comparison = Comparison()
    for _ in range(3):
        assert found(comparison, flood, part(B, {1, 2}, "o")) == (0, 0, True)


def test_what_cannot_be_seen_again_is_not_held_to_be_true_for_ever() -> None:
    comparison = Comparison()
    assert found(comparison, part(A, {1, 2}), part(B, {3, 4})) == (1, 1, False)
    for _ in range(UNSEEN_ROUNDS):
        assert not comparison.unseen
        assert found(comparison, part(A, {1, 2})) == (0, 0, False)
    assert comparison.unseen
    assert found(comparison, part(A, {1, 2}), part(B, {1, 2})) == (0, 0, True)
    assert not comparison.unseen


class Until(NamedTuple):
    """A value that expires."""

    expiration_time: float


def showing(address: str, **found: dict[str, float]) -> Part:
    """A part with records {owner: expiration} under each of some keys."""
    return Part(
        address, frozenset(), {}, {k: {o: Until(t) for o, t in of.items()} for k, of in found.items()}
    )


def test_a_part_is_given_the_latest_of_what_it_lacks_and_another_that_is_apart_from_it_shows() -> None:
    one, two = showing(A, k={"o": 1.0, "p": 1.0}, m={"o": 5.0}), showing(B, k={"o": 9.0})
    third = showing("c", k={"p": 2.0, "q": 1.0})
    assert missing([one, two, third], []) == []
    assert missing([one, two, third], [(one, two)]) == [
        (two, "k", {"p": Until(1.0)}),
        (two, "m", {"o": Until(5.0)}),
    ]
    lacking = missing([one, two, third], [(one, two), (third, two)])
    assert (two, "k", {"p": Until(2.0), "q": Until(1.0)}) in lacking
    assert (third, "k", {"o": Until(9.0)}) in lacking


def test_nothing_of_a_key_that_any_part_shows_flooded_is_given_to_another() -> None:
    flood = showing("c", k={str(n): 1.0 for n in range(MAX_COMPARED + 1)})
    one, two = showing(A, k={"o": 1.0}, m={"o": 1.0}), showing(B)
    assert missing([one, two, flood], [(one, two), (flood, two)]) == [(two, "m", {"o": Until(1.0)})]


looks = st.builds(part, st.sampled_from((A, B)), st.sets(st.integers(0, 3)), st.text("opq", max_size=3))


@given(st.lists(st.tuples(looks, looks), max_size=8))
def test_proven_parts_were_suspected_and_are_never_called_whole(rounds: list[tuple[Part, Part]]) -> None:
    comparison = Comparison()
    for parts in rounds:
        verdict = comparison.judge(parts)
        assert all(pair in verdict.suspects for pair in verdict.proven)
        assert not (verdict.proven and verdict.whole)
        apart = not parts[0].nodes & parts[1].nodes
        assert not (apart and verdict.whole)
