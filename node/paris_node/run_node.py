"""A node's part in one run: what it announces, and the checkpoints it copies for others' sake.

Owns: announcing loop, replication loop, which checkpoint of its own a trainer announces, handing over
before leaving. Both publishers and volunteers are run nodes; claiming and training are the volunteers'
(`volunteer`). Does not own: its membership (`progress`), what it finds out about checkpoints (`checker`).
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import trio

from paris_node.announcer import PROVIDE_TTL_S, Announcer
from paris_node.checker import Checker
from paris_node.in_use import ItemsInUse
from paris_node.judging import Candidate, Met, contenders
from paris_node.keeping import announce_fetches, give_up_abandoned, pinned_items
from paris_node.ledger import Ledger
from paris_node.network import Network
from paris_node.progress import NO_ROLE, Progress, Telling
from paris_node.reaching import Reaching
from paris_node.runs import MANIFEST_FILE
from paris_node.snapshot import Observation, observe
from paris_node.tries import COPY_DEADLINE_S, Tries
from paris_p2p import clock
from paris_p2p.core.safety import (
    check_now,
    copy_now,
    examination_order,
    first_checkers,
    is_safe,
    may_announce_next,
)
from paris_p2p.errors import RemoteProtocolError, StoreError, TransportError
from paris_p2p.ids import InfoHash, Role
from paris_p2p.programs import Output
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import Manifest, SignedManifest
from paris_p2p.wire.records import RunRecord, role_scope
from paris_p2p.workers.nursery import open_inner_nursery

log = logging.getLogger(__name__)

HAND_OVER_S = 20.0
RUN_TTL_S = 600.0
ANNOUNCE_PERIOD_S = 30.0
"""At most: records are looked through twice in a lease's renewal, and well within a record's life."""
REPLICA_STALL_S = 30.0
MAX_EXAMINED = 2
"""Checkpoints that are only strangers' word, looked at at once beside the copies the run counts on: one of
them is the one known longest."""
EXAMINE_STALL_S = 15.0
"""Nobody need serve what a stranger's statement names."""
MAX_COPIES = 3
"""At once: a swarm fetches a few items at a time, and the trainer's shards must not wait for copies."""


def run_items(manifest: Manifest) -> list[ContentRef]:
    """Every item the manifest names: shards, components, initial weights."""
    shards = [ref for cluster in manifest.clusters for ref in (cluster.train, cluster.heldout)]
    initial = [variant.initial for variant in manifest.recipe.experts if variant.initial is not None]
    return [*shards, *manifest.components.values(), *initial]


