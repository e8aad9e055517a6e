"""What is known of a run at one moment, as plain values: the source of `status` in every form.

Owns: reading a run's records from the DHT into an `Observation`, and its reduction to a `Snapshot`.
Does not own: drawing (`views`), deciding (`core`).
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paris_p2p import clock
from paris_p2p.core.accept import choose_checkpoint
from paris_p2p.core.assignment import RoleStatus, View, newest_statement, role_states, seen_claims
from paris_p2p.dht.client import Dht
from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import NodeId, Role
from paris_p2p.wire.checkpoint import CheckpointStatement, check_statement
from paris_p2p.wire.identity import peer_id_text
from paris_p2p.wire.manifest import SignedManifest, Training
from paris_p2p.wire.records import AnnounceRecord, MemberRecord, Record, role_scope

MAX_RECORDS_PER_KEY = 2048
MAX_COUNT = 1 << 50
"""Steps, rates and losses beyond this are a stranger's joke."""
MAX_SKEW_S = 3600.0
"""A membership said longer ago, or further ahead, than this cannot be live: its record would have expired."""
LONGEST_S = 10.0 * 365 * 86_400
"""Ages and times left beyond this are shown as unknown."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint somebody announces: the statement, its signed bytes, and who holds it whole."""

    statement: CheckpointStatement
    data: bytes
    providers: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class Observation:
    """A run's live records. `candidates`: a role's announced checkpoints, best for use first; `newest`: the
    one a successor goes on from (`core.assignment.newest_statement`); `view`: what the lease machine sees."""

    view: View
    candidates: Mapping[Role, Sequence[Candidate]]
    newest: Mapping[Role, Candidate]

    def best(self, role: Role) -> CheckpointStatement | None:
        """The best announced checkpoint of `role`."""
        found = self.candidates[role]
        return found[0].statement if found else None

    def finished(self, roles: Iterable[Role]) -> bool:
        """Whether every role has a finished checkpoint that somebody holds."""
        bests = [self.best(role) for role in roles]
        return all(best is not None and best.finished for best in bests)


