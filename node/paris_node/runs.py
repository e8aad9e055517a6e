"""Finding a run: from the DHT's announcements, or from what this home remembers.

Owns: choosing among announced runs, fetching and checking the manifest. Strangers can announce anything:
the manifest is bound to its run id by its hash and to its organiser by its signature.
"""

import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

import trio

from paris_node.network import Network
from paris_node.text import printable
from paris_p2p import clock
from paris_p2p.dht.sharing import in_turns
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
from paris_p2p.workers.nursery import open_inner_nursery

T = TypeVar("T")
log = logging.getLogger(__name__)

FIND_DEADLINE_S = 10.0
FETCH_STALL_S = 20.0
FETCH_TTL_S = 60.0
MANIFEST_FILE = "manifest.paris"
MAX_LISTED = 10
MANIFEST_TRIES = 16
"""Strangers can name any item as a run's manifest, with as many keys as they like. So many are tried, in turn
those announced most often and those of keys drawn by lot, ..."""
TRIED_AT_ONCE = 4
MANIFEST_DEADLINE_S = 80.0
"""... for so long in all."""


def matching(records: Sequence[RunRecord], selector: str | None) -> list[RunRecord]:
    """The announced runs that `selector` (id, beginning of an id, or name; None: any) means."""
    if selector is None:
        return list(records)
    by_id = [r for r in records if len(selector) >= 6 and r.run_id.hex().startswith(selector.lower())]
    return by_id or [record for record in records if record.name == selector]


def in_turn(most: Iterable[T], by_lot: Iterable[T], count: int) -> list[T]:
    """`count` things, each once, in turn from either row: what strangers do most of, they can do alone."""
    return list(dict.fromkeys(in_turns((most, by_lot))))[:count]


def _rows(things: Sequence[T], rng: random.Random) -> tuple[list[T], list[T]]:
    """What is named most often first, and what is named by one after the other drawn by lot."""
    return [one for one, _ in Counter(things).most_common()], rng.sample(things, len(things))


def _only(found: Sequence[SignedManifest]) -> SignedManifest:
    """The one run of `found` (not empty). Raises `ConfigError` when there are several."""
    if len(found) > 1:
        listed = _listed(f"{printable(one.manifest.name)} ({one.run_id.hex()[:12]})" for one in found)
        raise ConfigError(f"several runs are announced: {listed}. Choose one with --run NAME, or --run ID")
    return found[0]


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - MAX_LISTED} more" if len(every) > MAX_LISTED else ""
    return ", ".join(every[:MAX_LISTED]) + more


async def find_run(
    network: Network, selector: str | None, rng: random.Random | None = None
) -> SignedManifest:
    """The checked manifest of the run meant: from this home if a whole run id names one that is there (so
    that the run's members can come back when its publisher has gone), else through the swarm. What is
    announced and has no manifest to show is no run.

    Raises `NetworkError` when no such run is announced in time, or none of those has a manifest,
    `ConfigError` when several have one.
    """
    rng = rng or random.Random()
    remembered = _remembered(network.home, selector)
    if remembered is not None:
        return remembered
    deadline = clock.monotonic() + FIND_DEADLINE_S
    while True:
        records = await network.dht.read("run", b"")
        announced = [r.payload for r in records if isinstance(r.payload, RunRecord)]
        found = matching(announced, selector)
        if found:
            return _only(await _manifests(network, found, rng))
        if clock.monotonic() > deadline:
            raise NetworkError(_not_found(announced, selector))
        await trio.sleep(1.0)


async def announced_runs(network: Network, rng: random.Random | None = None) -> list[SignedManifest]:
    """The checked manifests of the runs that are announced there, by name, where there are several; at most
    `MAX_LISTED`, and none that cannot be had. Raises `TransportError`."""
    records = await network.dht.read("run", b"")
    announced = [record.payload for record in records if isinstance(record.payload, RunRecord)]
    if len({record.run_id for record in announced}) < 2:
        return []
    try:
        return await _manifests(network, announced, rng or random.Random())
    except NetworkError as error:
        log.info("no announced run has a manifest: %s", error)
        return []


async def _manifests(
    network: Network, announced: Sequence[RunRecord], rng: random.Random
) -> list[SignedManifest]:
    """The manifests of the runs `announced` (not empty), by name, of so many as can be listed. Raises
    `NetworkError` when none can be had."""
    by_run: dict[RunId, list[RunRecord]] = {}
    for record in announced:
        by_run.setdefault(record.run_id, []).append(record)
    found: list[SignedManifest] = []
    reasons: list[str] = []

    async def fetch(run_id: RunId) -> None:
        try:
            found.append(await _fetch_manifest(network, by_run[run_id], rng))
        except NetworkError as error:
            reasons.append(str(error))
            log.info("the run %s: %s", run_id.hex()[:12], error)

    async with open_inner_nursery() as nursery:
        for run_id in in_turn(*_rows([record.run_id for record in announced], rng), MAX_LISTED):
            nursery.start_soon(fetch, run_id)
    if not found:
        raise NetworkError(_listed(reasons))
    return sorted(found, key=lambda signed: (signed.manifest.name, signed.run_id))


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


async def _fetch_manifest(
    network: Network, records: Sequence[RunRecord], rng: random.Random
) -> SignedManifest:
    run_id = records[0].run_id
    remembered = load_manifest(network.home, run_id)
    if remembered is not None:
        return remembered
    named = [record.manifest for record in records]
    reasons: list[str] = []
    found: list[SignedManifest] = []
    left = iter(in_turn(*_rows(named, rng), MANIFEST_TRIES))

    async def try_them(scope: trio.CancelScope) -> None:
        for ref in left:
            try:
                found.append(await _one_manifest(network, ref, run_id))
            except (TransportError, RemoteProtocolError, ManifestError, OSError) as error:
                reasons.append(str(error))
            else:
                scope.cancel()

    with trio.move_on_after(MANIFEST_DEADLINE_S) as scope:
        async with open_inner_nursery() as nursery:
            for _ in range(TRIED_AT_ONCE):
                nursery.start_soon(try_them, scope)
    if not found:
        raise NetworkError(f"the run's manifest could not be had: {_listed(reasons)}")
    save_manifest(network.home, found[0])
    return found[0]


async def _one_manifest(network: Network, ref: ContentRef, run_id: RunId) -> SignedManifest:
    """The manifest of the run, if that is what `ref` is. Raises what fetching and checking raise."""
    if ref.length > MAX_MANIFEST_BYTES:
        raise ManifestError("the announced manifest is too large")
    await _tell_of_fetch(network, ref)
    folder = await network.swarm.fetch(ref, stall_timeout_s=FETCH_STALL_S)
    data = await trio.to_thread.run_sync((folder / MANIFEST_FILE).read_bytes)
    return check_manifest(data, run_id)


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
