"""A network in memory: nodes with real homes and stores, a DHT that checks every record, a swarm that
copies verified items between stores, and a trainer that follows a script. Time is trio's mock clock."""

import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import trio
from safetensors.numpy import save_file

from paris_node import checker, training_job
from paris_node.announcer import PROVIDE_TTL_S
from paris_node.network import Network
from paris_node.run_node import RunNode
from paris_node.runs import save_manifest
from paris_p2p import clock
from paris_p2p.errors import TransportError, WorkerError
from paris_p2p.ids import ROUTER, InfoHash, NodeId, Role, Term
from paris_p2p.net.swarm import Progress, Rates
from paris_p2p.programs import Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.home import Home
from paris_p2p.wire.access_pass import Pass, sign_pass
from paris_p2p.wire.checkpoint import CheckpointStatement, sign_statement, statement_digest
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import (
    Cluster,
    LeaseTimes,
    SignedManifest,
    sign_manifest,
)
from paris_p2p.wire.records import (
    AnnounceRecord,
    AttestRecord,
    Check,
    ClaimRecord,
    MemberRecord,
    Payload,
    Record,
    RunRecord,
    SignedRecord,
    check_record,
    key_id,
    record_key,
    role_scope,
    sign_record,
)
from paris_p2p.wire.terms import make_term
from paris_p2p.workers.nursery import open_inner_nursery
from tests import samples
from tests.samples import ORGANISER, TRAINING, manifest, recipe

START_UNIX = 1_750_000_000.0
STEPS = TRAINING.steps
LEASE = LeaseTimes(ttl_s=20.0, renew_s=6.0, settle_s=2.0, poll_s=3.0)

Event = dict[str, Any]
Script = Callable[["Trainer"], Awaitable[None]]


class MemoryDht:
    """The DHT client of one node. `down`: requests fail when their deadline passes; else they take `takes_s`;
    `late`: keys that are not read by those who do not wait for them; `vouched`: owners it was told of."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.down = False
        self.takes_s = 0.05
        self.late: set[tuple[str, bytes]] = set()
        self.vouched: list[NodeId] = []
        self.notices: tuple[Any, ...] = ()
        self.published: list[SignedRecord] = []

    async def publish(self, records: Sequence[SignedRecord], *, deadline_s: float = 30.0) -> list[bool]:
        await self._travel(deadline_s)
        self.published += records
        return [self._world.store_record(record) for record in records]

    async def read(self, kind: str, scope: bytes) -> list[Record]:
        return (await self.read_many([(kind, scope)]))[0]

    async def read_many(
        self, keys: Sequence[tuple[str, bytes]], *, deadline_s: float = 30.0
    ) -> list[list[Record]]:
        await self._travel(deadline_s)
        return [self._world.live(kind, scope) for kind, scope in keys]

    async def read_some(
        self, keys: Sequence[tuple[str, bytes]], *, patience_s: float, deadline_s: float = 30.0
    ) -> list[list[Record] | None]:
        found = await self.read_many(keys, deadline_s=deadline_s)
        return [None if key in self.late else some for key, some in zip(keys, found, strict=True)]

    def vouch_for(self, owners: Iterable[NodeId]) -> None:
        self.vouched += owners

    async def _travel(self, deadline_s: float) -> None:
        if self.down:
            await trio.sleep(deadline_s)
            raise TransportError(f"the DHT did not answer in {deadline_s:.0f} s")
        await trio.sleep(self.takes_s)


class MemorySwarm:
    """The swarm of one node: an item comes from any other node's store, whole, or not at all."""

    def __init__(self, world: "World", store: ContentStore, port: int, node_id: NodeId) -> None:
        self._world, self._store, self.node_id = world, store, node_id
        self.addresses: tuple[str, ...] = (f"/ip4/127.0.0.1/tcp/{port}/p2p/12D3KooW",)
        self.asked: list[ContentRef] = []
        self.urgent: list[ContentRef] = []  # of these, what was to go before other fetches
        self.under_way: set[InfoHash] = set()
        self.yielding = False
        self.satisfied: set[InfoHash] = set()  # served as much as ratio and time ask for
        self.must_serve: Callable[[], Container[InfoHash]] = frozenset
        self.reachability: Any = None

    async def fetch(
        self,
        ref: ContentRef,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        peers: Sequence[Any] = (),
        stall_timeout_s: float = 60.0,
        priority: int = 0,
    ) -> Path:
        self.asked.append(ref)
        if priority > 0:
            self.urgent.append(ref)
        await trio.lowlevel.checkpoint()
        for other in (self._store, *self._world.stores):
            if other.has(ref.info_hash):
                self._world.taken.add((id(other), ref.info_hash, self.node_id))
                self._store.adopt(other, ref.info_hash)
                return self._store.files(ref.info_hash)
        self.under_way.add(ref.info_hash)
        try:
            await trio.sleep(stall_timeout_s)
        finally:
            self.under_way.discard(ref.info_hash)
        raise TransportError(f"no source delivered {ref.info_hash.hex()[:8]}")

    def rates(self) -> Rates:
        return Rates(10.0, 20.0, 1, 100, 200)

    def yield_uploads(self, yielding: bool) -> None:
        self.yielding = yielding

    def keep_serving(self, must_serve: Callable[[], Container[InfoHash]]) -> None:
        self.must_serve = must_serve

    def takers(self, info_hash: InfoHash) -> frozenset[NodeId]:
        return frozenset(
            who for store, item, who in self._world.taken if (store, item) == (id(self._store), info_hash)
        )

    def prefer(self, whom: Callable[[], Iterable[NodeId]]) -> None:
        self.preferred = whom

    def refuses(self, info_hash: InfoHash) -> bool:
        return info_hash in self.satisfied and info_hash not in self.must_serve()

    def fetching(self) -> frozenset[InfoHash]:
        return frozenset(self.under_way)

    def in_use(self) -> frozenset[InfoHash]:
        return frozenset(self.under_way)


