"""One lease machine against a scripted network: every rule of docs/protocol/claims.md by itself."""

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.core.assignment import SeenClaim, View
from paris_p2p.core.lease import CHECK_CLOCKS_S, MAX_ADRIFT_S, LeaseMachine
from paris_p2p.core.lease_actions import Action, Now, Start, Stop, Trainer, WriteClaim
from paris_p2p.core.lease_table import TRANSITIONS, Event, State, transition
from paris_p2p.errors import LocalProtocolError
from paris_p2p.ids import InfoHash, NodeId, Role, RunId, Term
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import LeaseTimes
from paris_p2p.wire.terms import MARK_BITS, belongs, highest_number, term_number

TIMES = LeaseTimes(ttl_s=60.0, renew_s=20.0, settle_s=3.0, poll_s=10.0)
EPOCH = 1.75e9
ME, RIVAL, OTHER = (NodeId(bytes([n]) * 32) for n in (1, 2, 3))
A, B = Role("expert-0"), Role("expert-1")


def term(number: int) -> Term:
    """Some claim's term of this number."""
    return Term(number << MARK_BITS)


class Rig:
    """A machine, its clocks and the claims others have in the DHT. Stores take 0.1 s."""

    def __init__(
        self, roles: tuple[Role, ...] = (A,), *, wanted: Role | None = None, seed: int = 0, limit: int = 1
    ) -> None:
        rng = random.Random(seed)
        self.machine = LeaseMachine(ME, roles, TIMES, wanted=wanted, max_roles_per_node=limit, rng=rng)
        self.roles = roles
        self.seconds = 1000.0
        self.wall_offset = EPOCH
        self.claims: dict[tuple[Role, NodeId], SeenClaim] = {}
        self.statements: dict[Role, CheckpointStatement] = {}
        self.store_ok = True
        self.read_ok = True
        self.log: list[Action] = []

    @property
    def now(self) -> Now:
        return Now(self.seconds, self.seconds + self.wall_offset)

    def view(self) -> View:
        live = {key: c for key, c in self.claims.items() if c.expiration_unix > self.now.unix}
        claims = {role: [c for (r, _), c in live.items() if r == role] for role in self.roles}
        return View(self.now.unix, claims, dict(self.statements))

    def put(
        self, role: Role, owner: NodeId, state: str, number: int, *, since: float = 0.0, left: float = 60.0
    ) -> None:
        """Another node's claim, begun `since` seconds from now, expiring in `left`."""
        unix = self.now.unix
        self.claims[role, owner] = SeenClaim(owner, state, term(number), unix + since, unix + left)

    def perform(self, actions: list[Action]) -> None:
        self.log += actions
        for action in actions:
            if isinstance(action, WriteClaim):
                self.store(action)

    def store(self, write: WriteClaim) -> None:
        self.seconds += 0.1
        if self.store_ok:
            claim = write.claim
            seen = SeenClaim(ME, claim.state, claim.term, claim.since_unix, write.expiration_unix)
            known = self.claims.get((write.role, ME))
            if known is None or known.expiration_unix < seen.expiration_unix:
                self.claims[write.role, ME] = seen
        self.machine.stored(write, self.store_ok, 0.1, self.now)

    def once(self) -> list[Action]:
        """One round of the driver's loop; what the machine did."""
        before = len(self.log)
        self.seconds = max(self.seconds + 0.01, min(self.machine.next_wakeup(), self.seconds + 60))
        self.perform(self.machine.step(None, self.now))
        if self.machine.wants_view(self.now) and not self.read_ok:
            self.machine.read_failed(self.now)
        elif self.machine.wants_view(self.now):
            self.perform(self.machine.step(self.view(), self.now))
        return self.log[before:]

    def until(self, state: State, limit_s: float = 120.0) -> "Rig":
        """Rounds until the machine is in `state`."""
        end = self.seconds + limit_s
        while self.machine.state is not state:
            assert self.seconds < end, f"still {self.machine.state} after {limit_s} s"
            self.once()
        return self

    def run(self, seconds: float) -> list[Action]:
        """Rounds for `seconds`; what the machine did."""
        before, end = len(self.log), self.seconds + seconds
        while self.seconds < end:
            self.once()
        return self.log[before:]

    def writes(self) -> list[tuple[str, int]]:
        """The states and numbers written."""
        writes = [action.claim for action in self.log if isinstance(action, WriteClaim)]
        return [(claim.state, term_number(claim.term)) for claim in writes]

    def starts(self) -> list[tuple[Role, int]]:
        """The roles and numbers started."""
        starts = [action for action in self.log if isinstance(action, Start)]
        return [(start.role, term_number(start.term)) for start in starts]

    def stops(self) -> list[Stop]:
        return [action for action in self.log if isinstance(action, Stop)]


