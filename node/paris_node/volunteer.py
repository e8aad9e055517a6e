"""A volunteer: drives the lease machine, and trains whatever role it wins.

Owns: the loop between the DHT and the machine, starting and stopping training jobs, leaving in order.
Does not own: the protocol's decisions (`core.lease`) or a job's inside (`training_job`).
"""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import trio

from paris_node.fitting import ChoosyMachine, Fit, TooBig
from paris_node.progress import NO_ROLE
from paris_node.renewals import Renewals
from paris_node.room import check_room
from paris_node.run_node import HAND_OVER_S, RunNode
from paris_node.snapshot import Observation
from paris_node.standing_by import FETCH_MODEL, StandingBy
from paris_node.training_job import STOP_GRACE_S, Outcome, TrainingJob
from paris_p2p import clock
from paris_p2p.core.assignment import View
from paris_p2p.core.lease_actions import Action, Now, Start, Stop, Trainer, WriteClaim
from paris_p2p.errors import ConfigError, StoreError, TransportError
from paris_p2p.ids import Role, Term
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.records import role_scope, sign_record
from paris_p2p.wire.terms import term_number
from paris_p2p.workers.nursery import open_inner_nursery

log = logging.getLogger(__name__)

READ_DEADLINE_S = 10.0
WRITE_DEADLINE_S = 10.0
"""A claim that takes longer to read or write than half a short lease is as good as lost."""
WATCH_PERIOD_S = 1.0
RELEASE_DEADLINE_S = 8.0
OWN_LOOK_S = 900.0
"""A run that is finished by strangers' word is left when it could not be looked at here for so long."""
DISK_PERIOD_S = 10.0
"""How often a node without room looks whether there is some again."""


def now() -> Now:
    """This moment on both clocks."""
    return Now(clock.monotonic(), clock.unix())


