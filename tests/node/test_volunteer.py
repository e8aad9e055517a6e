"""Tests of `paris_node.volunteer`."""

import dataclasses
import random
from collections import namedtuple
from functools import partial
from typing import Any

import pytest
import trio

from paris_node.fitting import Fit
from paris_node.volunteer import OWN_LOOK_S, Volunteer
from paris_p2p import clock
from paris_p2p.core.assignment import View
from paris_p2p.core.lease_actions import Start
from paris_p2p.errors import ConfigError
from paris_p2p.ids import Role, Term
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import ClaimRecord, record_key, role_scope
from paris_p2p.wire.terms import make_term, term_number
from tests.samples import ORGANISER

EXPERT, ROUTER = Role("expert-0"), Role("router")
STRANGER = Identity(b"s" * 32)
Usage = namedtuple("Usage", "total used free")


async def trains(trainer: Any) -> None:
    """Ten seconds, a checkpoint every five; stops when told."""
    trainer.ready()
    for step in range(10, 101, 10):
        with trio.move_on_after(1):
            await trainer.stopping.wait()
        if trainer.stopping.is_set():
            trainer.checkpoint(step)
            trainer.say("stopped", step=step)
            return
        trainer.step(step)
        if step % 50 == 0:
            trainer.checkpoint(step)
    trainer.say("finished", step=100)


async def crashes(trainer: Any) -> None:
    trainer.say("error", kind="oom", message="out of memory")


class Member:
    """A volunteer with its loops running, and what it says."""

    def __init__(
        self,
        world: Any,
        name: str,
        *,
        wanted: Role | None = None,
        roles: tuple[Role, ...] | None = None,
        fit: Fit | None = None,
    ) -> None:
        self.world = world
        self.node, self.events = world.run_node(world.network(name, seeds=True))
        self.volunteer = Volunteer(
            self.node,
            wanted=wanted,
            device="cpu",
            threads=1,
            rng=random.Random(len(name) + ord(name[0])),
            roles=roles,
            fit=fit,
        )
        self.ended_at: float | None = None

    async def live(self, *, until_complete: bool = True) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.node.announce_loop)
            nursery.start_soon(self.node.replicate_loop)
            await self.volunteer.run(until_complete=until_complete)
            nursery.cancel_scope.cancel()
        self.ended_at = trio.current_time()

    def said(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["event"] == kind]

    async def hears(self, kind: str, deadline_s: float = 120.0) -> dict[str, Any]:
        """Wait until it says `kind`."""
        with trio.fail_after(deadline_s):
            while not self.said(kind):
                await trio.sleep(0.25)
        return self.said(kind)[-1]

    def claims(self, role: Role) -> list[Any]:
        mine = self.node.network.identity.node_id
        return [
            r for r in self.world.live("claim", role_scope(self.world.signed.run_id, role)) if r.owner == mine
        ]


async def test_a_node_alone_trains_every_role_and_ends_when_all_are_finished(
    world: Any, autojump_clock: Any
) -> None:
    world.scripts = [trains]
    alice = Member(world, "alice")
    await alice.live()
    assert {event["role"] for event in alice.said("claimed")} == {EXPERT, ROUTER}
    assert {event["role"] for event in alice.said("finished")} == {EXPERT, ROUTER}
    assert all(event["term"] == 1 for event in alice.said("claimed"))
    for role in (EXPERT, ROUTER):
        assert all(claim.payload.state == "released" for claim in alice.claims(role))


async def test_two_nodes_share_the_roles(world: Any, autojump_clock: Any) -> None:
    world.scripts = [trains]
    alice, bob = Member(world, "alice"), Member(world, "bob")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        nursery.start_soon(bob.live)
    finished = [event["role"] for one in (alice, bob) for event in one.said("finished")]
    assert sorted(finished) == [EXPERT, ROUTER] and len(alice.said("finished")) == 1