def statement(role: Role, number: int, step: int, holder: NodeId = RIVAL) -> CheckpointStatement:
    ref = ContentRef(InfoHash(bytes(32)), 100, 1 << 14)
    return CheckpointStatement(
        RunId(bytes(32)), role, term(number), holder, step, 100, 0, ref, ref, b"", 1.0, EPOCH
    )


# --- claiming ------------------------------------------------------------------------------------------


def test_a_free_role_is_bid_for_held_confirmed_and_started_with_term_one() -> None:
    rig = Rig().until(State.HOLDING)
    assert rig.writes() == [("bid", 1), ("hold", 1)]
    assert rig.starts() == [(A, 1)]
    holding = rig.machine.holding
    assert holding is not None and (holding.role, term_number(holding.term)) == (A, 1)


def test_a_bid_settles_for_the_full_wait_and_a_hold_for_half_of_it() -> None:
    rig = Rig().until(State.BIDDING)
    bid_at = rig.seconds
    rig.until(State.CONFIRMING)
    hold_at = rig.seconds
    rig.until(State.HOLDING)
    assert 3.0 <= hold_at - bid_at < 3.3
    assert 1.5 <= rig.seconds - hold_at < 1.8


def test_slow_stores_make_the_settling_longer_up_to_a_third_of_the_lease() -> None:
    rig = Rig().until(State.BIDDING)
    assert rig.machine.settle_wait_s == 3.0
    for took, least in ((8.0, 8.0), (100.0, 14.0), (100.0, 17.0)):
        (write,) = _force_write(rig)
        rig.machine.stored(write, False, took, rig.now)
        assert least <= rig.machine.settle_wait_s <= 20.0


def test_one_store_that_the_machine_slept_through_does_not_pass_for_a_slow_network() -> None:
    rig = Rig().until(State.BIDDING)
    (write,) = _force_write(rig)
    rig.machine.stored(write, False, 3600.0, rig.now)
    assert rig.machine.settle_wait_s <= TIMES.ttl_s / 6 + 0.1


def _force_write(rig: Rig) -> list[WriteClaim]:
    """The next write of the machine, left unanswered."""
    rig.claims.clear()  # our own bid does not show, so it is written again
    rig.seconds = max(rig.seconds, rig.machine.next_wakeup())
    return [a for a in rig.machine.step(rig.view(), rig.now) if isinstance(a, WriteClaim)]


def test_only_the_claimed_role_needs_reading_once_there_is_one() -> None:
    rig = Rig((A, B))
    assert rig.machine.reads == (A, B)
    rig.until(State.BIDDING)
    assert list(rig.machine.reads) == [rig.machine.role]


def test_a_role_that_cannot_be_read_now_does_not_hold_up_the_choice_among_the_others() -> None:
    rig = Rig((A, B))
    assert rig.machine.patience_s < 5.0
    rig.perform(rig.machine.step(View(rig.now.unix, {B: []}), rig.now))
    assert rig.machine.reads == (B, A)
    rig.seconds = max(rig.seconds, rig.machine.next_wakeup())
    rig.perform(rig.machine.step(View(rig.now.unix, {B: []}), rig.now))
    assert (rig.machine.state, rig.machine.role) == (State.BIDDING, B)
    assert rig.machine.patience_s == math.inf


def test_reads_that_show_nothing_make_the_next_one_more_patient() -> None:
    rig = Rig((A, B))
    first = rig.machine.patience_s
    rig.machine.read_failed(rig.now)
    assert rig.machine.patience_s == 2 * first
    rig.perform(rig.machine.step(rig.view(), rig.now))
    assert rig.machine.patience_s == first


def test_who_finds_its_first_choice_taken_bids_for_the_second_at_once() -> None:
    rig = Rig((A, B))
    rig.perform(rig.machine.step(rig.view(), rig.now))
    first, second = rig.machine.reads
    rig.put(first, RIVAL, "bid", 1)
    rig.seconds = max(rig.seconds, rig.machine.next_wakeup())
    rig.perform(rig.machine.step(rig.view(), rig.now))
    assert (rig.machine.state, rig.machine.role) == (State.BIDDING, second)


