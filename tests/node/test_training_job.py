"""Tests of `paris_node.training_job`."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from paris_node.fitting import Fit
from paris_node.going_on import RESUME_ROUNDS, RESUME_STALL_S
from paris_node.saving import REFUSED_S, SAVE_AGAIN_S
from paris_node.training_job import (
    MAX_KILLED,
    READY_DEADLINE_S,
    SHARD_STALL_S,
    SILENCE_DEADLINE_S,
    STOP_GRACE_S,
    Outcome,
    TrainingJob,
)
from paris_p2p.errors import DiskFullError
from paris_p2p.ids import Role, Term
from paris_p2p.net.swarm import Rates
from paris_p2p.wire.checkpoint import CheckpointStatement, statement_digest
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import role_scope
from paris_p2p.workers.spawn import WorkerDied

ROLE = Role("expert-0")
OTHER = Identity(b"x" * 32)
ORGANISER = Identity(b"o" * 32)


async def trains_well(trainer: Any) -> None:
    """Two checkpoints, the second the last."""
    trainer.ready(int(trainer.start["resume"] is not None))
    for step in (50, 100):
        trainer.step(step)
        trainer.checkpoint(step)
    trainer.say("finished", step=100)


async def refuses_to_resume(trainer: Any) -> None:
    if trainer.start["resume"] is not None:
        trainer.say("error", kind="bad_resume", message="tampered with")
    else:
        await trains_well(trainer)


async def stops_when_told(trainer: Any) -> None:
    trainer.ready()
    trainer.step(7)
    await trainer.stopping.wait()
    trainer.checkpoint(7)
    trainer.say("stopped", step=7)


async def hangs(trainer: Any) -> None:
    trainer.ready()
    await trio.sleep_forever()


def job_of(
    world: Any, *, role: str = ROLE, term: int = 3 << 32, seeds: bool = True, fit: Fit | None = None
) -> tuple[TrainingJob, Any, Any]:
    node, events = world.run_node(world.network("alice", seeds=seeds))
    return TrainingJob(node, Role(role), Term(term), device="cpu", threads=1, fit=fit), node, events


def announced(world: Any, step: int, **options: Any) -> CheckpointStatement:
    """A checkpoint another node has and announces."""
    keeper = world.network(f"keeper-{step}")
    data, statement = world.checkpoint(keeper.identity, ROLE, step, store=keeper.store, **options)
    world.announces(keeper.identity, data, ROLE)
    return statement  # type: ignore[no-any-return]


def named(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def exists(path: str) -> bool:
    return Path(path).exists()


async def test_a_role_is_trained_from_its_shards_to_its_last_step(world: Any, autojump_clock: Any) -> None:
    world.scripts = [trains_well]
    world.network("publisher", seeds=True)
    job, node, events = job_of(world, seeds=False)
    assert await job.run() == Outcome("finished")
    start = world.trainers[0].start
    assert (start["role"], start["resume"], start["device"], start["threads"]) == (ROLE, None, "cpu", 1)
    assert [shard["cluster"] for shard in start["shards"]] == [0]
    assert all(
        (Path(shard[part]) / "config.json").exists()
        for shard in start["shards"]
        for part in ("train", "heldout")
    )
    assert [event["step"] for event in named(events(), "step")] == [50, 100]
    assert {"role", "step", "loss", "images_per_s"} <= named(events(), "step")[0].keys()
    made = [statement for _, statement in node.ledger.held()]
    assert [(s.step, s.term, s.holder) for s in made] == [
        (n, 3 << 32, node.network.identity.node_id) for n in (50, 100)
    ]
    assert made[0].parent == b"" and made[1].parent == made[0].resume.info_hash
    last = named(events(), "checkpoint")[-1]
    assert (last["step"], last["content_id"]) == (100, made[1].weights.info_hash.hex())
    assert not exists(start["out"])


async def test_the_router_is_given_every_shard(world: Any, autojump_clock: Any) -> None:
    world.signed = world.make_run("digits", clusters=3)
    world.scripts = [trains_well]
    job, _, _ = job_of(world, role="router")
    assert await job.run() == Outcome("finished")
    assert [shard["cluster"] for shard in world.trainers[0].start["shards"]] == [0, 1, 2]


async def test_training_goes_on_from_the_newest_checkpoint_not_the_one_with_most_steps(
    world: Any, autojump_clock: Any
) -> None:
    """A woken zombie's later step of an older term is worth having, but no parent (decision 3)."""
    announced(world, 75, term=1)
    newest = announced(world, 50, term=2)
    world.scripts = [trains_well]
    job, node, events = job_of(world)
    assert await job.run() == Outcome("finished")
    assert newest.resume.info_hash.hex() in world.trainers[0].start["resume"]
    assert world.trainers[0].start["resume_step"] == 50
    assert not node.network.store.has(newest.resume.info_hash)  # it has served, and is no small thing
    (resumed,) = named(events(), "resumed")
    assert (resumed["role"], resumed["term"], resumed["parent"]) == (ROLE, 3, newest.resume.info_hash.hex())
    assert next(s for _, s in node.ledger.held() if s.step == 50).parent == newest.resume.info_hash


