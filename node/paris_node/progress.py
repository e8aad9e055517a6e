"""What a member of a run is doing right now, and telling the others of it.

Owns: `Progress`, when the membership record is said anew. Does not own: writing records (`announcer`), what
changes the progress (`volunteer`, `training_job`).
"""

from dataclasses import dataclass, field

from paris_node.announcer import Announcer
from paris_node.text import human_seconds
from paris_p2p import clock
from paris_p2p.ids import Role, Term
from paris_p2p.net.swarm import Rates
from paris_p2p.wire.manifest import SignedManifest
from paris_p2p.wire.records import MemberRecord

NO_ROLE = Role("")
MEMBER_TTL_S = 300.0
"""At most: a membership also lapses three renewals of a lease after its last one."""
IDLE_TELL_S = 25.0
"""Who stands by says so once in a renewal, or this often where those are longer."""


@dataclass(slots=True)
class Progress:
    """What this node is doing right now, as its membership record tells it."""

    activity: str = "joining"
    role: Role = NO_ROLE
    term: Term = field(default=Term(0))
    step: int = 0
    total_steps: int = 0
    loss: float = 0.0
    images_per_s: float = 0.0


SOON_S = (60.0, 120.0, 300.0)
LATER_S = 600.0
"""When a trainer's progress is told on a terminal: after these seconds, then every so many."""


class StepReports:
    """When and how people are told of a role's training. `batch`: images a step; `began`: monotonic."""

    def __init__(self, batch: int, began: float) -> None:
        self._batch = batch
        self._due = [began + seconds for seconds in SOON_S]

    def text(self, progress: Progress, now: float) -> str | None:
        """The line that is due at `now`, if one is."""
        if now < self._due[0]:
            return None
        while self._due and self._due[0] <= now:
            last = self._due.pop(0)
            self._due = self._due or [last + LATER_S]
        left = ""
        if progress.images_per_s > 0:
            steps = progress.total_steps - progress.step
            left = f", {human_seconds(steps * self._batch / progress.images_per_s)} left"
        return (
            f"{progress.role}: step {progress.step} of {progress.total_steps}, loss {progress.loss:.3f}, "
            f"{progress.images_per_s:.0f} images/s{left}"
        )


class Telling:
    """The membership record of one node in one run."""

    def __init__(self, progress: Progress, signed: SignedManifest) -> None:
        self._progress = progress
        self._run_id = signed.run_id
        self._renew_s = signed.manifest.lease.renew_s
        self._told: tuple[object, ...] = ()
        self._told_unix = 0.0

    def say(self, announcer: Announcer, reach: str, rates: Rates) -> None:
        """Say what is so now. Every time while training; else now and then, unless more than rates has
        changed: storing a record is a dozen calls, and most members stand by."""
        progress, now = self._progress, clock.unix()
        told = (announcer.addresses, progress.activity, progress.role, reach)
        young = 0.0 <= now - self._told_unix < min(0.9 * self._renew_s, IDLE_TELL_S)
        if progress.role == NO_ROLE and told == self._told and young:
            return
        self._told, self._told_unix = told, now
        record = MemberRecord(
            addresses=announcer.addresses,
            activity=progress.activity,
            role=progress.role,
            term=progress.term,
            step=progress.step,
            total_steps=progress.total_steps,
            loss=float(progress.loss),
            images_per_s=float(progress.images_per_s),
            up_bytes_per_s=int(rates.up_bytes_per_s),
            down_bytes_per_s=int(rates.down_bytes_per_s),
            updated_unix=now,
            reach=reach,
        )
        announcer.say(record, self._run_id, min(3 * self._renew_s, MEMBER_TTL_S))