def test_a_role_that_was_taken_during_the_random_delay_is_not_bid_for() -> None:
    rig = Rig()
    rig.perform(rig.machine.step(rig.view(), rig.now))
    rig.put(A, RIVAL, "bid", 1)
    rig.run(8.0)
    assert rig.machine.state is State.IDLE and not rig.writes()


@pytest.mark.parametrize(("since", "wins"), [(-1.0, False), (1.0, True)])
def test_of_two_bids_of_one_number_the_earlier_wins(since: float, wins: bool) -> None:
    rig = Rig().until(State.BIDDING)
    rig.put(A, RIVAL, "bid", 1, since=since)
    rig.once()
    assert (rig.machine.state is State.CONFIRMING) == wins


def test_a_bid_of_a_higher_term_wins_over_an_earlier_one() -> None:
    rig = Rig().until(State.BIDDING)
    rig.put(A, RIVAL, "bid", 2, since=1.0)
    rig.once()
    assert rig.machine.state is State.BACKOFF


def test_a_hold_beats_a_bid_even_of_a_higher_term() -> None:
    rig = Rig()
    rig.put(A, OTHER, "hold", 7, left=-1)  # something expired, so that our bid has term 8
    rig.perform(rig.machine.step(View(rig.now.unix, {A: [rig.claims[A, OTHER]]}), rig.now))
    rig.until(State.BIDDING)
    rig.put(A, RIVAL, "hold", 1)
    rig.once()
    assert rig.writes() == [("bid", 8), ("released", 8)]


def test_a_confirming_node_yields_to_a_hold_of_a_higher_term_without_ever_starting() -> None:
    rig = Rig().until(State.CONFIRMING)
    rig.put(A, RIVAL, "hold", 2, since=20)
    rig.once()
    assert rig.machine.state is State.BACKOFF and not rig.starts() and not rig.stops()
    assert rig.writes()[-1] == ("released", 1)


def test_a_claim_that_does_not_show_is_written_again_and_given_up_after_a_few_tries() -> None:
    rig = Rig().until(State.BIDDING)
    rig.store_ok = False
    rig.claims.clear()
    rig.until(State.BACKOFF)
    assert rig.writes().count(("bid", 1)) == 4


def test_the_tombstone_expires_later_than_the_claim_it_replaces() -> None:
    rig = Rig().until(State.HOLDING)
    rig.machine.released()
    rig.perform(rig.machine.step(None, rig.now))
    assert rig.claims[A, ME].state == "released"
    assert math.isinf(rig.machine.next_wakeup())


def test_a_tombstone_that_was_not_accepted_is_written_again_until_the_claim_has_expired() -> None:
    rig = Rig().until(State.HOLDING)
    rig.store_ok = False
    rig.machine.released()
    rig.run(65.0)
    released = rig.writes().count(("released", 1))
    assert released > 5
    rig.run(30.0)
    assert rig.writes().count(("released", 1)) == released
    assert math.isinf(rig.machine.next_wakeup())


def test_every_record_expires_later_than_the_one_before() -> None:
    rig = Rig().until(State.HOLDING)
    rig.run(100.0)
    rig.machine.failed(A, rig.now)
    rig.run(200.0)
    expirations = [a.expiration_unix for a in rig.log if isinstance(a, WriteClaim)]
    assert expirations == sorted(set(expirations)) and len(expirations) > 8


def test_losing_again_and_again_makes_the_pause_longer() -> None:
    rig = Rig()
    pauses = []
    for _ in range(5):
        rig.until(State.BIDDING, 300)
        rig.put(A, RIVAL, "hold", 1, since=-5, left=4.0)
        rig.until(State.BACKOFF)
        pauses.append(rig.machine.next_wakeup() - rig.seconds)
        rig.claims.clear()
        rig.seconds += 5
    assert pauses[0] < 2.5 and max(pauses) > 5.0


# --- terms ---------------------------------------------------------------------------------------------


def test_the_term_is_one_more_than_any_seen_in_a_claim_or_a_checkpoint() -> None:
    rig = Rig()
    rig.put(A, RIVAL, "released", 4)
    rig.statements[A] = statement(A, 6, 10)
    assert rig.until(State.HOLDING).starts() == [(A, 7)]


