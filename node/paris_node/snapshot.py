"""What is known of a run at one moment, as plain values: the source of `status` in every form.

Owns: reading a run's records from the DHT into an `Observation`, and its reduction to a `Snapshot`.
Does not own: drawing (`views`), deciding (`core`).
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paris_node.announcer import PROVIDE_TTL_S, is_overdue
from paris_node.judging import (
    NOTHING_KNOWN,
    Candidate,
    Known,
    Met,
    attestations,
    candidates,
    countable,
    heard_first,
    holder,
    jury,
    newest_candidate,
    verify_new,
    vouched_by,
)
from paris_p2p import clock
from paris_p2p.core.accept import Attestation
from paris_p2p.core.access import admitted
from paris_p2p.core.assignment import (
    RoleState,
    RoleStatus,
    SeenClaim,
    View,
    honoured,
    role_states,
    seen_claims,
)
from paris_p2p.core.conduct import Conduct
from paris_p2p.core.safety import safe_checkpoint
from paris_p2p.dht.client import Dht
from paris_p2p.errors import TransportError
from paris_p2p.ids import ROUTER, NodeId, Role
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.identity import peer_id_text
from paris_p2p.wire.manifest import Manifest, SignedManifest
from paris_p2p.wire.records import MemberRecord, Record, role_scope
from paris_p2p.wire.terms import term_number

log = logging.getLogger(__name__)

STALE_S = 1.0
"""What was read longer ago is read again before it is judged: claims last seconds."""
MEMBERS_KEPT_S = 60.0
"""Where the members cannot be read in time, those read so long ago are still taken for the run's."""
MAX_COUNT = 1 << 50
"""Steps, rates and losses beyond this are a stranger's joke."""
MAX_SKEW_S = 3600.0
"""A membership said longer ago, or further ahead, than this cannot be live: its record would have expired."""
LONGEST_S = 10.0 * 365 * 86_400
"""Ages and times left beyond this are shown as unknown."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A run's live records. `candidates`: a role's announced checkpoints, credible and best for use first;
    `newest`: the one the run goes by (`judging.countable`), where there is one; `safe`: the newest that
    enough others hold; `view`: what the lease machine sees; `overdue`: who should have announced a role's
    checkpoint again, and did not."""

    view: View
    candidates: Mapping[Role, Sequence[Candidate]]
    newest: Mapping[Role, Candidate]
    safe: Mapping[Role, CheckpointStatement]
    overdue: Mapping[Role, frozenset[NodeId]] = field(default_factory=dict)

    def best(self, role: Role) -> CheckpointStatement | None:
        """The best announced checkpoint of `role`."""
        found = self.candidates.get(role)
        return found[0].statement if found else None

    def finished(self, roles: Iterable[Role]) -> bool:
        """Whether every role has a finished checkpoint that was checked by this node or enough others."""
        newest = [self.newest.get(role) for role in roles]
        return all(one is not None and one.statement.finished and one.credible for one in newest)


@dataclass(frozen=True, slots=True)
class RoleLine:
    """One row of the status table. Ages and times in seconds; `None` where nothing is known.

    `announced_step`, `content_id`, `providers`: of the checkpoint the run goes by. It was made by `made_by`
    in term `made_in`, going on from the resume item `parent` (hex), if any; `checked`: whether it is more
    than its signer's word; `checked_by` witnesses found it good, with a held-out loss of `measured_loss` if
    they measured. `safe_step`: of the newest checkpoint that enough others hold. `overdue`: the providers
    that should have announced it again by now. `loss`: in training, as its holder says; `heldout_loss`: of
    that checkpoint, as its maker says. `variant`: the kind of expert it is, or must become; None where the
    run has one kind only, and where it is open.
    """

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
    safe_step: int = 0
    checked: bool = False
    checked_by: int = 0
    measured_loss: float | None = None
    made_by: NodeId | None = None
    made_in: int = 0
    parent: str | None = None
    overdue: int = 0
    variant: str | None = None
    heldout_loss: float | None = None


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