@dataclass(frozen=True, slots=True)
class RoleLine:
    """One row of the status table. Ages and times in seconds; `None` where nothing is known."""

    role: Role
    state: str
    holder: NodeId | None
    term: int
    step: int
    total_steps: int
    announced_step: int
    age_s: float | None
    loss: float | None
    images_per_s: float | None
    eta_s: float | None
    content_id: str | None
    providers: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole run at one moment. Rates in bytes/s over all members."""

    run_id: str
    name: str
    roles: tuple[RoleLine, ...]
    members: tuple[tuple[str, MemberRecord], ...]
    now_unix: float

    @property
    def peers(self) -> int:
        """Members heard of."""
        return len(self.members)

    def to_json(self) -> dict[str, Any]:
        """The object `paris-node status --once --json` prints."""
        return {
            "run_id": self.run_id,
            "name": self.name,
            "roles": [_role_json(line) for line in self.roles],
            "peers": self.peers,
            "members": [_member_json(peer, record, self.now_unix) for peer, record in self.members],
            "up_bytes_per_s": sum(record.up_bytes_per_s for _, record in self.members),
            "down_bytes_per_s": sum(record.down_bytes_per_s for _, record in self.members),
        }


async def observe(dht: Dht, signed: SignedManifest, *, rejected: Collection[bytes] = ()) -> Observation:
    """Read every live record of the run. `rejected`: signed statements to leave out, found to be bad."""
    roles = signed.manifest.roles
    keys = [("claim", role_scope(signed.run_id, role)) for role in roles]
    keys += [("announce", role_scope(signed.run_id, role)) for role in roles]
    answers = await dht.read_many([*keys, ("member", signed.run_id)])
    now_unix = clock.unix()
    claims = dict(zip(roles, answers[: len(roles)], strict=True))
    announced = dict(zip(roles, answers[len(roles) : -1], strict=True))
    found = {role: candidates(records, signed, role, rejected) for role, records in announced.items()}
    newest = {role: newest_candidate(some) for role, some in found.items() if some}
    view = View(
        now_unix=now_unix,
        claims={r: seen_claims(records, signed.manifest.lease, now_unix) for r, records in claims.items()},
        statements={role: candidate.statement for role, candidate in newest.items()},
        members=_members(answers[-1], now_unix),
        providers={role: candidate.providers for role, candidate in newest.items()},
    )
    return Observation(view, found, newest)


def _members(records: Iterable[Record], now_unix: float) -> dict[NodeId, MemberRecord]:
    """The members among `records`; one that says impossible numbers says nothing."""
    return {
        record.owner: record.payload
        for record in records
        if isinstance(record.payload, MemberRecord) and plausible(record.payload, now_unix)
    }


def plausible(member: MemberRecord, now_unix: float) -> bool:
    """Whether what a stranger says of itself can be shown and reckoned with."""
    rates = (member.loss, member.images_per_s, member.up_bytes_per_s, member.down_bytes_per_s)
    return (
        0 <= member.step <= member.total_steps <= MAX_COUNT
        and all(0 <= rate <= MAX_COUNT for rate in rates)
        and abs(now_unix - member.updated_unix) <= MAX_SKEW_S
    )


def going_on_order(found: Sequence[Candidate], limit: int) -> list[Candidate]:
    """The first `limit` of `found` in the order in which a successor tries to go on from them."""
    left = list(found)
    ordered: list[Candidate] = []
    while left and len(ordered) < limit:
        newest = newest_candidate(left)
        left.remove(newest)
        ordered.append(newest)
    return ordered


def newest_candidate(found: Sequence[Candidate]) -> Candidate:
    """The one of `found` (not empty) that a successor goes on from."""
    newest = newest_statement(candidate.statement for candidate in found)
    return next(candidate for candidate in found if candidate.statement == newest)


def candidates(
    records: Sequence[Record], signed: SignedManifest, role: Role, rejected: Collection[bytes] = ()
) -> tuple[Candidate, ...]:
    """The announced checkpoints of `role` that fit the run, best first; forged statements are dropped."""
    holders: dict[bytes, set[NodeId]] = {}
    for record in records[:MAX_RECORDS_PER_KEY]:
        if isinstance(record.payload, AnnounceRecord) and record.payload.statement not in rejected:
            holders.setdefault(record.payload.statement, set()).add(record.owner)
    by_statement: dict[CheckpointStatement, bytes] = {}
    for data in holders:
        try:
            statement = check_statement(data)
        except RemoteProtocolError:
            continue
        by_statement[statement] = data
    ordered = choose_checkpoint(by_statement, signed, role)
    return tuple(Candidate(s, by_statement[s], frozenset(holders[by_statement[s]])) for s in ordered)


def take_snapshot(observation: Observation, signed: SignedManifest) -> Snapshot:
    """Reduce an observation to what people and scripts want to see."""
    manifest, view = signed.manifest, observation.view
    statuses = role_states(manifest.roles, view)
    lines = tuple(_role_line(statuses[role], manifest.training(role)) for role in manifest.roles)
    members = tuple(sorted((peer_id_text(node), record) for node, record in view.members.items()))
    return Snapshot(signed.run_id.hex(), manifest.name, lines, members, view.now_unix)


def _role_line(status: RoleStatus, training: Training) -> RoleLine:
    best = status.statement
    loss = status.loss if status.loss is not None or best is None else best.heldout_loss
    rate = status.images_per_s or None  # a stranger's word: it may be any positive number
    left = (status.total_steps or training.steps) - status.step
    return RoleLine(
        role=status.role,
        state=status.state.value,
        holder=status.holder,
        term=status.term,
        step=status.step,
        total_steps=status.total_steps or training.steps,
        announced_step=best.step if best else 0,
        age_s=_sensible(status.age_s),
        loss=loss,
        images_per_s=rate,
        eta_s=_sensible(left * training.batch_size / rate if rate else None),
        content_id=best.weights.info_hash.hex() if best else None,
        providers=status.providers,
    )


def _sensible(seconds: float | None) -> float | None:
    return seconds if seconds is not None and math.isfinite(seconds) and 0 <= seconds <= LONGEST_S else None


def _role_json(line: RoleLine) -> dict[str, Any]:
    return {
        "role": line.role,
        "state": line.state,
        "holder": peer_id_text(line.holder) if line.holder else None,
        "term": line.term,
        "step": line.step,
        "total_steps": line.total_steps,
        "announced_step": line.announced_step,
        "age_s": None if line.age_s is None else round(line.age_s, 1),
        "loss": line.loss,
        "images_per_s": line.images_per_s,
        "eta_s": None if line.eta_s is None else round(line.eta_s, 1),
        "content_id": line.content_id,
        "providers": line.providers,
    }


def _member_json(peer: str, record: MemberRecord, now_unix: float) -> dict[str, Any]:
    return {
        "peer": peer,
        "activity": record.activity,
        "role": record.role or None,
        "up_bytes_per_s": record.up_bytes_per_s,
        "down_bytes_per_s": record.down_bytes_per_s,
        "age_s": round(max(0.0, now_unix - record.updated_unix), 1),
    }
