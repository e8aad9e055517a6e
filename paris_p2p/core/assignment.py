"""What a run needs, as one reader sees it: role states, which role to take, what to replicate.

Owns: `View` (claims, statements, members and providers as read), the state of each role derived from it,
the total order of rival claims, and the two placements made by rendezvous hash (a role for a node, a
replica for a checkpoint). Does not own: the claim protocol over time (`core.lease`), reading the DHT.
"""

import functools
import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from paris_p2p.ids import NodeId, Role, Term
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.manifest import LeaseTimes
from paris_p2p.wire.records import CLOCK_TOLERANCE_S, ClaimRecord, MemberRecord, Record
from paris_p2p.wire.terms import belongs, highest_number, term_number

MAX_ROLES_PER_NODE = 1
"""A node trains one role at a time; a key that claims more is not heard (`honoured`)."""


Maker = tuple[NodeId, Term]
"""Who works, or worked, under which claim: what a statement and a claim of one lineage share."""


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


def seen_claims(role: Role, records: Iterable[Record], times: LeaseTimes, now_unix: float) -> list[SeenClaim]:
    """The claims on `role` among `records` that any reader should take seriously (`_credible`)."""
    claims = (
        SeenClaim(
            record.owner,
            record.payload.state,
            record.payload.term,
            record.payload.since_unix,
            record.expiration_unix,
        )
        for record in records
        if isinstance(record.payload, ClaimRecord)
    )
    return [claim for claim in claims if _credible(role, claim, times, now_unix)]


def _credible(role: Role, claim: SeenClaim, times: LeaseTimes, now_unix: float) -> bool:
    """Whether a stranger's claim is one that the protocol can produce.

    Not one that promises to live much longer than this run's leases do: the record layer allows an hour, and
    nobody may lock a role for longer than a lease with a single write. Nor one from the future, with a term
    that no count could have reached, or with another claim's mark. All of it is judged by the claim alone:
    a claim that one reader honours and another ignores would give the role two holders.
    """
    return (
        claim.expiration_unix <= now_unix + times.ttl_s + 2 * CLOCK_TOLERANCE_S
        and math.isfinite(claim.since_unix)
        and claim.since_unix <= now_unix + 2 * CLOCK_TOLERANCE_S
        and term_number(claim.term) <= highest_number(claim.since_unix)
        and belongs(claim.term, role, claim.owner, claim.since_unix)
    )


def honoured(
    claims: Mapping[Role, Sequence[SeenClaim]], now_unix: float, max_roles: int
) -> Mapping[Role, Sequence[SeenClaim]]:
    """`claims` without those live ones that their owner has over and above `max_roles`.

    An owner's newest claims count (by `since`, then the role's name). An honest node that has moved on has
    ended its older ones, even where the tombstone was not seen, and a liar has no more roles than others.
    """
    roles: dict[NodeId, list[tuple[float, Role]]] = {}
    for role, some in claims.items():
        for claim in some:
            if now_unix < claim.expiration_unix and claim.state != "released":
                roles.setdefault(claim.owner, []).append((claim.since_unix, role))
    excess = {
        (role, owner)
        for owner, mine in roles.items()
        if len(mine) > max_roles
        for _, role in sorted(mine)[: len(mine) - max_roles]
    }
    if not excess:
        return claims
    return {
        role: [claim for claim in some if (role, claim.owner) not in excess or not claim.live(now_unix)]
        for role, some in claims.items()
    }


@functools.lru_cache(maxsize=1 << 14)
def rendezvous(role: Role, node: NodeId) -> bytes:
    """The weight of (role, node): lowest first. Every node computes the same, and no two roles agree on
    their favourite nodes (highest random weight hashing, Thaler and Ravishankar 1998)."""
    return hashlib.sha256(b"paris-p2p rendezvous 1\0" + role.encode() + b"\0" + node).digest()


def claim_rank(role: Role, claim: SeenClaim) -> tuple[bool, int, float, bytes]:
    """Rival live claims in order: HOLD before BID; of HOLDs the higher term; of BIDs the higher number, then
    the earlier since, so that a late bid does not undo one that has nearly settled. The rest breaks ties."""
    hold = claim.state == "hold"
    order = claim.term if hold else term_number(claim.term)
    return not hold, -order, claim.since_unix, rendezvous(role, claim.owner)


def best_claim(role: Role, view: View) -> SeenClaim | None:
    """The live claim on `role` that wins over all others, if there is one."""
    live = (claim for claim in view.claims.get(role, ()) if claim.live(view.now_unix))
    return min(live, key=lambda claim: claim_rank(role, claim), default=None)


def claimed(role: Role, view: View) -> bool:
    """Whether anybody has a live claim on `role`."""
    return any(claim.live(view.now_unix) for claim in view.claims.get(role, ()))


def newest_statement(
    statements: Iterable[CheckpointStatement], *, within_steps: float, leader: Maker | None = None
) -> CheckpointStatement | None:
    """The checkpoint a successor goes on from: a finished one, else the role's holder's latest of its very
    claim (`leader`, if the role has a holder), else the latest step of the highest term among those that are
    at most `within_steps` (the checkpoint interval) behind the furthest of `statements`.

    The term comes before the step, so that a woken zombie's output never overwrites the newer lineage. But a
    statement needs no claim: whoever signs one chooses its term, and must not undo days of work by that.
    """
    some = list(statements)
    if not any(one.finished for one in some):
        furthest = max((one.step for one in some), default=0)
        led = [one for one in some if (one.holder, one.term) == leader]
        some = led or [one for one in some if one.step >= furthest - within_steps]
    return max(some, key=_lineage, default=None)


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
_LAST_STEPS_WEIGHT = 0.25


def preferred_roles(node: NodeId, states: Iterable[RoleStatus]) -> list[Role]:
    """The roles `node` may claim, most wanted first: unclaimed before stale, and in the order of its hash.

    Stale roles are drawn the more often the further behind they are (weighted rendezvous hashing,
    Schindelhauer and Schomaker 2005): the run needs them most, yet a crowd does not all run for one.
    """
    free = (status for status in states if status.state in _TAKEN_FIRST)
    ordered = sorted(free, key=lambda s: (_TAKEN_FIRST[s.state], _drawn_at(node, s), s.role))
    return [status.role for status in ordered]


def _drawn_at(node: NodeId, status: RoleStatus) -> float:
    """When `node` draws the role: exponentially distributed, at a rate of what is left to do."""
    uniform = int.from_bytes(rendezvous(status.role, node)[:6], "big") / 2**48
    left = 1.0 - status.step / max(1, status.total_steps)
    return -math.log1p(-uniform) / (_LAST_STEPS_WEIGHT + left)


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
