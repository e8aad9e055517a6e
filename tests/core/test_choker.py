"""Upload slots."""

from paris_p2p.core.choker import TENURE_S, Candidate, choose_unchoked


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
