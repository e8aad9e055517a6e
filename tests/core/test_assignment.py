"""Role states, the choice of a role, and who replicates what."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.core.assignment import (
    RoleState,
    RoleStatus,
    SeenClaim,
    View,
    best_claim,
    claim_rank,
    honoured,
    newest_statement,
    preferred_roles,
    rendezvous,
    replication_targets,
    role_states,
    seen_claims,
)
from paris_p2p.ids import ROUTER, InfoHash, NodeId, Role, RunId, Term, expert_role
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import LeaseTimes
from paris_p2p.wire.records import ClaimRecord, MemberRecord, Record
from paris_p2p.wire.terms import MARK_BITS, highest_number, make_term

NOW = 1.75e9
A, B, C = expert_role(0), expert_role(1), ROUTER
ANN, BOB, CAT = (NodeId(bytes([n]) * 32) for n in (1, 2, 3))
TIMES = LeaseTimes(ttl_s=60.0, renew_s=20.0, settle_s=3.0, poll_s=10.0)


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(32, "big"))


def claim(
    owner: NodeId, state: str = "hold", term: int = 1, since: float = 0.0, left: float = 30
) -> SeenClaim:
    return SeenClaim(owner, state, Term(term), NOW + since, NOW + left)


def statement(
    role: Role = A,
    *,
    term: int = 1,
    step: int = 10,
    holder: NodeId = ANN,
    loss: float = 1.0,
    total: int = 100,
) -> CheckpointStatement:
    ref = ContentRef(InfoHash(bytes(32)), 100, 1 << 14)
    run = RunId(bytes(32))
    return CheckpointStatement(run, role, Term(term), holder, step, total, 0, ref, ref, b"", loss, NOW - 40)


def member(role: Role, term: int, step: int) -> MemberRecord:
    return MemberRecord((), "training", role, Term(term), step, 200, 0.5, 12.0, 0, 0, NOW - 7)


def view(
    claims: Sequence[SeenClaim] = (),
    known: CheckpointStatement | None = None,
    members: dict[NodeId, MemberRecord] | None = None,
) -> View:
    return View(NOW, {A: list(claims)}, {} if known is None else {A: known}, members or {})


def status(claims: Sequence[SeenClaim] = (), known: CheckpointStatement | None = None) -> RoleStatus:
    return role_states([A], view(claims, known))[A]


# --- states --------------------------------------------------------------------------------------------


def test_a_role_nobody_ever_claimed_is_unclaimed() -> None:
    empty = status()
    assert (empty.state, empty.holder, empty.term, empty.step) == (RoleState.UNCLAIMED, None, 0, 0)
    assert empty.age_s is None


@pytest.mark.parametrize("state", ["bid", "hold"])
def test_a_live_claim_without_progress_makes_a_role_claimed(state: str) -> None:
    seen = status([claim(BOB, state, 3)])
    assert (seen.state, seen.holder, seen.term) == (RoleState.CLAIMED, BOB, 3)


def test_a_role_is_training_once_its_holder_reports_steps_of_that_very_term() -> None:
    training = role_states([A], view([claim(ANN, term=2)], None, {ANN: member(A, 2, 5)}))[A]
    assert training.state is RoleState.TRAINING
    assert (training.step, training.total_steps, training.age_s) == (5, 200, 7.0)
    assert (training.loss, training.images_per_s) == (0.5, 12.0)


@pytest.mark.parametrize("report", [member(A, 1, 5), member(B, 2, 5), member(A, 2, 0)])
def test_reports_of_another_term_role_or_no_step_are_not_progress(report: MemberRecord) -> None:
    assert role_states([A], view([claim(ANN, term=2)], None, {ANN: report}))[A].state is RoleState.CLAIMED


def test_an_announced_checkpoint_of_the_holders_term_counts_as_progress() -> None:
    assert status([claim(ANN)], statement()).state is RoleState.TRAINING


def test_a_taken_over_role_is_claimed_at_the_step_it_resumes_from() -> None:
    seen = status([claim(BOB, term=2)], statement(term=1, step=10))
    assert (seen.state, seen.holder, seen.term, seen.step) == (RoleState.CLAIMED, BOB, 2, 10)


def test_a_checkpoint_without_a_live_claim_is_stale() -> None:
    seen = status([claim(ANN, left=-1)], statement())
    assert (seen.state, seen.holder, seen.term, seen.step) == (RoleState.STALE, ANN, 1, 10)
    assert seen.age_s == 40.0


def test_an_expired_hold_is_stale_even_without_a_checkpoint() -> None:
    assert status([claim(ANN, left=-1)]).state is RoleState.STALE


def test_tombstones_alone_leave_a_role_unclaimed() -> None:
    assert status([claim(ANN, "released"), claim(BOB, "bid", left=-1)]).state is RoleState.UNCLAIMED


def test_a_finished_role_stays_finished_whoever_claims_it() -> None:
    seen = status([claim(BOB, term=9)], statement(step=100))
    assert (seen.state, seen.holder, seen.term, seen.step) == (RoleState.FINISHED, ANN, 1, 100)


def test_the_states_come_in_the_order_of_the_roles() -> None:
    assert list(role_states([C, A, B], view())) == [C, A, B]


# --- rivals --------------------------------------------------------------------------------------------


def test_rivals_rank_by_hold_then_holds_by_term_and_bids_by_number_and_since() -> None:
    three = 3 << MARK_BITS
    ranked = [
        claim(ANN, "hold", three + 2, since=9),
        claim(BOB, "hold", three + 1, since=-9),
        claim(CAT, "hold", 2, since=0),
        claim(ANN, "bid", three + 1, since=-20),
        claim(BOB, "bid", three + 7, since=-10),
        claim(CAT, "bid", 9, since=-99),
    ]
    shuffled = [ranked[i] for i in (3, 1, 4, 0, 5, 2)]
    assert sorted(shuffled, key=lambda c: claim_rank(A, c)) == ranked


def test_equal_rivals_are_told_apart_by_a_hash_that_differs_by_role() -> None:
    winners = {best_claim(A, View(NOW, {A: [claim(node(n)) for n in order]})) for order in ((1, 2), (2, 1))}
    assert len(winners) == 1
    favourites = {min(range(8), key=lambda n: rendezvous(expert_role(r), node(n))) for r in range(20)}
    assert len(favourites) > 3


def test_expired_and_released_claims_do_not_compete() -> None:
    seen = view([claim(ANN, term=9, left=-1), claim(BOB, "released", 8), claim(CAT, "bid", 1)])
    assert best_claim(A, seen) == claim(CAT, "bid", 1)


def record(left: float = 60.0, since: float = NOW, number: int = 1, owner: NodeId = ANN) -> Record:
    term = make_term(number, A, ANN, since)
    return Record("claim", b"", owner, ClaimRecord("hold", term, since), NOW + left)


@pytest.mark.parametrize(
    "bad",
    [
        record(left=600),
        record(since=math.nan),
        record(since=NOW + 30),
        record(number=highest_number(NOW) + 1),
        record(owner=BOB),
        Record("claim", b"", ANN, ClaimRecord("hold", Term(1), NOW), NOW + 60),
    ],
    ids=["longer than a lease", "no time", "the future", "too high a number", "another's term", "no mark"],
)
def test_a_claim_that_the_protocol_cannot_produce_is_dropped(bad: Record) -> None:
    assert seen_claims(A, [bad, record(65)], TIMES, NOW) == seen_claims(A, [record(65)], TIMES, NOW)
    assert not seen_claims(A, [bad], TIMES, NOW)
    assert len(seen_claims(A, [record(65)], TIMES, NOW)) == 1


def test_of_a_key_that_claims_every_role_only_the_newest_claims_count() -> None:
    roles = [expert_role(n) for n in range(4)]
    seen = {role: [claim(ANN, since=n), claim(BOB, since=-n)] for n, role in enumerate(roles)}
    only = honoured(seen, NOW, 1)
    assert [[c.owner for c in only[role]] for role in roles] == [[BOB], [], [], [ANN]]
    two = honoured(seen, NOW, 2)
    assert [[c.owner for c in two[role]] for role in roles] == [[BOB], [BOB], [ANN], [ANN]]


def test_a_role_that_its_holder_has_left_for_another_is_free_though_no_tombstone_was_seen() -> None:
    seen = {A: [claim(ANN, since=-20)], B: [claim(ANN, "bid", since=-1)], C: [claim(BOB)]}
    assert honoured(seen, NOW, 1) == {A: [], B: seen[B], C: seen[C]}


def test_what_has_ended_counts_towards_no_limit() -> None:
    seen = {A: [claim(ANN, since=-20)], B: [claim(ANN, "released")], C: [claim(ANN, left=-1)]}
    assert honoured(seen, NOW, 1) == seen


# --- lineages ------------------------------------------------------------------------------------------


def test_a_later_step_of_an_older_term_never_overwrites_the_newer_lineage() -> None:
    zombie, successor = statement(term=1, step=90), statement(term=2, step=60, holder=BOB)
    assert newest_statement([zombie, successor], within_steps=50) is successor


def test_a_term_does_not_make_up_for_more_than_an_interval_of_training() -> None:
    """Whoever signs a checkpoint chooses its term: a step of training must not undo days of it."""
    honest, stranger = statement(term=3, step=90), statement(term=1000, step=2, holder=BOB)
    assert newest_statement([honest, stranger], within_steps=50) is honest
    assert newest_statement([honest, stranger], within_steps=math.inf) is stranger
    again = replace(honest, term=Term(1000), holder=BOB)  # the honest one's content, signed again
    onwards = replace(honest, step=91)
    assert newest_statement([honest, again, onwards], within_steps=0) is onwards


def test_while_a_role_has_a_holder_its_own_checkpoints_are_the_newest() -> None:
    made = statement(term=3, step=40)
    zombie, stranger = statement(term=2, step=99, holder=BOB), statement(term=1000, step=41, holder=BOB)
    leader = (made.holder, made.term)
    assert newest_statement([zombie, stranger, made], within_steps=50, leader=leader) is made
    assert newest_statement([zombie, stranger], within_steps=50, leader=leader) is zombie
    done = replace(zombie, step=100)
    assert newest_statement([made, done], within_steps=50, leader=leader) is done


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 1 << 40)), min_size=1), st.integers(0, 99))
@settings(deadline=None, derandomize=True)
def test_the_newest_is_never_further_behind_than_an_interval(
    made: list[tuple[int, int]], within_steps: int
) -> None:
    some = [statement(term=term, step=step) for step, term in made]
    newest = newest_statement(some, within_steps=within_steps)
    assert newest is not None and newest.step >= max(step for step, _ in made) - within_steps
    assert all(newest.term >= one.term for one in some if one.step > newest.step)


def test_a_finished_checkpoint_is_final_whatever_its_term() -> None:
    done, later = statement(term=1, step=100), statement(term=2, step=60, holder=BOB)
    assert newest_statement([later, done], within_steps=50) is done


def test_of_equal_steps_the_lower_loss_is_kept_and_no_loss_at_all_is_the_worst() -> None:
    good, bad, none = (statement(loss=loss) for loss in (0.5, 2.0, math.nan))
    assert newest_statement([none, bad, good], within_steps=50) is good
    assert newest_statement([none, bad], within_steps=50) is bad
    assert newest_statement([], within_steps=50) is None


# --- taking a role -------------------------------------------------------------------------------------


def choose(who: NodeId, seen: View, roles: Sequence[Role]) -> Role | None:
    return next(iter(preferred_roles(who, role_states(roles, seen).values())), None)


def test_unclaimed_roles_come_before_stale_ones_and_held_ones_are_left_alone() -> None:
    seen = View(NOW, {A: [claim(ANN)], B: [claim(BOB, left=-1)]}, {})
    assert choose(CAT, seen, [A, B, C]) == C
    assert choose(CAT, seen, [A, B]) == B
    assert choose(CAT, seen, [A]) is None


def test_a_hundred_joiners_spread_over_the_free_roles() -> None:
    roles = [expert_role(n) for n in range(8)]
    taken = Counter(choose(node(n), view(), roles) for n in range(100))
    assert len(taken) == 8 and max(taken.values()) < 30


def test_of_stale_roles_the_one_furthest_behind_is_taken_most_often_but_not_by_all() -> None:
    seen = View(NOW, {}, {A: statement(A, step=90), B: statement(B, step=10)})
    taken = Counter(choose(node(n), seen, [A, B]) for n in range(200))
    assert 120 < taken[B] < 180


# --- replication ---------------------------------------------------------------------------------------


def replicated(
    members: int, replicas: int, providers: Collection[NodeId] = (), holder: NodeId = ANN
) -> list[NodeId]:
    """Which of nodes 10, 11, … would fetch the checkpoint of role A."""
    names = [node(n) for n in range(10, 10 + members)]
    seen = View(
        NOW,
        {},
        {A: statement(holder=holder)},
        {name: member(B, 1, 1) for name in names},
        {A: providers},
    )
    return [name for name in names if replication_targets(name, seen, replicas)]


def test_as_many_members_as_are_missing_replicate_a_checkpoint() -> None:
    assert len(replicated(20, 2)) == 2
    assert len(replicated(1, 2)) == 1
    assert replicated(20, 0) == []


def test_providers_beside_the_trainer_count_and_the_trainer_does_not() -> None:
    first, second = replicated(20, 2)
    assert replicated(20, 2, [ANN]) == [first, second]
    assert len(replicated(20, 2, [ANN, first])) == 1
    assert replicated(20, 2, [first, second]) == []


def test_the_trainer_never_replicates_its_own_checkpoint() -> None:
    assert node(10) not in replicated(2, 5, holder=node(10))


def test_the_least_replicated_checkpoint_is_fetched_first() -> None:
    seen = View(
        NOW,
        {},
        {role: statement(role) for role in (A, B, C)},
        {},
        {A: [ANN, BOB], B: [ANN], C: [ANN, BOB, node(7)]},
    )
    assert [s.role for s in replication_targets(CAT, seen, 3)] == [B, A, C]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 30), st.integers(0, 4), st.sets(st.integers(10, 39), max_size=5))
def test_every_missing_replica_is_fetched_by_exactly_one_member(
    members: int, replicas: int, providing: set[int]
) -> None:
    providers = {node(n) for n in providing if n < 10 + members}
    missing = max(0, replicas - len(providers))
    fetching = replicated(members, replicas, providers)
    assert len(fetching) == min(missing, members - len(providers))
    assert not providers & set(fetching)