async def observe(
    dht: Dht,
    signed: SignedManifest,
    *,
    known: Known = NOTHING_KNOWN,
    met: Met | None = None,
    whole: bool = False,
    roles: Sequence[Role] | None = None,
    patience_s: float = math.inf,
) -> Observation:
    """Read the live records of the run, and judge what strangers say by what this node knows itself.

    Of `roles` only (default: all), and without those whose claims, announcements or attestations take longer
    than `patience_s` to read: what was not read is not empty. Raises `TransportError` where the members were
    not read, now or lately.

    `met`: what the same reader's last observations verified. Without it, of roles that it does not know yet,
    and with `whole`, everything announced is verified: that takes seconds when there are thousands. Otherwise
    a little of what is new is.
    """
    roles = signed.manifest.roles if roles is None else roles
    met = Met() if met is None else met
    dht.vouch_for((signed.manifest.organiser, *signed.manifest.claimants))
    reading = await _read_run(dht, signed, roles, patience_s, met, known.me)
    began = clock.monotonic()
    await reading.verify(signed, met, whole)
    if clock.monotonic() - began > STALE_S:
        reading = await _read_run(dht, signed, roles, patience_s, met, known.me)
        await reading.verify(signed, met, False)
    now_unix, claims, shown = reading.now_unix, reading.claims, reading.announced
    words = jury(signed, reading.members, known)
    found = {
        role: candidates(signed, role, shown[role], met, reading.said[role], words, known) for role in claims
    }
    honest = honoured(claims, now_unix, signed.manifest.max_roles_per_node)
    overdue = {role: _overdue(records, now_unix) for role, records in shown.items()}
    return replace(_observation(signed, honest, found, reading.members, now_unix), overdue=overdue)


@dataclass(frozen=True, slots=True)
class _Reading:
    """A run's records as read at one moment. `claims`, `announced` and `said` lack the roles of which any key
    was not read."""

    now_unix: float
    members: Mapping[NodeId, MemberRecord]
    claims: Mapping[Role, Sequence[SeenClaim]]
    announced: Mapping[Role, Sequence[Record]]
    said: Mapping[Role, Mapping[bytes, Sequence[Attestation]]]

    async def verify(self, signed: SignedManifest, met: Met, whole: bool) -> None:
        """`judging.verify_new` of what is announced."""
        first = heard_first(signed, self.claims, self.now_unix)
        vouched = {
            digest for said in self.said.values() for digest in vouched_by(signed.manifest.organiser, said)
        }
        await verify_new(
            signed, self.announced, met, first=first, vouched=vouched, salt=self.now_unix, whole=whole
        )


async def _read_run(
    dht: Dht,
    signed: SignedManifest,
    roles: Sequence[Role],
    patience_s: float,
    met: Met,
    me: NodeId | None,
) -> _Reading:
    kinds = ("claim", "announce", "attest")
    keys = [(kind, role_scope(signed.run_id, role)) for kind in kinds for role in roles]
    answers = await _read([*keys, ("member", signed.run_id)], dht, patience_s)
    by_role = zip(roles, *(answers[n * len(roles) : (n + 1) * len(roles)] for n in range(3)), strict=True)
    whole = {
        role: (claimed, announced, attested)
        for role, claimed, announced, attested in by_role
        if claimed is not None and announced is not None and attested is not None
    }
    now_unix = clock.unix()
    lease = signed.manifest.lease
    claims = {
        role: seen_claims(role, admitted(signed, claimed, now_unix), lease, now_unix)
        for role, (claimed, _, _) in whole.items()
    }
    return _Reading(
        now_unix,
        _current_members(answers[-1], met, now_unix),
        _heard(signed.manifest, claims, now_unix, met.conduct, me),
        {role: announced for role, (_, announced, _) in whole.items()},
        {role: attestations(signed, attested, now_unix) for role, (_, _, attested) in whole.items()},
    )


def _heard(
    manifest: Manifest,
    claims: Mapping[Role, Sequence[SeenClaim]],
    now_unix: float,
    conduct: Conduct,
    me: NodeId | None,
) -> Mapping[Role, Sequence[SeenClaim]]:
    """The claims without those of keys that take held roles over again and again: for whatever follows."""
    ttl_s, limit = manifest.lease.ttl_s, manifest.max_roles_per_node
    heard = conduct.hear(claims, now_unix, me=me, ttl_s=ttl_s, max_roles=limit)
    for owner, role in heard.news:
        text = "%s takes one held role after the other, %s now: it is not heard there for a while"
        log.warning(text, peer_id_text(owner), role)
    return heard.claims


def _current_members(
    records: list[Record] | None, met: Met, now_unix: float
) -> Mapping[NodeId, MemberRecord]:
    """The members that were read now or else lately: how many must vouch for a checkpoint depends on them,
    and nobody is needed where there seems to be nobody."""
    if records is not None:
        met.members = (now_unix, _members(records, now_unix))
    read_unix, members = met.members
    if not 0 <= now_unix - read_unix <= MEMBERS_KEPT_S:
        raise TransportError("the members of the run could not be read in time")
    return members


def _overdue(records: Iterable[Record], now_unix: float) -> frozenset[NodeId]:
    return frozenset(one.owner for one in records if is_overdue(one.expiration_unix, PROVIDE_TTL_S, now_unix))


async def _read(
    keys: Sequence[tuple[str, bytes]], dht: Dht, patience_s: float
) -> Sequence[list[Record] | None]:
    if math.isinf(patience_s):
        return await dht.read_many(keys)
    return await dht.read_some(keys, patience_s=patience_s)


