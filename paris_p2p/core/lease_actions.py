"""What the lease machine asks of its driver, as plain values.

Owns: the actions, and a moment on both clocks. Does not own: when which is due (`core.lease`).
"""

from dataclasses import dataclass
from enum import Enum

from paris_p2p.ids import Role, Term
from paris_p2p.wire.records import ClaimRecord


@dataclass(frozen=True, slots=True)
class Now:
    """One moment on both clocks: `monotonic` seconds for timers, `unix` seconds for records."""

    monotonic: float
    unix: float


@dataclass(frozen=True, slots=True)
class WriteClaim:
    """Store `claim` on `role` until `expiration_unix`, then call `LeaseMachine.stored` with this value."""

    role: Role
    claim: ClaimRecord
    expiration_unix: float


@dataclass(frozen=True, slots=True)
class Start:
    """The role is ours: train it, and key every output by `term` from here on. A trainer of it that ran on
    without a lease goes on, unless the run goes by another's newer checkpoint by now."""

    role: Role
    term: Term


class Trainer(Enum):
    """What becomes of the trainer of a role that is no longer ours. `RUN_ON`: it goes on, its checkpoints are
    kept here and told nobody; `WIND_UP`: it ends with a checkpoint, which is announced as one candidate among
    others. It never ends without one: whoever makes a holder stop must not undo its work."""

    RUN_ON = "run on"
    WIND_UP = "wind up"


@dataclass(frozen=True, slots=True)
class Stop:
    """The role is no longer ours, or may not be: stop announcing it at once, training it as `trainer` says.

    `RUN_ON` is followed by a `WIND_UP`, or by a `Start` of the same role, or by neither.
    """

    role: Role
    reason: str
    trainer: Trainer


Action = WriteClaim | Start | Stop