class Trainer:
    """The parent's end of a scripted trainer; `start` is the message it was started with."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.start: dict[str, Any] = {}
        self.stopping = trio.Event()
        self.death = WorkerError("the trainer died")
        self._up, self._messages = trio.open_memory_channel[dict[str, Any]](100)
        self._script_done = trio.Event()

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "start":
            self.start = message
        else:
            self.stopping.set()

    async def receive(self) -> dict[str, Any]:
        try:
            return await self._messages.receive()
        except trio.EndOfChannel:
            raise self.death from None

    async def play(self, script: Script) -> None:
        while not self.start:
            await trio.sleep(0.01)
        async with self._up:
            await script(self)

    def say(self, kind: str, /, **fields: Any) -> None:
        """One message up."""
        self._up.send_nowait({**fields, "type": kind})

    def ready(self, step: int = 0) -> None:
        self.say("ready", step=step, total_steps=STEPS, device="cpu")

    def step(self, step: int) -> None:
        self.say("step", step=step, loss=0.5, images_per_s=100.0, seconds=1.0, waited_s=0.0)

    def checkpoint(self, step: int, loss: float | None = None) -> None:
        """Write real folders and hand them over."""
        folder = Path(self.start["out"]) / f"step-{step}"
        write_checkpoint(folder, Role(self.start["role"]), f"{self.start['role']} {step}")
        weights, resume = str(folder / "weights"), str(folder / "resume")
        self.say("checkpoint", step=step, heldout_loss=loss or 1.0 / step, weights=weights, resume=resume)


def write_checkpoint(folder: Path, role: Role, content: str) -> None:
    """The two folders a trainer makes; `content` decides the bytes."""
    spec = (samples.ROUTER if role == ROUTER else samples.EXPERT).tensors[0]
    (folder / "weights").mkdir(parents=True)
    (folder / "resume").mkdir()
    value = np.full(spec.shape, float(sum(content.encode())), dtype=np.float32)
    save_file({spec.name: value}, folder / "weights" / "diffusion_pytorch_model.safetensors")
    (folder / "weights" / "config.json").write_text("{}")
    (folder / "resume" / "resume.json").write_text(json.dumps(content))


def no_torch(_message: dict[str, Any]) -> dict[str, Any]:
    """What a node without torch measures."""
    return {"type": "error", "message": "no torch here"}


class CheckerChild:
    """The parent's end of a child that measures what the world says."""

    def __init__(self, world: "World") -> None:
        self._world = world

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        self._world.asked_to_measure.append(message)

    async def receive(self) -> dict[str, Any]:
        await trio.sleep(1)
        return self._world.measure(self._world.asked_to_measure[-1])


