"""One role's training on this node: gather shards, find the checkpoint to go on from, run the trainer.

Owns: the conversation with the trainer child, and in which order what it needs is fetched. Does not own:
whether this node may hold the role (`volunteer`, by the lease machine), keeping its checkpoints (`saving`).
"""

import logging
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio

from paris_node.fitting import Fit
from paris_node.going_on import MAX_ROUNDS, RESUME_ROUNDS, Parents, unless
from paris_node.judging import Candidate
from paris_node.progress import StepReports
from paris_node.run_node import RunNode
from paris_node.saving import Saving
from paris_p2p import clock
from paris_p2p.core.yielding import UploadYield
from paris_p2p.errors import ParisError, RemoteProtocolError, TransportError, WorkerError
from paris_p2p.ids import Role, Term
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.terms import term_number
from paris_p2p.workers.nursery import open_inner_nursery
from paris_p2p.workers.spawn import Worker, WorkerDied, open_worker

T = TypeVar("T")
log = logging.getLogger(__name__)

TRAINER_MODULE = "paris_p2p.diffusion.train_worker"
READY_DEADLINE_S = 300.0
SILENCE_DEADLINE_S = 900.0
STOP_GRACE_S = 60.0
SHARD_STALL_S = 120.0
MAX_ROLLBACKS = 3
"""How often a job goes back to the newest checkpoint and takes another path because a loss was not finite."""
MAX_KILLED = 2
"""How often a job starts its trainer again because something killed it, before the role is given up: the next
one would do no better where memory is short."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: `finished`, `stopped` (asked to), `failed`, or `config` (this node's options are
    wrong: no other role will do better) with the reason."""

    kind: str
    reason: str = ""


class _BadResume(ParisError):
    """The trainer refused the resume bundle it was given."""


class _NotFinite(ParisError):
    """A loss was not a number, or infinite: the trainer has ended."""