async def test_a_bundle_the_trainer_refuses_gives_way_to_the_next_then_to_a_fresh_start(
    world: Any, autojump_clock: Any
) -> None:
    for step in (25, 60):
        announced(world, step)
    world.scripts = [refuses_to_resume]
    job, _, events = job_of(world)
    assert await job.run() == Outcome("finished")
    resumes = [trainer.start["resume"] for trainer in world.trainers]
    assert len(resumes) == 3 and resumes[2] is None and resumes[0] != resumes[1]
    assert named(events(), "resumed") == []


async def test_a_bundle_that_was_refused_is_not_kept_nor_tried_by_the_next_job_and_others_are_told(
    world: Any, autojump_clock: Any
) -> None:
    """Whoever vouched for its weights did not see the bundle: that is no lie."""
    bad = announced(world, 60)
    job, node, _ = job_of(world)
    (data,) = (
        record.payload.statement for record in world.live("announce", role_scope(world.signed.run_id, ROLE))
    )
    world.attests(OTHER, ROLE, data)
    (candidate,) = (await node.observe()).candidates[Role(ROLE)]
    await node.replicate(candidate)
    world.scripts = [refuses_to_resume]
    assert await job.run() == Outcome("finished")
    assert data in node.checker.known().rejected and data not in node.ledger
    assert node.checker.known().liars == set()
    said = world.live("attest", role_scope(world.signed.run_id, ROLE))
    checks = [
        one
        for record in said
        if record.owner == node.network.identity.node_id
        for one in record.payload.checks
    ]
    assert [one.good for one in checks if one.statement == statement_digest(data)] == [False]
    again = TrainingJob(node, Role(ROLE), Term(4 << 32), device="cpu", threads=1)
    assert bad.holder not in {one.statement.holder for one in await again._parents.find()}


async def test_a_bundle_nobody_serves_gives_way_to_the_next(world: Any, autojump_clock: Any) -> None:
    served = announced(world, 25)
    world.announces(OTHER, world.checkpoint(OTHER, ROLE, 60)[0], ROLE)
    world.scripts = [trains_well]
    job, _, _ = job_of(world)
    assert await job.run() == Outcome("finished")
    assert served.resume.info_hash.hex() in world.trainers[0].start["resume"]


@pytest.mark.parametrize("step", [1, 80])
async def test_strangers_who_name_what_they_do_not_serve_do_not_hide_the_work_that_is_served(
    world: Any, autojump_clock: Any, step: int
) -> None:
    """Twelve keys: whatever steps they say, and whoever vouches for them."""
    served = announced(world, 75, term=3 << 32)
    (good,) = world.live("announce", role_scope(world.signed.run_id, ROLE))
    crowd = [Identity(bytes([90 + number]) * 32) for number in range(12)]
    fakes = [
        world.checkpoint(who, ROLE, step + number, term=1000 + number << 32)[0]
        for number, who in enumerate(crowd)
    ]

    async def say() -> None:
        while True:
            world.announces(Identity(b"keeps it".ljust(32)), good.payload.statement, ROLE)
            for who, fake in zip(crowd, fakes, strict=True):
                world.announces(who, fake, ROLE)
                world.takes_part(who)
            for who in crowd[:3]:  # the organiser is away
                world.attests(who, ROLE, *fakes[:8])
            await trio.sleep(100)

    world.scripts = [trains_well]
    job, _, _ = job_of(world)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(say)
        await trio.sleep(0.1)
        assert await job.run() == Outcome("finished")
        nursery.cancel_scope.cancel()
    assert served.resume.info_hash.hex() in world.trainers[0].start["resume"]


