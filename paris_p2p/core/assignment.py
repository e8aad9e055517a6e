"""What a run needs, as one reader sees it: role states, which role to take, what to replicate.

Owns: `View` (claims, statements, members and providers as read), the state of each role derived from it,
the total order of rival claims, and the two placements made by rendezvous hash (a role for a node, a
replica for a checkpoint). Does not own: the claim protocol over time (`core.lease`), reading the DHT.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from paris_p2p.ids import NodeId, Role, Term
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.manifest import LeaseTimes
from paris_p2p.wire.records import CLOCK_TOLERANCE_S, ClaimRecord, MemberRecord, Record


@dataclass(frozen=True, slots=True)
class SeenClaim:
    """A claim on a role as read: `state` is `bid`, `hold` or `released`; times are unix seconds."""

    owner: NodeId
    state: str
    term: Term
    since_unix: float
    expiration_unix: float

    def live(self, now_unix: float) -> bool:
        """Whether it still stands: neither released nor expired."""
        return self.state != "released" and now_unix < self.expiration_unix


@dataclass(frozen=True, slots=True)
class View:
    """One reading of a run. A missing role means that nothing was read about it.

    `statements`: the newest known checkpoint of a role (`newest_statement`); `members`: member records by
    owner; `providers`: who announces that newest checkpoint (the trainer included, if it does).
    """

    now_unix: float
    claims: Mapping[Role, Sequence[SeenClaim]]
    statements: Mapping[Role, CheckpointStatement] = field(default_factory=dict)
    members: Mapping[NodeId, MemberRecord] = field(default_factory=dict)
    providers: Mapping[Role, Collection[NodeId]] = field(default_factory=dict)


class RoleState(Enum):
    """`CLAIMED`: a live claim without reported progress; `TRAINING`: a live hold with progress;
    `STALE`: there is something to take over but nobody who holds it."""

    UNCLAIMED = "unclaimed"
    CLAIMED = "claimed"
    TRAINING = "training"
    STALE = "stale"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RoleStatus:
    """A role as `status` shows it.

    `holder` and `term`: of the best live claim, else of the newest checkpoint, else None and 0.
    `total_steps` is 0 while nobody has said it. `age_s`: seconds since the shown step was reported, None
    without one. `statement`: the newest checkpoint, served by `providers` nodes.
    """

    role: Role
    state: RoleState
    holder: NodeId | None
    term: Term
    step: int
    total_steps: int
    age_s: float | None
    loss: float | None
    images_per_s: float | None
    statement: CheckpointStatement | None
    providers: int


def seen_claims(records: Iterable[Record], times: LeaseTimes, now_unix: float) -> list[SeenClaim]:
    """The claims among `records`.

    One that promises to live much longer than this run's leases do is dropped: the record layer allows an
    hour, and nobody may lock a role for longer than a lease with a single write. So is one whose `since`
    is no number: it could not be ranked.
    """
    latest = now_unix + times.ttl_s + 2 * CLOCK_TOLERANCE_S
    return [
        SeenClaim(
            record.owner,
            record.payload.state,
            record.payload.term,
            record.payload.since_unix,
            record.expiration_unix,
        )
        for record in records
        if isinstance(record.payload, ClaimRecord)
        and record.expiration_unix <= latest
        and math.isfinite(record.payload.since_unix)
    ]


def rendezvous(role: Role, node: NodeId) -> bytes:
    """The weight of (role, node): lowest first. Every node computes the same, and no two roles agree on
    their favourite nodes (highest random weight hashing, Thaler and Ravishankar 1998)."""
    return hashlib.sha256(b"paris-p2p rendezvous 1\0" + role.encode() + b"\0" + node).digest()


def claim_rank(role: Role, claim: SeenClaim) -> tuple[bool, int, float, bytes]:
    """Rival live claims in order: HOLD before BID, higher term, earlier since, then the rendezvous hash."""
    return claim.state != "hold", -claim.term, claim.since_unix, rendezvous(role, claim.owner)


def best_claim(role: Role, view: View) -> SeenClaim | None:
    """The live claim on `role` that wins over all others, if there is one."""
    live = (claim for claim in view.claims.get(role, ()) if claim.live(view.now_unix))
    return min(live, key=lambda claim: claim_rank(role, claim), default=None)


def newest_statement(statements: Iterable[CheckpointStatement]) -> CheckpointStatement | None:
    """The checkpoint a successor goes on from: a finished one, else the latest step of the highest term.

    The term comes before the step, so that a woken zombie's output never overwrites the newer lineage.
    """
    return max(statements, key=_lineage, default=None)


def _lineage(statement: CheckpointStatement) -> tuple[bool, int, int, float, bytes, bytes]:
    loss = statement.heldout_loss if math.isfinite(statement.heldout_loss) else math.inf
    return (
        statement.finished,
        statement.term,
        statement.step,
        -loss,
        statement.holder,
        statement.resume.info_hash,
    )


def role_states(roles: Sequence[Role], view: View) -> dict[Role, RoleStatus]:
    """The status of each of `roles`, in their order."""
    return {role: _role_status(role, view) for role in roles}


def _role_status(role: Role, view: View) -> RoleStatus:
    statement = view.statements.get(role)
    claim = best_claim(role, view)
    finished = statement is not None and statement.finished
    progress = None if finished or claim is None else _progress(role, claim, view)
    step, total, updated = _step(statement, progress)
    holder = None if statement is None else statement.holder
    term = Term(0) if statement is None else statement.term
    if claim is not None and not finished:
        holder, term = claim.owner, claim.term
    return RoleStatus(
        role=role,
        state=_state(role, view, claim, statement, progress),
        holder=holder,
        term=term,
        step=step,
        total_steps=total,
        age_s=None if updated is None else max(0.0, view.now_unix - updated),
        loss=None if progress is None else progress.loss,
        images_per_s=None if progress is None else progress.images_per_s,
        statement=statement,
        providers=len(view.providers.get(role, ())),
    )


def _progress(role: Role, claim: SeenClaim, view: View) -> MemberRecord | None:
    """What the holder of `claim` says about its training under that very claim, if anything yet."""
    member = view.members.get(claim.owner)
    if member is None or (member.role, member.term) != (role, claim.term) or member.step < 1:
        return None
    return member


def _step(
    statement: CheckpointStatement | None, progress: MemberRecord | None
) -> tuple[int, int, float | None]:
    """(step, total steps, when that was said): the holder's own word first, else the checkpoint's."""
    if progress is not None:
        return progress.step, progress.total_steps, progress.updated_unix
    if statement is not None:
        return statement.step, statement.total_steps, statement.created_unix
    return 0, 0, None


def _state(
    role: Role,
    view: View,
    claim: SeenClaim | None,
    statement: CheckpointStatement | None,
    progress: MemberRecord | None,
) -> RoleState:
    if statement is not None and statement.finished:
        return RoleState.FINISHED
    if claim is not None:
        announced = statement is not None and (statement.holder, statement.term) == (claim.owner, claim.term)
        working = claim.state == "hold" and (progress is not None or announced)
        return RoleState.TRAINING if working else RoleState.CLAIMED
    # A tombstone alone is no reason to call a role stale: losers of a race leave them too.
    lapsed = any(seen.state == "hold" for seen in view.claims.get(role, ()))
    return RoleState.STALE if statement is not None or lapsed else RoleState.UNCLAIMED


_TAKEN_FIRST = {RoleState.UNCLAIMED: 0, RoleState.STALE: 1}


def choose_role(node: NodeId, states: Iterable[RoleStatus]) -> Role | None:
    """The role `node` should claim: unclaimed before stale, and of those the one its hash prefers.

    None when every role is held or finished.
    """
    free = (status for status in states if status.state in _TAKEN_FIRST)
    chosen = min(free, key=lambda s: (_TAKEN_FIRST[s.state], rendezvous(s.role, node)), default=None)
    return None if chosen is None else chosen.role


def replication_targets(node: NodeId, view: View, replicas: int) -> list[CheckpointStatement]:
    """The checkpoints `node` should fetch and serve, least replicated first.

    Each newest checkpoint wants `replicas` providers beside its trainer. The missing ones are the members
    that come first in the role's rendezvous order and do not have it: every node computes the same
    choice, so nothing is fetched by everybody. The order depends on the role, not on the checkpoint, so
    the same peers follow a role and can drop its previous checkpoint when they have the next.
    """
    members = frozenset(view.members) | {node}
    wanted: list[tuple[int, Role]] = []
    for role, statement in view.statements.items():
        having = frozenset(view.providers.get(role, ())) | {statement.holder}
        missing = replicas - (len(having) - 1)
        order = sorted(members - having, key=lambda member: rendezvous(role, member))
        if node in order[: max(0, missing)]:
            wanted.append((len(having), role))
    return [view.statements[role] for _, role in sorted(wanted)]
