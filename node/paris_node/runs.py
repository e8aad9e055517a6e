"""Finding a run: from the DHT's announcements, or from what this home remembers.

Owns: choosing among announced runs, fetching and checking the manifest. Strangers can announce anything:
the manifest is bound to its run id by its hash and to its organiser by its signature.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

import trio

from paris_node.network import Network
from paris_node.text import printable
from paris_p2p import clock
from paris_p2p.errors import (
    ConfigError,
    ManifestError,
    NetworkError,
    RemoteProtocolError,
    TransportError,
)
from paris_p2p.ids import RunId
from paris_p2p.store.durable import disk, write_atomic
from paris_p2p.store.home import Home
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import MAX_MANIFEST_BYTES, SignedManifest, check_manifest
from paris_p2p.wire.records import MAX_ADDRESS_CHARS, MAX_ADDRESSES, ProvideRecord, RunRecord, sign_record

log = logging.getLogger(__name__)

FIND_DEADLINE_S = 10.0
FETCH_STALL_S = 20.0
FETCH_TTL_S = 60.0
MANIFEST_FILE = "manifest.paris"
MAX_LISTED = 10
MANIFEST_TRIES = 4
"""Strangers can name any item as a run's manifest: so many are tried, the most often announced first."""


def matching(records: Sequence[RunRecord], selector: str | None) -> list[RunRecord]:
    """The announced runs that `selector` (id, beginning of an id, or name; None: any) means."""
    if selector is None:
        return list(records)
    by_id = [r for r in records if len(selector) >= 6 and r.run_id.hex().startswith(selector.lower())]
    return by_id or [record for record in records if record.name == selector]


def choose(records: Sequence[RunRecord], selector: str | None) -> list[RunRecord]:
    """The records of the one run meant (several publishers may announce it); empty when none is.

    Raises `ConfigError` when several runs match.
    """
    found = matching(records, selector)
    runs = {record.run_id: record.name for record in found}
    if len(runs) > 1:
        listed = _listed(f"{printable(name)} ({run_id.hex()[:12]})" for run_id, name in sorted(runs.items()))
        raise ConfigError(f"several runs are announced: {listed}. Choose one with --run ID")
    return found


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - MAX_LISTED} more" if len(every) > MAX_LISTED else ""
    return ", ".join(every[:MAX_LISTED]) + more


async def find_run(network: Network, selector: str | None) -> SignedManifest:
    """The checked manifest of the run meant: from this home if a whole run id names one that is there (so
    that the run's members can come back when its publisher has gone), else through the swarm.

    Raises `NetworkError` when no such run is announced in time, `ConfigError` when several are.
    """
    remembered = _remembered(network.home, selector)
    if remembered is not None:
        return remembered
    deadline = clock.monotonic() + FIND_DEADLINE_S
    while True:
        records = await network.dht.read("run", b"")
        announced = [r.payload for r in records if isinstance(r.payload, RunRecord)]
        found = choose(announced, selector)
        if found:
            return await _fetch_manifest(network, found)
        if clock.monotonic() > deadline:
            raise NetworkError(_not_found(announced, selector))
        await trio.sleep(1.0)


def _remembered(home: Home, selector: str | None) -> SignedManifest | None:
    try:
        run_id = RunId(bytes.fromhex(selector or ""))
    except ValueError:
        return None
    return load_manifest(home, run_id) if len(run_id) == 32 else None


def _not_found(announced: Sequence[RunRecord], selector: str | None) -> str:
    if selector is None:
        return "the network answers, but nobody announces a run there: is `paris-node publish` running?"
    names = _listed(sorted({printable(record.name) for record in announced})) or "none"
    return f"no run {selector!r} is announced there (announced: {names})"


async def _tell_of_fetch(network: Network, ref: ContentRef) -> None:
    """Who has it may be unable to be dialled, and then dials whoever says that it is fetching."""
    addresses = tuple(a for a in network.swarm.addresses if len(a) <= MAX_ADDRESS_CHARS)[:MAX_ADDRESSES]
    record = ProvideRecord(False, addresses)
    signed = sign_record(network.identity, record, ref.info_hash, clock.unix() + FETCH_TTL_S)
    try:
        await network.dht.publish([signed])
    except TransportError as error:
        log.info("telling of a fetch: %s", error)


async def _fetch_manifest(network: Network, records: Sequence[RunRecord]) -> SignedManifest:
    run_id = records[0].run_id
    remembered = load_manifest(network.home, run_id)
    if remembered is not None:
        return remembered
    reasons = []
    announced = Counter(record.manifest for record in records)
    for ref, _ in announced.most_common(MANIFEST_TRIES):
        if ref.length > MAX_MANIFEST_BYTES:
            reasons.append("the announced manifest is too large")
            continue
        try:
            await _tell_of_fetch(network, ref)
            folder = await network.swarm.fetch(ref, stall_timeout_s=FETCH_STALL_S)
            signed = check_manifest(await trio.Path(folder / MANIFEST_FILE).read_bytes(), run_id)
        except (TransportError, RemoteProtocolError, ManifestError, OSError) as error:
            reasons.append(str(error))
            continue
        save_manifest(network.home, signed)
        return signed
    raise NetworkError(f"the run's manifest could not be had: {'; '.join(reasons)}")


def load_manifest(home: Home, run_id: RunId) -> SignedManifest | None:
    """The manifest this home keeps for `run_id`, if any; a damaged one counts as none."""
    path = home.run_folder(run_id) / MANIFEST_FILE
    try:
        with disk("reading a manifest", path.parent):
            return check_manifest(path.read_bytes(), run_id) if path.exists() else None
    except ManifestError:
        return None


def save_manifest(home: Home, signed: SignedManifest) -> None:
    """Keep the manifest in this home. Raises `StoreError`."""
    folder = home.run_folder(signed.run_id)
    with disk("keeping the manifest", folder, len(signed.data)):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / MANIFEST_FILE, signed.data)
