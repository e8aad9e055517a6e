"""A node's part in one run: what it announces, and the checkpoints it copies for others' sake.

Owns: announcing loop, replication loop, which checkpoint of its own a trainer announces, handing over
before leaving. Both publishers and volunteers are run nodes; claiming and training are the volunteers'
(`volunteer`). Does not own: its membership (`progress`), what it finds out about checkpoints (`checker`).
"""

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import trio

from paris_node.announcer import PROVIDE_TTL_S, Announcer
from paris_node.checker import Checker
from paris_node.choosing import Choosing, Look
from paris_node.in_use import ItemsInUse
from paris_node.judging import Candidate, Met, holder
from paris_node.keeping import announce_fetches, give_up_abandoned, pinned_items
from paris_node.ledger import Ledger
from paris_node.network import Network
from paris_node.progress import NO_ROLE, Progress, Telling
from paris_node.reaching import Reaching
from paris_node.runs import MANIFEST_FILE
from paris_node.snapshot import Observation, observe
from paris_node.tries import COPY_DEADLINE_S
from paris_p2p import clock
from paris_p2p.core.assignment import Maker
from paris_p2p.core.safety import Held, is_safe, may_announce_next, safe_checkpoint, witnessed
from paris_p2p.errors import RemoteProtocolError, StoreError, TransportError
from paris_p2p.ids import InfoHash, NodeId, Role
from paris_p2p.programs import Output
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import Manifest, SignedManifest
from paris_p2p.wire.records import AnnounceRecord, RunRecord, role_scope
from paris_p2p.workers.nursery import open_inner_nursery

log = logging.getLogger(__name__)