async def test_a_role_starts_afresh_only_after_its_checkpoints_were_out_of_reach_for_a_while(
    world: Any, autojump_clock: Any
) -> None:
    """One replica's short absence must not throw a role's whole work away."""
    data, _ = world.checkpoint(OTHER, ROLE, 60)
    world.announces(OTHER, data, ROLE)
    world.attests(ORGANISER, ROLE, data, loss=0.5)
    world.scripts = [trains_well]
    job, _, _ = job_of(world)
    assert await job.run() == Outcome("finished")
    assert world.trainers[0].start["resume"] is None
    assert trio.current_time() >= RESUME_ROUNDS * RESUME_STALL_S


async def test_the_bundle_a_take_over_goes_on_from_is_fetched_before_the_shards_have_come(
    world: Any, autojump_clock: Any
) -> None:
    """Shards that nobody delivers take two minutes to fail; who has the bundle may be about to leave."""
    bundle = announced(world, 60).resume
    for record in world.live("announce", role_scope(world.signed.run_id, ROLE)):
        world.attests(ORGANISER, ROLE, record.payload.statement, loss=0.5)
    job, node, _ = job_of(world, seeds=False)
    swarm = node.network.swarm
    with trio.move_on_after(SHARD_STALL_S / 2):
        await job.run()
    assert node.network.store.has(bundle.info_hash)
    assert swarm.urgent == [bundle] and set(swarm.asked) > {bundle}


@pytest.mark.parametrize("credible", [True, False])
async def test_only_a_bundle_that_can_be_believed_goes_before_other_fetches(
    world: Any, autojump_clock: Any, credible: bool
) -> None:
    bundle = announced(world, 60).resume
    if credible:
        for record in world.live("announce", role_scope(world.signed.run_id, ROLE)):
            world.attests(ORGANISER, ROLE, record.payload.statement, loss=0.5)
    world.scripts = [trains_well]
    job, node, _ = job_of(world)
    assert await job.run() == Outcome("finished")
    assert node.network.swarm.urgent == [bundle] * credible
    assert bundle.info_hash.hex() in world.trainers[0].start["resume"]


async def test_a_bundle_that_does_not_come_beside_the_shards_costs_nothing_but_the_usual_tries(
    world: Any, autojump_clock: Any
) -> None:
    data, _ = world.checkpoint(OTHER, ROLE, 60)
    world.announces(OTHER, data, ROLE)
    world.attests(ORGANISER, ROLE, data, loss=0.5)
    world.network("publisher", seeds=True)
    world.scripts = [trains_well]
    job, _, _ = job_of(world, seeds=False)
    assert await job.run() == Outcome("finished")
    assert world.trainers[0].start["resume"] is None
    assert trio.current_time() < (RESUME_ROUNDS + 1) * RESUME_STALL_S


async def test_a_role_somebody_finished_meanwhile_is_not_trained(world: Any, autojump_clock: Any) -> None:
    announced(world, 100)
    job, _, _ = job_of(world)
    assert await job.run() == Outcome("finished")
    assert world.trainers == []


async def test_a_role_whose_end_nobody_has_checked_yet_is_looked_at_before_it_is_trained_again(
    world: Any, autojump_clock: Any
) -> None:
    """Its trainer's claim has lapsed, and the organiser was too busy to check it."""
    keeper = world.network("keeper")
    for step in (50, 100):
        data, _ = world.checkpoint(OTHER, ROLE, step, store=keeper.store)
        world.announces(OTHER if step == 100 else keeper.identity, data, ROLE)
        if step == 50:
            world.attests(ORGANISER, ROLE, data, loss=0.5)
    job, _, _ = job_of(world)
    assert await job.run() == Outcome("finished")
    assert world.trainers == []


async def test_a_role_that_strangers_call_finished_is_trained(world: Any, autojump_clock: Any) -> None:
    served = announced(world, 50)
    for number in range(4):
        who = Identity(bytes([number]) * 32)
        fake, _ = world.checkpoint(who, ROLE, 100, term=9 << 32, content="z" * (number + 1))
        world.announces(who, fake, ROLE)
    wrong = world.checkpoint(OTHER, "router", 50, store=world.stores[0])[1].weights
    lie, _ = world.checkpoint(OTHER, ROLE, 100, term=10 << 32, store=world.stores[0], weights=wrong)
    world.announces(OTHER, lie, ROLE)
    world.scripts = [trains_well]
    job, _, _ = job_of(world)
    assert await job.run() == Outcome("finished")
    start = world.trainers[0].start
    assert served.resume.info_hash.hex() in start["resume"]
    assert (start["resume_step"], start["resume_loss"]) == (50, 0.5)


