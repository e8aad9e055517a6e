"""One role's training on this node: gather shards, find the checkpoint to go on from, run the trainer.

Owns: the conversation with the trainer child, and turning its checkpoints into content items and signed
statements. Does not own: whether this node may hold the role (`volunteer`, by the lease machine).
"""

import logging
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio

from paris_node.fitting import Fit
from paris_node.going_on import order_to_try
from paris_node.judging import Candidate
from paris_node.run_node import RunNode
from paris_p2p import clock
from paris_p2p.core.accept import Standing
from paris_p2p.core.yielding import UploadYield
from paris_p2p.errors import ParisError, RemoteProtocolError, StoreError, TransportError, WorkerError
from paris_p2p.ids import Role, Term
from paris_p2p.wire.checkpoint import CheckpointStatement, sign_statement
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
RESUME_STALL_S = 30.0
RESUME_DEADLINE_S = 600.0
RESUME_BYTES_PER_S = 256 << 10
"""A credible checkpoint's bundle may take so long, and besides what its bytes take at this rate."""
UNBACKED_STALL_S = 15.0
"""For checkpoints that are only their signers' word: nobody need serve them ..."""
UNBACKED_DEADLINE_S = 60.0
UNBACKED_BYTES_PER_S = 4 << 20
"""... or serve them faster than piece by piece: each item has 60 s and its bytes at this rate, twice that in
the next round, ..."""
UNBACKED_TOTAL_S = 900.0
"""... and all of them together no more than this of the time for which a job keeps its role from others."""
MAX_ROLLBACKS = 3
"""How often a job goes back to the newest checkpoint and takes another path because a loss was not finite."""
MAX_KILLED = 2
"""How often a job starts its trainer again because something killed it, before the role is given up: the next
one would do no better where memory is short."""
RESUME_ROUNDS = 3
"""How often the announced checkpoints are tried before a role starts afresh because none can be reached."""


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
    """Trains (`role`, `term`) until the recipe's last step, or until `stop` is called. `fit`: what `device`
    has the memory for, if that matters in this run."""

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
        self._role = role
        self._term = term
        self._device = device
        self._threads = threads
        self._fit = fit
        self._stopping = trio.Event()
        self._parent = b""
        self._variant: int | None = 0  # None: the trainer takes the first that fits its memory
        self._attempt = 0  # grows with every rollback: other noise from there on
        self._killed = 0
        self._rolled_back = ""  # why, until the trainer that goes on from there is ready
        self._initial: list[str | None] = []
        self._unbacked_s = UNBACKED_TOTAL_S  # left
        self._refused: set[bytes] = set()  # signed statements whose bundle the trainer did not take
        self._doubted: set[bytes] = set()  # those whose bundle led to a loss that was not finite
        self._uploads = UploadYield()
        self._fetched: ContentRef | None = None  # the parent's bundle, until the first checkpoint of our own

    def stop(self) -> None:
        """Ask the trainer for a last checkpoint; `run` then returns `stopped`."""
        self._stopping.set()

    async def run(self) -> Outcome:
        """Train to the end. Never raises for what a peer or the trainer did: that is an `Outcome`."""
        try:
            self._node.progress.activity = "fetching"
            shards = await self._unless_stopped(self._gather_shards)
            if shards is None:
                return Outcome("stopped")
            return await self._train_to_the_end(shards)
        except ParisError as error:
            return Outcome("failed", str(error))
        except BaseExceptionGroup as group:  # two fetches, or trainer and link, failed in one moment
            _, rest = group.split(ParisError)
            if rest is not None:
                raise rest from None
            return Outcome("failed", "; ".join(str(error) for error in group.exceptions))

    async def _unless_stopped(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """What `work` returns; `None` when asked to stop before it is done."""
        result: T | None = None
        async with open_inner_nursery() as nursery:

            async def watch() -> None:
                await self._stopping.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            result = await work()
            nursery.cancel_scope.cancel()
        return result

    async def _gather_shards(self) -> list[dict[str, Any]]:
        manifest = self._node.signed.manifest
        initial = manifest.initial(self._role)
        refs = {*manifest.shards(self._role), *(ref for ref in initial if ref is not None)}
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
            log.warning("%s: %s; going back to the newest checkpoint", self._role, self._rolled_back)

    async def _train_from_newest(self, shards: list[dict[str, Any]]) -> Outcome:
        """Train from the newest checkpoint that can be had and that the trainer accepts, else afresh.

        Afresh only when there is none, or none that can be used: the others follow the newer term, so one
        replica's short absence must not throw a role's whole work away.
        """
        for attempt in range(RESUME_ROUNDS):
            if attempt:
                await self._unless_stopped(partial(trio.sleep, self._node.signed.manifest.lease.poll_s))
            outcome, unreachable = await self._try_candidates(shards, attempt)
            if outcome is not None:
                return outcome
            if not unreachable:
                break
        return await self._train(shards, None, None)

    async def _try_candidates(
        self, shards: list[dict[str, Any]], attempt: int
    ) -> tuple[Outcome | None, bool]:
        """The outcome of training from the first checkpoint that works, if one does; whether one could not
        be reached."""
        unreachable = False
        found = order_to_try(await self._find_candidates())
        usable = [c for c in found if c.data not in self._refused and c.standing is not Standing.REFUTED]
        for place, candidate in enumerate(usable, 1):
            try:
                end = self._end_at(candidate.statement)
                if end is not None:
                    await self._look_at(candidate, attempt)
                    return Outcome("stopped") if self._stopping.is_set() else end, False
                with self._node.in_use.using(candidate.statement.resume.info_hash):
                    folder = await self._fetch_resume(candidate, attempt)
                    if folder is None:
                        return Outcome("stopped"), False
                    return await self._train(shards, candidate.statement, folder), False
            except (TransportError, RemoteProtocolError, _BadResume) as error:
                step = candidate.statement.step
                log.warning("%s: step %d cannot be gone on from: %s", self._role, step, error)
                if isinstance(error, TransportError):
                    unreachable = True
                else:
                    self._refused.add(candidate.data)
            except _NotFinite as error:
                if not self._blames(candidate, usable[place:]):
                    raise
                log.warning(
                    "%s: step %d is not gone on from: %s", self._role, candidate.statement.step, error
                )
                self._refused.add(candidate.data)
        return None, unreachable

    def _blames(self, candidate: Candidate, others: Sequence[Candidate]) -> bool:
        """Whether a loss that was not finite is the bundle's fault: a stranger's, and nothing of our own came
        of it. Where nothing as credible is left it is tried once more: it may be honest, and all there is."""
        if self._fetched is None or candidate.statement.holder == self._node.network.identity.node_id:
            return False
        again = candidate.data in self._doubted
        self._doubted.add(candidate.data)
        return again or any(one.credible or not candidate.credible for one in others)

    async def _fetch_resume(self, candidate: Candidate, attempt: int) -> Path | None:
        """The bundle's files, or None when asked to stop. Only what is credible goes before other fetches,
        and may take its time. Raises `TransportError`."""
        ref, swarm = candidate.statement.resume, self._node.network.swarm
        if candidate.credible:
            deadline_s, stall_s = RESUME_DEADLINE_S + ref.length / RESUME_BYTES_PER_S, RESUME_STALL_S
        else:
            deadline_s, stall_s = self._unbacked_deadline_s(ref, attempt), UNBACKED_STALL_S
        started = clock.monotonic()
        priority = int(candidate.credible)
        try:
            with trio.move_on_after(deadline_s):
                fetch = partial(swarm.fetch, ref, stall_timeout_s=stall_s, priority=priority)
                return await self._unless_stopped(fetch)
        finally:
            if not candidate.credible:
                self._unbacked_s -= clock.monotonic() - started
        raise TransportError(f"its bundle of {ref.length} bytes did not come within {deadline_s:.0f} s")

    def _unbacked_deadline_s(self, ref: ContentRef, attempt: int) -> float:
        patience_s = (UNBACKED_DEADLINE_S + ref.length / UNBACKED_BYTES_PER_S) * 2.0**attempt
        return max(0.0, min(patience_s, self._unbacked_s))

    async def _find_candidates(self) -> list[Candidate]:
        """What is announced of the role, and what is held here whether it is announced or not: work that was
        done while the network was away. Raises `TransportError`, but not for a rollback to what is here."""
        announced: Sequence[Candidate] = ()
        held = [(data, one) for data, one in self._node.ledger.held() if one.role == self._role]
        try:
            announced = (await self._node.observe(whole=True)).candidates[self._role]
        except TransportError:
            if not (held and self._rolled_back):
                raise
        shown = {candidate.data for candidate in announced}
        me, access = frozenset({self._node.network.identity.node_id}), self._node.ledger.access
        own = [
            Candidate(statement, data, me, access(data), Standing.CHECKED)
            for data, statement in held
            if data not in shown
        ]
        return [*announced, *own]

    def _end_at(self, statement: CheckpointStatement) -> Outcome | None:
        """How a job ends whose role this checkpoint is to be kept of: it is the last one, or of a kind that
        this machine cannot train; to begin afresh under a newer term would throw the work away."""
        if statement.finished:
            return Outcome("finished")
        if self._fit is not None and self._fit.too_big(statement):
            return Outcome("failed", self._fit.shortage(self._node.signed.manifest, statement))
        return None

    async def _look_at(self, candidate: Candidate, attempt: int) -> None:
        """Strangers' word, however many keys it has, is not enough to leave a role untrained: look at the
        weights. Raises `TransportError` or `RemoteProtocolError` when they are not known to be good."""
        if candidate.assured or (candidate.credible and not candidate.statement.finished):
            return
        deadline_s = self._unbacked_deadline_s(candidate.statement.weights, attempt)
        look = partial(self._node.fetch_weights, candidate, measure=True, stall_s=UNBACKED_STALL_S)
        started = clock.monotonic()
        try:
            await self._unless_stopped(partial(look, deadline_s=deadline_s))
        finally:
            self._unbacked_s -= clock.monotonic() - started

    async def _train(
        self, shards: list[dict[str, Any]], parent: CheckpointStatement | None, resume: Path | None
    ) -> Outcome:
        self._parent = parent.resume.info_hash if parent else b""
        allowed = self._node.signed.manifest.variants(self._role)
        self._variant = parent.variant if parent else (None if len(allowed) > 1 else allowed[0])
        self._fetched = parent.resume if parent else None
        outcome = Outcome("stopped")
        self._uploads = UploadYield()
        async with self._scratch_folder() as out, open_worker(TRAINER_MODULE) as worker:
            await worker.send(self._start_message(shards, parent, resume, out))
            async with open_inner_nursery() as nursery:
                nursery.start_soon(self._pass_stop_on, worker, nursery.cancel_scope)
                try:
                    outcome = await self._converse(worker, parent)
                finally:
                    self._node.network.swarm.yield_uploads(False)
                nursery.cancel_scope.cancel()
        return outcome

    @asynccontextmanager
    async def _scratch_folder(self) -> AsyncIterator[Path]:
        """The trainer's folder, empty; removed afterwards."""
        home, run_id = self._node.network.home, self._node.signed.run_id
        await _remove(home.work(run_id, self._role))
        folder = home.work(run_id, self._role)
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
            "role": self._role,
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
        try:
            await worker.send({"type": "stop"})
        except WorkerError:
            return  # it has ended: the conversation hears why
        await trio.sleep(STOP_GRACE_S)
        log.warning("%s: the trainer did not stop within %.0f s and is ended", self._role, STOP_GRACE_S)
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
            await self._on_checkpoint(message)
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
        progress = self._node.progress
        progress.activity, progress.step = "training", int(message["step"])
        progress.total_steps = int(message["total_steps"])
        self._variant = int(message.get("variant", self._variant or 0))
        self._fit = None  # what is ready does fit: memory may have been freed since this was found out
        if self._rolled_back:
            reason, self._rolled_back = self._rolled_back, ""
            text = f"{self._role}: {reason}; going on from step {message['step']}"
            step = int(message["step"])
            self._node.output.event("rolled_back", text, role=self._role, step=step, reason=reason)
        if parent is not None:
            self._node.output.event(
                "resumed",
                f"{self._role}: going on from step {message['step']} (term {term_number(self._term)})",
                role=self._role,
                term=term_number(self._term),
                step=message["step"],
                parent=parent.resume.info_hash.hex(),
            )

    def _on_step(self, message: dict[str, Any]) -> None:
        progress, swarm = self._node.progress, self._node.network.swarm
        progress.step, progress.loss = int(message["step"]), float(message["loss"])
        progress.images_per_s = float(message["images_per_s"])
        if self._node.lacks_copies(self._role):  # what only this node has is worth more than its speed
            swarm.yield_uploads(False)
        else:
            up = swarm.rates().up_bytes_per_s
            swarm.yield_uploads(self._uploads.report(progress.images_per_s, up, clock.monotonic()))
        self._node.output.event(
            "step",
            role=self._role,
            step=progress.step,
            total_steps=progress.total_steps,
            loss=progress.loss,
            images_per_s=progress.images_per_s,
        )

    async def _on_checkpoint(self, message: dict[str, Any]) -> None:
        store = self._node.network.store
        with self._node.in_use.using() as use:  # until it is noted, nothing else keeps it from the quota
            add = partial(store.add, mode="move", foresee=use)
            weights = await trio.to_thread.run_sync(partial(add, Path(message["weights"])))
            resume = await trio.to_thread.run_sync(partial(add, Path(message["resume"])))
            statement = self._statement(message, weights, resume)
            self._parent = resume.info_hash
            signed = sign_statement(statement, self._node.network.identity)
            await self._node.hold(signed, statement, loss=statement.heldout_loss, access=self._node.access)
        await self._drop_parent()
        self._node.output.event(
            "checkpoint",
            f"{self._role}: checkpoint at step {statement.step}/{statement.total_steps}, "
            f"held-out loss {statement.heldout_loss:.4f}",
            role=self._role,
            term=term_number(self._term),
            step=statement.step,
            content_id=weights.info_hash.hex(),
            heldout_loss=statement.heldout_loss,
        )

    async def _drop_parent(self) -> None:
        """The bundle we went on from has served: four times the weights, needed only by who announces it."""
        ref, self._fetched = self._fetched, None
        named = {statement.resume for _, statement in self._node.ledger.held()}
        if ref is not None and ref not in named:
            try:
                await trio.to_thread.run_sync(self._node.network.store.remove, ref.info_hash)
            except StoreError as error:
                log.warning("the bundle %s was resumed from stays: %s", self._role, error)

    def _statement(
        self, message: dict[str, Any], weights: ContentRef, resume: ContentRef
    ) -> CheckpointStatement:
        signed, variant = self._node.signed, self._variant or 0
        return CheckpointStatement(
            run_id=signed.run_id,
            role=self._role,
            term=self._term,
            holder=self._node.network.identity.node_id,
            step=int(message["step"]),
            total_steps=signed.manifest.training(self._role, variant).steps,
            variant=variant,
            weights=weights,
            resume=resume,
            parent=self._parent,
            heldout_loss=float(message["heldout_loss"]),
            created_unix=clock.unix(),
        )


async def _remove(folder: Path) -> None:
    await trio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))
