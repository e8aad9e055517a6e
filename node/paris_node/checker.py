"""Checking checkpoints here, and saying so: what this node found out by itself.

Owns: verdicts (good, bad, measured loss), who vouched for what turned out bad, this node's attestations, and
the child process that measures held-out losses. Does not own: the rules (`core.accept`), fetching
(`run_node`).
"""

import logging
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio

from paris_node.judging import Candidate, Known
from paris_node.network import Network
from paris_p2p import clock
from paris_p2p.core.accept import holder_lied, loss_refusal, witness_lied
from paris_p2p.errors import RemoteProtocolError, StoreError, TransportError, WorkerError
from paris_p2p.ids import ROUTER, NodeId, Role
from paris_p2p.store.weights import NearLimitError, check_weights_file
from paris_p2p.wire.checkpoint import CheckpointStatement, statement_digest
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import SignedManifest
from paris_p2p.wire.records import MAX_CHECKS, AttestRecord, Check
from paris_p2p.workers.spawn import Worker, open_worker

T = TypeVar("T")
log = logging.getLogger(__name__)

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CHECK_MODULE = "paris_p2p.diffusion.check_worker"
MEASURE_DEADLINE_S = 300.0
"""A measurement that takes longer is done without: a large expert on a slow CPU."""
WARM_S = 180.0
"""How long the child waits for the next measurement: starting it costs more than measuring a small
network."""
SHARD_STALL_S = 30.0
MAX_SHARD_FETCH_BYTES = 32 << 20
"""Held-out shards up to this size in all are fetched for a measurement; larger ones are used where they
are."""
MAX_REMEMBERED = 4096


def check_weights_item(folder: Path, signed: SignedManifest, statement: CheckpointStatement) -> None:
    """Refuse (`RemoteProtocolError`) a fetched weights item that is not what the run's recipe asks for."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise RemoteProtocolError(f"the weights item has no {WEIGHTS_FILE}")
    tensors = signed.manifest.architecture(statement.role, statement.variant).tensors
    check_weights_file(path, tensors)


class _LossRefused(RemoteProtocolError):
    """The weights' held-out loss, as measured here, is a reason to refuse them."""

    def __init__(self, reason: str, loss: float, baseline: float) -> None:
        super().__init__(reason)
        self.loss, self.baseline = loss, baseline


@dataclass(frozen=True, slots=True)
class _Request:
    message: dict[str, Any]
    reply: "trio.MemorySendChannel[dict[str, Any] | None]"


