"""What is known of a run at one moment, as plain values: the source of `status` in every form.

Owns: reading a run's records from the DHT into an `Observation`, and its reduction to a `Snapshot`.
Does not own: drawing (`views`), deciding (`core`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paris_p2p import clock
from paris_p2p.core.accept import order_checkpoints
from paris_p2p.core.assignment import RoleStatus, role_states
from paris_p2p.core.lease import SeenClaim, View
from paris_p2p.dht.client import Dht
from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import NodeId, Role
from paris_p2p.wire.checkpoint import CheckpointStatement, check_statement
from paris_p2p.wire.identity import peer_id_text
from paris_p2p.wire.manifest import SignedManifest
from paris_p2p.wire.records import AnnounceRecord, ClaimRecord, MemberRecord, Record, role_scope

MAX_RECORDS_PER_KEY = 2048


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint somebody announces: the statement, its signed bytes, and who holds it whole."""

    statement: CheckpointStatement
    data: bytes
    providers: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class Observation:
    """A run's live records. `candidates`: a role's announced checkpoints, best first."""

    now_unix: float
    claims: Mapping[Role, Sequence[SeenClaim]]
    candidates: Mapping[Role, Sequence[Candidate]]
    members: Mapping[NodeId, MemberRecord]

    def best(self, role: Role) -> CheckpointStatement | None:
        """The best announced checkpoint of `role`."""
        found = self.candidates.get(role, ())
        return found[0].statement if found else None

    def view(self, store_time_s: float = 0.0) -> View:
        """What the lease machine looks at."""
        best = {role: self.best(role) for role in self.claims}
        return View(self.now_unix, self.claims, best, store_time_s)

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


async def observe(dht: Dht, signed: SignedManifest) -> Observation:
    """Read every live record of the run."""
    roles = signed.manifest.roles
    keys = [("claim", role_scope(signed.run_id, role)) for role in roles]
    keys += [("announce", role_scope(signed.run_id, role)) for role in roles]
    answers = await dht.read_many([*keys, ("member", signed.run_id)])
    claims = dict(zip(roles, answers[: len(roles)], strict=True))
    announced = dict(zip(roles, answers[len(roles) : -1], strict=True))
    return Observation(
        clock.unix(),
        {role: seen_claims(records) for role, records in claims.items()},
        {role: candidates(records, signed, role) for role, records in announced.items()},
        {r.owner: r.payload for r in answers[-1] if isinstance(r.payload, MemberRecord)},
    )


def seen_claims(records: Iterable[Record]) -> tuple[SeenClaim, ...]:
    """Claim records as the lease machine sees them."""
    return tuple(
        SeenClaim(r.owner, r.payload.state, r.payload.term, r.payload.since_unix, r.expiration_unix)
        for r in records
        if isinstance(r.payload, ClaimRecord)
    )


def candidates(records: Sequence[Record], signed: SignedManifest, role: Role) -> tuple[Candidate, ...]:
    """The announced checkpoints of `role` that fit the run, best first; forged statements are dropped."""
    holders: dict[bytes, set[NodeId]] = {}
    for record in records[:MAX_RECORDS_PER_KEY]:
        if isinstance(record.payload, AnnounceRecord):
            holders.setdefault(record.payload.statement, set()).add(record.owner)
    by_statement: dict[CheckpointStatement, bytes] = {}
    for data in holders:
        try:
            statement = check_statement(data)
        except RemoteProtocolError:
            continue
        if statement.run_id == signed.run_id and statement.role == role:
            by_statement[statement] = data
    ordered = order_checkpoints(list(by_statement), signed.manifest, role)
    return tuple(Candidate(s, by_statement[s], frozenset(holders[by_statement[s]])) for s in ordered)


def take_snapshot(observation: Observation, signed: SignedManifest) -> Snapshot:
    """Reduce an observation to what people and scripts want to see."""
    manifest = signed.manifest
    statuses = role_states(observation.view(), {r: manifest.training(r).steps for r in manifest.roles})
    lines = tuple(_role_line(statuses[role], observation, manifest.training(role).batch_size)
                  for role in manifest.roles)
    members = tuple(sorted((peer_id_text(node), record) for node, record in observation.members.items()))
    return Snapshot(signed.run_id.hex(), manifest.name, lines, members, observation.now_unix)


def _role_line(status: RoleStatus, observation: Observation, batch_size: int) -> RoleLine:
    progress = _progress(status, observation)
    found = observation.candidates[status.role]
    best = found[0] if found else None
    step = max(progress.step if progress else 0, status.step)
    left = status.total_steps - step
    rate = progress.images_per_s if progress and progress.images_per_s > 0 else None
    training = progress is not None and status.state in ("claimed", "training")
    return RoleLine(
        role=status.role,
        state="training" if training and progress and progress.activity == "training" else status.state,
        holder=status.holder or (best.statement.holder if best else None),
        term=status.term,
        step=step,
        total_steps=status.total_steps,
        announced_step=best.statement.step if best else 0,
        age_s=_age(progress, best, observation.now_unix),
        loss=progress.loss if progress and step else (best.statement.heldout_loss if best else None),
        images_per_s=rate if training else None,
        eta_s=left * batch_size / rate if training and rate else None,
        content_id=best.statement.weights.info_hash.hex() if best else None,
        providers=len(best.providers) if best else 0,
    )


def _progress(status: RoleStatus, observation: Observation) -> MemberRecord | None:
    """What the role's holder says of itself, while it speaks of this role and term."""
    member = observation.members.get(status.holder) if status.holder else None
    if member is None or member.role != status.role or member.term != status.term:
        return None
    return member


def _age(progress: MemberRecord | None, best: Candidate | None, now_unix: float) -> float | None:
    if progress is not None:
        return max(0.0, now_unix - progress.updated_unix)
    return max(0.0, now_unix - best.statement.created_unix) if best else None


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