def test_the_term_of_an_expired_claim_is_remembered_as_long_as_the_machine_lives() -> None:
    rig = Rig()
    rig.put(A, RIVAL, "hold", 3, left=2000)
    rig.run(1500)
    assert rig.machine.state is State.IDLE
    assert rig.until(State.HOLDING, 700).starts() == [(A, 4)]


def test_a_term_carries_the_mark_of_the_very_claim() -> None:
    rig = Rig().until(State.HOLDING)
    claim = rig.claims[A, ME]
    assert belongs(claim.term, A, ME, claim.since_unix)


def test_when_a_liar_has_used_up_all_numbers_the_next_is_bid_for_as_time_passes() -> None:
    rig = Rig()
    rig.put(A, RIVAL, "released", highest_number(rig.now.unix) + 5)
    began = rig.seconds
    rig.until(State.BIDDING)
    assert 5.0 < rig.seconds - began < 9.0
    assert rig.writes() == [("bid", highest_number(rig.now.unix))]


def test_a_checkpoint_with_a_number_from_the_future_does_not_end_a_lease() -> None:
    rig = Rig().until(State.HOLDING)
    rig.statements[A] = statement(A, highest_number(rig.now.unix) + 1000, 10)
    rig.run(30.0)
    assert not rig.stops()


@pytest.mark.parametrize(("mark", "number"), [(0, 1), ((1 << MARK_BITS) - 1, 2)])
def test_a_bidder_that_learns_of_a_checkpoint_of_its_own_number_goes_on_only_with_the_higher_term(
    mark: int, number: int
) -> None:
    rig = Rig().until(State.BIDDING)
    rig.statements[A] = replace(statement(A, 1, 10), term=Term(term(1) | mark))
    assert rig.until(State.HOLDING).starts() == [(A, number)]
    assert rig.claims[A, ME].term > rig.statements[A].term


# --- holding -------------------------------------------------------------------------------------------


def test_a_lease_is_renewed_every_renewal_time_and_never_stops() -> None:
    rig = Rig().until(State.HOLDING)
    rig.run(600.0)
    assert 28 <= rig.writes().count(("hold", 1)) <= 40
    assert not rig.stops()


@pytest.mark.parametrize(("mark", "yields"), [(1, True), (-1, False)])
@pytest.mark.parametrize("since", [-500.0, 50.0])
def test_of_two_holders_the_lower_term_yields_whoever_came_first(
    mark: int, yields: bool, since: float
) -> None:
    rig = Rig().until(State.HOLDING)
    unix, ours = rig.now.unix, rig.claims[A, ME].term
    rig.claims[A, RIVAL] = SeenClaim(RIVAL, "hold", Term(ours + mark), unix + since, unix + 60)
    rig.run(21.0)
    assert bool(rig.stops()) == yields
    assert (("released", 1) in rig.writes()) == yields


def test_a_holder_ignores_bidders_of_whatever_term() -> None:
    rig = Rig().until(State.HOLDING)
    rig.put(A, RIVAL, "bid", 9, since=-500)
    rig.run(30.0)
    assert not rig.stops()


def test_a_rival_that_claims_another_role_since_then_counts_no_longer_here() -> None:
    rig = Rig((A, B), wanted=None)
    rig.put(A, RIVAL, "hold", 3, since=-100, left=300)
    rig.put(B, RIVAL, "hold", 1, since=-50, left=300)
    rig.until(State.HOLDING)
    assert rig.starts() == [(A, 4)]


def test_where_the_run_allows_two_roles_a_key_both_claims_of_a_rival_count() -> None:
    rig = Rig((A, B), limit=2)
    rig.put(A, RIVAL, "hold", 3, since=-100, left=300)
    rig.put(B, RIVAL, "hold", 1, since=-50, left=300)
    rig.run(60.0)
    assert rig.machine.state is State.IDLE and not rig.starts()


def test_a_holder_wakes_when_its_lease_comes_into_doubt_and_else_only_to_compare_its_clocks() -> None:
    rig = Rig().until(State.HOLDING)
    rig.machine.step(None, rig.now)
    checks, renewal = rig.machine.next_wakeup(), rig.machine.next_wakeup(even_clocks=True)
    assert checks == rig.seconds + CHECK_CLOCKS_S < renewal <= rig.seconds + TIMES.renew_s
    rig.store_ok = False
    rig.run(30.0)  # every renewal fails
    doubt = rig.machine.next_wakeup(even_clocks=True)
    assert rig.machine.state is State.HOLDING and doubt <= rig.seconds + TIMES.renew_s / 4 * 1.5


