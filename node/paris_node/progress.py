"""What a member of a run is doing right now, and telling the others of it.

Owns: `Progress`, when the membership record is said anew. Does not own: writing records (`announcer`), what
changes the progress (`volunteer`, `training_job`).
"""

from dataclasses import dataclass, field

from paris_node.announcer import Announcer
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
