"""Signed DHT records: kinds, keys, payloads, limits, signing and the acceptance rule.

Every record lives under (key, subkey): the key says what it is about, the subkey is the 32-byte key of
the node that owns it. A record carries a signature over kind, scope, subkey, payload and expiration;
whoever stores or reads it applies `check_record`. Nothing else may be stored under any key.
Does not own: the DHT itself (`dht`).
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Any

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError
from paris_p2p.ids import NodeId, Role, RunId, Term
from paris_p2p.wire import canonical
from paris_p2p.wire.access_pass import MAX_PASS_BYTES
from paris_p2p.wire.addresses import MAX_ADDRESS_CHARS as MAX_ADDRESS_CHARS
from paris_p2p.wire.addresses import MAX_ADDRESSES as MAX_ADDRESSES
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import NODE_ID_BYTES, SIGNATURE_BYTES, Identity, verify
from paris_p2p.wire.terms import MAX_TERM

PROTOCOL_VERSION = 1
MAX_RECORD_BYTES = 1024
MAX_CHECKS = 8
"""In one attestation; with a pass it still fits the cap."""
CLOCK_TOLERANCE_S = 5.0
CACHED_RECORDS = 8192
"""Verified records remembered: at most 1.5 KiB each."""
_CONTEXT = "paris-p2p record 1"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Kind `run`, scope empty: this run exists, here is its signed manifest."""

    name: str
    run_id: RunId
    manifest: ContentRef

    def __post_init__(self) -> None:
        if len(self.run_id) != 32 or not 1 <= len(self.name) <= 64:
            raise ValueError("run_id or name out of range")


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """Kind `member`, scope run id: a node takes part in a run, and what it is doing.

    `activity`: `joining`, `fetching`, `training`, `disk full` (it trains, and cannot keep its checkpoints),
    `seeding`, `publishing`, `leaving`. `role` is empty when it holds none. `step` of `total_steps` with
    training `loss` and `images_per_s`; rates in bytes/s. `reach`: how others get through to it (`direct`,
    `mapped`, `punched`, `relayed`, `outbound-only`), empty: unknown.
    """

    addresses: tuple[str, ...]
    activity: str
    role: Role
    term: Term
    step: int
    total_steps: int
    loss: float
    images_per_s: float
    up_bytes_per_s: int
    down_bytes_per_s: int
    updated_unix: float
    reach: str = canonical.optional("")

    def __post_init__(self) -> None:
        _check_addresses(self.addresses)
        if max(len(self.activity), len(self.role), len(self.reach)) > 16:
            raise ValueError("activity, role or reach too long")


@dataclass(frozen=True, slots=True)
class ClaimRecord:
    """Kind `claim`, scope run id + role. `state`: `bid`, `hold`, or `released` (a tombstone).

    `since_unix`: when this node first wrote its bid for this term; `term`: the fencing token (`wire.terms`);
    `access`: in a restricted run the owner's pass (`wire.access_pass`), if it needs one.
    """

    state: str
    term: Term
    since_unix: float
    access: bytes = canonical.optional(b"")

    def __post_init__(self) -> None:
        _check_access(self.access)
        if self.state not in ("bid", "hold", "released") or not 1 <= self.term <= MAX_TERM:
            raise ValueError("claim state or term out of range")


@dataclass(frozen=True, slots=True)
class AnnounceRecord:
    """Kind `announce`, scope run id + role: the owner of this record holds the checkpoint of `statement`
    (a signed `CheckpointStatement`, possibly another node's) and serves it at `addresses`. `access`: the pass
    of the statement's holder, if the run is restricted and it needs one."""

    statement: bytes
    addresses: tuple[str, ...]
    access: bytes = canonical.optional(b"")

    def __post_init__(self) -> None:
        _check_addresses(self.addresses)
        _check_access(self.access)


@dataclass(frozen=True, slots=True)
class Check:
    """What the owner of an `AttestRecord` found. `statement`: SHA-256 of the signed statement's bytes;
    `good`: whether the weights are what the recipe asks for; `loss`: their held-out loss, if measured."""

    statement: bytes
    good: bool
    loss: float | None

    def __post_init__(self) -> None:
        if len(self.statement) != 32:
            raise ValueError("a statement's digest is 32 bytes")
        if self.loss is not None and not 0 <= self.loss < math.inf:
            raise ValueError("loss is not a loss")


@dataclass(frozen=True, slots=True)
class AttestRecord:
    """Kind `attest`, scope run id + role: the owner fetched these checkpoints and checked them itself, newest
    last. `access`: the owner's pass, if the run is restricted and it needs one."""

    checks: tuple[Check, ...]
    access: bytes = canonical.optional(b"")

    def __post_init__(self) -> None:
        if len(self.checks) > MAX_CHECKS:
            raise ValueError("too many checks")
        _check_access(self.access)


@dataclass(frozen=True, slots=True)
class ProvideRecord:
    """Kind `provide`, scope info-hash: the owner serves the item (all of it when `complete`)."""

    complete: bool
    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_addresses(self.addresses)


@dataclass(frozen=True, slots=True)
class RelayRecord:
    """Kind `relay`, scope empty: the owner dials others back, and may relay for those that cannot be
    dialled, at `addresses` (direct TLS)."""

    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_addresses(self.addresses)


Payload = RunRecord | MemberRecord | ClaimRecord | AnnounceRecord | AttestRecord | ProvideRecord | RelayRecord


@dataclass(frozen=True, slots=True)
class Kind:
    """A record kind: its payload type and the longest time ahead (seconds) it may expire."""

    payload: type[Any]
    max_ttl_s: float