def test_a_checkpoint_of_a_newer_term_does_not_end_a_lease_that_stands() -> None:
    """Whoever signs one chooses its term: a holder's own checkpoint, signed again, must not end its work."""
    rig = Rig().until(State.HOLDING)
    for number in (2, 50, highest_number(rig.now.unix)):
        rig.statements[A] = statement(A, number, 90)
        rig.run(61.0)
    assert not rig.stops() and rig.machine.state is State.HOLDING
    rig.perform(rig.machine.step(None, rig.now))
    rig.machine.failed(A, rig.now)
    assert rig.until(State.HOLDING, 300.0).starts()[-1][1] > 50  # the next claim goes beyond it


def test_a_holder_stops_when_another_node_has_finished_the_role() -> None:
    rig = Rig().until(State.HOLDING)
    rig.statements[A] = statement(A, 1, 100)
    rig.run(100.0)
    assert len(rig.stops()) == 1 and rig.machine.state is State.IDLE


def test_an_outranked_holder_ends_with_a_checkpoint() -> None:
    rig = Rig().until(State.HOLDING)
    rig.put(A, RIVAL, "hold", 9)
    rig.run(25.0)
    assert _kinds(rig) == [Trainer.WIND_UP]


def test_a_holder_sees_its_own_finished_checkpoint_without_stopping() -> None:
    rig = Rig().until(State.HOLDING)
    rig.statements[A] = replace(statement(A, 1, 100, ME), term=rig.claims[A, ME].term)
    rig.run(25.0)
    assert not rig.stops()
    rig.machine.finished(A)
    rig.run(60.0)
    assert rig.machine.state is State.IDLE and rig.claims.get((A, ME)) is not None
    assert rig.writes()[-1] == ("released", 1)


def test_failing_renewals_end_the_lease_before_it_expires_and_the_trainer_runs_on() -> None:
    rig = Rig().until(State.HOLDING)
    expires = rig.claims[A, ME].expiration_unix
    rig.store_ok = False
    while not rig.stops():
        rig.once()
    assert expires - 6.0 <= rig.now.unix <= expires - 4.5
    assert [stop.trainer for stop in rig.stops()] == [Trainer.RUN_ON]


def test_failing_reads_end_the_lease_before_it_expires_and_the_trainer_runs_on() -> None:
    rig = Rig().until(State.HOLDING)
    expires = rig.claims[A, ME].expiration_unix
    rig.read_ok = False
    rig.until(State.ADRIFT)
    assert rig.now.unix <= expires - 4.5 and len(rig.stops()) == 1


def test_one_failed_renewal_is_repeated_soon_and_changes_nothing() -> None:
    rig = Rig().until(State.HOLDING)
    rig.store_ok = False
    rig.run(21.0)
    rig.store_ok = True
    rig.run(60.0)
    assert not rig.stops()


# --- cut off -------------------------------------------------------------------------------------------


def _adrift(seconds: float = 200.0) -> Rig:
    """A holder whose network has been away for a while: it reads what it wrote itself, and stores nothing."""
    rig = Rig((A, B), wanted=A).until(State.HOLDING)
    rig.store_ok = False
    rig.until(State.ADRIFT)
    rig.claims.clear()
    rig.run(seconds)
    return rig


def _kinds(rig: Rig) -> list[Trainer]:
    return [stop.trainer for stop in rig.stops()]


def test_while_the_network_is_away_bids_come_to_nothing_and_the_trainer_is_left_alone() -> None:
    rig = _adrift(600.0)
    assert _kinds(rig) == [Trainer.RUN_ON] and len(rig.starts()) == 1
    assert rig.machine.holding is None and rig.machine.role == A


def test_a_node_that_was_cut_off_claims_its_role_anew_while_the_trainer_still_runs() -> None:
    rig = _adrift()
    before = rig.starts()[0][1]
    rig.store_ok = True
    rig.until(State.HOLDING, 60.0)
    (_, (role, again)) = rig.starts()
    assert role == A and again > before
    assert _kinds(rig) == [Trainer.RUN_ON]  # the driver winds the old one up at the Start
    rig.run(300.0)
    assert rig.machine.state is State.HOLDING and len(rig.starts()) == 2


