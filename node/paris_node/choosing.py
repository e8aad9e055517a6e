"""Which checkpoints a member of a run copies, and which ones it looks at, next.

Owns: what is under way of both, how many at once and in which order, and that measuring takes a share of the
machine only. Does not own: copying and looking (`run_node`), the rules (`core.safety`, `judging`).
"""

import math
from collections.abc import Container, Iterator
from enum import Enum

from paris_node.judging import NOTHING_KNOWN, Candidate, contenders, jury
from paris_node.snapshot import Observation
from paris_node.tries import Tries
from paris_p2p.core.safety import check_now, copy_now, examination_order, first_checkers
from paris_p2p.ids import NodeId, Role
from paris_p2p.wire.manifest import SignedManifest

MAX_EXAMINED = 2
"""Checkpoints that are only strangers' word, looked at at once beside the copies the run counts on: one of
them is the one known longest."""
MAX_COPIES = 3
"""At once: a swarm fetches a few items at a time, and the trainer's shards must not wait for copies."""
REST_FACTOR = 3.0
"""After measuring an unfinished checkpoint no other of its kind (`Look.COUNTING`, or the rest) is measured
for so many times as long as it took. They come for as long as the run lasts, or a stranger likes."""


class Look(Enum):
    """Why a checkpoint is looked at. `COUNTING`: the run goes by it already; else it is only strangers' word:
    `LONGEST`: the one known longest, `OTHER`: one that failed least."""

    COUNTING = 0
    LONGEST = 1
    OTHER = 2


class Choosing:
    """One node's choices in one run. `mirror`: it copies and looks at everything, at once."""

    def __init__(self, me: NodeId, signed: SignedManifest, *, mirror: bool) -> None:
        self._me = me
        self._signed = signed
        self._mirror = mirror
        self._sure = frozenset({signed.manifest.organiser})
        self.tries = Tries()
        self._copying: dict[bytes, Role] = {}  # by signed statement, as the next
        self._looking: dict[bytes, Look] = {}
        self._counting_at: dict[Role, float] = {}  # when one that counts was looked at last
        self._rest_until = {True: -math.inf, False: -math.inf}  # of measuring: those that count, others

    def copies(self, observation: Observation, held: Container[bytes], now: float) -> Iterator[Candidate]:
        """What to copy from now on, until `copied` is called for it. Each copy rests when it failed: one that
        cannot be had holds up no other.

        One copy a role at a time, so that a fast trainer is not chased from checkpoint to checkpoint.
        """
        self.tries.keep({one.data for some in observation.candidates.values() for one in some})
        for candidate in self._wanted(observation, held, now):
            role = candidate.statement.role
            if len(self._copying) < MAX_COPIES and role not in self._copying.values():
                self._copying[candidate.data] = role
                yield candidate

    def copied(self, data: bytes, now: float, *, done: bool) -> None:
        """The copy has ended."""
        del self._copying[data]
        if not done:
            self.tries.failed(data, now)

    def looks(
        self, observation: Observation, held: Container[bytes], now: float, *, idle: bool
    ) -> Iterator[tuple[Candidate, Look]]:
        """What to look at from now on, until `looked` is called for it, and why."""
        counting = self._unmeasured(observation, held, now, idle=idle)
        if counting is not None:
            self._counting_at[counting.statement.role] = now
            self._looking[counting.data] = Look.COUNTING
            yield counting, Look.COUNTING
        doubtful = self._doubtful(observation, now, idle=idle)
        known = [self.tries.of(one.data, now) for one in doubtful]
        tries = [(tried.since, tried.failures) for tried in known]
        under_way = list(self._looking.values())
        for_longest = Look.LONGEST not in under_way
        slots = MAX_EXAMINED - 1 - under_way.count(Look.OTHER)
        longest, others = examination_order(tries, slots, for_oldest=for_longest)
        for number in others if longest is None else (longest, *others):
            look = Look.LONGEST if number == longest else Look.OTHER
            self._looking[doubtful[number].data] = look
            yield doubtful[number], look

    def looked(self, candidate: Candidate, now: float, *, done: bool, measured_s: float) -> None:
        """The look has ended; meanwhile `measured_s` were spent on measuring."""
        look = self._looking.pop(candidate.data)
        if not done:
            self.tries.failed(candidate.data, now)
        if not candidate.statement.finished:
            self._rest_until[look is Look.COUNTING] = now + REST_FACTOR * measured_s

    def _wanted(self, observation: Observation, held: Container[bytes], now: float) -> list[Candidate]:
        """The newest checkpoints that this node should copy now, least replicated first."""
        replicas, members = self._signed.manifest.replicas, observation.view.members
        wanted = []
        for role, one in observation.newest.items():
            tried = self.tries.of(one.data, now)
            if tried.rest_until <= now and one.data not in self._looking and one.data not in held:
                waited = now - tried.since
                if self._mirror or copy_now(
                    self._me, role, one.held, members, replicas, waited, sure=self._sure
                ):
                    wanted.append(one)
        return sorted(wanted, key=lambda one: len(one.providers))

    def _busy_with(self, now: float) -> set[bytes]:
        return self.tries.resting(now) | self._copying.keys() | self._looking.keys()

    def _unmeasured(
        self, observation: Observation, held: Container[bytes], now: float, *, idle: bool
    ) -> Candidate | None:
        """Of the unfinished checkpoints that the run goes by and that are here the one to measure before they
        are vouched for: of the role whose turn was longest ago. The organiser does, while it publishes."""
        publishing = jury(self._signed, observation.view.members, NOTHING_KNOWN).publishing
        if not (self._mirror or (idle and not publishing)):
            return None
        if Look.COUNTING in self._looking.values() or now < self._rest_until[True]:
            return None
        busy = self._busy_with(now)
        waiting = [
            one
            for one in observation.newest.values()
            if one.data in held and one.data not in busy and not (one.assured or one.statement.finished)
        ]
        return min(
            waiting, key=lambda one: self._counting_at.get(one.statement.role, -math.inf), default=None
        )

    def _doubtful(self, observation: Observation, now: float, *, idle: bool) -> list[Candidate]:
        """Checkpoints that are only strangers' word but would count as newer or finish a role: who mirrors
        looks at them at once, an idle node when nobody else did for a while."""
        busy, resting = self._busy_with(now), now < self._rest_until[False]
        interval = self._signed.manifest.recipe.checkpoint_interval_steps
        found: list[Candidate] = []
        for role, some in observation.candidates.items():
            first = first_checkers(self._me, role, observation.view.members)
            for one in contenders(some, observation.newest.get(role), within_steps=interval, skip=busy):
                waited = now - self.tries.of(one.data, now).since
                turn = check_now(self._me, role, first, one.statement.holder, waited)
                paced = one.statement.finished or not resting
                if paced and (self._mirror or (idle and turn)):
                    found.append(one)
        return found
