"""The lease machine: how one node claims a role, keeps it, yields it and gives it back, without I/O.

Owns: the states of a claim, its records' terms and expirations, when to read next. Does not own: the
order of rival claims and the choice of a role (`core.assignment`), what is remembered of earlier reads
(`core.claim_memory`), reading and writing the DHT, the trainer (the node's daemon).

The driver's loop, in which a read gives up within a few seconds:

    sleep until machine.next_wakeup()     # or until an event of its own
    perform(machine.step(None, now()))    # stops at once if the lease is in doubt
    if machine.wants_view(now()):         # roles that take longer than machine.patience_s are left out
        view = await read(machine.reads)  # latest=True; machine.read_failed(now()) if it fails
        perform(machine.step(view, now()))

`perform` calls `machine.stored` for every `WriteClaim`, however it went.

A lease is no lock: the DHT has no compare-and-swap, so after a partition, a late write or a lie two nodes
can both believe that they hold a role. The protocol makes that rare and short, the **term** harmless:
outputs are keyed by (role, term, holder, step), and `assignment.newest_statement` puts the holder's first.

Who wins. While a claim is being made, HOLD goes before BID whatever their terms: a bidder may have missed
the HOLD in its first read, and must not push out a healthy holder by a term it made up. Between two HOLDs
the higher term wins: it can only exist because the other holder looked dead to its owner, who then
settled, confirmed, and resumed from the announced checkpoint, so the older one is a zombie, a node that
was cut off, or one whose records did not get through; its lineage is the one that must end. No two claims
have one term: those that took the same number, not having seen each other, are told apart by their marks.
No lease that stands ends by the term of a checkpoint: who signs one chooses it, and needs no claim for it.

Restart. A node that finds its own live claim from an earlier process bids again at once, with the next
term. That is safe: the identity is locked to one process and the trainer dies with its parent, so nobody
acts under that claim, everybody else keeps away from it, and the new term separates the two processes'
outputs. Should the key be in use twice all the same, a process that sees a claim under its name that it
did not write stops. Only a process that has not bid yet takes a claim back, so two do not hunt each other.

Cut off. A lease in doubt is over, the work is not: while the network is away the machine is ADRIFT, the
trainer goes on, and nobody is told anything. When a view comes the role is bid for again, with the trainer
still running: only a HOLD that shows proves that the network is back. Whoever else got the role meanwhile
keeps it; then, and after `MAX_ADRIFT_S`, the trainer ends with a checkpoint that is one candidate of many.

Two clocks. Records carry wall time, timers run on monotonic time, and a lease counts as good only while
both say so: a wall clock set back is caught by the monotonic one, a suspended machine (whose monotonic
clock stood still) by the wall clock.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from paris_p2p.core.assignment import (
    MAX_ROLES_PER_NODE,
    SeenClaim,
    View,
    best_claim,
    claim_rank,
    claimed,
    preferred_roles,
    role_states,
)
from paris_p2p.core.claim_memory import ClaimMemory
from paris_p2p.core.lease_actions import Action, Now, Start, Stop, Trainer, WriteClaim
from paris_p2p.core.lease_table import Event, State, transition
from paris_p2p.core.tombstones import Tombstones
from paris_p2p.errors import LocalProtocolError
from paris_p2p.ids import NodeId, Role, Term
from paris_p2p.wire.manifest import LeaseTimes
from paris_p2p.wire.records import CLOCK_TOLERANCE_S, ClaimRecord
from paris_p2p.wire.terms import highest_number, make_term, term_number

BLIND_PAUSE_S = 1.0  # a failed read is tried again after this long
CHECK_CLOCKS_S = 1.0  # how long a trainer may run on after its machine slept
MAX_TRIES = 4  # writes of a BID or a HOLD before giving up on it
MAX_BACKOFF_DOUBLINGS = 3
MAX_FAILURE_BACKOFF_S = 3600.0
MAX_ADRIFT_S = 6 * 3600.0  # a trainer works on for itself at most this long
LOOK_PATIENCE_S = 1.0  # a look at several roles goes on without those that take longer to read
MAX_CANDIDATES = 2  # roles of a second look


@dataclass(slots=True)
class _Lease:
    """The claim in progress. `stored`: the last record of the present state was accepted; `good_*`: until
    when the last accepted HOLD stands, on both clocks; `sent_monotonic`: when the last record was made."""

    role: Role
    term: Term
    since_unix: float
    writing: WriteClaim | None = None
    sent_monotonic: float = 0.0
    stored: bool = False
    tries: int = 0
    good_unix: float = -math.inf
    good_monotonic: float = -math.inf

    def left(self, now: Now) -> float:
        """Seconds until the last accepted HOLD ends, on the clock that says so first."""
        return min(self.good_unix - now.unix, self.good_monotonic - now.monotonic)


class LeaseMachine:
    """One node's claim on at most one of `roles`; `wanted` restricts it to one of them (`--role`)."""

    def __init__(
        self,
        node_id: NodeId,
        roles: Sequence[Role],
        times: LeaseTimes,
        *,
        wanted: Role | None = None,
        max_roles_per_node: int = MAX_ROLES_PER_NODE,
        rng: random.Random,
    ) -> None:
        self._node_id = node_id
        self._roles = tuple(roles) if wanted is None else (wanted,)
        self._times = times
        self._rng = rng
        # Stops before others may think the lease is over: their clock may run ahead, ours behind.
        self._margin_s = min(CLOCK_TOLERANCE_S, times.ttl_s / 6)
        self._state = State.IDLE
        self._lease: _Lease | None = None
        self._tombstones = Tombstones()
        self._in_flight: set[WriteClaim] = set()
        self._timer = -math.inf  # monotonic: when the present state next needs a view
        self._last: Now | None = None
        self._candidates: tuple[Role, ...] = ()  # IDLE: the roles to look at again and bid for one of
        self._blind_reads = 0  # in a row
        self._first_bid = True
        self._losses = 0
        self._failures: dict[Role, int] = {}
        self._finishes: dict[Role, int] = {}
        self._avoid: dict[Role, float] = {}  # monotonic time until which a role is left alone
        self._store_s = 0.0
        self._adrift_since: float | None = None  # monotonic: since when a trainer runs without a lease
        self._memory = ClaimMemory(node_id, {*roles, *self._roles}, times.ttl_s, max_roles_per_node)

    @property
    def state(self) -> State:
        """The present state."""
        return self._state

    @property
    def role(self) -> Role | None:
        """The role being claimed or held."""
        return None if self._lease is None else self._lease.role

    @property
    def holding(self) -> Start | None:
        """The role and term held, between a `Start` and whatever ends it; else None."""
        lease = self._lease if self._state is State.HOLDING else None
        return None if lease is None else Start(lease.role, lease.term)

    @property
    def reads(self) -> tuple[Role, ...]:
        """The roles the next view must show: all while looking for one, else only those that matter now."""
        return self._candidates or self._roles if self.role is None else (self.role,)

    @property
    def patience_s(self) -> float:
        """Seconds after which the next view may leave roles out: one that cannot be read now must not hold
        up the choice among the others. Infinite where the one role asked for is what matters."""
        if len(self.reads) == 1:
            return math.inf
        return max(LOOK_PATIENCE_S, self._store_s) * 2.0 ** min(self._blind_reads, 4)

    @property
    def settle_wait_s(self) -> float:
        """Seconds a BID settles now: the setting, or twice the store time (TTL / 3 at most) if longer."""
        return max(self._times.settle_s, 2 * self._store_s)

    def next_wakeup(self, *, even_clocks: bool = False) -> float:
        """The monotonic time of the next `step` (the past: at once; infinity: after the next event).

        `even_clocks`: neither clock jumps meanwhile (a simulation knows); no need to compare them.
        """
        times = [self._tombstones.next_due(), self._view_due()]
        if self._last is not None and self._lease is not None and self._state is State.HOLDING:
            times.append(self._last.monotonic + self._lease.left(self._last) - self._margin_s)
            if not even_clocks:
                times.append(self._last.monotonic + CHECK_CLOCKS_S)
        return min(times)

    def wants_view(self, now: Now) -> bool:
        """Whether a step with a view has something to do now."""
        return self._view_due() <= now.monotonic

    def _view_due(self) -> float:
        if self._state is State.ENDED or (self._lease is not None and self._lease.writing is not None):
            return math.inf
        return self._timer

    def read_failed(self, now: Now) -> None:
        """There is no view: ask for one again a little later, with more patience."""
        self._blind_reads += 1
        self._timer = max(self._timer, now.monotonic + BLIND_PAUSE_S)

    def step(self, view: View | None, now: Now) -> list[Action]:
        """What to do at `now`. Without a view: only what needs none (stop in doubt, write tombstones)."""
        actions = self._check_doubt(now)
        if view is not None and self._state is not State.ENDED:
            self._memory.observe(view, now.unix)
            self._blind_reads = 0
            actions += self._decide(view, now)
        for role, claim in self._tombstones.take_due(now.monotonic, now.unix):
            actions.append(self._record(role, claim, now.unix))
        self._last = now
        return actions

    def stored(self, write: WriteClaim, ok: bool, took_s: float, now: Now) -> None:
        """A `write` was accepted or not, after `took_s`. `LocalProtocolError` if none such is under way."""
        if write not in self._in_flight:
            raise LocalProtocolError(f"no write of {write.claim.state!r} for {write.role} is under way")
        self._in_flight.remove(write)
        # A moving average: one lost RPC makes one store slow, a slow network all of them; sleep is no sign.
        self._store_s += (min(took_s, self._times.ttl_s / 6) - self._store_s) / 2
        if write.claim.state == "released":
            retry_at = now.monotonic + self._jitter(self._times.settle_s)
            self._tombstones.stored(write.role, write.expiration_unix, ok, retry_at)
        elif self._lease is not None and write == self._lease.writing:
            self._claim_stored(self._lease, write, ok, now)

    def finished(self, role: Role) -> None:
        """The trainer has finished `role` and its last checkpoint is announced. `LocalProtocolError`
        unless `role` is held."""
        self._check_held(role, Event.FINISHED)
        now = self._last.monotonic if self._last is not None else 0.0
        self._avoid[role] = now + self._finish_pause_s(role)
        self._end(Event.FINISHED, -math.inf)

    def _finish_pause_s(self, role: Role) -> float:
        """For how long a role is left alone after this node finished it, longer each time: the announcement
        may take a while to come back, and others to believe it; if they never do, it is trained again."""
        finishes = self._finishes[role] = self._finishes.get(role, 0) + 1
        return min(MAX_FAILURE_BACKOFF_S, self._times.ttl_s * 2.0 ** min(finishes - 1, 16))

    def failed(self, role: Role, now: Now) -> None:
        """The trainer broke on `role`: release it and leave it alone, longer each time.
        `LocalProtocolError` unless `role` is held."""
        self._check_held(role, Event.FAILED)
        failures = self._failures[role] = self._failures.get(role, 0) + 1
        pause = min(MAX_FAILURE_BACKOFF_S, self._times.ttl_s * 2.0 ** min(failures - 1, 16))
        self._avoid[role] = now.monotonic + pause
        self._end(Event.FAILED, now.monotonic + self._jitter(self._times.settle_s))

    def ended_adrift(self, now: Now, *, failed: bool) -> None:
        """The trainer that ran on without a lease has ended of itself, its work done or `failed`. Nothing
        happens without one; a claim for it that is under way goes on."""
        if self._state is State.ADRIFT and self._lease is not None:
            pause = self._times.ttl_s if failed else self._finish_pause_s(self._lease.role)
            self._avoid[self._lease.role] = now.monotonic + pause
            self._end(Event.FAILED if failed else Event.FINISHED, now.monotonic)
        self._adrift_since = None

    def released(self) -> None:
        """The node leaves; the trainer has already stopped. `step(None, now)` then yields the tombstone
        until it is accepted (`next_wakeup` is infinite when nothing is left to write)."""
        self._end(Event.RELEASED, math.inf)

    def _check_held(self, role: Role, event: Event) -> None:
        transition(self._state, event)
        if self._lease is None or self._lease.role != role:
            raise LocalProtocolError(f"{event.name} for {role}, but {self.role} is held")

    def _decide(self, view: View, now: Now) -> list[Action]:
        if self._state is State.BACKOFF and now.monotonic >= self._timer:
            self._state = transition(self._state, Event.RESTED)
        if self._state is State.IDLE and now.monotonic >= self._timer:
            return self._look(view, now)
        if self._lease is None or self._lease.writing is not None:
            return []
        if self._state is State.HOLDING:
            return self._keep(self._lease, view, now)
        if self._state is State.ADRIFT:
            return self._return(self._lease, view, now) if now.monotonic >= self._timer else []
        if now.monotonic >= self._timer:
            return self._settle(self._lease, view, now)
        return []

    def _look(self, view: View, now: Now) -> list[Action]:
        """IDLE: pick free roles, wait a random moment, look at those again, bid. The second look is quick, so
        that most nodes see the first one's bid instead of racing it, and shows a few roles, so that whoever
        comes late has another one at hand."""
        # Live claims of this node's previous process count only until the first bid of this one.
        mine = self._memory.own_live(now.unix) if self._first_bid else {}
        maybe = self._free(mine, now)
        free = [role for role in maybe if role in view.claims]  # the view may have left some out
        for other in mine:
            if other not in free[:1]:
                self._bury(other, mine[other].term, mine[other].since_unix)
        if free and (self._candidates or free[0] in mine):
            return self._bid(free[0], now)
        first_look = not self._candidates
        self._candidates = tuple(dict.fromkeys([*free, *maybe]))[:MAX_CANDIDATES]
        if not self._candidates:
            self._timer = self._next_look(now) if first_look else now.monotonic
        elif first_look:
            self._timer = now.monotonic + self._rng.uniform(0, self._times.settle_s / 2)
        return []

    def _free(self, mine: dict[Role, SeenClaim], now: Now) -> list[Role]:
        """The roles that this node may claim as far as it knows, its own of before first."""
        seen = self._memory.view(now.unix, own=not self._first_bid)
        open_to_us = [r for r in self._roles if self._avoid.get(r, -math.inf) <= now.monotonic]
        free = [role for role in open_to_us if not claimed(role, seen)]
        states = role_states(free, seen).values()
        return sorted(preferred_roles(self._node_id, states), key=lambda role: role not in mine)

    def _next_look(self, now: Now) -> float:
        """When to look for a free role again: after a poll, or when the next live claim runs out."""
        claims = self._memory.view(now.unix).claims
        ends = [c.expiration_unix for role in self._roles for c in claims[role] if c.live(now.unix)]
        soonest = min(ends, default=math.inf) - now.unix + self._rng.uniform(0, self._times.settle_s / 2)
        return now.monotonic + min(soonest, self._jitter(self._times.poll_s))

    def _bid(self, role: Role, now: Now) -> list[Action]:
        number = term_number(self._memory.highest_term(role)) + 1
        if number > highest_number(now.unix):  # somebody used up what there is until now
            self._timer = now.monotonic + BLIND_PAUSE_S
            return []
        self._state = transition(self._state, Event.CHOSEN)
        self._first_bid, self._candidates = False, ()
        self._tombstones.drop(role)
        self._lease = _Lease(role, make_term(number, role, self._node_id, now.unix), now.unix)
        return self._write(self._lease, now)

    def _settle(self, lease: _Lease, view: View, now: Now) -> list[Action]:
        """BIDDING or CONFIRMING, after the wait: judge what a new read shows."""
        lost = self._why_lost(lease, view, now)
        if lost is not None:
            return self._give_up(Event.LOST, lost, now)
        if not lease.stored or not self._visible(lease, view):
            lease.stored = False
            if lease.tries < MAX_TRIES:
                return self._write(lease, now)
            return self._give_up(Event.DOUBT, "the claim does not show", now)
        self._state = transition(self._state, Event.WON)
        lease.tries, lease.stored = 0, False
        if self._state is State.CONFIRMING:
            return self._write(lease, now)
        self._losses, self._adrift_since = 0, None
        self._plan_renewal(lease)
        return [Start(lease.role, lease.term)]

    def _keep(self, lease: _Lease, view: View, now: Now) -> list[Action]:
        """HOLDING: yield when outranked, renew when it is time."""
        lost = self._why_lost(lease, view, now)
        if lost is not None:
            return self._give_up(Event.LOST, lost, now)
        return self._write(lease, now) if now.monotonic >= self._timer else []

    def _return(self, lease: _Lease, view: View, now: Now) -> list[Action]:
        """ADRIFT, with a view again: give up a role that somebody else got, bid for it if it is free."""
        lost = self._why_lost(lease, view, now)
        rival = best_claim(lease.role, self._memory.view(now.unix, own=False))
        if lost is None and rival is not None and rival.state == "hold":
            lost = "another node has taken it over"
        if lost is not None:
            return self._give_up(Event.LOST, lost, now)
        if rival is None and lease.role in view.claims:
            return self._bid(lease.role, now)
        self._timer = now.monotonic + BLIND_PAUSE_S  # a rival's bid becomes a hold, or lapses
        return []

    def _why_lost(self, lease: _Lease, view: View, now: Now) -> str | None:
        """The reason to give the claim up, if what is known at `now` has one."""
        statement = self._memory.statement(lease.role)
        maker = None if statement is None else (statement.holder, statement.term)
        if statement is not None and statement.finished and maker != (self._node_id, lease.term):
            return "the role is finished"
        if statement is not None and self._fenced_by(statement.term, lease):
            return f"there is a checkpoint of term {term_number(statement.term)}, a newer one"
        if any(self._not_mine(claim, lease) for claim in view.claims.get(lease.role, ())):
            return "another process uses this node's key"
        rival = best_claim(lease.role, self._memory.view(now.unix, own=False))
        if rival is not None and claim_rank(lease.role, rival) < claim_rank(lease.role, self._own(lease)):
            return f"another node's {rival.state} of term {term_number(rival.term)} goes first"
        used = term_number(self._memory.highest_term(lease.role))
        if self._state is State.BIDDING and used > term_number(lease.term):
            return "a newer term has been used"
        return None

    def _fenced_by(self, term: Term, lease: _Lease) -> bool:
        """Whether a checkpoint of `term` ends a claim: none ends a lease that stands, whoever made it."""
        least = lease.term + 1 if self._state is State.ADRIFT else lease.term
        return self._state is not State.HOLDING and term >= least

    def _not_mine(self, claim: SeenClaim, lease: _Lease) -> bool:
        """Whether a claim under our name is neither ours nor a leftover that our next write replaces."""
        written = (claim.term, claim.since_unix) == (lease.term, lease.since_unix)
        return claim.owner == self._node_id and not written and claim.term >= lease.term

    def _own(self, lease: _Lease) -> SeenClaim:
        """Our claim as others should see it."""
        state = "bid" if self._state is State.BIDDING else "hold"
        return SeenClaim(self._node_id, state, lease.term, lease.since_unix, math.inf)

    def _visible(self, lease: _Lease, view: View) -> bool:
        """Whether the read shows our latest record, as others should see it."""
        state = "bid" if self._state is State.BIDDING else "hold"
        return any(
            (claim.owner, claim.state, claim.term) == (self._node_id, state, lease.term)
            for claim in view.claims.get(lease.role, ())
        )

    def _check_doubt(self, now: Now) -> list[Action]:
        if self._lease is None:
            return []
        if self._adrift_since is not None and now.monotonic - self._adrift_since > MAX_ADRIFT_S:
            reason = f"the network was away for {MAX_ADRIFT_S / 3600:.0f} hours"
            return self._give_up(Event.LOST, reason, now)
        if self._last is not None and self._state is not State.ADRIFT:
            wall, steady = now.unix - self._last.unix, now.monotonic - self._last.monotonic
            if abs(wall - steady) > self._margin_s:
                return self._give_up(
                    Event.DOUBT, f"the clock jumped by {wall - steady:.0f} s, or the machine slept", now
                )
        confirmed = self._state in (State.CONFIRMING, State.HOLDING) and self._lease.good_unix > -math.inf
        if confirmed and self._lease.left(now) <= self._margin_s:
            return self._give_up(Event.DOUBT, "the lease could not be renewed in time", now)
        return []

    def _give_up(self, event: Event, reason: str, now: Now) -> list[Action]:
        held, adrift = self.holding, self._adrift_since is not None
        if event is Event.DOUBT and self._lease is not None and (held is not None or adrift):
            return self._cut_off(self._lease, reason, now)
        role, self._adrift_since = self.role, None
        self._losses += 1
        self._end(event, now.monotonic + self._backoff())
        return [Stop(role, reason, Trainer.WIND_UP)] if role and (held or adrift) else []

    def _cut_off(self, lease: _Lease, reason: str, now: Now) -> list[Action]:
        """The lease is over, or the bid for another came to nothing; the trainer goes on."""
        self._state = transition(self._state, Event.CUT_OFF)
        lease.writing = None
        if self._adrift_since is not None:
            self._timer = now.monotonic + self._backoff()
            return []
        self._adrift_since = self._timer = now.monotonic
        return [Stop(lease.role, reason, Trainer.RUN_ON)]

    def _end(self, event: Event, timer: float) -> None:
        self._state = transition(self._state, event)
        self._timer = timer
        lease, self._lease = self._lease, None
        last = None if lease is None else self._memory.own(lease.role)
        if lease is not None and not (last and self._not_mine(last, lease)):  # not another process's
            self._bury(lease.role, lease.term, lease.since_unix)

    def _backoff(self) -> float:
        doublings = min(max(0, self._losses - 1), MAX_BACKOFF_DOUBLINGS)
        return self._jitter(self.settle_wait_s / 2 * 2.0**doublings)

    def _jitter(self, seconds: float) -> float:
        return seconds * self._rng.uniform(0.5, 1.5)

    def _write(self, lease: _Lease, now: Now) -> list[Action]:
        bid = self._state is State.BIDDING
        lease.tries += 1
        lease.sent_monotonic = now.monotonic
        life = self._bid_life() if bid else self._times.ttl_s
        claim = ClaimRecord("bid" if bid else "hold", lease.term, lease.since_unix)
        lease.writing = self._record(lease.role, claim, now.unix + life)
        return [lease.writing]

    def _bid_life(self) -> float:
        """A bid lives as long as it may take to become a HOLD, so that a dead bidder does not block a role
        for a whole lease."""
        return min(self._times.ttl_s, 3 * self.settle_wait_s + 2 * CLOCK_TOLERANCE_S)

    def _plan_renewal(self, lease: _Lease) -> None:
        self._timer = lease.sent_monotonic + self._times.renew_s * self._rng.uniform(0.85, 1.0)

    def _record(self, role: Role, claim: ClaimRecord, expiration_unix: float) -> WriteClaim:
        """A write that replaces every earlier one of ours: the DHT keeps what expires last."""
        expiration_unix = max(expiration_unix, self._memory.own_expiration(role) + 1.0)
        seen = SeenClaim(self._node_id, claim.state, claim.term, claim.since_unix, expiration_unix)
        self._memory.add(role, seen)
        write = WriteClaim(role, claim, expiration_unix)
        self._in_flight.add(write)
        return write

    def _claim_stored(self, lease: _Lease, write: WriteClaim, ok: bool, now: Now) -> None:
        lease.writing = None
        lease.stored = ok
        if not ok:
            self._timer = now.monotonic + self._jitter(min(self._times.settle_s, self._times.renew_s / 4))
            return
        if write.claim.state == "hold":
            lease.good_unix = write.expiration_unix
            lease.good_monotonic = lease.sent_monotonic + self._times.ttl_s
        if self._state is State.HOLDING:
            self._plan_renewal(lease)
        else:
            self._timer = now.monotonic + self.settle_wait_s / (1 if self._state is State.BIDDING else 2)

    def _bury(self, role: Role, term: Term, since_unix: float) -> None:
        claim = ClaimRecord("released", term, since_unix)
        self._tombstones.add(role, claim, self._memory.own_expiration(role))
        self._memory.release_own(role)
