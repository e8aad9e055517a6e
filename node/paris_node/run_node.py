"""A node's part in one run: what it says of itself, and the checkpoints it copies for others' sake.

Owns: membership record, announcing loop, replication loop, handing over before leaving. Both publishers
and volunteers are run nodes; claiming and training are the volunteers' (`volunteer`).
"""

import logging
from dataclasses import dataclass, field

import trio

from paris_node.announcer import Announcer
from paris_node.ledger import Ledger
from paris_node.network import Network
from paris_node.runs import MANIFEST_FILE
from paris_node.snapshot import Candidate, Observation, observe
from paris_p2p import clock
from paris_p2p.core.assignment import replication_targets
from paris_p2p.errors import ParisError, RemoteProtocolError, StoreError, TransportError
from paris_p2p.ids import Role, Term
from paris_p2p.programs import Output
from paris_p2p.store.weights import check_weights_file
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.manifest import SignedManifest
from paris_p2p.wire.records import MemberRecord, RunRecord

log = logging.getLogger(__name__)

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
HAND_OVER_S = 20.0
RUN_TTL_S = 600.0
REPLICA_STALL_S = 30.0
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


class RunNode:
    """One member of one run. `mirror`: copy every role's newest checkpoint, whoever else has it."""

    def __init__(self, network: Network, signed: SignedManifest, output: Output, *, mirror: bool) -> None:
        self.network = network
        self.signed = signed
        self.output = output
        self.progress = Progress()
        self.announcer = Announcer(network)
        folder = network.home.run_folder(signed.run_id) / "statements"
        self.ledger = Ledger(folder, network.store)
        self._mirror = mirror
        self._rejected: set[bytes] = set()
        self._announce_what_is_held()

    def _announce_what_is_held(self) -> None:
        """Every node keeps the run findable: its manifest outlives its publisher."""
        manifest = self.signed.manifest
        ref = self.network.store.add(
            self.network.home.run_folder(self.signed.run_id) / MANIFEST_FILE, mode="copy"
        )
        self.announcer.provide([ref.info_hash])
        self.announcer.say(RunRecord(manifest.name, self.signed.run_id, ref), b"", RUN_TTL_S)
        wanted = [ref for cluster in manifest.clusters for ref in (cluster.train, cluster.heldout)]
        wanted += manifest.components.values()
        self.announcer.provide(r.info_hash for r in wanted if self.network.store.has(r.info_hash))
        for role in manifest.roles:
            newest = self.ledger.newest(role)
            if newest is not None:
                self.announcer.provide_checkpoint(self.signed.run_id, *newest)

    async def observe(self) -> Observation:
        """The run as the DHT shows it now."""
        return await observe(self.network.dht, self.signed)

    async def announce_loop(self) -> None:
        """Renew this node's records for ever; a network that is away is waited out."""
        while True:
            self._say_membership()
            self.announcer.forget_removed()
            try:
                await self.announcer.flush()
            except TransportError as error:
                log.warning("announcing failed, trying again: %s", error)
            await trio.sleep(self.signed.manifest.lease.renew_s / 2)

    def _say_membership(self) -> None:
        rates = self.network.swarm.rates()
        progress = self.progress
        record = MemberRecord(
            addresses=self.network.swarm.addresses[:3],
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
        self.announcer.say(record, self.signed.run_id, 3 * self.signed.manifest.lease.renew_s)

    async def replicate_loop(self) -> None:
        """Copy the checkpoints that too few peers hold, for ever."""
        while True:
            try:
                await self._replicate_once()
            except ParisError as error:
                log.warning("copying checkpoints: %s", error)
            await trio.sleep(self.signed.manifest.lease.poll_s)

    async def _replicate_once(self) -> None:
        observation = await self.observe()
        wanted = [candidate for candidate in self._targets(observation) if self._is_news(candidate)]
        async with trio.open_nursery() as nursery:
            for candidate in wanted:
                nursery.start_soon(self._replicate_quietly, candidate)

    def _targets(self, observation: Observation) -> list[Candidate]:
        if self._mirror:
            return list(observation.newest.values())
        me, replicas = self.network.identity.node_id, self.signed.manifest.replicas
        return [observation.newest[s.role] for s in replication_targets(me, observation.view, replicas)]

    def _is_news(self, candidate: Candidate) -> bool:
        return candidate.data not in self.ledger and candidate.data not in self._rejected

    async def _replicate_quietly(self, candidate: Candidate) -> None:
        try:
            await self.replicate(candidate)
        except (TransportError, RemoteProtocolError, StoreError) as error:
            statement = candidate.statement
            log.info("no copy of %s step %d: %s", statement.role, statement.step, error)

    async def replicate(self, candidate: Candidate) -> None:
        """Fetch a checkpoint whole, check it, and serve it from here."""
        await self.fetch_weights(candidate)
        await self.network.swarm.fetch(candidate.statement.resume, stall_timeout_s=REPLICA_STALL_S)
        await self.hold(candidate.data, candidate.statement)

    async def fetch_weights(self, candidate: Candidate) -> None:
        """Fetch and check the weights of a checkpoint. Raises `RemoteProtocolError` if they do not fit."""
        statement = candidate.statement
        folder = await self.network.swarm.fetch(statement.weights, stall_timeout_s=REPLICA_STALL_S)
        tensors = self.signed.manifest.architecture(statement.role, statement.variant).tensors
        try:
            await trio.to_thread.run_sync(check_weights_file, folder / WEIGHTS_FILE, tensors)
        except RemoteProtocolError:
            self._rejected.add(candidate.data)
            await trio.to_thread.run_sync(self.network.store.remove, statement.weights.info_hash)
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