def test_a_role_that_somebody_else_got_meanwhile_is_left_with_a_last_checkpoint() -> None:
    rig = _adrift()
    rig.store_ok = True
    rig.put(A, RIVAL, "hold", 1, since=-100.0)  # whatever its term: the lease was over
    rig.run(20.0)
    assert _kinds(rig) == [Trainer.RUN_ON, Trainer.WIND_UP]
    assert rig.machine.role is None and len(rig.starts()) == 1


def test_a_rivals_bid_is_waited_for_while_the_trainer_runs_on() -> None:
    rig = _adrift(0.0)
    rig.store_ok = True
    written = len(rig.writes())
    rig.put(A, RIVAL, "bid", 9)
    rig.run(15.0)
    assert _kinds(rig) == [Trainer.RUN_ON] and len(rig.writes()) == written
    rig.put(A, RIVAL, "released", 9, left=90)
    assert rig.until(State.HOLDING).starts()[-1][1] > 9


@pytest.mark.parametrize(("number", "step"), [(1 << 20, 10), (1, 100)])
def test_a_checkpoint_of_a_newer_term_or_a_finished_one_ends_a_trainer_adrift(number: int, step: int) -> None:
    rig = _adrift(0.0)
    rig.statements[A] = statement(A, number, step)
    rig.run(5.0)
    assert _kinds(rig) == [Trainer.RUN_ON, Trainer.WIND_UP]


def test_a_trainer_adrift_is_wound_up_after_some_hours() -> None:
    rig = _adrift(0.0)
    rig.read_ok = False
    rig.run(MAX_ADRIFT_S - 60.0)
    assert _kinds(rig) == [Trainer.RUN_ON]
    rig.run(120.0)
    assert _kinds(rig) == [Trainer.RUN_ON, Trainer.WIND_UP]


@pytest.mark.parametrize("failed", [True, False])
def test_a_trainer_that_ended_adrift_is_not_started_again_at_once(failed: bool) -> None:
    rig = _adrift(0.0)
    rig.machine.ended_adrift(rig.now, failed=failed)
    assert rig.machine.role is None
    rig.store_ok = True
    rig.run(30.0)
    assert len(rig.starts()) == 1 and _kinds(rig) == [Trainer.RUN_ON]
    rig.run(120.0)
    assert len(rig.starts()) == 2  # nobody believed the finish, if it was one: it is tried again


# --- clocks and zombies --------------------------------------------------------------------------------


def test_a_woken_zombie_stops_before_it_reads_anything() -> None:
    rig = Rig().until(State.HOLDING)
    rig.seconds += 70.0
    actions = rig.machine.step(None, rig.now)
    assert isinstance(actions[0], Stop)
    assert rig.machine.state is State.ADRIFT


@pytest.mark.parametrize("jump", [-3600.0, -10.0, 10.0, 3600.0])
def test_a_clock_that_jumps_stops_the_holder(jump: float) -> None:
    rig = Rig().until(State.HOLDING)
    rig.wall_offset += jump
    assert isinstance(rig.machine.step(None, rig.now)[0], Stop)


def test_a_machine_that_slept_with_its_monotonic_clock_stopped_stops_the_holder() -> None:
    rig = Rig().until(State.HOLDING)
    rig.wall_offset += 30.0  # the monotonic clock did not count these
    assert isinstance(rig.machine.step(None, rig.now)[0], Stop)


def test_a_clock_corrected_by_a_second_is_no_reason_to_stop() -> None:
    rig = Rig().until(State.HOLDING)
    for nudge in (1.0, -1.0):
        rig.wall_offset += nudge
        rig.run(30.0)
    assert not rig.stops()


def test_a_zombie_finds_its_role_taken_and_stays_away() -> None:
    rig = Rig().until(State.HOLDING)
    rig.seconds += 300.0
    rig.put(A, RIVAL, "hold", 2, left=10_000)
    rig.run(200.0)
    assert rig.machine.state is State.IDLE and len(rig.starts()) == 1
    assert rig.stops()[-1].trainer is Trainer.WIND_UP


# --- taking over, restarting ----------------------------------------------------------------------------