async def test_a_node_claims_only_what_it_can_hold_and_sees_the_others_finish(
    world: Any, autojump_clock: Any
) -> None:
    world.scripts = [trains]
    small, big = Member(world, "small", roles=(ROUTER,)), Member(world, "big")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(small.live)
        await small.hears("finished")
        assert small.ended_at is None  # not complete yet
        nursery.start_soon(big.live)
    assert [event["role"] for event in small.said("claimed")] == [ROUTER]
    assert [event["role"] for event in big.said("finished")] == [EXPERT]


async def test_a_node_that_never_gets_a_role_ends_when_the_others_have_finished(
    world: Any, autojump_clock: Any
) -> None:
    world.scripts = [trains]
    alice, bob, carol = (Member(world, name) for name in ("alice", "bob", "carol"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        nursery.start_soon(bob.live)
        await alice.hears("claimed")
        await bob.hears("claimed")
        nursery.start_soon(carol.live)
    assert carol.said("claimed") == [] and carol.ended_at is not None
    assert [event["why"] for event in carol.said("standing_by")] == ["held", "finished"]
    assert alice.said("standing_by")[-1]["finished"] == [EXPERT, ROUTER]


async def test_joining_a_finished_run_is_told_once_and_again_after_a_lost_role_was_trained_here(
    world: Any, autojump_clock: Any
) -> None:
    world.scripts = [trains]
    for role in (EXPERT, ROUTER):
        data, _ = world.checkpoint(STRANGER, role, 100)
        world.announces(STRANGER, data, role)
        world.attests(ORGANISER, role, data, loss=0.5)
    alice = Member(world, "alice")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(alice.live, until_complete=False))
        told = await alice.hears("standing_by", 10)
        assert (told["why"], told["finished"], told["left"]) == ("finished", [EXPERT, ROUTER], [])
        await trio.sleep(60)
        lost = record_key("announce", role_scope(world.signed.run_id, EXPERT))
        world.records = {key: record for key, record in world.records.items() if key[0] != lost}
        await alice.hears("finished")
        await trio.sleep(15)
        nursery.cancel_scope.cancel()
    kinds = [event["event"] for event in alice.events() if event["event"] in ("standing_by", "claimed")]
    assert kinds == ["standing_by", "claimed", "standing_by"]


async def test_who_finds_every_role_held_says_so_once_and_claims_one_when_its_lease_runs_out(
    world: Any, autojump_clock: Any
) -> None:
    world.scripts = [trains]
    world.holds(STRANGER, EXPERT)
    world.holds(ORGANISER, ROUTER)
    alice = Member(world, "alice")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await alice.hears("claimed")
        (told,) = alice.said("standing_by")
        assert (told["why"], told["held"]) == ("held", [EXPERT, ROUTER])
        nursery.cancel_scope.cancel()


async def test_leaving_checkpoints_releases_and_lets_another_go_on(world: Any, autojump_clock: Any) -> None:
    world.scripts = [trains]
    alice, bob = Member(world, "alice", wanted=EXPERT), Member(world, "bob", wanted=EXPERT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await alice.hears("step")
        await trio.sleep(2.5)
        nursery.start_soon(bob.node.announce_loop)
        nursery.start_soon(bob.node.replicate_loop)
        await trio.sleep(1)
        alice.volunteer.leave()
        while alice.ended_at is None:
            await trio.sleep(0.25)
        last = alice.said("checkpoint")[-1]
        assert [claim.payload.state for claim in alice.claims(EXPERT)] == ["released"]
        newest = bob.node.ledger.newest(EXPERT)
        assert newest is not None and newest[1].step == last["step"]
        nursery.start_soon(bob.live)
        resumed = await bob.hears("resumed")
        assert (resumed["role"], resumed["term"]) == (EXPERT, 2)
        nursery.cancel_scope.cancel()


async def test_leaving_without_a_role_takes_no_time_even_if_the_network_is_away(
    world: Any, autojump_clock: Any
) -> None:
    world.scripts = [trains]
    alice = Member(world, "alice")
    alice.node.network.dht.down = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await trio.sleep(3)
        left = trio.current_time()
        alice.volunteer.leave()
    assert alice.ended_at is not None and alice.ended_at - left < 25


async def slowly(trainer: Any) -> None:
    """A step in four seconds, a checkpoint every ten."""
    step = trainer.start["resume_step"]
    trainer.ready(step)
    while step < 100:
        with trio.move_on_after(4):
            await trainer.stopping.wait()
        if trainer.stopping.is_set():
            trainer.checkpoint(step)
            trainer.say("stopped", step=step)
            return
        step += 1
        trainer.step(step)
        if step % 10 == 0:
            trainer.checkpoint(step)
    trainer.say("finished", step=step)


async def test_without_a_network_the_lease_ends_in_time_and_the_trainer_goes_on_for_itself(
    world: Any, autojump_clock: Any
) -> None:
    """Also while a read of the DHT hangs: others may take the role when the lease has run out."""
    world.scripts = [slowly]
    alice = Member(world, "alice", wanted=EXPERT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await alice.hears("step")
        await trio.sleep(30)  # it is renewed meanwhile
        assert alice.said("adrift") == []
        alice.node.network.dht.down = True
        expires = max(claim.expiration_unix for claim in alice.claims(EXPERT))
        await alice.hears("adrift")
        assert clock.unix() <= expires
        published = len(alice.node.network.dht.published)
        await trio.sleep(180)
        assert len(alice.said("checkpoint")) >= 3 and alice.said("stopped") == []
        assert len(alice.node.network.dht.published) == published
        reached = alice.said("step")[-1]["step"]
        alice.node.network.dht.down = False
        resumed = await alice.hears("resumed", 60)
        assert alice.said("claimed")[-1]["term"] == resumed["term"] > 1
        assert resumed["step"] >= reached  # not a step is lost
        nursery.cancel_scope.cancel()


async def test_a_role_that_was_nobody_elses_meanwhile_is_gone_on_with_by_the_trainer_that_runs(
    world: Any, autojump_clock: Any
) -> None:
    """Under the new term, and what it made without a lease is told of when there is one again."""
    world.scripts = [slowly]
    alice = Member(world, "alice", wanted=EXPERT)
    mine, scope = alice.node.network.identity.node_id, role_scope(world.signed.run_id, EXPERT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await alice.hears("step")
        await trio.sleep(3)
        alice.node.network.dht.down = True
        await alice.hears("checkpoint")
        assert alice.said("adrift") and world.live("announce", scope) == []
        alice.node.network.dht.down = False
        resumed = await alice.hears("resumed", 60)
        while len(alice.said("checkpoint")) < 2:
            await trio.sleep(0.5)
        made = sorted((one.step, term_number(one.term)) for _, one in alice.node.ledger.held())
        assert made == [(10, 1), (20, resumed["term"])] and resumed["term"] > 1
        with trio.fail_after(60):  # a later one waits for copies of the announced one
            while not alice.node.network.dht.published:
                await trio.sleep(0.5)
        assert [record.owner for record in world.live("announce", scope)] == [mine]
        nursery.cancel_scope.cancel()
    assert len(world.trainers) == 1 and not world.trainers[0].stopping.is_set()


async def test_a_machine_that_loses_every_lease_gets_on_all_the_same_and_is_told_of_it_once(
    world: Any, autojump_clock: Any
) -> None:
    """Each lease ends before the trainer, which takes longer than that to load, has made a step."""
    world.scripts = [loads_slowly]
    alice = Member(world, "alice", wanted=EXPERT)
    alice.node.network.dht.takes_s = 5.0
    with trio.fail_after(400):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alice.live)
            await alice.hears("finished", 400)
            nursery.cancel_scope.cancel()
    assert len(alice.said("adrift")) >= 3 and len(alice.said("busy")) == 1
    assert len(world.trainers) == 1


async def loads_slowly(trainer: Any) -> None:
    await trio.sleep(45)
    trainer.ready()
    for step in range(1, 101):
        await trio.sleep(1)
        trainer.step(step)
    trainer.checkpoint(100)
    trainer.say("finished", step=100)


async def test_a_trainer_that_others_overtook_is_not_gone_on_with(world: Any, autojump_clock: Any) -> None:
    world.scripts = [slowly]
    alice = Member(world, "alice", wanted=EXPERT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        claimed = Start(EXPERT, Term(5 << 32))
        await alice.hears("step")
        volunteer = alice.volunteer
        _, newer = world.checkpoint(STRANGER, EXPERT, 40, term=4 << 32)
        volunteer._view = View(clock.unix(), {}, {EXPERT: newer})
        volunteer._start(claimed, nursery)
        with trio.fail_after(30):
            while len(world.trainers) < 2:
                await trio.sleep(0.5)
        assert world.trainers[0].stopping.is_set() and alice.said("claimed")[-1]["term"] == 5
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("back", [True, False])
async def test_who_leaves_without_a_lease_claims_nothing_any_more(
    world: Any, autojump_clock: Any, back: bool
) -> None:
    world.scripts = [slowly]
    alice = Member(world, "alice", wanted=EXPERT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await alice.hears("step")
        alice.node.network.dht.down = True
        await alice.hears("adrift")
        await trio.sleep(12)
        alice.node.network.dht.down = not back
        reached, left = alice.said("step")[-1]["step"], trio.current_time()
        assert "expert-0 finishes its step" in alice.volunteer.leaving_takes()
        alice.volunteer.leave()
        with trio.fail_after(60):
            while alice.ended_at is None:
                await trio.sleep(0.25)
        nursery.cancel_scope.cancel()
    assert trio.current_time() - left < 45
    assert len(alice.said("claimed")) == 1 and len(world.trainers) == 1
    assert alice.said("checkpoint")[-1]["step"] >= reached
    if back:
        assert all(claim.payload.state == "released" for claim in alice.claims(EXPERT))
        shown = world.live("announce", role_scope(world.signed.run_id, EXPERT))
        assert [record.owner for record in shown] == [alice.node.network.identity.node_id]


async def test_who_finds_its_role_taken_after_a_cut_ends_with_a_checkpoint_that_is_only_a_candidate(
    world: Any, autojump_clock: Any
) -> None:
    world.scripts = [slowly]
    alice, bob = Member(world, "alice", wanted=EXPERT), Member(world, "bob", wanted=EXPERT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await alice.hears("step")
        await trio.sleep(60)
        alice.node.network.dht.down = True
        nursery.start_soon(bob.live)
        await bob.hears("resumed")
        assert alice.said("adrift") and bob.said("resumed")[0]["step"] == 10
        alice.node.network.dht.down = False
        await alice.hears("stopped", 60)
        last = alice.said("step")[-1]["step"]
        mine = alice.node.network.identity.node_id
        shown: list[Any] = []
        with trio.fail_after(30):
            while not any(one.holder == mine and one.step == last for one in shown):
                await trio.sleep(0.5)
                shown = [one.statement for one in (await bob.node.observe()).candidates[EXPERT]]
        assert alice.said("checkpoint")[-1]["step"] == last > 10
        assert bob.said("stopped") == [] and len(alice.said("claimed")) == 1
        nursery.cancel_scope.cancel()


async def test_an_outranked_holder_ends_with_a_checkpoint_that_stays_a_candidate(
    world: Any, autojump_clock: Any
) -> None:
    world.scripts = [slowly]
    alice = Member(world, "alice", wanted=EXPERT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await alice.hears("step")
        await trio.sleep(5)
        world.holds(STRANGER, EXPERT, 9)
        await alice.hears("stopped", 60)
        await trio.sleep(5)
        last = alice.said("step")[-1]["step"]
        assert alice.said("checkpoint")[-1]["step"] == last > 0
        found = (await alice.node.observe()).candidates[EXPERT]
        assert [(one.statement.step, one.statement.holder) for one in found if one.credible] == [
            (last, alice.node.network.identity.node_id)
        ]
        nursery.cancel_scope.cancel()


async def test_a_role_that_is_finished_while_the_network_is_away_is_announced_when_it_is_back(
    world: Any, autojump_clock: Any
) -> None:
    world.scripts = [trains]
    alice = Member(world, "alice", wanted=EXPERT)

    async def slow(trainer: Any) -> None:
        trainer.ready()
        await trio.sleep(60)
        await trains(trainer)

    world.scripts = [slow]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await alice.hears("claimed")
        await trio.sleep(3)
        alice.node.network.dht.down = True
        await alice.hears("finished")
        assert alice.said("adrift")
        assert world.live("announce", role_scope(world.signed.run_id, EXPERT)) == []
        alice.node.network.dht.down = False
        await trio.sleep(60)
        observation = await alice.node.observe()
        assert observation.finished([EXPERT]) and len(alice.said("claimed")) == 1
        nursery.cancel_scope.cancel()


async def test_a_role_whose_trainer_fails_is_left_alone_for_a_while(world: Any, autojump_clock: Any) -> None:
    world.scripts = [crashes, trains]
    alice = Member(world, "alice")
    await alice.live()
    (failed,) = alice.said("failed")
    assert failed["reason"] == "out of memory"
    claimed = [event["role"] for event in alice.said("claimed")]
    assert claimed[0] == claimed[2] == failed["role"] != claimed[1]
    assert {event["role"] for event in alice.said("finished")} == {EXPERT, ROUTER}


async def test_options_that_no_role_can_use_end_the_node_with_the_reason(
    world: Any, autojump_clock: Any
) -> None:
    """`--device cuda` without one would otherwise claim and drop role after role for ever."""

    async def no_such_device(trainer: Any) -> None:
        trainer.say("error", kind="config", message="there is no CUDA device here")

    world.scripts = [no_such_device]
    alice = Member(world, "alice")
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="CUDA")):
        await alice.live()
    assert len(alice.said("claimed")) == 1
    (claim,) = alice.claims(alice.said("claimed")[0]["role"])
    assert claim.payload.state == "released"


async def test_a_trainer_that_stops_of_itself_has_failed(
    world: Any, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def stops(trainer: Any) -> None:
        trainer.say("stopped", step=0)

    world.scripts = [stops, trains]
    alice = Member(world, "alice", wanted=EXPERT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        with trio.fail_after(30):
            while "the trainer stopped of itself" not in caplog.text:
                await trio.sleep(0.1)
        await trio.sleep(1)
        assert [claim.payload.state for claim in alice.claims(EXPERT)] == ["released"]
        assert len(alice.said("claimed")) == 1 and not alice.said("finished")
        with trio.fail_after(300):
            while len(alice.said("claimed")) < 2:
                await trio.sleep(1)
        nursery.cancel_scope.cancel()


async def test_without_room_on_the_disk_nothing_is_claimed_until_there_is_some(
    world: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.scripts = [trains]
    free = {"bytes": 100}
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(10**12, 0, free["bytes"]))
    alice = Member(world, "alice")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        paused = await alice.hears("paused")
        assert "GB free" in paused["reason"] and str(alice.node.network.home.path) in paused["reason"]
        await trio.sleep(60)
        assert alice.said("claimed") == [] and len(alice.said("paused")) == 1
        assert world.live("member", world.signed.run_id)  # it is still a member
        free["bytes"] = 10**12
        await alice.hears("claimed", 30)
    assert len(alice.said("continuing")) == 1 and len(alice.said("finished")) == 2


async def test_a_node_without_room_still_ends_when_the_run_is_complete(
    world: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(10**12, 0, 100))
    alice = Member(world, "alice")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await alice.hears("paused")
        for role in (EXPERT, ROUTER):
            data, _ = world.checkpoint(STRANGER, role, 100)
            world.announces(STRANGER, data, role)
            world.attests(ORGANISER, role, data, loss=0.5)  # the word of who measured is enough
    assert alice.ended_at is not None and alice.said("claimed") == []


@pytest.mark.parametrize("served", [True, False])
async def test_a_run_that_is_finished_by_the_word_of_keys_is_left_when_it_was_looked_at_here(
    world: Any, autojump_clock: Any, served: bool
) -> None:
    alice, said = Member(world, "alice"), [Identity(bytes([n]) * 32) for n in (7, 8)]
    store = world.network("bob").store if served else None
    made = {role: world.checkpoint(STRANGER, role, 100, store=store)[0] for role in (EXPERT, ROUTER)}

    def say() -> None:
        for witness in said:
            world.takes_part(witness)
            for role, data in made.items():
                world.announces(STRANGER, data, role)
                world.attests(witness, role, data)

    say()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        for _ in range(60):
            await trio.sleep(20)
            say()
        assert alice.ended_at is not None
        nursery.cancel_scope.cancel()
    assert alice.said("claimed") == []
    assert (alice.ended_at < 300) == served and (alice.ended_at >= OWN_LOOK_S) != served


async def test_a_role_held_by_another_is_left_to_it(world: Any, autojump_clock: Any) -> None:
    world.scripts = [trains]
    scope = role_scope(world.signed.run_id, EXPERT)
    since = clock.unix()
    term = make_term(1, EXPERT, STRANGER.node_id, since)
    world.says(STRANGER, ClaimRecord("hold", term, since), scope, 20.0)
    alice = Member(world, "alice", wanted=EXPERT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await trio.sleep(15)
        assert alice.said("claimed") == []
        assert (await alice.hears("claimed", 30))["term"] == 2  # when it has run out
        nursery.cancel_scope.cancel()


SMALL = Fit("cpu", 10, router=1, experts=(20, 5))
"""A machine that can train the router and the second kind of expert."""


def announce_kind(world: Any, variant: int, *, term: int = 1) -> None:
    """Somebody who has gone left a checkpoint of that kind, which the organiser found good."""
    data, _ = world.checkpoint(STRANGER, EXPERT, 50, term=term << 32, variant=variant)
    world.announces(STRANGER, data, EXPERT)
    world.attests(ORGANISER, EXPERT, data, loss=0.5)


@pytest.fixture
def two_kinds(world: Any) -> Any:
    """A run whose expert may be of either of two kinds."""
    recipe = world.signed.manifest.recipe
    world.signed = world.make_run("kinds", recipe=dataclasses.replace(recipe, experts=recipe.experts * 2))
    return world


async def test_a_role_whose_checkpoint_is_too_big_is_left_alone_until_it_is_not_and_others_are_claimed(
    two_kinds: Any, autojump_clock: Any
) -> None:
    two_kinds.scripts = [trains]
    announce_kind(two_kinds, 0)
    alice = Member(two_kinds, "alice", fit=SMALL)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.live)
        await alice.hears("finished")
        await alice.hears("standing_by", 30)
        await trio.sleep(100)
        assert [event["role"] for event in alice.said("claimed")] == [ROUTER]
        (unfit,) = alice.said("unfit")
        assert (unfit["roles"], unfit["needs"], unfit["room"]) == ([EXPERT], 20, 10)
        (told,) = alice.said("standing_by")
        assert (told["why"], told["finished"], told["left"]) == ("ours_finished", [ROUTER], [EXPERT])
        announce_kind(two_kinds, 1, term=2)
        with trio.fail_after(60):
            while len(alice.said("claimed")) == 1:
                await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert alice.said("failed") == [] and alice.said("claimed")[-1]["role"] == EXPERT


async def test_asked_for_a_role_whose_checkpoint_is_too_big_a_node_ends_and_says_what_to_do(
    two_kinds: Any, autojump_clock: Any
) -> None:
    announce_kind(two_kinds, 0)
    alice = Member(two_kinds, "alice", wanted=EXPERT, fit=SMALL)
    said = (
        r"--role expert-0: its newest checkpoint \(step 50\) is of kind .* at least .* or join without --role"
    )
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match=said)):
        await alice.live()
    assert alice.said("claimed") == []


async def test_what_only_its_holder_says_to_be_too_big_ends_no_node_that_was_asked_for_the_role(
    two_kinds: Any, autojump_clock: Any
) -> None:
    term = two_kinds.holds(STRANGER, EXPERT)
    data, _ = two_kinds.checkpoint(STRANGER, EXPERT, 50, term=term, variant=0)
    two_kinds.announces(STRANGER, data, EXPERT)
    alice = Member(two_kinds, "alice", wanted=EXPERT, fit=SMALL)
    with trio.move_on_after(15):
        await alice.live()
    assert alice.said("unfit") == [] and alice.ended_at is None