class TrainingJob:
    """Trains `role` under `term` until the recipe's last step, or until `stop` is called. `fit`: what
    `device` has the memory for, if that matters in this run."""

    def __init__(
        self,
        node: RunNode,
        role: Role,
        term: Term,
        *,
        device: str,
        threads: int | None,
        fit: Fit | None = None,
    ) -> None:
        self._node = node
        self.role = role
        self.term = term
        self.ready = False
        """Whether a trainer has something that ending it would lose."""
        self._device = device
        self._threads = threads
        self._fit = fit
        self._stopping = trio.Event()
        self._saving = Saving(node, role, term)
        self._variant: int | None = 0  # None: the trainer takes the first that fits its memory
        self._attempt = 0  # grows with every rollback: other noise from there on
        self._killed = 0
        self._rolled_back = ""  # why, until the trainer that goes on from there is ready
        self._initial: list[str | None] = []
        self._parents = Parents(node, role, self._stopping)
        self._doubted: set[bytes] = set()  # those whose bundle led to a loss that was not finite
        self._uploads = UploadYield()
        self._early = trio.CancelScope()  # what is fetched of a checkpoint while shards are
        self._reports: StepReports | None = None

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopping.is_set()

    @property
    def parent(self) -> bytes:
        """The item that the next checkpoint follows on; b"" without one."""
        return self._saving.parent

    def go_on(self, term: Term) -> None:
        """The role was lost to nobody and is held under `term` now: key by it what comes from here on."""
        self.term = self._saving.term = term

    def stop(self) -> None:
        """Ask the trainer for a last checkpoint; `run` then returns `stopped`."""
        self._stopping.set()

    async def run(self) -> Outcome:
        """Train to the end. Never raises for what a peer or the trainer did: that is an `Outcome`."""
        try:
            self._node.progress.activity = "fetching"
            self._early = trio.CancelScope()
            async with open_inner_nursery() as nursery:
                nursery.start_soon(self._fetch_early)
                outcome = await self._gather_and_train()
                nursery.cancel_scope.cancel()
            return outcome
        except ParisError as error:
            return Outcome("failed", str(error))
        except BaseExceptionGroup as group:  # two fetches, or trainer and link, failed in one moment
            _, rest = group.split(ParisError)
            if rest is not None:
                raise rest from None
            return Outcome("failed", "; ".join(str(error) for error in group.exceptions))

    async def _gather_and_train(self) -> Outcome:
        shards = await unless(self._stopping, self._gather_shards)
        return Outcome("stopped") if shards is None else await self._train_to_the_end(shards)

    async def _fetch_early(self) -> None:
        """While shards are missing fetch the bundle that training will go on from, before them: its peers may
        be about to leave, the shards' are not, and training begins when the later of both is here.

        What fails here is tried again when the shards have come, and counts then."""
        if all(self._node.network.store.has(ref.info_hash) for ref in self._needed()):
            return
        try:
            with self._early:
                found = self._parents.order(await self._parents.find())
                good = (one for one in found if one.credible and self._end_at(one.statement) is None)
                first = next(good, None)
                if first is not None:
                    with self._node.in_use.using(first.statement.resume.info_hash):
                        await self._parents.fetch(first, 0)
                        await trio.sleep_forever()  # until it is used: the quota must not have it
        except ParisError as error:
            log.info("%s: no bundle beside the shards: %s", self.role, error)

    def _needed(self) -> set[ContentRef]:
        """The items that training begins with."""
        manifest = self._node.signed.manifest
        initial = (ref for ref in manifest.initial(self.role) if ref is not None)
        return {*manifest.shards(self.role), *initial}

    async def _gather_shards(self) -> list[dict[str, Any]]:
        manifest, refs = self._node.signed.manifest, self._needed()
        initial = manifest.initial(self.role)
        paths: dict[ContentRef, Path] = {}

        async def gather(ref: ContentRef) -> None:
            paths[ref] = await self._node.network.swarm.fetch(ref, stall_timeout_s=SHARD_STALL_S)

        async with open_inner_nursery() as nursery:
            for ref in refs:
                nursery.start_soon(gather, ref)
        self._node.announcer.provide(ref.info_hash for ref in refs)
        self._initial = [str(paths[ref]) if ref is not None else None for ref in initial]
        return [
            {"cluster": c.index, "train": str(paths[c.train]), "heldout": str(paths[c.heldout])}
            for c in manifest.clusters
            if c.train in paths
        ]

    async def _train_to_the_end(self, shards: list[dict[str, Any]]) -> Outcome:
        """As `_train_from_newest`, and from there again, a few times, when a loss was not finite or somebody
        killed the trainer: the lease is good, and nobody has more of the role than this node."""
        while True:
            try:
                return await self._train_from_newest(shards)
            except _NotFinite as error:
                if self._attempt == MAX_ROLLBACKS:
                    return Outcome("failed", f"{error}, after {MAX_ROLLBACKS} rollbacks")
                self._attempt += 1
                self._rolled_back = str(error)
            except WorkerDied as error:
                if error.status >= 0 or self._killed == MAX_KILLED or self._stopping.is_set():
                    raise
                self._killed += 1
                self._rolled_back = error.summary
            log.warning("%s: %s; going back to the newest checkpoint", self.role, self._rolled_back)

    async def _train_from_newest(self, shards: list[dict[str, Any]]) -> Outcome:
        """Train from the newest checkpoint that can be had and that the trainer accepts, else afresh.

        Afresh only when there is none, or none that can be used: the others follow the newer term, so one
        replica's short absence must not throw a role's whole work away.
        """
        self._parents.unreached.clear()
        for attempt in range(MAX_ROUNDS):
            found = await self._parents.find(here_will_do=bool(self._rolled_back))
            new = self._parents.any_new(found)
            if not found or (attempt >= RESUME_ROUNDS and not new):
                break
            if attempt and not new:
                await unless(self._stopping, partial(trio.sleep, self._node.signed.manifest.lease.poll_s))
            outcome = await self._try_candidates(shards, found, min(attempt, RESUME_ROUNDS - 1))
            if outcome is not None:
                return outcome
        return await self._train(shards, None, None)

    async def _try_candidates(
        self, shards: list[dict[str, Any]], found: Sequence[Candidate], attempt: int
    ) -> Outcome | None:
        """The outcome of training from the first checkpoint of `found` that works, if one does."""
        ordered = self._parents.order(found)
        for place, candidate in enumerate(ordered, 1):
            try:
                end = self._end_at(candidate.statement)
                if end is not None:
                    await self._parents.look_at(candidate, attempt)
                    if self._stopping.is_set():
                        return Outcome("stopped")
                    if candidate.statement.finished or self._parents.is_weighed(candidate):
                        return end
                    log.warning(
                        "%s: nobody measured step %d: %s", self.role, candidate.statement.step, end.reason
                    )
                    self._parents.refused.add(candidate.data)
                    continue
                with self._node.in_use.using(candidate.statement.resume.info_hash):
                    folder = await self._parents.fetch(candidate, attempt)
                    if folder is None:
                        return Outcome("stopped")
                    return await self._train(shards, candidate.statement, folder)
            except (TransportError, RemoteProtocolError, _BadResume) as error:
                step = candidate.statement.step
                log.warning("%s: step %d cannot be gone on from: %s", self.role, step, error)
                if isinstance(error, TransportError):
                    self._parents.unreached.add(candidate.data)
                else:
                    await self._parents.refuse(candidate, useless=isinstance(error, _BadResume))
            except _NotFinite as error:
                if not self._blames(candidate, ordered[place:]):
                    raise
                log.warning("%s: step %d is not gone on from: %s", self.role, candidate.statement.step, error)
                self._parents.refused.add(candidate.data)
        return None

    def _blames(self, candidate: Candidate, others: Sequence[Candidate]) -> bool:
        """Whether a loss that was not finite is the bundle's fault: a stranger's, and nothing of our own came
        of it. Where nothing as credible is left it is tried once more: it may be honest, and all there is."""
        if self._saving.fetched is None or candidate.statement.holder == self._node.network.identity.node_id:
            return False
        again = candidate.data in self._doubted
        self._doubted.add(candidate.data)
        return again or any(one.credible or not candidate.credible for one in others)

    def _end_at(self, statement: CheckpointStatement) -> Outcome | None:
        """How a job ends whose role this checkpoint is to be kept of: it is the last one, or of a kind that
        this machine cannot train; to begin afresh under a newer term would throw the work away."""
        if statement.finished:
            return Outcome("finished")
        if self._fit is not None and self._fit.too_big(statement):
            return Outcome("failed", self._fit.shortage(self._node.signed.manifest, statement))
        return None

    async def _train(
        self, shards: list[dict[str, Any]], parent: CheckpointStatement | None, resume: Path | None
    ) -> Outcome:
        self._early.cancel()
        saving = self._saving
        saving.parent, saving.fetched = (parent.resume.info_hash, parent.resume) if parent else (b"", None)
        allowed = self._node.signed.manifest.variants(self.role)
        self._variant = parent.variant if parent else (None if len(allowed) > 1 else allowed[0])
        outcome = Outcome("stopped")
        self._uploads, self.ready = UploadYield(), False
        async with self._scratch_folder() as out, open_worker(TRAINER_MODULE) as worker:
            await worker.send(self._start_message(shards, parent, resume, out))
            async with open_inner_nursery() as nursery:
                nursery.start_soon(self._pass_stop_on, worker, nursery.cancel_scope)
                nursery.start_soon(saving.try_again)
                try:
                    outcome = await self._converse(worker, parent)
                    if outcome.kind == "finished":
                        await saving.settle(self._stopping)
                    await saving.try_now()
                finally:
                    self._node.network.swarm.yield_uploads(False)
                    saving.close()
                nursery.cancel_scope.cancel()
        return outcome

    @asynccontextmanager
    async def _scratch_folder(self) -> AsyncIterator[Path]:
        """The trainer's folder, empty; removed afterwards."""
        home, run_id = self._node.network.home, self._node.signed.run_id
        await _remove(home.work(run_id, self.role))
        folder = home.work(run_id, self.role)
        try:
            yield folder
        finally:
            with trio.CancelScope(shield=True):  # our own disk: it takes no longer than it takes
                await _remove(folder)

    def _start_message(
        self,
        shards: list[dict[str, Any]],
        parent: CheckpointStatement | None,
        resume: Path | None,
        out: Path,
    ) -> dict[str, Any]:
        home, run_id = self._node.network.home, self._node.signed.run_id
        return {
            "type": "start",
            "manifest": str(home.run_folder(run_id) / "manifest.paris"),
            "role": self.role,
            "variant": self._variant,
            "device": self._device,
            "shards": shards,
            "initial": self._initial,
            "resume": str(resume) if resume else None,
            "resume_step": parent.step if parent else 0,
            "resume_loss": parent.heldout_loss if parent else None,
            "out": str(out),
            "threads": self._threads or max(1, (os.cpu_count() or 2) // 2),
            "attempt": self._attempt,
        }

    async def _pass_stop_on(self, worker: Worker, conversation: trio.CancelScope) -> None:
        await self._stopping.wait()
        if not self.ready:  # nothing is lost, and it does not listen while it loads
            conversation.cancel()
            return
        try:
            await worker.send({"type": "stop"})
        except WorkerError:
            return  # it has ended: the conversation hears why
        await trio.sleep(STOP_GRACE_S)
        log.warning("%s: the trainer did not stop within %.0f s and is ended", self.role, STOP_GRACE_S)
        conversation.cancel()

    async def _converse(self, worker: Worker, parent: CheckpointStatement | None) -> Outcome:
        deadline_s = READY_DEADLINE_S
        while True:
            with trio.move_on_after(deadline_s) as scope:
                message = await worker.receive()
            if scope.cancelled_caught:
                return Outcome("failed", f"the trainer said nothing for {deadline_s:.0f} s")
            deadline_s = SILENCE_DEADLINE_S
            outcome = await self._handle(message, parent)
            if outcome is not None:
                return outcome

    async def _handle(self, message: dict[str, Any], parent: CheckpointStatement | None) -> Outcome | None:
        kind = message.get("type")
        if kind == "ready":
            self._on_ready(message, parent)
        elif kind == "step":
            self._on_step(message)
        elif kind == "checkpoint":
            await self._saving.take(message)
        elif kind == "unsaved":
            self._saving.refused(int(message["step"]), str(message["message"]))
        elif kind in ("finished", "stopped"):
            return Outcome(kind)
        elif kind == "error":
            if message.get("kind") == "bad_resume":
                raise _BadResume(str(message.get("message")))
            if message.get("kind") == "nan":
                raise _NotFinite(str(message.get("message")))
            if message.get("kind") == "config":
                return Outcome("config", str(message.get("message")))
            return Outcome("failed", str(message.get("message")))
        return None

    def _on_ready(self, message: dict[str, Any], parent: CheckpointStatement | None) -> None:
        progress, self.ready = self._node.progress, True
        progress.activity, progress.step = "training", int(message["step"])
        progress.total_steps = int(message["total_steps"])
        self._variant = self._saving.variant = int(message.get("variant", self._variant or 0))
        training = self._node.signed.manifest.training(self.role, self._variant)
        self._reports = self._reports or StepReports(training.batch_size, clock.monotonic())
        self._fit = None  # what is ready does fit: memory may have been freed since this was found out
        if self._rolled_back:
            reason, self._rolled_back = self._rolled_back, ""
            text = f"{self.role}: {reason}; going on from step {message['step']}"
            step = int(message["step"])
            self._node.output.event("rolled_back", text, role=self.role, step=step, reason=reason)
        if parent is not None:
            self._node.output.event(
                "resumed",
                f"{self.role}: going on from step {message['step']} (term {term_number(self.term)})",
                role=self.role,
                term=term_number(self.term),
                step=message["step"],
                parent=parent.resume.info_hash.hex(),
            )

    def _on_step(self, message: dict[str, Any]) -> None:
        progress, swarm = self._node.progress, self._node.network.swarm
        progress.step, progress.loss = int(message["step"]), float(message["loss"])
        progress.images_per_s = float(message["images_per_s"])
        if self._node.lacks_copies(self.role):  # what only this node has is worth more than its speed
            swarm.yield_uploads(False)
        else:
            up, now = swarm.rates().up_bytes_per_s, clock.monotonic()
            waited = float(message["waited_s"]) / max(float(message["seconds"]), 1e-6)
            swarm.yield_uploads(self._uploads.report(progress.images_per_s, up, now, waited))
        self._node.output.event(
            "step",
            None if self._reports is None else self._reports.text(progress, clock.monotonic()),
            role=self.role,
            step=progress.step,
            total_steps=progress.total_steps,
            loss=progress.loss,
            images_per_s=progress.images_per_s,
        )


async def _remove(folder: Path) -> None:
    await trio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))