def test_a_dead_holders_role_is_taken_over_soon_after_its_claim_expires() -> None:
    rig = Rig()
    rig.put(A, RIVAL, "hold", 1, left=60.0)
    died = rig.seconds
    rig.until(State.HOLDING)
    assert 60.0 < rig.seconds - died < 72.0
    assert rig.starts() == [(A, 2)]


def test_a_read_that_shows_only_a_part_does_not_make_a_held_role_look_free() -> None:
    rig = Rig()
    rig.put(A, RIVAL, "hold", 1, left=60.0)
    rig.once()
    rig.claims.clear()
    rig.run(45.0)
    assert rig.machine.state is State.IDLE and not rig.writes()


def test_a_restarted_node_takes_its_own_live_claim_back_at_once_with_the_next_term() -> None:
    rig = Rig((A, B))
    for role in (A, B):
        rig.put(role, RIVAL if role == A else ME, "hold", 3, left=55.0)
    began = rig.seconds
    rig.until(State.HOLDING)
    assert rig.starts() == [(B, 4)]
    assert rig.seconds - began < 6.0
    assert rig.claims[B, ME].state == "hold" and term_number(rig.claims[B, ME].term) == 4


def test_a_restarted_node_that_wants_another_role_releases_its_old_claim() -> None:
    rig = Rig((A, B), wanted=A)
    rig.put(B, ME, "hold", 3, left=55.0)
    rig.until(State.HOLDING)
    assert rig.claims[B, ME].state == "released"
    assert rig.starts() == [(A, 1)]


def test_a_holder_that_sees_a_foreign_claim_under_its_own_name_stops_and_does_not_hunt_it() -> None:
    rig = Rig().until(State.HOLDING)
    rig.put(A, ME, "hold", 2, left=1000.0)
    rig.run(100.0)
    assert [stop.reason for stop in rig.stops()] == ["another process uses this node's key"]
    assert ("bid", 3) not in rig.writes()


# --- the driver's events --------------------------------------------------------------------------------


def test_after_finishing_a_role_the_next_one_is_claimed() -> None:
    rig = Rig((A, B)).until(State.HOLDING)
    first = rig.starts()[0][0]
    rig.machine.finished(first)
    rig.once()
    rig.until(State.HOLDING)
    assert {role for role, _ in rig.starts()} == {A, B}


def test_a_role_whose_finish_nobody_believes_is_claimed_again_later_each_time() -> None:
    rig = Rig().until(State.HOLDING)
    waits = []
    for _ in range(3):
        rig.machine.finished(A)
        ended = rig.seconds
        rig.until(State.HOLDING, 600)
        waits.append(rig.seconds - ended)
    assert 60 < waits[0] < 90 and 120 < waits[1] < 150 and 240 < waits[2] < 280


def test_a_role_whose_trainer_broke_is_left_alone_longer_each_time() -> None:
    rig = Rig().until(State.HOLDING)
    waits = []
    for _ in range(3):
        rig.machine.failed(A, rig.now)
        failed = rig.seconds
        rig.once()
        rig.until(State.HOLDING, 600)
        waits.append(rig.seconds - failed)
    assert waits[0] > 60 and waits[1] > 120 and waits[2] > 240


def test_a_node_that_was_asked_for_one_role_waits_for_that_one() -> None:
    rig = Rig((A, B), wanted=A)
    rig.put(A, RIVAL, "hold", 1, left=300)
    rig.run(290)
    assert not rig.writes()
    assert rig.until(State.HOLDING).starts() == [(A, 2)]


def test_a_node_that_left_does_nothing_more() -> None:
    rig = Rig().until(State.HOLDING)
    rig.machine.released()
    rig.run(100)
    assert rig.writes().count(("released", 1)) == 1 and rig.machine.state is State.ENDED


def test_a_write_nobody_asked_for_cannot_have_been_stored() -> None:
    rig = Rig().until(State.HOLDING)
    write = next(action for action in rig.log if isinstance(action, WriteClaim))
    with pytest.raises(LocalProtocolError, match="under way"):
        rig.machine.stored(write, True, 0.1, rig.now)


def test_finishing_another_role_than_the_held_one_is_our_own_bug() -> None:
    rig = Rig((A, B)).until(State.HOLDING)
    other = B if rig.machine.role == A else A
    with pytest.raises(LocalProtocolError, match=str(other)):
        rig.machine.finished(other)
    assert rig.machine.state is State.HOLDING


