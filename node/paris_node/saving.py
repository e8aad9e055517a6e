"""What a role's trainer makes, kept: its checkpoints as content items, signed, noted and told of.

Owns: the statements, one lineage of checkpoints, trying again while the disk refuses, and for how long.
Does not own: the conversation with the trainer (`training_job`), which checkpoints stay (`ledger`).
"""

import logging
import math
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from paris_node.run_node import RunNode
from paris_p2p import clock
from paris_p2p.errors import StoreError
from paris_p2p.ids import Role, Term
from paris_p2p.wire.checkpoint import CheckpointStatement, sign_statement
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.terms import term_number

log = logging.getLogger(__name__)

SAVE_AGAIN_S = 20.0
"""How often a checkpoint that the disk refused is tried again, unless the trainer brings a newer one."""
REFUSED_S = 1800.0
"""How long a role is trained on while nothing of it can be kept: with the node would go all of that work, and
another one, with room, would begin at the last checkpoint."""
LAST_POLL_S = 1.0
RISEN = 1.1
"""A held-out loss so many times the least one is no noise."""
DISK_FULL = "disk full"
"""The activity of a node that trains and cannot keep what it makes."""


@dataclass(slots=True)
class _Owed:
    """A checkpoint of the trainer's that is not kept yet, and what is done of it already."""

    message: dict[str, Any]
    items: dict[str, ContentRef] = field(default_factory=dict)  # by name in the message
    pins: ExitStack = field(default_factory=ExitStack)