class World:
    """Every node's records and stores."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stores: list[ContentStore] = []
        self.records: dict[tuple[bytes, bytes], SignedRecord] = {}
        self.scripts: list[Script] = []
        self.measure: Callable[[dict[str, Any]], dict[str, Any]] = no_torch
        self.asked_to_measure: list[dict[str, Any]] = []
        self.trainers: list[Trainer] = []
        self.taken: set[tuple[int, InfoHash, NodeId]] = set()  # from which store, what, by whom
        self.prepared = ContentStore(folder / "prepared" / "store")
        self.signed = self.make_run("digits")
        self._ports = iter(range(4001, 5000))
        self.start_unix = START_UNIX

    # --- the run ---------------------------------------------------------------------------------

    def make_run(
        self,
        name: str,
        *,
        clusters: int = 1,
        lease: LeaseTimes = LEASE,
        variants: tuple[int, ...] = (),
        **changed: Any,
    ) -> SignedManifest:
        """A run whose items are in `prepared`; `variants`: those its experts may be; `changed`: other fields
        of its manifest."""
        shards = [
            (self.item(f"cluster-{n}-train"), self.item(f"cluster-{n}-heldout")) for n in range(clusters)
        ]
        fields: dict[str, Any] = {
            "name": name,
            "recipe": recipe(interval=25),
            "clusters": tuple(Cluster(n, 10, 2, *pair, variants) for n, pair in enumerate(shards)),
            "components": {name: self.item(name) for name in ("text_encoder", "tokenizer")},
            "lease": lease,
            "replicas": 1,
        }
        signed = sign_manifest(manifest(**(fields | changed)), ORGANISER)
        (self.folder / "prepared" / "manifest.paris").write_bytes(signed.data)
        return signed

    def item(self, name: str) -> ContentRef:
        """A folder of one little file, as a content item of `prepared`."""
        source = self.folder / "sources" / name
        source.mkdir(parents=True, exist_ok=True)
        (source / "config.json").write_text(json.dumps({"name": name}))
        return self.prepared.add(source, mode="copy")

    # --- nodes -----------------------------------------------------------------------------------

    def network(self, name: str, *, seeds: bool = False) -> Network:
        """A node's network side. `seeds`: it has the run's items from the start."""
        home = Home(self.folder / "homes" / name)
        store = home.store()
        if seeds:
            for ref in self.prepared.complete():
                store.adopt(self.prepared, ref.info_hash)
        self.stores.append(store)
        save_manifest(home, self.signed)
        identity = Identity(name.encode().ljust(32, b"."))
        swarm = MemorySwarm(self, store, next(self._ports), identity.node_id)
        return Network(home, identity, store, cast(Any, MemoryDht(self)), cast(Any, swarm), ("/boot",))

    def run_node(
        self, network: Network, *, mirror: bool = False
    ) -> tuple[RunNode, Callable[[], list[Event]]]:
        """A run node, and what it has said so far."""
        said = io.StringIO()
        node = RunNode(network, self.signed, Output(True, said), mirror=mirror)
        return node, lambda: [json.loads(line) for line in said.getvalue().splitlines()]

    # --- records ---------------------------------------------------------------------------------

    def store_record(self, record: SignedRecord) -> bool:
        """As a DHT node: refuse what is not rightful (it raises), keep what expires last."""
        check_record(key_id(record.key), record.subkey, record.value, record.expiration_unix, clock.unix())
        known = self.records.get((record.key, record.subkey))
        if known is not None and known.expiration_unix >= record.expiration_unix:
            return False
        self.records[record.key, record.subkey] = record
        return True

    def live(self, kind: str, scope: bytes) -> list[Record]:
        """The live records of a key, checked again."""
        key, now = record_key(kind, scope), clock.unix()
        rows = [r for (where, _), r in self.records.items() if where == key and r.expiration_unix > now]
        return [check_record(key_id(key), r.subkey, r.value, r.expiration_unix, now) for r in rows]

    def says(self, who: Identity, payload: Payload, scope: bytes, ttl_s: float = PROVIDE_TTL_S) -> None:
        """`who`, perhaps a stranger, stores a record."""
        self.store_record(sign_record(who, payload, scope, clock.unix() + ttl_s))

    def announces_run(self, who: Identity, signed: SignedManifest, manifest: ContentRef) -> None:
        self.says(who, RunRecord(signed.manifest.name, signed.run_id, manifest), b"")

    # --- checkpoints -----------------------------------------------------------------------------

    def checkpoint(
        self,
        holder: Identity,
        role: str,
        step: int,
        /,
        *,
        term: int = 1,
        store: ContentStore | None = None,
        content: str = "",
        loss: float = 0.5,
        **changed: Any,
    ) -> tuple[bytes, CheckpointStatement]:
        """A signed statement about items that are put into `store`, if any; `changed`: other fields."""
        folder = self.folder / "made" / f"{len(list((self.folder / 'made').glob('*')))}"
        write_checkpoint(folder, Role(role), content or f"{role} {term} {step} {holder.node_id.hex()}")
        keeper = store if store is not None else ContentStore(self.folder / "nowhere")
        fields: dict[str, Any] = {
            "run_id": self.signed.run_id,
            "role": Role(role),
            "term": Term(term),
            "holder": holder.node_id,
            "step": step,
            "total_steps": STEPS,
            "variant": 0,
            "weights": keeper.add(folder / "weights"),
            "resume": keeper.add(folder / "resume"),
            "parent": b"",
            "heldout_loss": loss,
            "created_unix": self.start_unix,
        }
        statement = CheckpointStatement(**(fields | changed))
        return sign_statement(statement, holder), statement

    def holds(self, who: Identity, role: str, number: int = 1, *, state: str = "hold") -> Term:
        """`who` claims the role, for a lease; the claim's term."""
        since = clock.unix()
        term = make_term(number, Role(role), who.node_id, since)
        scope = role_scope(self.signed.run_id, Role(role))
        self.says(who, ClaimRecord(state, term, since), scope, self.signed.manifest.lease.ttl_s)
        return term

    def takes_part(self, who: Identity, activity: str = "seeding") -> None:
        """`who` says that it is a member."""
        self.says(
            who,
            MemberRecord((), activity, Role(""), Term(0), 0, 0, 0.0, 0.0, 0, 0, clock.unix()),
            self.signed.run_id,
        )

    def attests(
        self, who: Identity, role: str, *data: bytes, good: bool = True, loss: float | None = None
    ) -> None:
        """`who` says of signed statements what it found."""
        checks = tuple(Check(statement_digest(one), good, loss) for one in data)
        self.says(who, AttestRecord(checks), role_scope(self.signed.run_id, Role(role)))

    def announces(self, who: Identity, data: bytes, role: str, access: bytes = b"") -> None:
        """`who` says that it holds a checkpoint; `access`: the pass of its maker."""
        self.says(who, AnnounceRecord(data, (), access), role_scope(self.signed.run_id, Role(role)))

    def gives_pass(self, node: Identity, seconds: int) -> bytes:
        """The organiser lets `node` claim for a while."""
        leave = Pass(self.signed.run_id, node.node_id, int(clock.unix()) + seconds)
        return sign_pass(leave, ORGANISER)

    # --- trainers --------------------------------------------------------------------------------

    @asynccontextmanager
    async def open_trainer(self, module: str) -> AsyncIterator[Trainer]:
        """Stands in for `workers.spawn.open_worker`: plays the next script, the last one again and again."""
        assert module == training_job.TRAINER_MODULE
        trainer = Trainer(self)
        self.trainers.append(trainer)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        async with open_inner_nursery() as nursery:
            nursery.start_soon(trainer.play, script)
            try:
                yield trainer
            finally:
                nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def open_checker(self, module: str) -> AsyncIterator["CheckerChild"]:
        """Stands in for `workers.spawn.open_worker` where losses are measured."""
        assert module == checker.CHECK_MODULE
        yield CheckerChild(self)

    def nodes(self) -> list[NodeId]:
        """Every node that has stored a record."""
        return sorted({NodeId(subkey) for _, subkey in self.records})


async def _inline(function: Callable[..., Any], *args: Any, **_options: Any) -> Any:
    """`trio.to_thread.run_sync` without the thread: mock time must stand still meanwhile."""
    await trio.lowlevel.checkpoint()
    return function(*args)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """An empty network whose clocks are trio's, with threads and trainers in memory."""

    def seconds() -> float:
        try:
            return trio.current_time()
        except RuntimeError:  # outside of trio.run
            return 0.0

    monkeypatch.setattr(clock, "monotonic", seconds)
    monkeypatch.setattr(trio.to_thread, "run_sync", _inline)
    world = World(tmp_path)
    monkeypatch.setattr(clock, "unix", lambda: world.start_unix + seconds())
    monkeypatch.setattr(training_job, "open_worker", world.open_trainer)
    monkeypatch.setattr(checker, "open_worker", world.open_checker)
    return world