class RunNode:
    """One member of one run. `mirror`: copy every role's newest checkpoint, whoever else has it; `access`:
    this node's pass, if the run is restricted and it was given one."""

    def __init__(
        self,
        network: Network,
        signed: SignedManifest,
        output: Output,
        *,
        mirror: bool,
        access: bytes = b"",
    ) -> None:
        self.network = network
        self.signed = signed
        self.output = output
        self.progress = Progress()
        self._telling = Telling(self.progress, signed)
        self.announcer = Announcer(network)
        self.access = access
        self.reaching = Reaching(network, self.announcer, output, relay=network.relay)
        self.checker = Checker(network, signed)
        self.in_use = ItemsInUse()
        self._mirror = mirror
        self._copying: dict[bytes, Role] = {}  # by signed statement, as the next two
        self._examining: dict[bytes, bool] = {}  # whether it is the one known longest
        self._tries = Tries()
        self._private: set[Role] = set()  # trained without a lease: nothing new is said of them
        self._lacking: set[Role] = set()  # our own announced work that is not safe yet
        self._announced: dict[Role, tuple[bytes, float]] = {}  # what is said of our own work, since when
        self._met = Met()
        self._seen: tuple[float, Observation | None] = (-math.inf, None)  # when, the last whole one
        folder = network.home.run_folder(signed.run_id)
        manifest_item = network.store.add(folder / MANIFEST_FILE, mode="copy")
        self._manifest_item = manifest_item.info_hash
        self._items = {manifest_item.info_hash, *(ref.info_hash for ref in run_items(signed.manifest))}
        self.ledger = Ledger(folder / "statements", network.store, keep=self._items)
        self._announce_what_is_held(manifest_item)

    def _announce_what_is_held(self, manifest_item: ContentRef) -> None:
        """Every node keeps the run findable: its manifest outlives its publisher."""
        manifest = self.signed.manifest
        self.announcer.say(RunRecord(manifest.name, self.signed.run_id, manifest_item), b"", RUN_TTL_S)
        self.announcer.provide(item for item in sorted(self._items) if self.network.store.has(item))
        for data, statement in self.ledger.held():
            self.checker.found_good(data, statement)  # it was, before it was noted there
        for role in manifest.roles:
            self.announce_newest(role)
            self._attest(role)

    async def observe(
        self, roles: Sequence[Role] | None = None, patience_s: float = math.inf, *, whole: bool = False
    ) -> Observation:
        """The run as the DHT shows it now, judged by what this node has found out itself; of some `roles`
        only, without those that take longer than `patience_s` to read. `whole`: however much is new."""
        observation = await observe(
            self.network.dht,
            self.signed,
            known=self.checker.known(),
            met=self._met,
            whole=whole,
            roles=roles,
            patience_s=patience_s,
        )
        if observation.view.claims.keys() >= set(self.signed.manifest.roles):
            self._seen = (clock.monotonic(), observation)
        return observation

    async def _observe_lately(self) -> Observation:
        """The run as it was a poll ago at most: who stands by looks anyway, and that is most of its work."""
        at, seen = self._seen
        recent = clock.monotonic() - at < self.signed.manifest.lease.poll_s
        return seen if seen is not None and recent else await self.observe()

    async def announce_loop(self) -> None:
        """Renew this node's records for ever; a network that is away is waited out."""
        async with open_inner_nursery() as nursery:
            nursery.start_soon(announce_fetches, self.network, self.announcer)
            nursery.start_soon(self.reaching.run)
            await self._announce_all()

    def pinned(self) -> set[InfoHash]:
        """The items that stay whatever the quota says; asked from any thread."""
        also = self.network.swarm.in_use() | self.in_use.items() | {self._manifest_item}
        role = self.progress.role
        held = [statement for _, statement in self.ledger.held()]
        return pinned_items(self.signed.manifest, None if role == NO_ROLE else role, held, also)

    async def _announce_all(self) -> None:
        while True:
            self._telling.say(self.announcer, self.reaching.state, self.network.swarm.rates())
            self.announcer.forget_removed()
            await self._flush()
            overdue = self.announcer.overdue(clock.unix())
            if overdue:
                log.warning("%d announcements are overdue: others may no longer find what is here", overdue)
            await trio.sleep(min(self.signed.manifest.lease.renew_s / 2, ANNOUNCE_PERIOD_S))

    async def replicate_loop(self) -> None:
        """Copy the run's components, and the checkpoints that too few peers hold, for ever."""
        async with open_inner_nursery() as nursery:
            nursery.start_soon(self._gather_components)
            nursery.start_soon(self.checker.run)
            while True:
                try:
                    observation = await self._observe_lately()
                except TransportError as error:
                    log.warning("looking for checkpoints to copy failed, trying again: %s", error)
                else:
                    await self._review_own(observation)
                    self._start_copies(observation, nursery)
                    await self._tidy()
                    await give_up_abandoned(self.network, self._counting(observation))
                await trio.sleep(self.signed.manifest.lease.poll_s)

    def _counting(self, observation: Observation) -> list[ContentRef]:
        """What a fetch in this run may be about now."""
        shown = [one.statement for some in observation.candidates.values() for one in some]
        checkpoints = [ref for statement in shown for ref in (statement.weights, statement.resume)]
        return [*run_items(self.signed.manifest), *checkpoints]

    def _start_copies(self, observation: Observation, nursery: trio.Nursery) -> None:
        """Each copy is a task, and rests when it failed: one that cannot be had holds up no other.

        One copy a role at a time, so that a fast trainer is not chased from checkpoint to checkpoint.
        """
        now = clock.monotonic()
        self._tries.keep({one.data for some in observation.candidates.values() for one in some})
        for candidate in self._wanted(observation, now):
            role = candidate.statement.role
            if len(self._copying) < MAX_COPIES and role not in self._copying.values():
                self._copying[candidate.data] = role
                nursery.start_soon(self._replicate_quietly, candidate)
        doubtful = self._doubtful(observation, now)
        known = [self._tries.of(one.data, now) for one in doubtful]
        tries = [(tried.since, tried.failures) for tried in known]
        for_oldest = not any(self._examining.values())
        slots = MAX_EXAMINED - 1 - sum(not oldest for oldest in self._examining.values())
        oldest, others = examination_order(tries, slots, for_oldest=for_oldest)
        for number in others if oldest is None else (oldest, *others):
            self._examining[doubtful[number].data] = number == oldest
            nursery.start_soon(self._examine_quietly, doubtful[number])

    def _wanted(self, observation: Observation, now: float) -> list[Candidate]:
        """The newest checkpoints that this node should copy now, least replicated first."""
        me, replicas = self.network.identity.node_id, self.signed.manifest.replicas
        members = observation.view.members
        wanted = []
        for role, one in observation.newest.items():
            tried = self._tries.of(one.data, now)
            rested = tried.rest_until <= now and one.data not in self._examining
            if rested and one.data not in self.ledger:
                waited = now - tried.since
                if self._mirror or copy_now(me, role, one.held, members, replicas, waited):
                    wanted.append(one)
        return sorted(wanted, key=lambda one: len(one.providers))

    def _doubtful(self, observation: Observation, now: float) -> list[Candidate]:
        """Checkpoints that are only strangers' word but would count as newer or finish a role: who mirrors
        looks at them at once, an idle node when nobody else did for a while."""
        me, idle = self.network.identity.node_id, self.progress.role == NO_ROLE
        skip = self._tries.resting(now) | self._copying.keys() | self._examining.keys()
        found: list[Candidate] = []
        for role, some in observation.candidates.items():
            first = first_checkers(me, role, observation.view.members)
            for one in contenders(some, observation.newest.get(role), skip=skip):
                waited = now - self._tries.of(one.data, now).since
                turn = check_now(me, role, first, one.statement.holder, waited)
                if self._mirror or (idle and turn):
                    found.append(one)
        return found

    async def _review_own(self, observation: Observation) -> None:
        """Keep what is safe of this node's own work, and see whether the next checkpoint may be announced."""
        me, members = self.network.identity.node_id, observation.view.members
        replicas = self.signed.manifest.replicas
        for role, some in observation.candidates.items():
            safe = observation.safe.get(role)
            mine = [one for one in some if one.statement.holder == me and one.data in self.ledger]
            self.ledger.keep_safe(role, next((one.data for one in some if one.statement == safe), None))
            if role not in self._announced:
                continue
            data, since = self._announced[role]
            held = [one.held for one in some]
            shown = next((one for one in mine if one.data == data), None)
            safely = shown is not None and is_safe(shown.held, held, members, replicas)
            copied = shown is not None and bool(shown.providers - {me})
            if safely:
                self._lacking.discard(role)
            if may_announce_next(safely, copied, clock.monotonic() - since) or self.progress.role != role:
                self.announce_newest(role)
        await self._flush()

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
        """A copy that may fail: then it rests."""
        statement = candidate.statement
        done = False
        try:
            with trio.move_on_after(COPY_DEADLINE_S):
                await self.replicate(candidate)
                done = True
        except (TransportError, RemoteProtocolError, StoreError) as error:
            log.info("no copy of %s step %d: %s", statement.role, statement.step, error)
        finally:
            del self._copying[candidate.data]
            if not done:
                self._tries.failed(candidate.data, clock.monotonic())
        await self._tidy()

    async def _examine_quietly(self, candidate: Candidate) -> None:
        """Find out whether strangers' word is true. What is true and lacks copies is kept, other things are
        only vouched for."""
        statement = candidate.statement
        lacking = len(candidate.providers - {statement.holder}) < self.signed.manifest.replicas
        deadline_s = self._tries.look_deadline_s(candidate.data, clock.monotonic())
        done = False
        try:
            with trio.move_on_after(2 * COPY_DEADLINE_S):  # measuring waits for other measurements
                if self._mirror or lacking:
                    await self.replicate(candidate, stall_s=EXAMINE_STALL_S, deadline_s=deadline_s)
                else:
                    await self.examine(candidate, deadline_s=deadline_s)
                done = True
        except (TransportError, RemoteProtocolError, StoreError) as error:
            log.info("%s step %d is not believed: %s", statement.role, statement.step, error)
        finally:
            del self._examining[candidate.data]
            if not done:
                self._tries.failed(candidate.data, clock.monotonic())
        await self._tidy()

    async def _tidy(self) -> None:
        """Remove what was fetched for a look, once nobody uses it."""
        for item in self.in_use.take_unwanted():
            if self.ledger.needs(item):
                continue  # a good item under a false flag
            if item in self.in_use.items():
                self.in_use.unwanted(item)
                continue
            try:
                await trio.to_thread.run_sync(self.network.store.remove, item)
            except StoreError as error:
                log.info("an item that was fetched for a look stays for now: %s", error)
                self.in_use.unwanted(item)

    async def replicate(
        self, candidate: Candidate, *, stall_s: float = REPLICA_STALL_S, deadline_s: float = COPY_DEADLINE_S
    ) -> None:
        """Fetch a checkpoint whole, check it, and serve it from here; `deadline_s`: for each item. Raises
        `TransportError`, `RemoteProtocolError` (the checkpoint is bad) or `StoreError`."""
        statement = candidate.statement
        idle = self._mirror or self.progress.role == NO_ROLE
        with self.in_use.using(statement.weights.info_hash, statement.resume.info_hash):
            await self.fetch_weights(candidate, measure=idle, stall_s=stall_s, deadline_s=deadline_s)
            await self._fetch(statement.resume, stall_s, deadline_s)
            await self.hold(candidate.data, statement, access=candidate.access)

    async def _fetch(self, ref: ContentRef, stall_s: float, deadline_s: float) -> Path:
        with trio.move_on_after(deadline_s):
            return await self.network.swarm.fetch(ref, stall_timeout_s=stall_s)
        raise TransportError(f"an item of {ref.length} bytes did not come within {deadline_s:.0f} s")

    async def fetch_weights(
        self,
        candidate: Candidate,
        *,
        measure: bool,
        stall_s: float = REPLICA_STALL_S,
        deadline_s: float = COPY_DEADLINE_S,
    ) -> None:
        """Fetch (within `deadline_s`) and check the weights of a checkpoint. Raises `RemoteProtocolError` if
        they do not fit, `TransportError` or `StoreError`.

        `measure`: a finished one's held-out loss, too. A node that trains needs its machine for that, and an
        unfinished one is measured by the trainer that goes on from it.
        """
        statement = candidate.statement
        item = statement.weights.info_hash
        with self.in_use.using(item):
            known = self.network.store.has(item)
            folder = await self._fetch(statement.weights, stall_s, deadline_s)
            try:
                await self.checker.examine(candidate, folder, measure=measure and statement.finished)
            except RemoteProtocolError as error:
                log.warning("%s step %d is refused: %s", statement.role, statement.step, error)
                if not known:  # else it is, or was, somebody's good item
                    self.in_use.unwanted(item)
                raise
            finally:
                self._attest(statement.role)

    async def examine(self, candidate: Candidate, *, deadline_s: float) -> None:
        """As `fetch_weights`, and keep nothing but the finding. Raises what it raises."""
        item = candidate.statement.weights.info_hash
        with self.in_use.using(item):
            known = self.network.store.has(item)
            await self.fetch_weights(candidate, measure=True, stall_s=EXAMINE_STALL_S, deadline_s=deadline_s)
            await self._flush()
            if not known:
                self.in_use.unwanted(item)

    async def hold(
        self,
        data: bytes,
        statement: CheckpointStatement,
        *,
        loss: float | None = None,
        access: bytes = b"",
    ) -> None:
        """Both items of `statement` are complete and good here: note it and tell others. `loss`: as this node
        measured it, if it did; `access`: the pass of the statement's holder, if it has one. Raises
        `StoreError` when an item is no longer here: only what is here is announced."""
        with self.in_use.using(statement.weights.info_hash, statement.resume.info_hash):
            await trio.to_thread.run_sync(self.ledger.add, data, statement, access)
        self.checker.found_good(data, statement, loss)
        if statement.role in self._private:
            return
        self._attest(statement.role)
        if not self._own_is_waited_for(statement):
            self.announce_newest(statement.role)
        await self._flush()

    def _own_is_waited_for(self, statement: CheckpointStatement) -> bool:
        """Whether an earlier checkpoint of this node's present work is still being copied by others."""
        shown = self._announced.get(statement.role)
        if shown is None or statement.finished or self.progress.role != statement.role:
            return False
        earlier = dict(self.ledger.held()).get(shown[0])
        lineage = (statement.holder, statement.term)
        return earlier is not None and (earlier.holder, earlier.term) == lineage

    def keep_private(self, role: Role) -> None:
        """Say nothing of what is held of `role` from now on; what was said stays."""
        self._private.add(role)

    def make_public(self, role: Role) -> None:
        """Say again what is held of `role`."""
        if role in self._private:
            self._private.remove(role)
            self.announce_newest(role)
            self._attest(role)

    def lacks_copies(self, role: Role) -> bool:
        """Whether the checkpoint this node made of `role` and announces is not known to be safe."""
        return role in self._lacking

    def announce_newest(self, role: Role) -> None:
        """Say which checkpoint of `role` this node holds: the newest, from the next flush on."""
        newest = self.ledger.newest(role)
        if newest is None or role in self._private:
            return
        data, statement = newest
        mine = statement.holder == self.network.identity.node_id
        if mine and self._announced.get(role, (b"", 0.0))[0] != data:
            self._announced[role] = (data, clock.monotonic())
            self._lacking.add(role)
        elif not mine:
            self._announced.pop(role, None)
            self._lacking.discard(role)
        self.ledger.keep_announced(role, data)
        self.announcer.provide_checkpoint(self.signed.run_id, data, statement, self.ledger.access(data))

    def _attest(self, role: Role) -> None:
        record = self.checker.attestation(role, self.access)
        if record.checks and role not in self._private:
            self.announcer.say(record, role_scope(self.signed.run_id, role), PROVIDE_TTL_S)

    async def _flush(self) -> None:
        try:
            await self.announcer.flush()
        except TransportError as error:
            log.warning("announcing failed, it is tried again: %s", error)

    async def hand_over(self) -> None:
        """Before leaving: give peers a bounded time to copy the newest checkpoints only this node holds."""
        for role in self.signed.manifest.roles:
            self.announce_newest(role)
        with trio.move_on_after(HAND_OVER_S):
            await self._flush()
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