class Volunteer:
    """Claims and trains for one node. `leave` ends it in order: checkpoint, release, hand over."""

    def __init__(
        self,
        node: RunNode,
        *,
        wanted: Role | None,
        device: str,
        threads: int | None,
        rng: random.Random,
        roles: Sequence[Role] | None = None,
        fit: Fit | None = None,
        fetch_model: str = FETCH_MODEL,
    ) -> None:
        """`roles`: those this node may claim (None: all of the run); `wanted`: the only one it claims; `fit`:
        what it has the memory for, if that matters; `fetch_model`: the command that gets the model."""
        self._node = node
        manifest = node.signed.manifest
        me = node.network.identity.node_id
        claimable = manifest.roles if roles is None else roles
        heard = manifest.max_roles_per_node
        self._machine = ChoosyMachine(
            me, claimable, manifest.lease, wanted=wanted, max_roles_per_node=heard, rng=rng
        )
        self._some = wanted is not None or len(claimable) < len(manifest.roles)
        self._wanted = wanted
        self._claimable = tuple(claimable) if wanted is None else (wanted,)
        self._fit = fit
        self._too_big = TooBig(fit, manifest.lease.ttl_s)
        self._standing_by = StandingBy(node.output, manifest.roles, me, fetch_model=fetch_model)
        self._device = device
        self._threads = threads
        self._job: TrainingJob | None = None
        self._fatal: ConfigError | None = None
        self._training = trio.Lock()  # one trainer at a time: a lost one may take seconds to end
        self._wake = trio.Event()
        self._owed: list[Action] = []  # what the machine wanted done while a read or write was under way
        self._reading = trio.CancelScope()
        self._leaving = False
        self._complete = False
        self._finished_at = math.inf  # monotonic: since when every role is seen finished
        self._paused = False
        self._rest_until = 0.0  # monotonic: nothing is looked at before
        self._view: View | None = None  # the last one the machine was shown
        self._renewals = Renewals(manifest.lease.ttl_s)

    def leave(self) -> None:
        """Finish with a checkpoint and return from `run`."""
        self._leaving = True
        if self._job is not None:
            self._job.stop()
        else:
            self._reading.cancel()
        self._wake.set()

    def leaving_takes(self) -> str:
        """What `leave` waits for, and for how long at most."""
        rest_s = RELEASE_DEADLINE_S + HAND_OVER_S
        if self._job is None:
            return f"what only this node has is handed over ({rest_s:.0f} s at most)"
        if not self._job.ready:
            return f"{self._job.role} is given back before its training began ({rest_s:.0f} s at most)"
        does = "finishes its step, measures the held-out loss and saves a checkpoint, which peers copy"
        return f"{self._job.role} {does} ({STOP_GRACE_S + rest_s:.0f} s at most)"

    async def run(self, *, until_complete: bool) -> None:
        """Claim and train until `leave` is called or, with `until_complete`, every role is finished."""
        self._standing_by.leaves = until_complete
        async with open_inner_nursery() as nursery:
            nursery.start_soon(self._watch_lease)
            while not self._done(until_complete):
                await self._sleep()
                await self._step(nursery)
            nursery.cancel_scope.cancel()
        await self._release()
        self._node.progress.activity = "leaving"
        if self._leaving and self._node.ledger.held():
            self._node.output.say(f"handing over what no other node has yet, {HAND_OVER_S:.0f} s at most")
        await self._node.hand_over()
        if self._fatal is not None:
            raise self._fatal

    def _done(self, until_complete: bool) -> bool:
        if self._job is not None:
            return False
        return self._leaving or (until_complete and self._complete)

    def _claims_no_more(self) -> bool:
        """Whether nothing is read or bid for any more: this node leaves, and has no lease to keep until its
        trainer has ended."""
        return self._leaving and (self._job is None or self._machine.holding is None)

    async def _sleep(self) -> None:
        """Until the machine wants to look again, or a job ends."""
        until = max(self._machine.next_wakeup(), self._rest_until)
        if self._claims_no_more():
            until = math.inf  # the job's end wakes it
        with trio.move_on_after(max(0.0, until - clock.monotonic())):
            await self._wake.wait()
        self._wake = trio.Event()

    async def _watch_lease(self) -> None:
        """Notice a lease that runs out, or a machine that slept, while the loop waits for the DHT."""
        while True:
            await trio.sleep(WATCH_PERIOD_S)
            for action in self._machine.step(None, now()):
                if isinstance(action, Stop):
                    self._stop(action)
                else:
                    self._owed.append(action)
                    self._wake.set()

    async def _step(self, nursery: trio.Nursery) -> None:
        owed, self._owed = self._owed, []
        await self._perform([*owed, *self._machine.step(None, now())], nursery)
        if self._claims_no_more() or not self._machine.wants_view(now()):
            return
        observation = await self._read()
        if observation is None:
            self._machine.read_failed(now())
            return
        self._complete = self._is_complete(observation)
        self._leave_the_big_alone(observation)
        if self._claims_no_more():
            return
        self._view = observation.view
        if self._short_of_disk():
            self._rest_until = clock.monotonic() + DISK_PERIOD_S
            return
        await self._perform(self._machine.step(observation.view, now()), nursery)
        if self._job is None and self._machine.role is None:
            left = self._too_big.roles
            claimable = [role for role in self._claimable if role not in left]
            self._standing_by.see(observation, claimable, sure=self._complete)

    def _leave_the_big_alone(self, observation: Observation) -> None:
        """A role whose newest checkpoint takes more memory than there is would be claimed in vain."""
        fit, view, wanted = self._fit, observation.view, self._wanted
        if fit is None:
            return
        read = [role for role in self._claimable if role in view.claims]
        weighed = {role: one.statement for role, one in observation.newest.items() if one.weighed}
        new = self._too_big.see(read, weighed, clock.monotonic())
        self._machine.left_alone = self._too_big.roles
        newest = None if wanted is None else observation.newest.get(wanted)
        idle = self._machine.role is None and not self._leaving
        if idle and newest is not None and newest.credible and wanted in self._too_big.roles:
            reason = fit.shortage(self._node.signed.manifest, newest.statement)
            remedy = "end other programs, choose another --device, or join without --role"
            self._fatal = ConfigError(f"--role {wanted}: {reason}: {remedy}")
            self.leave()
            return
        for statement in new:
            self._say_too_big(fit, statement)

    def _say_too_big(self, fit: Fit, statement: CheckpointStatement) -> None:
        role, reason = statement.role, fit.shortage(self._node.signed.manifest, statement)
        self._node.output.event(
            "unfit",
            f"{role} is not claimed: {reason}",
            roles=[role],
            room=fit.room,
            device=fit.device,
            step=statement.step,
            variant=statement.variant,
            needs=fit.takes(role, statement.variant),
        )

    def _is_complete(self, observation: Observation) -> bool:
        """Whether all is finished, so that a volunteer may leave for good. Where anybody can take part the
        word of a few keys is not enough: an idle node looks at such checkpoints itself; it has time to."""
        manifest, seen_at = self._node.signed.manifest, clock.monotonic()
        if not observation.finished(manifest.roles):
            self._finished_at = math.inf
            return False
        self._finished_at = min(self._finished_at, seen_at)
        assured = all(observation.newest[role].assured for role in manifest.roles)
        return assured or manifest.restricted or seen_at - self._finished_at >= OWN_LOOK_S

    async def _read(self) -> Observation | None:
        """What the machine asks for of the run as it is now, or None: no answer in time, or it is no longer
        of interest."""
        observation: Observation | None = None
        roles: Sequence[Role] | None = self._machine.reads
        if self._some and self._machine.role is None:
            roles = None  # whether the run is complete is seen by all of them
        try:
            with trio.move_on_after(READ_DEADLINE_S) as self._reading:
                observation = await self._node.observe(roles, self._machine.patience_s)
        except TransportError as error:
            log.warning("reading the run failed, trying again: %s", error)
        if self._reading.cancelled_caught and not self._leaving:
            log.warning("reading the run took longer than %.0f s, trying again", READ_DEADLINE_S)
        return observation if observation is not None and observation.view.claims else None

    def _short_of_disk(self) -> bool:
        """Whether a role would be claimed that the disk cannot hold: a full one fails every role in turn."""
        if self._job is not None or self._machine.role is not None or self._complete:
            return False
        try:
            check_room(self._node.network, self._node.signed.manifest, self._wanted)
        except StoreError as error:
            self._say_paused(str(error))
            return True
        self._say_paused(None)
        return False

    def _say_paused(self, reason: str | None) -> None:
        if self._paused == (reason is not None):
            return
        self._paused = reason is not None
        if reason is None:
            self._node.output.event("continuing", "there is room again: going on")
        else:
            self._node.output.event("paused", f"no role is claimed for now: {reason}", reason=reason)

    async def _perform(self, actions: list[Action], nursery: trio.Nursery) -> None:
        for action in actions:
            if isinstance(action, WriteClaim):
                await self._write(action)
            elif isinstance(action, Start):
                self._start(action, nursery)
            else:
                self._stop(action)

    async def _write(self, write: WriteClaim) -> None:
        network = self._node.network
        scope = role_scope(self._node.signed.run_id, write.role)
        claim = replace(write.claim, access=self._node.access)
        record = sign_record(network.identity, claim, scope, write.expiration_unix)
        started = clock.monotonic()
        try:
            ok = (await network.dht.publish([record], deadline_s=WRITE_DEADLINE_S))[0]
        except TransportError as error:
            log.warning("writing the claim on %s failed: %s", write.role, error)
            ok = False
        self._machine.stored(write, ok, clock.monotonic() - started, now())

    def _start(self, start: Start, nursery: trio.Nursery) -> None:
        """Train `start`. A trainer of it that ran on without a lease goes on under the new one, unless
        somebody trained the role meanwhile; then it ends with a checkpoint first: `_training`."""
        if self._leaving:
            return
        self._standing_by.has_claimed()
        self._renewals.won(clock.monotonic())
        job = self._job
        if job is not None and job.role == start.role and not job.stopping and not self._overtaken(job):
            self._take_back(job, start)
            return
        if job is not None:
            self._node.make_public(start.role)
            job.stop()
        term = term_number(start.term)
        self._node.output.event("claimed", f"{start.role} is ours (term {term})", role=start.role, term=term)
        progress = self._node.progress
        progress.role, progress.term, progress.step = start.role, start.term, 0
        progress.loss = progress.images_per_s = 0.0
        self._job = TrainingJob(
            self._node, start.role, start.term, device=self._device, threads=self._threads, fit=self._fit
        )
        nursery.start_soon(self._work, self._job)

    def _overtaken(self, job: TrainingJob) -> bool:
        """Whether the checkpoint that the run goes by is another node's, of a newer term than `job` has."""
        newest = None if self._view is None else self._view.statements.get(job.role)
        mine = self._node.network.identity.node_id
        return newest is not None and newest.holder != mine and newest.term > job.term

    def _take_back(self, job: TrainingJob, start: Start) -> None:
        """The role is ours again, and nobody had it meanwhile: its trainer loses no step. What it makes from
        now on has the new term; what it made without a lease has its old one, and may be told of now."""
        role, term = start.role, term_number(start.term)
        job.go_on(start.term)
        progress = self._node.progress
        progress.term = start.term
        self._node.make_public(role)
        output = self._node.output
        if not job.ready:
            output.event("claimed", f"{role}: back (term {term})", role=role, term=term)
            return
        output.event("claimed", role=role, term=term)
        text = f"{role}: back, going on from step {progress.step} (term {term})"
        output.event("resumed", text, role=role, term=term, step=progress.step, parent=job.parent.hex())

    def _stop(self, stop: Stop) -> None:
        """The lease of a role is over; what becomes of its trainer is the machine's decision."""
        if stop.trainer is Trainer.RUN_ON:
            text = f"{stop.role}: {stop.reason}; training goes on here, nothing is lost"
            self._node.output.event("adrift", text, role=stop.role, reason=stop.reason)
            self._node.keep_private(stop.role)
            self._say_if_busy()
            return
        self._node.output.event(
            "stopped", f"{stop.role} is given up: {stop.reason}", role=stop.role, reason=stop.reason
        )
        self._node.make_public(stop.role)
        if self._job is not None:
            self._job.stop()  # with a checkpoint, a candidate among others: it has the old term

    def _say_if_busy(self) -> None:
        if not self._renewals.lost(clock.monotonic()):
            return
        ttl_s = self._node.signed.manifest.lease.ttl_s
        text = (
            f"this machine is too busy, or its network too slow, to renew its lease in time ({ttl_s:.0f} s); "
            "end other programs or use --threads 1"
        )
        self._node.output.event("busy", text, ttl_s=ttl_s)

    async def _work(self, job: TrainingJob) -> None:
        async with self._training:
            outcome = await job.run()
        if self._job is not job:
            return  # the next one has begun, of this role or another
        start = Start(job.role, job.term)  # the last lease it trained under
        self._job = None
        self._node.make_public(start.role)
        progress = self._node.progress
        progress.activity, progress.role, progress.term = "seeding", NO_ROLE, Term(0)
        progress.images_per_s = 0.0
        if self._machine.holding == start:
            self._conclude(start, outcome)
        elif self._machine.role == start.role:
            self._conclude_adrift(start, outcome)
        self._wake.set()

    def _conclude_adrift(self, start: Start, outcome: Outcome) -> None:
        """The trainer ended of itself while the network was away."""
        if outcome.kind == "finished":
            term = term_number(start.term)
            text = f"{start.role} is finished; it is announced when the network is back"
            self._node.output.event("finished", text, role=start.role, term=term)
        elif outcome.kind != "stopped":
            log.error("%s: %s", start.role, outcome.reason)
        self._machine.ended_adrift(now(), failed=outcome.kind != "finished")

    def _conclude(self, start: Start, outcome: Outcome) -> None:
        if outcome.kind == "finished":
            self._machine.finished(start.role)
            term = term_number(start.term)
            self._node.output.event("finished", f"{start.role} is finished", role=start.role, term=term)
        elif outcome.kind == "config":
            self._fatal = ConfigError(outcome.reason)
            self._machine.failed(start.role, now())
            self.leave()
        elif outcome.kind == "failed":
            self._node.output.event(
                "failed", f"{start.role} failed: {outcome.reason}", role=start.role, reason=outcome.reason
            )
            self._machine.failed(start.role, now())
        elif not self._leaving:
            log.error("%s: the trainer stopped of itself", start.role)
            self._machine.failed(start.role, now())

    async def _release(self) -> None:
        """Write the tombstones that are still owed, for a bounded time: the lease runs out anyway."""
        self._machine.released()
        actions = self._owed
        with trio.move_on_after(RELEASE_DEADLINE_S):
            while True:
                for action in actions:
                    if isinstance(action, WriteClaim):
                        await self._write(action)
                if self._machine.next_wakeup() == math.inf:
                    return
                await trio.sleep(max(0.0, self._machine.next_wakeup() - clock.monotonic()))
                actions = self._machine.step(None, now())