def _observation(
    signed: SignedManifest,
    claims: Mapping[Role, Sequence[SeenClaim]],
    found: Mapping[Role, Sequence[Candidate]],
    members: Mapping[NodeId, MemberRecord],
    now_unix: float,
) -> Observation:
    counting = {role: countable(role, some, claims[role], now_unix) for role, some in found.items()}
    manifest = signed.manifest
    interval = manifest.recipe.checkpoint_interval_steps
    holders = {role: holder(role, claims[role], now_unix) for role in counting}
    newest = {
        role: newest_candidate(some, within_steps=interval, leader=holders[role])
        for role, some in counting.items()
        if some
    }
    safe = {
        role: safe_checkpoint(
            [one.held for one in some],
            members,
            manifest.replicas,
            within_steps=interval,
            leader=holders[role],
        )
        for role, some in counting.items()
    }
    view = View(
        now_unix=now_unix,
        claims=claims,
        statements={role: candidate.statement for role, candidate in newest.items()},
        members=members,
        providers={role: candidate.providers for role, candidate in newest.items()},
    )
    kept = {role: statement for role, statement in safe.items() if statement is not None}
    return Observation(view, found, newest, kept)


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


def take_snapshot(observation: Observation, signed: SignedManifest) -> Snapshot:
    """Reduce an observation to what people and scripts want to see."""
    manifest, view = signed.manifest, observation.view
    statuses = role_states(manifest.roles, view)
    lines = tuple(_role_line(statuses[role], observation, manifest) for role in manifest.roles)
    members = tuple(sorted((peer_id_text(node), record) for node, record in view.members.items()))
    return Snapshot(signed.run_id.hex(), manifest.name, lines, members, view.now_unix)


def _role_line(status: RoleStatus, observation: Observation, manifest: Manifest) -> RoleLine:
    best = status.statement
    training = manifest.training(status.role, best.variant if best else None)
    newest, safe = observation.newest.get(status.role), observation.safe.get(status.role)
    checked, finished = newest is not None and newest.credible, status.state is RoleState.FINISHED
    begun = bool(status.images_per_s)  # else it has resumed, and reported no step yet
    rate = status.images_per_s or None  # a stranger's word: it may be any positive number
    left = (status.total_steps or training.steps) - status.step
    return RoleLine(
        role=status.role,
        state="checking" if finished and not checked else status.state.value,
        holder=status.holder,
        term=term_number(status.term),
        step=status.step,
        total_steps=status.total_steps or training.steps,
        announced_step=best.step if best else 0,
        age_s=_sensible(status.age_s),
        loss=status.loss if begun else None,
        images_per_s=rate,
        eta_s=_sensible(left * training.batch_size / rate if rate else None),
        content_id=best.weights.info_hash.hex() if best else None,
        providers=status.providers,
        safe_step=safe.step if safe else 0,
        checked=checked,
        checked_by=len(newest.witnesses) if newest else 0,
        measured_loss=newest.measured if newest else None,
        made_by=best.holder if best else None,
        made_in=term_number(best.term) if best else 0,
        parent=best.parent.hex() if best and best.parent else None,
        overdue=len(newest.providers & observation.overdue.get(status.role, frozenset())) if newest else 0,
        variant=_variant(status.role, best, manifest),
        heldout_loss=best.heldout_loss if best else None,
    )


def _variant(role: Role, best: CheckpointStatement | None, manifest: Manifest) -> str | None:
    kinds, allowed = manifest.recipe.experts, manifest.variants(role)
    if role == ROUTER or len(kinds) == 1 or (best is None and len(allowed) > 1):
        return None
    return kinds[allowed[0] if best is None else best.variant].name


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
        "loss": line.heldout_loss if line.loss is None else line.loss,
        "training_loss": line.loss,
        "heldout_loss": line.heldout_loss,
        "images_per_s": line.images_per_s,
        "eta_s": None if line.eta_s is None else round(line.eta_s, 1),
        "content_id": line.content_id,
        "providers": line.providers,
        "overdue": line.overdue,
        "safe_step": line.safe_step,
        "checked": line.checked,
        "checked_by": line.checked_by,
        "measured_loss": line.measured_loss,
        "made_by": peer_id_text(line.made_by) if line.made_by else None,
        "made_in_term": line.made_in,
        "parent": line.parent,
        "variant": line.variant,
    }


def _member_json(peer: str, record: MemberRecord, now_unix: float) -> dict[str, Any]:
    return {
        "peer": peer,
        "activity": record.activity,
        "role": record.role or None,
        "reach": record.reach or None,
        "up_bytes_per_s": record.up_bytes_per_s,
        "down_bytes_per_s": record.down_bytes_per_s,
        "age_s": round(max(0.0, now_unix - record.updated_unix), 1),
    }
