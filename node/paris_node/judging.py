"""The checkpoints that strangers announce, judged: from records to candidates with a standing.

Owns: `Candidate`, what this node knows by itself (`Known`), the jury of a moment, and the caps on what one
key or one crowd can make a reader look at. Does not own: reading the records (`snapshot`), the rules
(`core.accept`, `core.access`), checking weights (`checker`).
"""

import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from paris_p2p.core.accept import (
    Attestation,
    Jury,
    Standing,
    choose_checkpoint,
    eligible,
    fair_order,
    limit_per_holder,
    measured_loss,
    standing,
)
from paris_p2p.core.access import admitted, may_claim
from paris_p2p.core.assignment import SeenClaim, claim_rank, newest_statement
from paris_p2p.core.safety import Held
from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import NodeId, Role
from paris_p2p.wire.checkpoint import (
    CheckpointStatement,
    check_statement,
    is_remembered,
    statement_digest,
)
from paris_p2p.wire.manifest import SignedManifest
from paris_p2p.wire.records import AnnounceRecord, AttestRecord, MemberRecord, Record

MAX_RECORDS_PER_KEY = 2048
MAX_PER_HOLDER = 3
"""Checkpoints of one holder looked at in one role: its newest, its safe one, one in between."""
VERIFIED_AT_ONCE = 32
"""New statements verified in a row before other tasks have their turn: about 20 ms."""
VERIFIED_A_ROUND = 64
VERIFIED_A_ROLE = 8
"""New statements verified in one reading of a run: 70 ms of CPU with nine roles."""
PUBLISHING = "publishing"
"""The activity of the organiser's node that mirrors, and so checks, every checkpoint."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a node knows by itself. `me`: its id, if it takes part; `checked`: digests of statements whose
    weights it found good; `rejected`: signed statements it found bad; `liars`: who vouched for those."""

    me: NodeId | None = None
    checked: Collection[bytes] = frozenset()
    rejected: Collection[bytes] = frozenset()
    liars: frozenset[NodeId] = frozenset()


NOTHING_KNOWN = Known()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint somebody announces: the statement, its signed bytes, and who holds it whole.

    `access`: its holder's pass, if one came along; `witnesses`: whose word for it counts; `vouched`:
    everybody who found its weights good, and `measured_by` those who say that they measured their loss, too;
    `measured`: its held-out loss as witnesses measured it, if they did; `by_organiser`: whether the
    organiser is among the witnesses.
    """

    statement: CheckpointStatement
    data: bytes
    providers: frozenset[NodeId]
    access: bytes = b""
    standing: Standing = Standing.UNCHECKED
    witnesses: frozenset[NodeId] = field(default=frozenset())
    vouched: frozenset[NodeId] = field(default=frozenset())
    measured: float | None = None
    measured_by: frozenset[NodeId] = field(default=frozenset())
    by_organiser: bool = False

    @property
    def assured(self) -> bool:
        """Whether it is more than the word of keys that anybody can make."""
        return self.standing is Standing.CHECKED or (self.credible and self.by_organiser)

    @property
    def credible(self) -> bool:
        """Whether it is more than its signer's word."""
        return self.standing >= Standing.BACKED

    @property
    def held(self) -> Held:
        """As `core.safety` sees it."""
        return Held(self.statement, self.providers)


async def verify_new(
    announced: Mapping[Role, Sequence[Record]], first: Collection[NodeId], now_unix: float
) -> None:
    """Verify statements that were not met before, so many a round as `verified_a_round` says and in
    `core.accept.fair_order`: judging leaves out the others, whose turn comes in a later round.

    Does not hold up everything else, and a stranger that publishes thousands of them costs no more.
    """
    new: dict[NodeId, list[bytes]] = {}
    for records in announced.values():
        for record in records[:MAX_RECORDS_PER_KEY]:
            payload = record.payload
            if isinstance(payload, AnnounceRecord) and not is_remembered(payload.statement):
                new.setdefault(record.owner, []).append(payload.statement)
    ordered = fair_order(new, first, salt=struct.pack(">d", now_unix))
    for number, data in enumerate(ordered[: verified_a_round(len(announced))], 1):
        with suppress(RemoteProtocolError):  # judging drops it
            check_statement(data)
        if number % VERIFIED_AT_ONCE == 0:
            await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()