HAND_OVER_S = 20.0
RUN_TTL_S = 600.0
ANNOUNCE_PERIOD_S = 30.0
"""At most: records are looked through twice in a lease's renewal, and well within a record's life."""
REPLICA_STALL_S = 30.0
EXAMINE_STALL_S = 15.0
"""Nobody need serve what a stranger's statement names."""


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
        self._choosing = Choosing(network.identity.node_id, signed, mirror=mirror)
        self._private: set[Role] = set()  # trained without a lease: nothing new is said of them
        self._lacking: set[Role] = set()  # our own announced work that is not safe yet
        self._announced: dict[Role, tuple[bytes, float]] = {}  # what is said of our own work, since when
        self._holders: dict[Role, Maker | None] = {}  # as last read
        self._met = Met()
        self._seen: tuple[float, Observation | None] = (-math.inf, None)  # when, the last whole one
        folder = network.home.run_folder(signed.run_id)
        manifest_item = network.store.add(folder / MANIFEST_FILE, mode="copy")
        self._manifest_item = manifest_item.info_hash
        self._items = {manifest_item.info_hash, *(ref.info_hash for ref in run_items(signed.manifest))}
        self.ledger = Ledger(
            folder / "statements",
            network.store,
            within_steps=signed.manifest.recipe.checkpoint_interval_steps,
            keep=self._items,
        )
        network.swarm.keep_serving(self.needed)
        network.swarm.prefer(self._part_of_the_run)
        self._announce_what_is_held(manifest_item)

    def _part_of_the_run(self) -> Iterable[NodeId]:
        """Who has, or had, a part in it that not everybody can have: they are asked for items first."""
        holders = [maker[0] for maker in self._holders.values() if maker is not None]
        return (self.signed.manifest.organiser, *self.signed.manifest.claimants, *holders)

    def _announce_what_is_held(self, manifest_item: ContentRef) -> None:
        """Every node keeps the run findable: its manifest outlives its publisher."""
        manifest = self.signed.manifest
        self.announcer.say(RunRecord(manifest.name, self.signed.run_id, manifest_item), b"", RUN_TTL_S)
        self.announcer.provide(item for item in sorted(self._items) if self.network.store.has(item))
        me = self.network.identity.node_id
        for data, statement in self.ledger.held():
            if statement.holder == me:  # others' may never have been measured here
                self.checker.found_good(data, statement, statement.heldout_loss)
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
        self._note_holders(observation)
        if observation.view.claims.keys() >= set(self.signed.manifest.roles):
            self._seen = (clock.monotonic(), observation)
        return observation

    @property
    def seen(self) -> Observation | None:
        """The whole run as this node saw it last."""
        return self._seen[1]

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
        return self.needed() | self.network.swarm.in_use()

    def needed(self) -> set[InfoHash]:
        """The items that this node keeps, and serves, whatever its limits say: what it holds counts as a
        copy, and a model or a take-over may come to need it."""
        also = self.in_use.items() | {self._manifest_item}
        role = self.progress.role
        held = [statement for _, statement in self.ledger.held()]
        return pinned_items(self.signed.manifest, None if role == NO_ROLE else role, held, also)

    async def _announce_all(self) -> None:
        while True:
            self._telling.say(self.announcer, self.reaching.state, self.network.swarm.rates())
            self.announcer.forget_refused()
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
        """Each copy and each look is a task."""
        now, held, idle = clock.monotonic(), self.ledger, self.progress.role == NO_ROLE
        for candidate in self._choosing.copies(observation, held, now):
            nursery.start_soon(self._replicate_quietly, candidate)
        for candidate, look in self._choosing.looks(observation, held, now, idle=idle):
            nursery.start_soon(self._examine_quietly, candidate, look)

    async def _review_own(self, observation: Observation) -> None:
        """Keep what is safe of this node's own work, and see whether the next checkpoint may be announced."""
        me, members = self.network.identity.node_id, observation.view.members
        replicas = self.signed.manifest.replicas
        interval = self.signed.manifest.recipe.checkpoint_interval_steps
        for role, some in observation.candidates.items():
            mine = [one for one in some if one.statement.holder == me and one.data in self.ledger]
            held = [self._witnessed(one) for one in some]
            safe = safe_checkpoint(
                held, members, replicas, within_steps=interval, leader=self._holders.get(role)
            )
            if safe is not None and (safe.holder, safe.term) == self._holders.get(role):
                # While nobody holds the role, strangers' words for steps decide what is the newest.
                self.ledger.keep_safe(role, next((one.data for one in some if one.statement == safe), None))
            if role not in self._announced:
                continue
            data, since = self._announced[role]
            shown = next((self._witnessed(one) for one in mine if one.data == data), None)
            safely = shown is not None and is_safe(shown, held, members, replicas)
            copied = shown is not None and bool(shown.holders - {me})
            if safely:
                self._lacking.discard(role)
            if may_announce_next(safely, copied, clock.monotonic() - since) or self.progress.role != role:
                self.announce_newest(role)
        await self._flush()

    def _witnessed(self, one: Candidate) -> Held:
        """Who holds a checkpoint; of one that was made here, who is known to."""
        if one.statement.holder != self.network.identity.node_id:
            return one.held
        took = self.network.swarm.takers(one.statement.resume.info_hash)
        return witnessed(one.held, took | {self.signed.manifest.organiser})

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
            self._choosing.copied(candidate.data, clock.monotonic(), done=done)
        await self._tidy()

    async def _examine_quietly(self, candidate: Candidate, look: Look) -> None:
        """Find out whether strangers' word is true. What is true and lacks copies is kept, other things, and
        what is kept already, are only vouched for."""
        statement = candidate.statement
        lacking = len(candidate.providers - {statement.holder}) < self.signed.manifest.replicas
        deadline_s = self._choosing.tries.look_deadline_s(candidate.data, clock.monotonic())
        before_s, done = self.checker.measured_s, False
        try:
            with trio.move_on_after(2 * COPY_DEADLINE_S):  # measuring waits for other measurements
                if look is not Look.COUNTING and (self._mirror or lacking):
                    await self.replicate(candidate, look=True, stall_s=EXAMINE_STALL_S, deadline_s=deadline_s)
                else:
                    await self.examine(candidate, deadline_s=deadline_s)
                done = True
        except TransportError as error:
            log.info("%s step %d could not be fetched yet: %s", statement.role, statement.step, error)
        except (RemoteProtocolError, StoreError) as error:
            log.info("%s step %d is not believed: %s", statement.role, statement.step, error)
        finally:
            spent_s = self.checker.measured_s - before_s
            self._choosing.looked(candidate, clock.monotonic(), done=done, measured_s=spent_s)
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
        self,
        candidate: Candidate,
        *,
        look: bool = False,
        stall_s: float = REPLICA_STALL_S,
        deadline_s: float = COPY_DEADLINE_S,
    ) -> None:
        """Fetch a checkpoint whole, check it, and serve it from here; `deadline_s`: for each item. Raises
        `TransportError`, `RemoteProtocolError` (the checkpoint is bad) or `StoreError`.

        Its loss is measured first if it is finished, or nobody has to be quick (`look`). Else it is copied
        first and, where there is time, measured before it is vouched for (`Choosing.looks`). A node that
        trains needs its machine for that, and vouches for the form.
        """
        statement = candidate.statement
        idle = self._mirror or self.progress.role == NO_ROLE
        measure = look or (idle and statement.finished)
        vouch = measure or not idle
        with self.in_use.using(statement.weights.info_hash, statement.resume.info_hash):
            await self.fetch_weights(
                candidate, measure=measure, vouch=vouch, stall_s=stall_s, deadline_s=deadline_s
            )
            await self._fetch(statement.resume, stall_s, deadline_s)
            await self.hold(candidate.data, statement, access=candidate.access, vouch=vouch)

    async def _fetch(self, ref: ContentRef, stall_s: float, deadline_s: float) -> Path:
        with trio.move_on_after(deadline_s):
            return await self.network.swarm.fetch(ref, stall_timeout_s=stall_s)
        raise TransportError(f"an item of {ref.length} bytes did not come within {deadline_s:.0f} s")

    async def fetch_weights(
        self,
        candidate: Candidate,
        *,
        measure: bool,
        vouch: bool = True,
        stall_s: float = REPLICA_STALL_S,
        deadline_s: float = COPY_DEADLINE_S,
    ) -> None:
        """Fetch (within `deadline_s`) and check the weights of a checkpoint, and `vouch` for them; `measure`:
        their held-out loss, too, where that can be done. Raises `RemoteProtocolError` if they do not fit,
        `TransportError` or `StoreError`."""
        statement = candidate.statement
        item = statement.weights.info_hash
        with self.in_use.using(item):
            known = self.network.store.has(item)
            folder = await self._fetch(statement.weights, stall_s, deadline_s)
            try:
                await self.checker.examine(candidate, folder, measure=measure, vouch=vouch)
            except RemoteProtocolError as error:
                log.warning("%s step %d is refused: %s", statement.role, statement.step, error)
                await self._let_go(candidate)
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

    async def refuse(self, candidate: Candidate) -> None:
        """A trainer here could not go on from its bundle: say so, and keep it no longer."""
        self.checker.found_useless(candidate)
        await self._let_go(candidate)
        self._attest(candidate.statement.role)
        await self._flush()

    async def _let_go(self, candidate: Candidate) -> None:
        """It is false: if it is held, it is not any more."""
        role = candidate.statement.role
        if candidate.data not in self.ledger:
            return
        await trio.to_thread.run_sync(self.ledger.drop, candidate.data)
        self.announcer.unsay(AnnounceRecord, role_scope(self.signed.run_id, role))
        self.announce_newest(role)

    async def hold(
        self,
        data: bytes,
        statement: CheckpointStatement,
        *,
        loss: float | None = None,
        access: bytes = b"",
        vouch: bool = True,
    ) -> None:
        """Both items of `statement` are complete and well formed here: note it and tell others. `loss`: as
        this node measured it, if it did; `access`: the pass of the statement's holder, if it has one;
        `vouch`: say that it is good, too. Raises `StoreError` when an item is no longer here: only what is
        here is announced."""
        with self.in_use.using(statement.weights.info_hash, statement.resume.info_hash):
            await trio.to_thread.run_sync(self.ledger.add, data, statement, access)
        if vouch:
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

    def _note_holders(self, observation: Observation) -> None:
        """Who holds a role decides which of its checkpoints is the newest, and so is announced from here."""
        view = observation.view
        for role, claims in view.claims.items():
            before, self._holders[role] = self._holders.get(role), holder(role, claims, view.now_unix)
            if self._holders[role] != before and self.progress.role != role:
                self.announce_newest(role)

    def announce_newest(self, role: Role) -> None:
        """Say which checkpoint of `role` this node holds: the newest, from the next flush on."""
        me, progress = self.network.identity.node_id, self.progress
        leader = (me, progress.term) if progress.role == role else self._holders.get(role)
        newest = self.ledger.newest(role, leader)
        if newest is None or role in self._private:
            return
        data, statement = newest
        mine = statement.holder == me
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
        held = {role: one for role, one in observation.newest.items() if one.data in self.ledger}
        return [role for role, one in held.items() if self._witnessed(one).holders <= {me}]
