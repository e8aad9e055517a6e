"""Who may claim roles and speak about checkpoints: pure rules over a manifest and passes.

Owns: the answer to "may this node?", for claims, statements and attestations alike. Does not own: a pass's
bytes (`wire.access_pass`), holding and serving content (open to everybody).
"""

from collections.abc import Iterable

from paris_p2p.errors import ConfigError, RemoteProtocolError
from paris_p2p.ids import NodeId
from paris_p2p.wire.access_pass import check_pass
from paris_p2p.wire.manifest import Manifest, SignedManifest
from paris_p2p.wire.records import AttestRecord, ClaimRecord, Record


def may_claim(run: SignedManifest, node: NodeId, access: bytes, at_unix: float) -> bool:
    """Whether `node`, showing the pass `access` (b"": none), could claim roles of the run at `at_unix`.

    Everybody in an open run. In a restricted one the organiser, the manifest's claimants, and whoever has the
    organiser's pass that had not expired then.
    """
    manifest = run.manifest
    if is_named(manifest, node):
        return True
    if not access:
        return False
    try:
        leave = check_pass(access, run.run_id, node, manifest.organiser)
    except RemoteProtocolError:
        return False
    return at_unix < leave.expires_unix


def is_named(manifest: Manifest, node: NodeId) -> bool:
    """Whether `node` needs no pass."""
    return not manifest.restricted or node == manifest.organiser or node in manifest.claimants


def admitted(run: SignedManifest, records: Iterable[Record], now_unix: float) -> list[Record]:
    """The claims and attestations among `records` whose owners may make them now."""
    if not run.manifest.restricted:
        return list(records)
    return [
        record
        for record in records
        if isinstance(record.payload, ClaimRecord | AttestRecord)
        and may_claim(run, record.owner, record.payload.access, now_unix)
    ]


def check_own_access(run: SignedManifest, node: NodeId, access: bytes, now_unix: float) -> str | None:
    """Why `node` cannot claim roles here with the pass it was given, or None. Raises `ConfigError` for a pass
    that is not for this run and node: a node given one wants to claim."""
    if is_named(run.manifest, node):
        return None
    if not access:
        return "the run is restricted, and this node's key is not among those that may claim roles"
    try:
        leave = check_pass(access, run.run_id, node, run.manifest.organiser)
    except RemoteProtocolError as error:
        raise ConfigError(f"{error}: ask the organiser for one with this node's peer id") from None
    if now_unix >= leave.expires_unix:
        raise ConfigError("the pass has expired: ask the organiser for a new one")
    return None