class Saving:
    """The checkpoints of one role in one term. `variant`: of the network that is trained; `parent`: the item
    the next checkpoint follows on."""

    def __init__(self, node: RunNode, role: Role, term: Term) -> None:
        self._node = node
        self._role = role
        self.term = term
        self.variant = 0
        self.parent = b""
        self.fetched: ContentRef | None = None  # the parent's bundle, until the first checkpoint of our own
        self._owed: _Owed | None = None
        self._least = (0, math.inf)  # step and held-out loss of the best checkpoint
        self._risen = False
        self._busy = trio.Lock()
        self._refused_since: float | None = None  # monotonic

    async def take(self, message: dict[str, Any]) -> None:
        """The trainer's next checkpoint: keep it now, or as soon as the disk takes it. One that is still owed
        makes way. Raises `StoreError` when nothing could be kept for too long."""
        async with self._busy:
            older = self._let_go()
            if older is not None:  # its folders take the room that the new one needs
                await trio.to_thread.run_sync(_remove, older.message)
            self._owed = _Owed(message)
            await self._try(self._owed)

    def refused(self, step: int, reason: str) -> None:
        """The checkpoint of `step` has no room. Said once. Raises `StoreError` when that has been so for too
        long."""
        now = clock.monotonic()
        self._node.progress.activity = DISK_FULL
        if self._refused_since is None:
            self._refused_since = now
            text = f"{self._role}: the checkpoint at step {step} is not kept: {reason}. Training goes on"
            self._node.output.event("unsaved", text, role=self._role, step=step, reason=reason)
        log.warning("%s: the checkpoint at step %d is not kept: %s", self._role, step, reason)
        if now - self._refused_since >= REFUSED_S:
            raise StoreError(f"no checkpoint could be kept for {REFUSED_S / 60:.0f} minutes: {reason}")

    async def try_again(self) -> None:
        """Keep what is owed when that is possible, for ever. Raises as `take`."""
        while True:
            await trio.sleep(SAVE_AGAIN_S)
            await self.try_now()

    async def settle(self, stopping: trio.Event) -> None:
        """The role is trained to its end: wait until nothing is owed (`try_again` runs meanwhile), or for
        `stopping`. Raises as `take`."""
        while self._owed is not None and not stopping.is_set():
            with trio.move_on_after(LAST_POLL_S):
                await stopping.wait()

    async def try_now(self) -> None:
        """Keep what is owed now, if it can be. Raises as `take`."""
        async with self._busy:
            if self._owed is not None:
                await self._try(self._owed)

    def close(self) -> None:
        """Let go of what is still owed: the work since the last checkpoint that was kept is lost."""
        owed = self._let_go()
        if owed is not None:
            log.error("%s: the checkpoint at step %s was never kept", self._role, owed.message["step"])

    def _let_go(self) -> _Owed | None:
        owed, self._owed = self._owed, None
        if owed is not None:
            owed.pins.close()
            for ref in owed.items.values():  # half of a checkpoint
                self._node.in_use.unwanted(ref.info_hash)
        return owed

    async def _try(self, owed: _Owed) -> None:
        try:
            await self._keep(owed)
        except StoreError as error:
            self.refused(int(owed.message["step"]), str(error))
            return
        owed.pins.close()
        self._owed = None
        if self._refused_since is not None:
            self._refused_since = None
            self._node.progress.activity = "training"

    async def _keep(self, owed: _Owed) -> None:
        # Until they are noted, nothing else keeps them from the quota.
        use = owed.pins.enter_context(self._node.in_use.using())
        for name in ("weights", "resume"):
            if name not in owed.items:
                add = partial(self._node.network.store.add, mode="move", foresee=use)
                owed.items[name] = await trio.to_thread.run_sync(partial(add, Path(owed.message[name])))
        statement = self._statement(owed.message, owed.items["weights"], owed.items["resume"])
        signed = sign_statement(statement, self._node.network.identity)
        await self._node.hold(signed, statement, loss=statement.heldout_loss, access=self._node.access)
        self.parent = statement.resume.info_hash
        await self._drop_parent()
        self._say(statement)

    def _say(self, statement: CheckpointStatement) -> None:
        self._node.output.event(
            "checkpoint",
            f"{self._role}: checkpoint at step {statement.step}/{statement.total_steps}, "
            f"held-out loss {statement.heldout_loss:.4f}",
            role=self._role,
            term=term_number(self.term),
            step=statement.step,
            content_id=statement.weights.info_hash.hex(),
            heldout_loss=statement.heldout_loss,
        )
        self._say_if_risen(statement)

    def _say_if_risen(self, statement: CheckpointStatement) -> None:
        """Training goes on and its last checkpoint counts, even if an earlier one was better: said once."""
        step, least = self._least
        loss = statement.heldout_loss
        if loss < least:
            self._least, self._risen = (statement.step, loss), False
        elif loss > RISEN * least and not self._risen:
            self._risen = True
            text = f"{self._role}: the held-out loss has risen since step {step} ({least:.3f} to {loss:.3f})"
            self._node.output.event("risen", text, role=self._role, since_step=step, least=least, now=loss)

    async def _drop_parent(self) -> None:
        """The bundle we went on from has served: four times the weights, needed only by who announces it."""
        ref, self.fetched = self.fetched, None
        named = {statement.resume for _, statement in self._node.ledger.held()}
        if ref is not None and ref not in named:
            try:
                await trio.to_thread.run_sync(self._node.network.store.remove, ref.info_hash)
            except StoreError as error:
                log.warning("the bundle %s was resumed from stays: %s", self._role, error)

    def _statement(
        self, message: dict[str, Any], weights: ContentRef, resume: ContentRef
    ) -> CheckpointStatement:
        signed = self._node.signed
        return CheckpointStatement(
            run_id=signed.run_id,
            role=self._role,
            term=self.term,
            holder=self._node.network.identity.node_id,
            step=int(message["step"]),
            total_steps=signed.manifest.training(self._role, self.variant).steps,
            variant=self.variant,
            weights=weights,
            resume=resume,
            parent=self.parent,
            heldout_loss=float(message["heldout_loss"]),
            created_unix=clock.unix(),
        )


def _remove(message: dict[str, Any]) -> None:
    for name in ("weights", "resume"):
        shutil.rmtree(message[name], ignore_errors=True)
