"""The checkpoints that strangers announce, judged: from records to candidates with a standing.

Owns: `Candidate`, what this node knows by itself (`Known`), which statements it has verified (`Met`), the
jury of a moment, and the caps on what one key or one crowd can make a reader verify. Does not own: reading
the records (`snapshot`), how many of a key are shown (the DHT worker), the rules (`core.accept`,
`core.access`), checking weights (`checker`).
"""

import logging
import math
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from paris_p2p import clock
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
from paris_p2p.core.assignment import Maker, SeenClaim, claim_rank, newest_statement
from paris_p2p.core.conduct import Conduct
from paris_p2p.core.safety import Held
from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import NodeId, Role
from paris_p2p.wire.checkpoint import CheckpointStatement, check_statement, statement_digest
from paris_p2p.wire.manifest import SignedManifest
from paris_p2p.wire.records import AnnounceRecord, AttestRecord, MemberRecord, Record

log = logging.getLogger(__name__)

MAX_MET = 2048
"""Statements of a role that are remembered: more than one read shows (`dht.protocol.MAX_ROWS_A_KEY`)."""
MAX_PER_HOLDER = 3
"""Checkpoints of one holder looked at in one role: its newest, its safe one, one in between."""
VERIFIED_AT_ONCE = 32
"""New statements verified in a row before other tasks have their turn: about 20 ms."""
VERIFIED_A_ROUND = 64
VERIFIED_A_ROLE = 8
"""New statements verified in one reading of a run that was read before: 70 ms of CPU with nine roles."""
WHOLE_DEADLINE_S = 60.0
"""So long may it take to verify all that is announced: those of a role that is flooded take a second."""
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
    everybody who found its weights good, and `measured_by` those who measured their loss, too, with it;
    `measured`: its held-out loss as witnesses measured it, if they did; `by_organiser`: whether the
    organiser is among them.
    """

    statement: CheckpointStatement
    data: bytes
    providers: frozenset[NodeId]
    access: bytes = b""
    standing: Standing = Standing.UNCHECKED
    witnesses: frozenset[NodeId] = field(default=frozenset())
    vouched: frozenset[NodeId] = field(default=frozenset())
    measured: float | None = None
    measured_by: frozenset[tuple[NodeId, float]] = field(default=frozenset())
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
    def weighed(self) -> bool:
        """Whether it is more than well-formed noise: its loss was measured by somebody who counts."""
        return self.credible and self.measured is not None

    @property
    def held(self) -> Held:
        """As `core.safety` sees it."""
        return Held(self.statement, self.providers)


class Met:
    """The signed statements of one run that a reader has verified, and what they turned out to be.

    For each role it keeps those shown last, more than one reading shows: what is shown is not forgotten
    while it is shown, however many keys show something. Whoever reads for the first time, or once, has none.
    """

    def __init__(self) -> None:
        self._answers: dict[Role, dict[bytes, CheckpointStatement | None]] = {}
        self._read: set[Role] = set()
        self.patience_s = WHOLE_DEADLINE_S
        """Left for the first readings together, which their reader may give up one by one."""
        self.conduct = Conduct()
        self.members: tuple[float, Mapping[NodeId, MemberRecord]] = (-math.inf, {})
        """When the members were last read (unix seconds), and who they were."""

    def statement(self, role: Role, data: bytes) -> CheckpointStatement | None:
        """What `data` says of `role`; None if it says nothing, or was not verified yet."""
        return self._answers.get(role, {}).get(data)

    def was_read(self, roles: Iterable[Role]) -> bool:
        """Whether everything that was announced of all these roles has been verified once."""
        return self._read.issuperset(roles)

    def note_read(self, roles: Iterable[Role]) -> None:
        """From now on `was_read` is true of them."""
        self._read.update(roles)

    def unknown(self, role: Role, shown: Iterable[bytes]) -> list[bytes]:
        """Those of the `shown` statements that were not verified; the others are kept longest from now on."""
        answers = self._answers.setdefault(role, {})
        new: list[bytes] = []
        for data in shown:
            if data in answers:
                answers[data] = answers.pop(data)
            else:
                new.append(data)
        return new

    def verify(self, signed: SignedManifest, role: Role, data: bytes) -> None:
        """Find out what `data` says, unless it is known. Takes about half a millisecond."""
        answers = self._answers.setdefault(role, {})
        if data in answers:
            return
        answers[data] = _of_role(signed, role, data)
        if len(answers) > MAX_MET:
            del answers[next(iter(answers))]


def _of_role(signed: SignedManifest, role: Role, data: bytes) -> CheckpointStatement | None:
    try:
        statement = check_statement(data)
    except RemoteProtocolError:
        return None
    return statement if (statement.run_id, statement.role) == (signed.run_id, role) else None


async def verify_new(
    signed: SignedManifest,
    announced: Mapping[Role, Sequence[Record]],
    met: Met,
    *,
    first: Collection[NodeId] = (),
    vouched: Collection[bytes] = (),
    salt: float = 0.0,
    whole: bool = False,
) -> None:
    """Verify statements that were not met before, in `core.accept.fair_order`: of roles that were read before
    so many a reading as `verified_a_round` says, and judging leaves out the others, whose turn comes in a
    later one; when a role is read for the first time, or `whole`, all of them, as far as `WHOLE_DEADLINE_S`
    goes.

    `vouched`: digests of statements that must not wait, with those of the keys in `first`. Other tasks have
    their turn meanwhile.
    """
    began, patience_s = clock.monotonic(), WHOLE_DEADLINE_S
    if first_time := not met.was_read(announced):
        patience_s = patience_s if whole else max(0.0, met.patience_s)
        whole = True
    roles, new = _unmet(announced, met)
    known_good = [data for data in roles if statement_digest(data) in vouched] if vouched else []
    ordered = fair_order(new, first, struct.pack(">d", salt), known_good)
    left = len(ordered) if whole else min(len(ordered), verified_a_round(len(announced)))
    try:
        with trio.move_on_after(patience_s if whole else math.inf) as scope:
            await _verify(signed, [(role, data) for data in ordered[:left] for role in roles[data]], met)
    finally:
        if first_time:
            met.patience_s -= clock.monotonic() - began
    await trio.lowlevel.checkpoint()
    if scope.cancelled_caught:
        log.warning("%d checkpoints are announced: not all could be looked at yet", len(ordered))
    if whole:
        met.note_read(announced)


def _unmet(
    announced: Mapping[Role, Sequence[Record]], met: Met
) -> tuple[dict[bytes, list[Role]], dict[NodeId, list[bytes]]]:
    """The statements that were not met before: the roles of each, and which ones each key announces."""
    roles: dict[bytes, list[Role]] = {}
    by_key: dict[NodeId, list[bytes]] = {}
    for role, records in announced.items():
        owners = _announcers(records)
        for data in met.unknown(role, owners):
            roles.setdefault(data, []).append(role)
            for owner in owners[data]:
                by_key.setdefault(owner, []).append(data)
    return roles, by_key


async def _verify(signed: SignedManifest, statements: Sequence[tuple[Role, bytes]], met: Met) -> None:
    for number, (role, data) in enumerate(statements, 1):
        met.verify(signed, role, data)
        if number % VERIFIED_AT_ONCE == 0:
            await trio.lowlevel.checkpoint()


def _announcers(records: Sequence[Record]) -> dict[bytes, list[NodeId]]:
    """Who announces each signed statement."""
    owners: dict[bytes, list[NodeId]] = {}
    for record in records:
        if isinstance(record.payload, AnnounceRecord):
            owners.setdefault(record.payload.statement, []).append(record.owner)
    return owners


def verified_a_round(roles: int) -> int:
    """How many new statements a reading of `roles` verifies that were read before: more than an honest run
    has new at a time."""
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
    for record in admitted(signed, records, now_unix):
        if isinstance(record.payload, AttestRecord):
            latest = {check.statement: check for check in record.payload.checks}
            for digest, check in latest.items():
                said.setdefault(digest, []).append(Attestation(record.owner, check.good, check.loss))
    return said


def vouched_by(organiser: NodeId, said: Mapping[bytes, Sequence[Attestation]]) -> set[bytes]:
    """The digests of the statements that the organiser found good."""
    return {digest for digest, words in said.items() if any(w.good and w.owner == organiser for w in words)}


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
    met: Met,
    said: Mapping[bytes, Sequence[Attestation]],
    jury: Jury,
    known: Known = NOTHING_KNOWN,
) -> tuple[Candidate, ...]:
    """The announced checkpoints of `role` that fit the run: credible ones first, then others, each best
    first.

    Forged statements, those this node found bad, those of holders who may not claim and those that are not
    verified yet (`verify_new`) are left out.
    """
    announced = _announced(signed, role, records, met, known)
    judged = {s: _judged(s, one, said, jury, known) for s, one in announced.items()}
    backed = {statement for statement, candidate in judged.items() if candidate.credible}
    few = limit_per_holder(judged, backed, MAX_PER_HOLDER)
    ordered = [judged[statement] for statement in choose_checkpoint(few, signed, role)]
    return tuple(sorted(ordered, key=_tier))


def _tier(candidate: Candidate) -> int:
    return -min(candidate.standing, Standing.BACKED)


def _announced(
    signed: SignedManifest, role: Role, records: Sequence[Record], met: Met, known: Known
) -> dict[CheckpointStatement, _Announced]:
    holders: dict[bytes, set[NodeId]] = {}
    passes: dict[bytes, set[bytes]] = {}
    for record in records:
        payload = record.payload
        if isinstance(payload, AnnounceRecord) and payload.statement not in known.rejected:
            holders.setdefault(payload.statement, set()).add(record.owner)
            passes.setdefault(payload.statement, set()).add(payload.access)
    found: dict[CheckpointStatement, _Announced] = {}
    for data, owners in holders.items():
        statement = met.statement(role, data)
        if statement is None:
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
    others = [word for word in words if word.owner != known.me]  # of its own word it knows whether it holds
    measuring = {
        word.owner for word in eligible(statement, others, jury) if word.good and word.loss is not None
    }
    return Candidate(
        statement,
        announced.data,
        announced.holders,
        announced.access,
        standing(statement, others, jury, checked=digest in known.checked),
        witnesses,
        frozenset(word.owner for word in words if word.good),
        measured_loss(counting, jury.organiser),
        frozenset((word.owner, word.loss) for word in words if word.good and word.loss is not None),
        jury.organiser in measuring,
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


def holder(role: Role, claims: Sequence[SeenClaim], now_unix: float) -> Maker | None:
    """Who holds `role` now, and in which term."""
    leader = _leader(role, claims, now_unix)
    return (leader.owner, leader.term) if leader is not None and leader.live(now_unix) else None


def contenders(
    found: Sequence[Candidate],
    newest: Candidate | None,
    *,
    within_steps: float,
    skip: Collection[bytes] = (),
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
        if best is None or newest_statement([best, one.statement], within_steps=within_steps) != best:
            return True
        return one is newest and best.finished

    return [one for one in found if matters(one)]


def going_on_order(found: Iterable[Candidate], limit: int, *, within_steps: float) -> list[Candidate]:
    """The first `limit` of `found` in the order in which a successor tries to go on from them: the credible
    ones first, of each kind in turn the newest (`core.assignment.newest_statement`) and the one of most
    steps: terms are for their signers to choose, and who has little to show chooses high ones."""
    left = list(found)
    ordered: list[Candidate] = []
    tier, place = 0, 0
    while left and len(ordered) < limit:
        best = min(_tier(one) for one in left)
        place = place + 1 if best == tier else 0
        tier = best
        some = [one for one in left if _tier(one) == tier]
        if place % 2:
            chosen = max(some, key=lambda one: (one.statement.step, one.statement.term))
        else:
            chosen = newest_candidate(some, within_steps=within_steps)
        left.remove(chosen)
        ordered.append(chosen)
    return ordered


def newest_candidate(
    found: Sequence[Candidate], *, within_steps: float, leader: Maker | None = None
) -> Candidate:
    """The one of `found` (not empty) that a successor goes on from; `leader`: who holds the role."""
    shown = (candidate.statement for candidate in found)
    newest = newest_statement(shown, within_steps=within_steps, leader=leader)
    return next(candidate for candidate in found if candidate.statement == newest)