def verified_a_round(roles: int) -> int:
    """How many new statements a reading of `roles` verifies: more than an honest run has new at a time."""
    return VERIFIED_A_ROUND + VERIFIED_A_ROLE * roles


def heard_first(
    signed: SignedManifest, claims: Mapping[Role, Sequence[SeenClaim]], now_unix: float
) -> frozenset[NodeId]:
    """Whose statements must not wait behind those of keys that anybody can make: the organiser's and those
    of the roles' holders."""
    leaders = (_leader(role, some, now_unix) for role, some in claims.items())
    return frozenset(one.owner for one in leaders if one is not None) | {signed.manifest.organiser}


def jury(signed: SignedManifest, members: Mapping[NodeId, MemberRecord], known: Known) -> Jury:
    """Whose words count at this moment."""
    organiser = signed.manifest.organiser
    host = members.get(organiser)
    publishing = host is not None and host.activity == PUBLISHING
    return Jury(organiser, publishing, frozenset(members), known.liars)


def attestations(
    signed: SignedManifest, records: Sequence[Record], now_unix: float
) -> dict[bytes, list[Attestation]]:
    """What is said of each statement, by its digest, by those who may speak in this run."""
    said: dict[bytes, list[Attestation]] = {}
    for record in admitted(signed, records[:MAX_RECORDS_PER_KEY], now_unix):
        if isinstance(record.payload, AttestRecord):
            latest = {check.statement: check for check in record.payload.checks}
            for digest, check in latest.items():
                said.setdefault(digest, []).append(Attestation(record.owner, check.good, check.loss))
    return said


@dataclass(frozen=True, slots=True)
class _Announced:
    """One statement as announced, perhaps by several."""

    data: bytes
    holders: frozenset[NodeId]
    access: bytes


def candidates(
    signed: SignedManifest,
    role: Role,
    records: Sequence[Record],
    said: Mapping[bytes, Sequence[Attestation]],
    jury: Jury,
    known: Known = NOTHING_KNOWN,
) -> tuple[Candidate, ...]:
    """The announced checkpoints of `role` that fit the run: credible ones first, then others, each best
    first.

    Forged statements, those this node found bad, those of holders who may not claim and those that are not
    verified yet (`verify_new`) are left out.
    """
    announced = _announced(signed, records, known)
    judged = {s: _judged(s, one, said, jury, known) for s, one in announced.items()}
    backed = {statement for statement, candidate in judged.items() if candidate.credible}
    few = limit_per_holder(judged, backed, MAX_PER_HOLDER)
    ordered = [judged[statement] for statement in choose_checkpoint(few, signed, role)]
    return tuple(sorted(ordered, key=_tier))


def _tier(candidate: Candidate) -> int:
    return -min(candidate.standing, Standing.BACKED)


def _announced(
    signed: SignedManifest, records: Sequence[Record], known: Known
) -> dict[CheckpointStatement, _Announced]:
    holders: dict[bytes, set[NodeId]] = {}
    passes: dict[bytes, set[bytes]] = {}
    for record in records[:MAX_RECORDS_PER_KEY]:
        payload = record.payload
        if isinstance(payload, AnnounceRecord) and payload.statement not in known.rejected:
            holders.setdefault(payload.statement, set()).add(record.owner)
            passes.setdefault(payload.statement, set()).add(payload.access)
    found: dict[CheckpointStatement, _Announced] = {}
    for data, owners in holders.items():
        if not is_remembered(data):  # its turn to be verified comes later
            continue
        try:
            statement = check_statement(data)
        except RemoteProtocolError:
            continue
        access = _valid_pass(signed, statement, passes[data])
        if access is not None:
            found[statement] = _Announced(data, frozenset(owners), access)
    return found


