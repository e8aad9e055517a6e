"""Which roles of a run this machine has the memory to train, so that it claims no other.

Owns: asking a child that knows torch and the device, and what follows: roles that are never claimed, and
those left alone while their newest checkpoint is of too big a kind. Does not own: the estimate
(`diffusion.fit_worker`), the disk (`room`). A role that is claimed and then fails for want of memory is lost
to the others for as long as it takes to notice; a small run is not worth the seconds of asking.
"""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from paris_node.text import printable
from paris_p2p.core.assignment import SeenClaim
from paris_p2p.core.lease import LeaseMachine
from paris_p2p.core.lease_actions import Now
from paris_p2p.errors import ConfigError, WorkerError
from paris_p2p.ids import ROUTER, Role
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.manifest import Architecture, Manifest
from paris_p2p.workers.spawn import open_worker

log = logging.getLogger(__name__)

MODULE = "paris_p2p.diffusion.fit_worker"
DEADLINE_S = 180.0
STATE_BYTES_PER_PARAMETER = 20
"""Weights, their average, a gradient and two moments, each in fp32."""
ASKED_FROM_BYTES = 1 << 30
"""Runs whose largest network takes less than this for its state fit wherever torch does."""


@dataclass(frozen=True, slots=True)
class Fit:
    """`room`: bytes that training may take on `device`; `router` and, by variant, `experts`: the least bytes
    each takes."""

    device: str
    room: int
    router: int
    experts: tuple[int, ...]

    def least(self, manifest: Manifest, role: Role) -> int:
        """What the smallest variant that `role` may be takes."""
        return min(self.takes(role, number) for number in manifest.variants(role))

    def takes(self, role: Role, variant: int) -> int:
        """What `role` takes as that variant of the recipe."""
        return self.router if role == ROUTER else self.experts[variant]

    def too_big(self, statement: CheckpointStatement) -> bool:
        """Whether there is something to train from this checkpoint on, and not the memory to do it."""
        return not statement.finished and self.takes(statement.role, statement.variant) > self.room

    def shortage(self, manifest: Manifest, statement: CheckpointStatement) -> str:
        """Why a checkpoint that is `too_big` cannot be gone on from here, for people."""
        experts, role = manifest.recipe.experts, statement.role
        kind = "" if role == ROUTER else f"is of kind {printable(experts[statement.variant].name)} and "
        return (
            f"its newest checkpoint (step {statement.step}) {kind}takes at least "
            f"{self.takes(role, statement.variant) / 1e9:.1f} GB of memory to train, "
            f"{self.device} has {self.room / 1e9:.1f} GB for it"
        )


def is_big(manifest: Manifest) -> bool:
    """Whether any network of the run may be too big for a machine that takes part."""
    networks = [manifest.recipe.router.architecture, *(one.architecture for one in manifest.recipe.experts)]
    return max(map(_state_bytes, networks)) >= ASKED_FROM_BYTES


def _state_bytes(architecture: Architecture) -> int:
    return STATE_BYTES_PER_PARAMETER * sum(math.prod(spec.shape) for spec in architecture.tensors)


async def ask(manifest: Path, device: str) -> Fit | None:
    """What fits on `device`; None where that cannot be found out. Raises `ConfigError` for a device that is
    not there."""
    answer: Mapping[str, Any] = {}
    try:
        with trio.move_on_after(DEADLINE_S):
            async with open_worker(MODULE) as worker:
                await worker.send({"type": "fit", "manifest": str(manifest), "device": device})
                answer = await worker.receive()
    except WorkerError as error:
        log.warning("how much memory there is for training is not known: %s", error)
    if answer.get("kind") == "config":
        raise ConfigError(str(answer["message"]))
    if answer.get("type") != "fit":
        return None
    return Fit(str(answer["device"]), int(answer["room"]), int(answer["router"]), tuple(answer["experts"]))


def fitting_roles(manifest: Manifest, fit: Fit, wanted: Role | None) -> tuple[Role, ...]:
    """The roles that fit, the `wanted` one among them. Raises `ConfigError` when that, or none, does."""
    asked = manifest.roles if wanted is None else (wanted,)
    roles = tuple(role for role in manifest.roles if fit.least(manifest, role) <= fit.room)
    if not set(asked) & set(roles):
        least = min(fit.least(manifest, role) for role in asked)
        raise ConfigError(
            f"training {wanted or 'any role of this run'} takes at least {least / 1e9:.1f} GB of memory, "
            f"{fit.device} has {fit.room / 1e9:.1f} GB for it: end other programs, or choose another --device"
        )
    return roles


class TooBig:
    """The roles of a run whose newest checkpoint, as last read, is too big for this machine. One that is not
    shown any more counts for `keep_s`: a reading may lack it. Only of those whose loss somebody measured:
    untrained values of a big kind cost a stranger nothing."""

    def __init__(self, fit: Fit | None, keep_s: float) -> None:
        self._fit = fit
        self._keep_s = keep_s
        self._shown: dict[Role, tuple[CheckpointStatement, float]] = {}
        self._told: set[tuple[Role, int]] = set()

    @property
    def roles(self) -> Collection[Role]:
        """Those that are left alone."""
        return self._shown.keys()

    def see(
        self, read: Collection[Role], newest: Mapping[Role, CheckpointStatement], now: float
    ) -> list[CheckpointStatement]:
        """A reading of the roles `read` at `now` (monotonic seconds). Those of the `newest` checkpoints that
        are too big and of a kind not met before in the role."""
        if self._fit is None:
            return []
        for role in read:
            statement = newest.get(role)
            if statement is not None and self._fit.too_big(statement):
                self._shown[role] = (statement, now)
            elif statement is not None or (role in self._shown and now - self._shown[role][1] > self._keep_s):
                self._shown.pop(role, None)
        new = [one for one, _ in self._shown.values() if (one.role, one.variant) not in self._told]
        self._told.update((one.role, one.variant) for one in new)
        return new


class ChoosyMachine(LeaseMachine):
    """The lease machine of a node that leaves some roles to others for now: `left_alone` may change between
    steps. They are not bid for, nor asked about a second time; what is held or claimed already goes on."""

    left_alone: Collection[Role] = ()

    def _free(self, mine: dict[Role, SeenClaim], now: Now) -> list[Role]:
        return [role for role in super()._free(mine, now) if role not in self.left_alone]