class Checker:
    """One node's own findings about one run's checkpoints. Measures only while `run` runs."""

    def __init__(self, network: Network, signed: SignedManifest) -> None:
        self._network = network
        self._signed = signed
        self._good: OrderedDict[bytes, Check] = OrderedDict()  # by digest, as the next
        self._bad: OrderedDict[bytes, Check] = OrderedDict()
        self._rejected: OrderedDict[bytes, None] = OrderedDict()  # signed statements
        self._liars: OrderedDict[NodeId, None] = OrderedDict()
        self._roles: OrderedDict[bytes, Role] = OrderedDict()
        self._requests: trio.MemorySendChannel[_Request] | None = None
        self.measured_s = 0.0
        """Spent on measuring, in all."""

    def known(self) -> Known:
        """For judging what others say."""
        me = self._network.identity.node_id
        return Known(me, self._good.keys(), self._rejected.keys(), frozenset(self._liars))

    def found_good(self, data: bytes, statement: CheckpointStatement, loss: float | None = None) -> None:
        """This node knows these weights to be good: it made them, or checked them (before a restart,
        even)."""
        digest = statement_digest(data)
        known = self._good.get(digest)
        if known is None or known.loss is None:
            _remember(self._good, digest, Check(digest, True, loss))
        _remember(self._roles, digest, statement.role)

    def found_useless(self, candidate: Candidate) -> None:
        """A trainer of this node could not go on from its bundle. That is nobody else's lie: who vouches
        looks at the weights only."""
        digest = statement_digest(candidate.data)
        self._good.pop(digest, None)
        _remember(self._bad, digest, Check(digest, False, None))
        _remember(self._roles, digest, candidate.statement.role)
        _remember(self._rejected, candidate.data, None)

    def _found_bad(self, candidate: Candidate, error: RemoteProtocolError) -> None:
        """Remember that it is bad and who lied. Everybody can check the form, so everybody who vouched for
        bad form lied. Who could not measure vouches for the form alone: where only the loss is not as stated
        (`_LossRefused`), those lied who say that they measured it, unless machines that round differently
        explain it: a stranger can state a loss between two honest measurements, or choose weights whose size
        is the limit (`NearLimitError`: nobody lied). The organiser mirrors
        everything and may err: its word is overruled by this node's finding, and goes on to count
        elsewhere."""
        self.found_useless(candidate)
        if isinstance(error, NearLimitError):
            return
        holder = candidate.statement.holder
        lied = _liars(candidate, error) if isinstance(error, _LossRefused) else {holder, *candidate.vouched}
        trusted = {self._network.identity.node_id, self._signed.manifest.organiser}
        for liar in sorted(lied - trusted):
            _remember(self._liars, liar, None)

    def has_measured(self, data: bytes) -> bool:
        """Whether this node measured the loss of these weights, and found it as stated."""
        known = self._good.get(statement_digest(data))
        return known is not None and known.loss is not None

    def attestation(self, role: Role, access: bytes) -> AttestRecord:
        """What this node has to say about the checkpoints of `role`; of the bad ones the latest two."""
        mine = [check for digest, check in self._good.items() if self._roles.get(digest) == role]
        bad = [check for digest, check in self._bad.items() if self._roles.get(digest) == role]
        warned = bad[-2:]
        return AttestRecord((*warned, *mine[len(warned) - MAX_CHECKS :]), access)

    async def examine(self, candidate: Candidate, folder: Path, *, measure: bool, vouch: bool = True) -> None:
        """Check the fetched weights of a candidate, and remember what came of it, with `vouch` also if they
        are good: that others are told.

        Raises `RemoteProtocolError` when they are bad: then whoever lied about them is not believed again;
        `StoreError` when they were removed here meanwhile, which is nobody's lie.
        """
        statement = candidate.statement
        loss: float | None = None
        try:
            await trio.to_thread.run_sync(check_weights_item, folder, self._signed, statement)
            if measure:
                loss = await self._measured(statement, folder)
        except RemoteProtocolError as error:
            if not self._network.store.has(statement.weights.info_hash):
                raise StoreError("the weights were removed while they were checked") from error
            self._found_bad(candidate, error)
            raise
        if vouch:
            self.found_good(candidate.data, statement, loss)

    async def _measured(self, statement: CheckpointStatement, folder: Path) -> float | None:
        """The weights' held-out loss, or None where it cannot be had. Raises `RemoteProtocolError`."""
        answer = await self._ask(statement, folder)
        if answer is None:
            return None
        loss, baseline = float(answer["loss"]), float(answer["baseline"])
        reason = loss_refusal(statement.heldout_loss, loss, baseline)
        if reason is not None:
            raise _LossRefused(reason, loss, baseline)
        return loss

    async def _ask(self, statement: CheckpointStatement, folder: Path) -> dict[str, Any] | None:
        requests = self._requests
        shards = None if requests is None else await self._heldout_shards(statement.role)
        if requests is None or shards is None:
            return None
        message = {
            "type": "measure",
            "manifest": str(self._network.home.run_folder(self._signed.run_id) / "manifest.paris"),
            "role": statement.role,
            "variant": statement.variant,
            "weights": str(folder),
            "shards": shards,
        }
        send, receive = trio.open_memory_channel[dict[str, Any] | None](1)
        try:
            await requests.send(_Request(message, send))
            return await receive.receive()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel):
            return None  # the measuring task has ended

    async def _heldout_shards(self, role: Role) -> list[dict[str, Any]] | None:
        """The held-out shards of the role's clusters, fetched when small; None when they are not to be
        had."""
        clusters = self._signed.manifest.clusters
        wanted = clusters if role == ROUTER else [c for c in clusters if role == f"expert-{c.index}"]
        store = self._network.store
        missing = [cluster.heldout for cluster in wanted if not store.has(cluster.heldout.info_hash)]
        if sum(ref.length for ref in missing) > MAX_SHARD_FETCH_BYTES:
            return None
        try:
            for ref in missing:
                await self._network.swarm.fetch(ref, stall_timeout_s=SHARD_STALL_S)
        except (TransportError, StoreError) as error:
            log.info("no held-out shard of %s to measure with: %s", role, error)
            return None
        return [{"cluster": c.index, "heldout": str(self._files(c.heldout))} for c in wanted]

    def _files(self, ref: ContentRef) -> Path:
        return self._network.store.files(ref.info_hash)

    async def run(self) -> None:
        """Measure what `examine` asks for, one at a time, in a child that ends when nothing is asked."""
        send, requests = trio.open_memory_channel[_Request](0)
        self._requests = send
        async with send, requests:
            while True:
                first = await requests.receive()
                try:
                    async with open_worker(CHECK_MODULE) as worker:
                        await self._serve(worker, first, requests)
                except WorkerError as error:
                    log.warning("a held-out loss could not be measured: %s", error)
                finally:
                    first.reply.close()

    async def _serve(
        self, worker: Worker, first: _Request, requests: "trio.MemoryReceiveChannel[_Request]"
    ) -> None:
        request: _Request | None = first
        while request is not None:
            with request.reply:
                began = clock.monotonic()
                try:
                    with trio.move_on_after(MEASURE_DEADLINE_S) as scope:
                        await worker.send(request.message)
                        answer = await worker.receive()
                finally:
                    self.measured_s += clock.monotonic() - began
                if scope.cancelled_caught:
                    log.warning("measuring %s took too long", request.message["role"])
                    return
                await request.reply.send(_valid(answer))
            request = None
            with trio.move_on_after(WARM_S):
                request = await requests.receive()


def _liars(candidate: Candidate, found: _LossRefused) -> set[NodeId]:
    """Whose word for the candidate's loss no rounding explains."""
    stated, loss, baseline = candidate.statement.heldout_loss, found.loss, found.baseline
    lied = {who for who, said in candidate.measured_by if witness_lied(stated, said, loss, baseline)}
    return lied | {candidate.statement.holder} if holder_lied(stated, loss, baseline) else lied


def _valid(answer: dict[str, Any]) -> dict[str, Any] | None:
    """A measurement; None when the child says that there is none (the reason is logged)."""
    if answer.get("type") != "measured":
        log.warning("a held-out loss could not be measured: %s", answer.get("message"))
        return None
    numbers = (answer.get("loss"), answer.get("baseline"))
    return answer if all(isinstance(n, float) and not math.isnan(n) for n in numbers) else None


def _remember(table: "OrderedDict[Any, T]", key: object, value: T) -> None:
    """Set, as the newest; the oldest goes when there are too many: strangers decide how many there are."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > MAX_REMEMBERED:
        table.popitem(last=False)
