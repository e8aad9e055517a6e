"""A node's part in one run: what it says of itself, and the checkpoints it copies for others' sake.

Owns: membership record, announcing loop, replication loop, handing over before leaving. Both publishers
and volunteers are run nodes; claiming and training are the volunteers' (`volunteer`).
"""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import trio

from paris_node.announcer import Announcer
from paris_node.ledger import Ledger
from paris_node.network import Network
from paris_node.runs import MANIFEST_FILE
from paris_node.snapshot import Candidate, Observation, observe
from paris_p2p import clock
from paris_p2p.core.assignment import replication_targets
from paris_p2p.errors import RemoteProtocolError, StoreError, TransportError
from paris_p2p.ids import Role, Term
from paris_p2p.programs import Output
from paris_p2p.store.weights import check_weights_file
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import Manifest, SignedManifest
from paris_p2p.wire.records import MemberRecord, RunRecord
from paris_p2p.workers.nursery import open_inner_nursery

log = logging.getLogger(__name__)

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
HAND_OVER_S = 20.0
RUN_TTL_S = 600.0
MEMBER_TTL_S = 300.0
"""At most: a membership also lapses three renewals of a lease after its last one."""
ANNOUNCE_PERIOD_S = 30.0
"""At most: records are looked through twice in a lease's renewal, and well within a record's life."""
REPLICA_STALL_S = 30.0
COPY_DEADLINE_S = 600.0
"""A copy that takes longer goes on later, if it is then still worth it; what was verified stays."""
COPY_REST_S = 20.0
MAX_COPIES = 4
"""At once: a swarm fetches a few items at a time, and the trainer's shards must not wait for copies."""
NO_ROLE = Role("")


@dataclass(slots=True)
class Progress:
    """What this node is doing right now, as its membership record tells it."""

    activity: str = "joining"
    role: Role = NO_ROLE
    term: Term = field(default=Term(0))
    step: int = 0
    total_steps: int = 0
    loss: float = 0.0
    images_per_s: float = 0.0


def run_items(manifest: Manifest) -> list[ContentRef]:
    """Every item the manifest names: shards and components."""
    shards = [ref for cluster in manifest.clusters for ref in (cluster.train, cluster.heldout)]
    return [*shards, *manifest.components.values()]