async def test_a_stop_before_anything_was_fetched_is_a_stop(world: Any, autojump_clock: Any) -> None:
    job, _, _ = job_of(world, seeds=False)
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            await trio.sleep(1)
            job.stop()

        nursery.start_soon(stop)
        assert await job.run() == Outcome("stopped")
    assert trio.current_time() < SHARD_STALL_S and world.trainers == []


async def test_a_stop_while_the_resume_bundle_is_fetched_is_a_stop(world: Any, autojump_clock: Any) -> None:
    world.announces(OTHER, world.checkpoint(OTHER, ROLE, 60)[0], ROLE)
    job, _, _ = job_of(world)
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            await trio.sleep(1)
            job.stop()

        nursery.start_soon(stop)
        assert await job.run() == Outcome("stopped")
    assert trio.current_time() < RESUME_STALL_S and world.trainers == []


async def test_a_stop_while_training_leaves_a_checkpoint(world: Any, autojump_clock: Any) -> None:
    world.scripts = [stops_when_told]
    job, node, _ = job_of(world)
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            await trio.sleep(10)
            job.stop()

        nursery.start_soon(stop)
        assert await job.run() == Outcome("stopped")
    assert [statement.step for _, statement in node.ledger.held()] == [7]


async def test_a_trainer_that_does_not_stop_is_ended(world: Any, autojump_clock: Any) -> None:
    world.scripts = [hangs]
    job, _, _ = job_of(world)
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            await trio.sleep(10)
            job.stop()

        nursery.start_soon(stop)
        assert await job.run() == Outcome("stopped")
    assert trio.current_time() == pytest.approx(10 + STOP_GRACE_S, abs=1)


async def test_a_held_out_loss_that_rises_is_told_of_once(world: Any, autojump_clock: Any) -> None:
    losses = {10: 0.9, 20: 0.3, 30: 0.32, 40: 0.5, 60: 0.8, 100: 0.7}

    async def overfits(trainer: Any) -> None:
        trainer.ready()
        for step, loss in losses.items():
            trainer.checkpoint(step, loss)
        trainer.say("finished", step=100)

    world.scripts = [overfits]
    job, _, events = job_of(world)
    assert await job.run() == Outcome("finished")
    (risen,) = named(events(), "risen")
    assert (risen["since_step"], risen["least"], risen["now"]) == (20, 0.3, 0.5)


async def test_a_trainer_that_is_still_loading_is_ended_at_once(world: Any, autojump_clock: Any) -> None:
    """It does not listen yet, and nothing is lost."""

    async def loads(trainer: Any) -> None:
        await trio.sleep_forever()

    world.scripts = [loads]
    job, _, _ = job_of(world)
    with trio.fail_after(15):
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                await trio.sleep(10)
                job.stop()

            nursery.start_soon(stop)
            assert await job.run() == Outcome("stopped")


async def test_a_trainer_that_says_nothing_has_failed(world: Any, autojump_clock: Any) -> None:
    async def silent(_trainer: Any) -> None:
        await trio.sleep_forever()

    world.scripts = [silent]
    job, _, _ = job_of(world)
    outcome = await job.run()
    assert outcome.kind == "failed" and "said nothing for 300 s" in outcome.reason
    assert trio.current_time() == pytest.approx(READY_DEADLINE_S, abs=1)


async def test_a_trainer_that_falls_silent_has_failed(world: Any, autojump_clock: Any) -> None:
    world.scripts = [hangs]
    job, _, _ = job_of(world)
    outcome = await job.run()
    assert outcome.kind == "failed" and "900 s" in outcome.reason
    assert trio.current_time() == pytest.approx(SILENCE_DEADLINE_S, abs=1)


async def test_a_trainer_that_dies_or_complains_has_failed_with_its_reason(
    world: Any, autojump_clock: Any
) -> None:
    async def dies(trainer: Any) -> None:
        trainer.ready()

    async def complains(trainer: Any) -> None:
        trainer.say("error", kind="oom", message="one sample does not fit into 8 GB")

    world.scripts = [dies, complains]
    job, _, _ = job_of(world)
    assert await job.run() == Outcome("failed", "the trainer died")
    assert await job.run() == Outcome("failed", "one sample does not fit into 8 GB")