def _valid_pass(
    signed: SignedManifest, statement: CheckpointStatement, passes: Iterable[bytes]
) -> bytes | None:
    """The pass by which the statement's holder could make it when it did; None if there is none.

    Whoever announces passes the holder's on: the statement must outlive its holder.
    """
    at_unix = statement.created_unix
    usable = (one for one in sorted(passes) if may_claim(signed, statement.holder, one, at_unix))
    return next(usable, None)


def _judged(
    statement: CheckpointStatement,
    announced: _Announced,
    said: Mapping[bytes, Sequence[Attestation]],
    jury: Jury,
    known: Known,
) -> Candidate:
    digest = statement_digest(announced.data)
    words = said.get(digest, ())
    counting = eligible(statement, words, jury)
    witnesses = frozenset(word.owner for word in counting if word.good)
    return Candidate(
        statement,
        announced.data,
        announced.holders,
        announced.access,
        standing(statement, words, jury, checked=digest in known.checked),
        witnesses,
        frozenset(word.owner for word in words if word.good),
        measured_loss(counting, jury.organiser),
        frozenset(word.owner for word in words if word.good and word.loss is not None),
        jury.organiser in witnesses,
    )


def countable(
    role: Role, found: Sequence[Candidate], claims: Sequence[SeenClaim], now_unix: float
) -> list[Candidate]:
    """The checkpoints that the run goes by: the credible ones, and those the role's holder made in its very
    claim (`_leader`), until somebody has looked. The newest of them is what the lease machine and copies
    start from: while a finished one waits for its check, nobody need train the role again. It does not make
    the role finished.
    """
    leader = _leader(role, claims, now_unix)
    return [
        one
        for one in found
        if one.credible
        or (
            one.standing is Standing.UNCHECKED
            and leader is not None
            and (one.statement.holder, one.statement.term) == (leader.owner, leader.term)
        )
    ]


def _leader(role: Role, claims: Sequence[SeenClaim], now_unix: float) -> SeenClaim | None:
    """The claim of the role's holder; where nobody has it, the claim of the last who gave it up."""
    held = [claim for claim in claims if claim.state != "bid"]
    live = [claim for claim in held if claim.live(now_unix)]
    return min(live or held, key=lambda claim: claim_rank(role, claim), default=None)


def contenders(
    found: Sequence[Candidate], newest: Candidate | None, *, skip: Collection[bytes] = ()
) -> list[Candidate]:
    """Checkpoints that somebody has to look at, in the order of `found`: unchecked ones that would count as
    newer than `newest` if they were good or would finish the role, and those that finish it by the word of
    keys that anybody can make. `skip`: signed statements that were tried in vain a short while ago."""
    best = None if newest is None else newest.statement

    def matters(one: Candidate) -> bool:
        if one.data in skip or one.assured or one.standing is Standing.REFUTED:
            return False
        if one.credible and not one.statement.finished:
            return False
        if best is None or newest_statement([best, one.statement]) != best:
            return True
        return one is newest and best.finished

    return [one for one in found if matters(one)]


def going_on_order(found: Iterable[Candidate], limit: int) -> list[Candidate]:
    """The first `limit` of `found` in the order in which a successor tries to go on from them: the credible
    ones first, of each kind the newest first."""
    left = list(found)
    ordered: list[Candidate] = []
    while left and len(ordered) < limit:
        tier = min(_tier(one) for one in left)
        newest = newest_candidate([one for one in left if _tier(one) == tier])
        left.remove(newest)
        ordered.append(newest)
    return ordered


def newest_candidate(found: Sequence[Candidate]) -> Candidate:
    """The one of `found` (not empty) that a successor goes on from."""
    newest = newest_statement(candidate.statement for candidate in found)
    return next(candidate for candidate in found if candidate.statement == newest)
