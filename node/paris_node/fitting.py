"""Which roles of a run this machine has the memory to train, so that it claims no other.

Owns: asking a child that knows torch and the device, and what follows. Does not own: the estimate
(`diffusion.fit_worker`), the disk (`room`). A role that is claimed and then fails for want of memory is lost
to the others for as long as it takes to notice; a small run is not worth the seconds of asking.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from paris_p2p.errors import ConfigError, WorkerError
from paris_p2p.ids import ROUTER, Role
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
        if role == ROUTER:
            return self.router
        return min(self.experts[number] for number in manifest.variants(role))


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
