"""Tests of `paris_p2p.core.conduct`: who keeps taking held roles over is not heard, honest keys are."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.claims_conduct import HearingSimulation, compare, flip
from benchmarks.claims_simulator import Scenario, Simulation
from paris_p2p.core.assignment import SeenClaim
from paris_p2p.core.conduct import MAX_KEYS, TAKEOVER_EVERY_S, TAKEOVERS_AT_ONCE, Conduct
from paris_p2p.ids import NodeId, Role, Term

NOW = 1.75e9
TTL_S = 60.0
A, B = Role("expert-0"), Role("expert-1")
ANN, BOB, EVE = (NodeId(bytes([n]) * 32) for n in (1, 2, 3))
Claims = Mapping[Role, Sequence[SeenClaim]]


def hold(owner: NodeId, term: int, at: float, *, left: float = TTL_S, state: str = "hold") -> SeenClaim:
    """A claim of this term, bid for at unix time `at` and running out `left` seconds later."""
    return SeenClaim(owner, state, Term(term), at, at + left)


class Reader:
    """One reader; what it is shown of role `A`, and which owners it hears there."""

    def __init__(self, me: NodeId | None = None) -> None:
        self.me = me
        self.conduct = Conduct()
        self.news: list[tuple[NodeId, Role]] = []

    def read(self, now: float, claims: Claims) -> Claims:
        heard = self.conduct.hear(claims, now, me=self.me, ttl_s=TTL_S, max_roles=1)
        self.news += heard.news
        return heard.claims

    def hears(self, now: float, *shown: SeenClaim) -> set[NodeId]:
        return {claim.owner for claim in self.read(now, {A: shown})[A] if claim.live(now)}

    def takeover(self, now: float, term: int, thief: NodeId = EVE) -> bool:
        """Whether `thief` is heard that comes up with `term` while Ann holds the role in the term before."""
        self.hears(now - 1, hold(ANN, term - 1, now - 1))
        return thief in self.hears(now, hold(ANN, term - 1, now), hold(thief, term, now))


def test_a_key_takes_a_few_held_roles_over_and_then_only_now_and_then() -> None:
    reader, terms = Reader(), itertools.count(2, 2)
    taken = [reader.takeover(NOW + 100.0 * n, next(terms)) for n in range(10)]
    assert taken == [True] * TAKEOVERS_AT_ONCE + [False] * 7
    assert reader.news == [(EVE, A)]  # said once
    assert not reader.takeover(NOW + TAKEOVER_EVERY_S - 10.0, next(terms))
    assert reader.takeover(NOW + TAKEOVER_EVERY_S + 10.0, next(terms))
    assert not reader.takeover(NOW + TAKEOVER_EVERY_S + 110.0, next(terms))
    assert reader.news == [(EVE, A), (EVE, A)]
    assert reader.takeover(NOW + 200.0, next(terms), BOB)  # another key is not to blame


def test_what_is_left_out_counts_as_released_and_its_term_stays_known() -> None:
    reader = Reader()
    for n in range(TAKEOVERS_AT_ONCE):
        reader.takeover(NOW + 100.0 * n, 2 + 2 * n)
    now = NOW + 1000.0
    reader.hears(now, hold(ANN, 50, now))
    shown = reader.read(
        now + 1, {A: [hold(ANN, 50, now), hold(EVE, 51, now + 1)], B: [hold(EVE, 7, now - 5)]}
    )
    assert [(claim.owner, claim.state, claim.term) for claim in shown[A]] == [
        (ANN, "hold", 50),
        (EVE, "released", 51),
    ]
    assert shown[B] == [hold(EVE, 7, now - 5)]  # nobody held that
    partial = reader.read(now + 2, {A: [hold(EVE, 51, now + 1)]})
    assert [(c.owner, c.state) for c in partial[A]] == [(EVE, "released"), (ANN, "hold")]


def test_one_claim_counts_once_however_often_it_comes_and_goes() -> None:
    """A link that flaps: each time both holders' claims, renewed meanwhile, meet again."""
    reader = Reader()
    for n in range(100):
        now = NOW + 10.0 * n
        ann, eve = (replace(hold(*one, NOW), expiration_unix=now + TTL_S) for one in ((ANN, 5), (EVE, 6)))
        assert reader.hears(now, ann, *([eve] if n % 10 == 9 else [])) >= (
            {ANN, EVE} if n % 10 == 9 else {ANN}
        )
    assert reader.takeover(NOW + 1100.0, 20) and reader.takeover(NOW + 1200.0, 30)