KINDS: dict[str, Kind] = {
    "run": Kind(RunRecord, 3600.0),
    "member": Kind(MemberRecord, 600.0),
    "claim": Kind(ClaimRecord, 3600.0),
    "announce": Kind(AnnounceRecord, 86_400.0),
    "attest": Kind(AttestRecord, 3600.0),
    "provide": Kind(ProvideRecord, 3600.0),
    "relay": Kind(RelayRecord, 3600.0),
}
KIND_OF: dict[type[Any], str] = {kind.payload: name for name, kind in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Record:
    """A checked record: who says what, about what, until when (unix seconds)."""

    kind: str
    scope: bytes
    owner: NodeId
    payload: Payload
    expiration_unix: float


@dataclass(frozen=True, slots=True)
class SignedRecord:
    """What is handed to the DHT: `key` (hashed by it), `subkey`, `value`, expiry in unix seconds."""

    key: bytes
    subkey: NodeId
    value: bytes
    expiration_unix: float


@dataclass(frozen=True, slots=True)
class _Envelope:
    kind: str
    scope: bytes
    payload: bytes
    signature: bytes


def role_scope(run_id: RunId, role: Role) -> bytes:
    """The scope of claims and announcements: run id followed by the role's name."""
    return run_id + role.encode()


def record_key(kind: str, scope: bytes) -> bytes:
    """The DHT key (before the DHT's own hashing) of records of `kind` about `scope`."""
    return f"paris-p2p/{PROTOCOL_VERSION}/{kind}/".encode() + scope


def key_id(key: bytes) -> bytes:
    """The 20-byte id under which hivemind's DHT files `key`: SHA-1 of the key's bytes."""
    return hashlib.sha1(key, usedforsecurity=False).digest()


def _signed_bytes(kind: str, scope: bytes, owner: NodeId, payload: bytes, expiration_unix: float) -> bytes:
    return canonical.pack([_CONTEXT, kind, scope, owner, payload, float(expiration_unix)])


def sign_record(identity: Identity, payload: Payload, scope: bytes, expiration_unix: float) -> SignedRecord:
    """A record of `identity` about `scope`, good until `expiration_unix`.

    Raises `LocalProtocolError` when it would be over the cap, and so be refused by every node.
    """
    kind = KIND_OF[type(payload)]
    body = canonical.encode(payload)
    signature = identity.sign(_signed_bytes(kind, scope, identity.node_id, body, expiration_unix))
    value = canonical.encode(_Envelope(kind, scope, body, signature))
    if len(value) > MAX_RECORD_BYTES:
        raise LocalProtocolError(f"{kind} record of {len(value)} bytes: the cap is {MAX_RECORD_BYTES}")
    return SignedRecord(record_key(kind, scope), identity.node_id, value, float(expiration_unix))


def check_record(
    dht_id: bytes, subkey: bytes, value: bytes, expiration_unix: float, now_unix: float
) -> Record:
    """The record, if it may stand at `dht_id` (20 bytes) under `subkey`; else `RemoteProtocolError`.

    Refuses: ownerless or foreign subkeys, values over the cap, unknown kinds, a record moved to another
    key, an expiry further ahead than its kind allows (plus `CLOCK_TOLERANCE_S`), a wrong signature,
    a malformed payload. Whether it has already expired is the caller's to judge.

    What was found good once is not verified again while it is among the last `CACHED_RECORDS`: a reader sees
    the same records every few seconds, and a signature costs 0.2 ms of the event loop.
    """
    record = _verified(bytes(dht_id), bytes(subkey), bytes(value), float(expiration_unix))
    latest = now_unix + KINDS[record.kind].max_ttl_s + CLOCK_TOLERANCE_S
    if not expiration_unix <= latest:
        raise RemoteProtocolError("the record expires further ahead than its kind allows")
    return record


@functools.lru_cache(maxsize=CACHED_RECORDS)
def _verified(dht_id: bytes, subkey: bytes, value: bytes, expiration_unix: float) -> Record:
    """`check_record` as far as it does not depend on the time."""
    if len(subkey) != NODE_ID_BYTES:
        raise RemoteProtocolError("the record has no owner: its subkey is not a node's key")
    envelope = canonical.decode(_Envelope, value, MAX_RECORD_BYTES)
    kind = KINDS.get(envelope.kind)
    if kind is None:
        raise RemoteProtocolError("the record is of an unknown kind")
    if key_id(record_key(envelope.kind, envelope.scope)) != dht_id:
        raise RemoteProtocolError("the record belongs to another key")
    if not math.isfinite(expiration_unix):  # NaN and infinities cannot be signed
        raise RemoteProtocolError("the record expires further ahead than its kind allows")
    owner = NodeId(subkey)
    signed = _signed_bytes(envelope.kind, envelope.scope, owner, envelope.payload, expiration_unix)
    if len(envelope.signature) != SIGNATURE_BYTES or not verify(owner, signed, envelope.signature):
        raise RemoteProtocolError("the record's signature is not its owner's")
    payload = canonical.decode(kind.payload, envelope.payload, MAX_RECORD_BYTES)
    return Record(envelope.kind, envelope.scope, owner, payload, expiration_unix)


def _check_access(access: bytes) -> None:
    if len(access) > MAX_PASS_BYTES:
        raise ValueError("the pass is too long")


def _check_addresses(addresses: tuple[str, ...]) -> None:
    if len(addresses) > MAX_ADDRESSES or any(len(text) > MAX_ADDRESS_CHARS for text in addresses):
        raise ValueError("too many or too long addresses")