def check_weights_item(folder: Path, signed: SignedManifest, statement: CheckpointStatement) -> None:
    """Refuse (`RemoteProtocolError`) a fetched weights item that is not what the run's recipe asks for."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise RemoteProtocolError(f"the weights item has no {WEIGHTS_FILE}")
    tensors = signed.manifest.architecture(statement.role, statement.variant).tensors
    check_weights_file(path, tensors)


class RunNode:
    """One member of one run. `mirror`: copy every role's newest checkpoint, whoever else has it."""

    def __init__(self, network: Network, signed: SignedManifest, output: Output, *, mirror: bool) -> None:
        self.network = network
        self.signed = signed
        self.output = output
        self.progress = Progress()
        self.announcer = Announcer(network)
        self._mirror = mirror
        self._rejected: set[bytes] = set()  # signed statements, as are the next two
        self._copying: set[bytes] = set()
        self._rest_until: dict[bytes, float] = {}  # monotonic
        folder = network.home.run_folder(signed.run_id)
        manifest_item = network.store.add(folder / MANIFEST_FILE, mode="copy")
        self._items = {manifest_item.info_hash, *(ref.info_hash for ref in run_items(signed.manifest))}
        self.ledger = Ledger(folder / "statements", network.store, keep=self._items)
        self._announce_what_is_held(manifest_item)

    def _announce_what_is_held(self, manifest_item: ContentRef) -> None:
        """Every node keeps the run findable: its manifest outlives its publisher."""
        manifest = self.signed.manifest
        self.announcer.say(RunRecord(manifest.name, self.signed.run_id, manifest_item), b"", RUN_TTL_S)
        self.announcer.provide(item for item in sorted(self._items) if self.network.store.has(item))
        for role in manifest.roles:
            newest = self.ledger.newest(role)
            if newest is not None:
                self.announcer.provide_checkpoint(self.signed.run_id, *newest)

    async def observe(self) -> Observation:
        """The run as the DHT shows it now, without the checkpoints that were found to be bad here."""
        return await observe(self.network.dht, self.signed, rejected=self._rejected)

    async def announce_loop(self) -> None:
        """Renew this node's records for ever; a network that is away is waited out."""
        while True:
            self._say_membership()
            self.announcer.forget_removed()
            try:
                await self.announcer.flush()
            except TransportError as error:
                log.warning("announcing failed, trying again: %s", error)
            await trio.sleep(min(self.signed.manifest.lease.renew_s / 2, ANNOUNCE_PERIOD_S))

    def _say_membership(self) -> None:
        rates = self.network.swarm.rates()
        progress = self.progress
        record = MemberRecord(
            addresses=self.announcer.addresses,
            activity=progress.activity,
            role=progress.role,
            term=progress.term,
            step=progress.step,
            total_steps=progress.total_steps,
            loss=float(progress.loss),
            images_per_s=float(progress.images_per_s),
            up_bytes_per_s=int(rates.up_bytes_per_s),
            down_bytes_per_s=int(rates.down_bytes_per_s),
            updated_unix=clock.unix(),
        )
        ttl_s = min(3 * self.signed.manifest.lease.renew_s, MEMBER_TTL_S)
        self.announcer.say(record, self.signed.run_id, ttl_s)

    async def replicate_loop(self) -> None:
        """Copy the run's components, and the checkpoints that too few peers hold, for ever."""
        async with open_inner_nursery() as nursery:
            nursery.start_soon(self._gather_components)
            while True:
                try:
                    observation = await self.observe()
                except TransportError as error:
                    log.warning("looking for checkpoints to copy failed, trying again: %s", error)
                else:
                    self._start_copies(observation, nursery)
                await trio.sleep(self.signed.manifest.lease.poll_s)

    def _start_copies(self, observation: Observation, nursery: trio.Nursery) -> None:
        """Each copy is a task, and rests when it failed: one that cannot be had holds up no other."""
        targets = [c for c in self._targets(observation) if c.data not in self.ledger]
        self._rest_until = {c.data: self._rest_until.get(c.data, -math.inf) for c in targets}
        for candidate in targets:
            rested = self._rest_until[candidate.data] <= clock.monotonic()
            if rested and candidate.data not in self._copying and len(self._copying) < MAX_COPIES:
                self._copying.add(candidate.data)
                nursery.start_soon(self._replicate_quietly, candidate)

    def _targets(self, observation: Observation) -> list[Candidate]:
        if self._mirror:
            return list(observation.newest.values())
        me, replicas = self.network.identity.node_id, self.signed.manifest.replicas
        return [observation.newest[s.role] for s in replication_targets(me, observation.view, replicas)]

    async def _gather_components(self) -> None:
        """Every member keeps what a model cannot do without: it must outlive the organiser."""
        missing = dict(self.signed.manifest.components)
        while missing:
            for name, ref in list(missing.items()):
                try:
                    await self.network.swarm.fetch(ref, stall_timeout_s=REPLICA_STALL_S)
                except (TransportError, StoreError) as error:
                    log.info("no copy of the component %s: %s", name, error)
                else:
                    self.announcer.provide([missing.pop(name).info_hash])
            await trio.sleep(self.signed.manifest.lease.poll_s)

    async def _replicate_quietly(self, candidate: Candidate) -> None:
        statement = candidate.statement
        try:
            with trio.move_on_after(COPY_DEADLINE_S):
                await self.replicate(candidate)
        except (TransportError, RemoteProtocolError, StoreError) as error:
            log.info("no copy of %s step %d: %s", statement.role, statement.step, error)
        finally:
            self._copying.remove(candidate.data)
            self._rest_until[candidate.data] = clock.monotonic() + COPY_REST_S

    async def replicate(self, candidate: Candidate) -> None:
        """Fetch a checkpoint whole, check it, and serve it from here. Raises `TransportError`,
        `RemoteProtocolError` (the checkpoint is bad) or `StoreError`."""
        await self.fetch_weights(candidate)
        await self.network.swarm.fetch(candidate.statement.resume, stall_timeout_s=REPLICA_STALL_S)
        await self.hold(candidate.data, candidate.statement)

    async def fetch_weights(self, candidate: Candidate) -> None:
        """Fetch and check the weights of a checkpoint. Raises `RemoteProtocolError` if they do not fit."""
        statement = candidate.statement
        item = statement.weights.info_hash
        known = self.network.store.has(item)
        folder = await self.network.swarm.fetch(statement.weights, stall_timeout_s=REPLICA_STALL_S)
        try:
            await trio.to_thread.run_sync(check_weights_item, folder, self.signed, statement)
        except RemoteProtocolError:
            self._rejected.add(candidate.data)
            if not known and not self.ledger.needs(item):  # else it is a good item under a false flag
                await trio.to_thread.run_sync(self.network.store.remove, item)
            raise

    async def hold(self, data: bytes, statement: CheckpointStatement) -> None:
        """Both items of `statement` are complete here: note it and tell others."""
        await trio.to_thread.run_sync(self.ledger.add, data, statement)
        newest = self.ledger.newest(statement.role)
        if newest is not None:
            self.announcer.provide_checkpoint(self.signed.run_id, *newest)
        try:
            await self.announcer.flush()
        except TransportError as error:
            log.warning("announcing a checkpoint failed, it is tried again: %s", error)

    async def hand_over(self) -> None:
        """Before leaving: give peers a bounded time to copy the newest checkpoints only this node holds."""
        with trio.move_on_after(HAND_OVER_S):
            while await self._only_here():
                await trio.sleep(1.0)

    async def _only_here(self) -> list[Role]:
        try:
            observation = await self.observe()
        except TransportError:
            return []
        me = self.network.identity.node_id
        if not observation.view.members.keys() - {me}:
            return []  # nobody is there to take it
        newest = observation.newest
        return [role for role, c in newest.items() if c.data in self.ledger and c.providers <= {me}]