@pytest.mark.parametrize(("state", "event"), itertools.product(State, Event))
def test_every_state_and_event_move_legally_or_raise_naming_both(state: State, event: Event) -> None:
    if (state, event) in TRANSITIONS:
        assert transition(state, event) in State
    else:
        with pytest.raises(LocalProtocolError, match=rf"{event.name} while {state.name}"):
            transition(state, event)


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", [Event.FINISHED, Event.FAILED, Event.RELEASED])
def test_a_driver_event_in_any_state_moves_legally_or_changes_nothing(state: State, event: Event) -> None:
    rig = _in_state(state)
    before = (rig.machine.state, rig.machine.role, rig.machine.next_wakeup(), rig.machine.reads)
    calls = {
        Event.FINISHED: lambda: rig.machine.finished(A),
        Event.FAILED: lambda: rig.machine.failed(A, rig.now),
        Event.RELEASED: rig.machine.released,
    }
    if (state, event) in TRANSITIONS:
        calls[event]()
        assert rig.machine.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(LocalProtocolError):
            calls[event]()
        assert before == (rig.machine.state, rig.machine.role, rig.machine.next_wakeup(), rig.machine.reads)


def _in_state(state: State) -> Rig:
    rig = Rig()
    if state is State.ENDED:
        rig.machine.released()
    elif state is State.BACKOFF:
        rig.until(State.HOLDING)
        rig.machine.failed(A, rig.now)
    elif state is State.ADRIFT:
        rig.until(State.HOLDING).store_ok = False
        rig.until(state)
    elif state is not State.IDLE:
        rig.until(state)
    return rig


class _Trainer:
    """Checks the one rule the daemon relies on: Start and Stop alternate, and match the machine.

    `adrift`: the role trained without a lease.
    """

    def __init__(self) -> None:
        self.running: Role | None = None
        self.adrift: Role | None = None

    def take(self, action: Action) -> None:
        if isinstance(action, Start):
            assert self.running is None and self.adrift in (None, action.role)
            self.running, self.adrift = action.role, None
        elif isinstance(action, Stop) and action.trainer is Trainer.WIND_UP:
            assert self.adrift == action.role and self.running is None
            self.adrift = None
        elif isinstance(action, Stop):
            assert self.running == action.role and self.adrift is None
            self.running = None
            self.adrift = action.role if action.trainer is Trainer.RUN_ON else None


_DISTURBANCES = st.sampled_from(
    [
        "wait",
        "lose store",
        "lose read",
        "heal",
        "rival bid",
        "rival hold",
        "rival gone",
        "jump",
        "sleep",
        "finished",
        "failed",
        "ended adrift",
        "checkpoint",
    ]
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.tuples(_DISTURBANCES, st.integers(0, 1), st.integers(1, 40)), max_size=25))
def test_whatever_happens_at_most_one_role_runs_and_only_under_a_good_lease(
    script: list[tuple[str, int, int]],
) -> None:
    rig, trainer = Rig((A, B)), _Trainer()
    for what, which, amount in script:
        _disturb(rig, trainer, what, (A, B)[which], amount)
        for _ in range(amount % 7):
            for action in rig.once():
                trainer.take(action)
            holding = rig.machine.holding
            assert trainer.running == (None if holding is None else holding.role)
            assert trainer.adrift in (None, rig.machine.role)


def _disturb(rig: Rig, trainer: _Trainer, what: str, role: Role, amount: int) -> None:
    if what in ("lose store", "lose read", "heal"):
        rig.store_ok, rig.read_ok = what != "lose store", what != "lose read"
    elif what in ("rival bid", "rival hold"):
        rig.put(role, RIVAL, what.split()[1], amount, since=amount - 20.0)
    elif what == "rival gone":
        rig.put(role, RIVAL, "released", amount, left=90)
    elif what == "jump":
        rig.wall_offset += (amount - 20) * 3.0
    elif what == "sleep":
        rig.seconds += amount * 4.0
    elif what == "checkpoint":
        rig.statements[role] = statement(role, amount, min(99, amount))
    elif trainer.running is not None and what == "finished":
        rig.machine.finished(trainer.running)
        trainer.running = None
    elif what == "ended adrift":
        rig.machine.ended_adrift(rig.now, failed=amount > 20)
        trainer.adrift = None
    elif trainer.running is not None and what == "failed":
        rig.machine.failed(trainer.running, rig.now)
        trainer.running = None