async def diverges(trainer: Any) -> None:
    """A checkpoint, then a loss that is no number."""
    trainer.ready(trainer.start["resume_step"])
    trainer.step(trainer.start["resume_step"] + 10)
    trainer.checkpoint(trainer.start["resume_step"] + 10)
    trainer.say("error", kind="nan", message="the training loss is nan at step 13")


async def test_a_loss_that_is_no_number_is_rolled_back_and_another_path_taken(
    world: Any, autojump_clock: Any
) -> None:
    world.scripts = [diverges, trains_well]
    job, node, events = job_of(world)
    assert await job.run() == Outcome("finished")
    first, second = (trainer.start for trainer in world.trainers)
    assert (first["attempt"], first["resume"]) == (0, None)
    assert (second["attempt"], second["resume_step"]) == (1, 10)
    (event,) = named(events(), "rolled_back")
    assert (event["role"], event["reason"]) == (ROLE, "the training loss is nan at step 13")
    assert [s.step for _, s in node.ledger.held()][-1] == 100


async def test_a_role_that_diverges_on_every_path_has_failed(world: Any, autojump_clock: Any) -> None:
    world.scripts = [diverges]
    job, node, events = job_of(world)
    node.network.dht.down = True  # what is here is enough to go back to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "observe", _seen_once(node))
        outcome = await job.run()
    assert outcome.kind == "failed" and "nan" in outcome.reason and "3 rollbacks" in outcome.reason
    assert [trainer.start["attempt"] for trainer in world.trainers] == [0, 1, 2, 3]
    assert [trainer.start["resume_step"] for trainer in world.trainers] == [0, 10, 20, 30]
    assert len(named(events(), "rolled_back")) == 3


@pytest.mark.parametrize(("older", "steps"), [(True, [60, 50]), (False, [60, 60, 0])])
async def test_a_strangers_bundle_that_leads_to_no_number_is_not_gone_back_to(
    world: Any, autojump_clock: Any, older: bool, steps: list[int]
) -> None:
    """Where there is nothing else, it has a second chance on another path."""
    made = []
    for step, term, key in ((50, 1 << 32, b"a"), (60, 2 << 32, b"m"))[not older :]:
        holder = world.network(key.decode(), seeds=True)
        data, _ = world.checkpoint(holder.identity, ROLE, step, term=term, store=holder.store)
        world.announces(holder.identity, data, ROLE)
        made.append(data)
    world.attests(ORGANISER, ROLE, *made, loss=0.5)

    async def poisoned(trainer: Any) -> None:
        if trainer.start["resume_step"] < 60:
            return await trains_well(trainer)
        trainer.ready(60)
        trainer.say("error", kind="nan", message="the training loss is nan at step 61")

    world.scripts = [poisoned]
    job, _, _ = job_of(world)
    assert await job.run() == Outcome("finished")
    assert [trainer.start["resume_step"] for trainer in world.trainers] == steps