def test_taking_over_what_has_lapsed_was_given_up_or_left_behind_costs_nothing() -> None:
    reader = Reader()
    for n in range(0, 40, 4):
        now = NOW + 100.0 * n
        gone = [
            hold(ANN, n + 1, now, left=TTL_S / 3),  # two renewals missed
            hold(ANN, n + 1, now, state="released"),
        ]
        for at, one in zip((now, now + 100), gone, strict=True):
            reader.hears(at - 30, hold(ANN, n + 1, at - 30))
            one = replace(one, expiration_unix=one.expiration_unix + at - now)
            assert BOB in reader.hears(at, one, hold(BOB, n + 2, at))
        reader.hears(now + 200, hold(ANN, n + 3, now + 200))
        moved_on = {
            A: [hold(ANN, n + 3, now + 200), hold(BOB, n + 4, now + 220)],
            B: [hold(ANN, 9, now + 210)],
        }
        assert reader.read(now + 220, moved_on)[A] == moved_on[A]
    assert [reader.takeover(NOW + 4100.0 + 70 * n, 90 + 2 * n, BOB) for n in range(4)] == [True] * 3 + [False]


def test_when_the_holder_is_gone_who_was_left_out_is_heard() -> None:
    reader = Reader()
    for n in range(TAKEOVERS_AT_ONCE):
        reader.takeover(NOW + 100.0 * n, 2 + 2 * n)
    now = NOW + 1000.0
    reader.hears(now, hold(ANN, 50, now))
    thief = hold(EVE, 51, now, left=200.0)
    assert reader.hears(now + 1, hold(ANN, 50, now), thief) == {ANN}
    assert reader.hears(now + 61, thief) == {EVE}


def test_the_readers_own_claims_are_always_heard() -> None:
    reader = Reader(me=EVE)
    assert all(reader.takeover(NOW + 100.0 * n, 2 + 2 * n) for n in range(20))
    assert not reader.news


def test_who_reads_for_the_first_time_goes_by_the_higher_term_like_everybody() -> None:
    assert Reader().hears(NOW, hold(ANN, 5, NOW - 100, left=150.0), hold(EVE, 6, NOW)) == {ANN, EVE}


def test_replays_and_lower_terms_blame_nobody() -> None:
    reader = Reader()
    for n in range(20):
        now = NOW + 30.0 * n
        old = replace(hold(BOB, 3, NOW), expiration_unix=now + 30)
        assert reader.hears(now, hold(ANN, 5, now), old) == {ANN, BOB}
    assert reader.takeover(NOW + 700.0, 8, BOB)


def test_the_memory_is_bounded() -> None:
    reader = Reader()
    for n in range(3 * MAX_KEYS):
        now = NOW + n
        shown = (hold(ANN, 5, now), hold(NodeId(n.to_bytes(32, "big")), 6, now))
        reader.read(now, {A: shown[:1]})
        reader.read(now, {A: shown})
        reader.read(now, {A: [replace(shown[1], state="released")]})
    assert len(reader.conduct._keys) == MAX_KEYS


CLAIMS = st.builds(
    hold,
    st.sampled_from([ANN, BOB, EVE]),
    st.integers(1, 30),
    st.just(NOW),
    left=st.floats(1.0, 4000.0),
    state=st.sampled_from(["hold", "bid", "released"]),
)


@given(st.lists(st.tuples(st.floats(0.0, 600.0), st.lists(CLAIMS, max_size=3), st.lists(CLAIMS, max_size=3))))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_nothing_is_invented_and_the_best_of_what_is_heard_of_a_role_stays(
    readings: list[tuple[float, list[SeenClaim], list[SeenClaim]]],
) -> None:
    reader, now, ever = Reader(me=ANN), NOW, set[SeenClaim]()
    for pause, of_a, of_b in readings:
        now += pause
        ever.update(of_a, of_b)
        for role, heard in reader.read(now, {A: of_a, B: of_b}).items():
            read = of_a if role == A else of_b
            assert all(claim in ever or replace(claim, state="hold") in ever for claim in heard)
            assert [c for c in read if c.owner == ANN] == [c for c in heard[: len(read)] if c.owner == ANN]
            if any(claim.live(now) for claim in read):
                assert any(claim.live(now) for claim in heard)


# --- whole runs: real lease machines over the simulated DHT ---------------------------------------------


def test_one_key_that_goes_from_role_to_role_stops_every_holder_or_a_few_and_then_none() -> None:
    scenario = Scenario(nodes=6, roles=4, churn=False, duration_s=900.0)
    for seed in (0, 1):
        without, careful = flip(Simulation(scenario, seed)), flip(HearingSimulation(scenario, seed))
        assert without.flips == without.stopped == careful.flips == 34
        assert careful.stopped <= 2 * TAKEOVERS_AT_ONCE  # readers do not see each of them at the same time


@pytest.mark.parametrize("loss", [0.0, 0.10])
@pytest.mark.parametrize("cut", [None, (60.0, 180.0)])
def test_runs_of_honest_nodes_come_out_the_same_to_the_last_digit(
    cut: tuple[float, float] | None, loss: float
) -> None:
    charged = 0
    for seed in range(3):
        scenario = Scenario(nodes=8, roles=5, loss=loss, partition=cut, duration_s=300.0)
        plain, careful, noted = compare(scenario, seed)
        assert plain == careful and noted.left_out == 0
        charged += sum(map(len, noted.charged.values()))
    assert (charged > 0) == (cut is not None)  # only what was two networks has two holders