async def test_a_crowd_of_keys_does_not_hide_what_a_role_is_gone_on_from(
    world: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_node.judging.VERIFIED_A_ROUND", 1)
    monkeypatch.setattr("paris_node.judging.VERIFIED_A_ROLE", 0)
    job, node, _ = job_of(world)
    await node.observe()  # it has been there for a while
    made = []
    for number in range(8):
        maker = Identity(bytes([130 + number]) * 32)
        made.append(world.checkpoint(maker, ROLE, 40)[0])
        world.announces(maker, made[-1], ROLE)
    assert len((await node.observe()).candidates[Role(ROLE)]) == 1
    assert {one.data for one in await job._parents.find()} == set(made)


def _seen_once(node: Any) -> Any:
    """The run shows once, before the network goes away."""
    observe, dht = node.observe, node.network.dht

    async def seen_once(**options: Any) -> Any:
        shown = dht.published == []
        dht.down = not shown
        observation = await observe(**options)
        dht.down = True
        return observation

    return seen_once


async def is_killed(trainer: Any) -> None:
    trainer.ready(trainer.start["resume_step"])
    trainer.checkpoint(trainer.start["resume_step"] + 10)
    trainer.death = WorkerDied("trainer", 7, -9, "")


async def test_a_trainer_that_is_killed_is_started_again_from_its_own_last_checkpoint(
    world: Any, autojump_clock: Any
) -> None:
    world.scripts = [is_killed, trains_well]
    job, _, events = job_of(world)
    assert await job.run() == Outcome("finished")
    assert [trainer.start["resume_step"] for trainer in world.trainers] == [0, 10]
    assert world.trainers[1].start["attempt"] == 0  # nothing was wrong with its path
    assert "SIGKILL" in named(events(), "rolled_back")[0]["reason"]


async def test_a_trainer_that_is_killed_again_and_again_has_failed(world: Any, autojump_clock: Any) -> None:
    world.scripts = [is_killed]
    job, _, _ = job_of(world)
    outcome = await job.run()
    assert outcome.kind == "failed" and "SIGKILL" in outcome.reason
    assert len(world.trainers) == MAX_KILLED + 1


async def test_work_that_was_never_announced_is_gone_on_from(world: Any, autojump_clock: Any) -> None:
    announced(world, 25)
    world.scripts = [trains_well]
    job, node, _ = job_of(world)
    store, identity = node.network.store, node.network.identity
    data, statement = world.checkpoint(identity, ROLE, 60, store=store)
    await node.hold(data, statement)
    world.records.clear()
    announced(world, 30)
    assert await job.run() == Outcome("finished")
    assert statement.resume.info_hash.hex() in world.trainers[0].start["resume"]


async def test_of_several_variants_the_trainer_takes_the_first_that_fits_and_statements_say_which(
    world: Any, autojump_clock: Any
) -> None:
    variant = world.signed.manifest.recipe.experts[0]
    recipe = dataclasses.replace(world.signed.manifest.recipe, experts=(variant, variant))
    world.signed = world.make_run("digits", recipe=recipe)

    async def takes_the_second(trainer: Any) -> None:
        trainer.say("ready", step=0, total_steps=100, variant=1)
        trainer.checkpoint(50)
        trainer.say("error", kind="nan", message="the loss is nan")

    world.scripts = [takes_the_second, trains_well]
    job, node, _ = job_of(world)
    assert await job.run() == Outcome("finished")
    assert [trainer.start["variant"] for trainer in world.trainers] == [None, 1]
    assert {statement.variant for _, statement in node.ledger.held()} == {1}


async def test_a_role_that_must_be_one_variant_is_trained_as_that(world: Any, autojump_clock: Any) -> None:
    manifest = world.signed.manifest
    variant = manifest.recipe.experts[0]
    recipe = dataclasses.replace(manifest.recipe, experts=(variant, variant))
    world.signed = world.make_run("digits", recipe=recipe, variants=(1,))
    world.scripts = [trains_well]
    job, node, _ = job_of(world)
    assert await job.run() == Outcome("finished")
    assert world.trainers[0].start["variant"] == 1
    assert {statement.variant for _, statement in node.ledger.held()} == {1}


@pytest.mark.parametrize("measured_by", ["organiser", "this node", "nobody"])
async def test_a_checkpoint_too_big_for_this_machine_is_not_trained_over_if_its_loss_was_measured(
    world: Any, autojump_clock: Any, measured_by: str
) -> None:
    """When nobody has, it is looked at here; what cannot be measured may be noise, and keeps nobody away."""
    statement = announced(world, 50)
    if measured_by == "organiser":
        data = next(iter(world.live("announce", role_scope(world.signed.run_id, ROLE)))).payload.statement
        world.attests(ORGANISER, ROLE, data, loss=0.5)
    if measured_by == "this node":
        world.measure = lambda _message: {"type": "measured", "loss": 0.5, "baseline": 1.2}
    world.scripts = [trains_well]
    job, node, _ = job_of(world, fit=Fit("cuda", 10, router=1, experts=(20,)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.checker.run)
        await trio.testing.wait_all_tasks_blocked()
        outcome = await job.run()
        nursery.cancel_scope.cancel()
    assert (statement.weights in node.network.swarm.asked) == (measured_by != "organiser")
    if measured_by == "nobody":
        assert outcome == Outcome("finished") and world.trainers[0].start["resume"] is None
    else:
        assert outcome.kind == "failed" and "its newest checkpoint (step 50)" in outcome.reason
        assert world.trainers == []


async def test_what_the_trainer_could_train_is_gone_on_from_whatever_fitted_before(
    world: Any, autojump_clock: Any
) -> None:
    """Other programs have ended since the machine was asked, so that the trainer took the bigger kind."""
    world.scripts = [is_killed, trains_well]
    job, _, events = job_of(world, fit=Fit("cuda", 10, router=1, experts=(20,)))
    assert await job.run() == Outcome("finished")
    assert named(events(), "resumed")


async def test_strangers_who_name_a_big_checkpoint_that_is_not_to_be_had_keep_nobody_from_training(
    world: Any, autojump_clock: Any
) -> None:
    world.announces(OTHER, world.checkpoint(OTHER, ROLE, 60)[0], ROLE)
    world.scripts = [trains_well]
    job, _, _ = job_of(world, fit=Fit("cuda", 10, router=1, experts=(20,)))
    assert await job.run() == Outcome("finished")


async def test_a_trainer_that_dies_as_it_is_told_to_stop_has_failed(
    world: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Telling it and hearing from it fail in one moment: still one outcome, not a group of errors."""
    died = trio.Event()

    async def dies(trainer: Any) -> None:
        trainer.ready()
        await died.wait()

    world.scripts = [dies]
    job, _, _ = job_of(world)
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            await trio.sleep(5)
            died.set()
            job.stop()

        nursery.start_soon(stop)
        assert (await job.run()).kind == "failed"


async def test_shards_that_cannot_be_had_are_one_failure(world: Any, autojump_clock: Any) -> None:
    """Both fetches give up in the same moment."""
    job, _, _ = job_of(world, seeds=False)
    outcome = await job.run()
    assert outcome.kind == "failed" and "no source delivered" in outcome.reason
    assert trio.current_time() == pytest.approx(SHARD_STALL_S, abs=1)


class FullDisk:
    """Has no room for the items called `names` while `full`."""

    def __init__(self, store: Any, *names: str) -> None:
        self.full, self._names, self._add = True, names, store.add
        store.add = self

    def __call__(self, source: Path, **options: Any) -> Any:
        if self.full and source.name in self._names:
            raise DiskFullError("disk full while adding it")
        return self._add(source, **options)


async def test_a_full_disk_does_not_end_training_and_the_checkpoint_is_kept_when_there_is_room(
    world: Any, autojump_clock: Any
) -> None:
    job, node, events = job_of(world)
    disk = FullDisk(node.network.store, "resume")
    seen: list[Any] = []

    async def trains_on(trainer: Any) -> None:
        trainer.ready()
        trainer.checkpoint(25)
        await trio.sleep(100)
        seen.append((node.progress.activity, [s.step for _, s in node.ledger.held()]))
        trainer.step(30)
        disk.full = False
        await trio.sleep(SAVE_AGAIN_S + 1)
        seen.append((node.progress.activity, [s.step for _, s in node.ledger.held()]))
        trainer.checkpoint(100)
        trainer.say("finished", step=100)

    world.scripts = [trains_on]
    assert await job.run() == Outcome("finished")
    assert seen == [("disk full", []), ("training", [25])]
    (said,) = named(events(), "unsaved")
    assert (said["role"], said["step"], said["reason"]) == (ROLE, 25, "disk full while adding it")
    assert [event["step"] for event in named(events(), "checkpoint")] == [25, 100]
    first, last = (statement for _, statement in node.ledger.held())
    assert last.parent == first.resume.info_hash


async def test_a_checkpoint_that_found_no_room_makes_way_for_the_next_one_altogether(
    world: Any, autojump_clock: Any
) -> None:
    job, node, _ = job_of(world)
    before = set(node.network.store.ids())
    disk = FullDisk(node.network.store, "resume")

    async def trains_on(trainer: Any) -> None:
        trainer.ready()
        trainer.checkpoint(25)
        await trio.sleep(1)
        disk.full = False
        trainer.checkpoint(50)
        await trio.sleep(1)
        assert not (Path(trainer.start["out"]) / "step-25" / "resume").exists()
        trainer.say("stopped", step=50)

    world.scripts = [trains_on]
    assert await job.run() == Outcome("stopped")
    await node._tidy()
    (held,) = (statement for _, statement in node.ledger.held())
    assert held.step == 50
    assert set(node.network.store.ids()) - before == {held.weights.info_hash, held.resume.info_hash}


async def test_a_role_whose_last_checkpoint_finds_no_room_is_not_finished_before_there_is_some(
    world: Any, autojump_clock: Any
) -> None:
    job, node, _ = job_of(world)
    disk = FullDisk(node.network.store, "weights")

    async def trains_to_the_end(trainer: Any) -> None:
        trainer.ready()
        trainer.checkpoint(100)
        trainer.say("finished", step=100)
        await trio.sleep(300)
        disk.full = False

    world.scripts = [trains_to_the_end]
    assert await job.run() == Outcome("finished")
    assert trio.current_time() > 300 and [s.step for _, s in node.ledger.held()] == [100]


@pytest.mark.parametrize("whose", ["trainer", "node"])
async def test_a_role_that_cannot_be_kept_for_long_is_given_up_and_says_why(
    world: Any, autojump_clock: Any, whose: str
) -> None:
    """Another node, with room, has the role then, from the last checkpoint that was kept."""
    job, node, events = job_of(world)
    FullDisk(node.network.store, "weights")

    async def finds_no_room(trainer: Any) -> None:
        trainer.ready()
        if whose == "node":
            trainer.checkpoint(1)
        for step in range(1, 1000):
            trainer.step(step)
            if whose == "trainer":
                trainer.say("unsaved", step=step, message="disk full while adding it")
            await trio.sleep(60)

    world.scripts = [finds_no_room]
    outcome = await job.run()
    assert outcome.kind == "failed" and "30 minutes: disk full" in outcome.reason
    assert trio.current_time() == pytest.approx(REFUSED_S, abs=61)
    assert len(named(events(), "unsaved")) == 1


async def test_a_work_folder_that_cannot_be_made_is_a_failure(world: Any, autojump_clock: Any) -> None:
    world.scripts = [trains_well]
    job, node, _ = job_of(world)
    (node.network.home.path / "work").write_bytes(b"")
    outcome = await job.run()
    assert outcome.kind == "failed" and "work" in outcome.reason


async def test_a_checkpoint_is_kept_although_the_network_is_away(world: Any, autojump_clock: Any) -> None:
    async def goes_on(trainer: Any) -> None:
        trainer.ready()
        node.network.dht.down = True
        trainer.checkpoint(50)
        trainer.checkpoint(100)
        trainer.say("finished", step=100)

    world.scripts = [goes_on]
    job, node, _ = job_of(world)
    assert await job.run() == Outcome("finished")
    assert [statement.step for _, statement in node.ledger.held()] == [50, 100]


async def test_a_cancelled_job_cleans_up_after_itself(world: Any, autojump_clock: Any) -> None:
    async def writes(trainer: Any) -> None:
        trainer.ready()
        trainer.checkpoint(5)  # whatever is there
        await trio.sleep_forever()

    world.scripts = [writes]
    job, _, _ = job_of(world)
    with trio.move_on_after(5) as scope:
        await job.run()
    assert scope.cancelled_caught and not exists(world.trainers[0].start["out"])


@pytest.mark.parametrize("with_uploads", [(50.0, 0.0), (100.0, 0.2)], ids=["slowed", "starved"])
async def test_uploads_make_room_for_the_trainer_but_not_while_its_checkpoint_lacks_copies(
    world: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch, with_uploads: tuple[float, float]
) -> None:
    """A take-over loses what only this node has. `with_uploads`: the trainer's speed, and the seconds of each
    that it waits for its input."""
    seen: list[bool] = []
    job, node, _ = job_of(world)
    swarm = node.network.swarm

    async def slowed_by_uploads(trainer: Any) -> None:
        trainer.ready()
        for step in range(1, 31):
            up, speed, waited = (1e6, *with_uploads) if step > 10 else (0.0, 100.0, 0.0)
            monkeypatch.setattr(swarm, "rates", lambda up=up: Rates(up, 0.0, 1, 0, 0))
            trainer.say("step", step=step, loss=0.5, images_per_s=speed, seconds=1.0, waited_s=waited)
            if step == 25:
                trainer.checkpoint(step)
            await trio.sleep(1)
            seen.append(swarm.yielding)
        trainer.say("finished", step=30)

    world.scripts = [slowed_by_uploads]
    assert (await job.run()).kind == "finished"
    assert seen[20] and not seen[5]
    assert not seen[28] and node.lacks_copies(ROLE)
