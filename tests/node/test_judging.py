"""Tests of `paris_node.judging`: what strangers can and cannot make a reader believe."""

import dataclasses
from typing import Any

import pytest
import trio

from paris_node.judging import MAX_MET, MAX_PER_HOLDER, Known, Met, contenders, verify_new
from paris_node.snapshot import observe, take_snapshot
from paris_p2p.core.accept import Standing
from paris_p2p.dht.protocol import MAX_ROWS_A_KEY
from paris_p2p.ids import Role, Term
from paris_p2p.wire.checkpoint import sign_statement
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import role_scope

ALICE, BOB, CAROL, MALLORY = (Identity(letter * 32) for letter in (b"a", b"b", b"c", b"m"))
FRIEND = Identity(b"n" * 32)
ORGANISER = Identity(b"o" * 32)
ROLE = Role("expert-0")
INTERVAL = 25


async def seen(world: Any, **known: Any) -> Any:
    return await observe(world.network("viewer").dht, world.signed, known=Known(**known))


def announced(world: Any, who: Identity, step: int, number: int = 1, **options: Any) -> bytes:
    data, _ = world.checkpoint(who, ROLE, step, term=number << 32, **options)
    world.announces(who, data, ROLE)
    return data  # type: ignore[no-any-return]


async def test_a_fake_finish_finishes_nothing(world: Any, autojump_clock: Any) -> None:
    for who in (ALICE, BOB, MALLORY):
        world.takes_part(who)
    announced(world, MALLORY, 100, 9)
    observation = await seen(world)
    assert ROLE not in observation.newest and ROLE not in observation.view.statements
    assert take_snapshot(observation, world.signed).roles[0].state == "unclaimed"
    assert [one.standing for one in observation.candidates[ROLE]] == [Standing.UNCHECKED]


async def test_a_fake_finish_by_the_claims_holder_finishes_nothing_either(
    world: Any, autojump_clock: Any
) -> None:
    for who in (ALICE, BOB, MALLORY):
        world.takes_part(who)
    term = world.holds(MALLORY, ROLE)
    world.announces(MALLORY, world.checkpoint(MALLORY, ROLE, 100, term=term)[0], ROLE)
    observation = await seen(world)
    assert not observation.finished([ROLE])
    assert take_snapshot(observation, world.signed).roles[0].state == "checking"


async def test_fakes_do_not_crowd_out_what_was_checked(world: Any, autojump_clock: Any) -> None:
    good = announced(world, ALICE, 50)
    world.attests(ORGANISER, ROLE, good, loss=0.5)
    for number in range(20):
        announced(world, Identity(bytes([100 + number]) * 32), 100, 9)
    observation = await seen(world)
    assert observation.candidates[ROLE][0].data == good == observation.newest[ROLE].data
    doubtful = contenders(observation.candidates[ROLE], observation.newest[ROLE], within_steps=INTERVAL)
    assert len(doubtful) == 20


async def test_a_finish_that_only_members_vouch_for_is_a_contender_until_somebody_sure_looked(
    world: Any, autojump_clock: Any
) -> None:
    for who in (ALICE, BOB, CAROL, MALLORY):
        world.takes_part(who)
    data = announced(world, MALLORY, 100, 9)
    for who in (BOB, CAROL):
        world.attests(who, ROLE, data)
    observation = await seen(world)
    newest = observation.newest[ROLE]
    assert newest.data == data and newest.credible and not newest.assured
    assert contenders(observation.candidates[ROLE], newest, within_steps=INTERVAL) == [newest]
    world.attests(ORGANISER, ROLE, data, loss=0.5)
    observation = await seen(world)
    assert observation.newest[ROLE].assured
    found, newest = observation.candidates[ROLE], observation.newest[ROLE]
    assert contenders(found, newest, within_steps=INTERVAL) == []


async def test_a_strangers_friends_vouch_in_vain_while_the_organiser_publishes(
    world: Any, autojump_clock: Any
) -> None:
    for who in (ALICE, MALLORY, FRIEND, BOB):
        world.takes_part(who)
    world.takes_part(ORGANISER, "publishing")
    fake = announced(world, MALLORY, 100, 9)
    for who in (FRIEND, BOB):
        world.attests(who, ROLE, fake)
    assert ROLE not in (await seen(world)).newest


async def test_a_node_believes_its_own_check_and_not_who_lied_before(world: Any, autojump_clock: Any) -> None:
    for who in (ALICE, BOB, CAROL, MALLORY):
        world.takes_part(who)
    fake, good = announced(world, MALLORY, 100, 9), announced(world, ALICE, 100, 1)
    for who in (BOB, CAROL):
        world.attests(who, ROLE, fake)
    assert (await seen(world)).newest[ROLE].data == fake
    again = await seen(world, rejected={fake}, liars=frozenset({BOB.node_id, MALLORY.node_id}))
    assert [one.data for one in again.candidates[ROLE]] == [good] and ROLE not in again.newest


async def test_attestations_count_only_from_members(world: Any, autojump_clock: Any) -> None:
    data = announced(world, ALICE, 100)
    for who in (ALICE, BOB):
        world.takes_part(who)
    world.attests(MALLORY, ROLE, data)
    assert ROLE not in (await seen(world)).newest
    world.attests(BOB, ROLE, data)
    assert (await seen(world)).finished([ROLE])


async def test_one_key_fills_a_role_with_few_checkpoints(world: Any, autojump_clock: Any) -> None:
    for number in range(10):
        data, _ = world.checkpoint(MALLORY, ROLE, number + 1)
        world.announces(Identity(bytes([100 + number]) * 32), data, ROLE)
    found = (await seen(world)).candidates[ROLE]
    assert [one.statement.step for one in found] == [10, 9, 8] and len(found) == MAX_PER_HOLDER


def test_more_statements_are_remembered_than_one_read_shows() -> None:
    assert MAX_MET > MAX_ROWS_A_KEY


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four new statements a reading."""
    monkeypatch.setattr("paris_node.judging.VERIFIED_A_ROUND", 4)
    monkeypatch.setattr("paris_node.judging.VERIFIED_A_ROLE", 0)


def flood(world: Any, count: int) -> None:
    for number in range(count):
        announced(world, Identity(bytes([130 + number]) * 32), 90, 3, loss=0.75)


async def shown(world: Any, met: Met | None, **options: Any) -> list[bytes]:
    """What a reader that has `met` some statements sees of the role."""
    dht = world.network("viewer").dht
    return [one.data for one in (await observe(dht, world.signed, met=met, **options)).candidates[ROLE]]


async def test_a_flood_of_statements_is_verified_a_few_a_reading_those_somebody_stands_for_first(
    world: Any, few: None, autojump_clock: Any
) -> None:
    met = Met()
    assert await shown(world, met) == []
    flood(world, 12)
    term = world.holds(ALICE, ROLE)
    mine, _ = world.checkpoint(ALICE, ROLE, 50, term=term, loss=0.75)
    world.announces(ALICE, mine, ROLE)
    copied, _ = world.checkpoint(BOB, ROLE, 40, loss=0.75)
    world.announces(CAROL, copied, ROLE)
    world.attests(ORGANISER, ROLE, copied, loss=0.5)
    first = await shown(world, met)
    assert {mine, copied} < set(first) and len(first) == 4
    assert [len(await shown(world, met)) for _ in range(4)] == [8, 12, 14, 14]  # and none twice


async def test_who_reads_for_the_first_time_or_must_know_it_all_is_shown_it_all(
    world: Any, few: None, autojump_clock: Any
) -> None:
    met = Met()
    flood(world, 8)
    good = announced(world, ALICE, 40)
    assert good in await shown(world, None) and good in await shown(world, met)
    flood(world, 18)
    late = announced(world, BOB, 30)
    assert len(await shown(world, met)) <= 13
    found = await shown(world, met, whole=True)
    assert late in found and len(found) == 20


async def test_even_then_it_does_not_take_for_ever_nor_keep_others_waiting(
    world: Any, few: None, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    monkeypatch.setattr("paris_node.judging.WHOLE_DEADLINE_S", 0.0)
    monkeypatch.setattr("paris_node.judging.VERIFIED_AT_ONCE", 2)
    met = Met()
    flood(world, 6)
    assert [len(await shown(world, met)) for _ in range(2)] == [2, 6]


async def test_a_first_reading_that_is_given_up_goes_on_where_it_was(
    world: Any, few: None, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    monkeypatch.setattr("paris_node.judging.VERIFIED_AT_ONCE", 2)
    met = Met()
    flood(world, 6)
    records = world.live("announce", role_scope(world.signed.run_id, ROLE))
    with trio.CancelScope() as scope:
        scope.cancel()
        await verify_new(world.signed, {ROLE: records}, met)
    assert scope.cancelled_caught and not met.was_read([ROLE])
    assert len(met.unknown(ROLE, [one.payload.statement for one in records])) == 4
    await verify_new(world.signed, {ROLE: records}, met)
    assert met.was_read([ROLE])


async def test_what_is_shown_stays_verified_however_much_is_shown_and_what_is_not_makes_room(
    world: Any, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    monkeypatch.setattr("paris_p2p.wire.checkpoint.CACHED_STATEMENTS", 1)
    monkeypatch.setattr("paris_node.judging.MAX_MET", 4)
    met = Met()
    signed = [world.checkpoint(Identity(bytes([130 + n]) * 32), ROLE, 10)[0] for n in range(6)]
    assert met.unknown(ROLE, signed[:4]) == signed[:4]
    for data in signed[:4]:
        met.verify(world.signed, ROLE, data)
    assert met.unknown(ROLE, [b"new", *signed[:3]]) == [b"new"]
    met.verify(world.signed, ROLE, b"new")  # no statement: that is remembered, too
    assert met.unknown(ROLE, [b"new", *signed[:4]]) == [signed[3]]
    assert met.statement(ROLE, b"new") is None and met.statement(ROLE, signed[0]) is not None


async def test_a_key_has_as_many_roles_as_the_run_allows(world: Any, autojump_clock: Any) -> None:
    for allowed, seen_roles in ((1, ["router"]), (2, [ROLE, "router"])):
        world.signed = world.make_run("two", max_roles_per_node=allowed)
        world.holds(MALLORY, ROLE)
        await trio.sleep(1)
        world.holds(MALLORY, "router")
        claims = (await seen(world)).view.claims
        assert [role for role in claims if claims[role]] == seen_roles


async def test_a_zombies_late_output_stays_a_candidate_and_overwrites_nothing(
    world: Any, autojump_clock: Any
) -> None:
    """Not the holder's, however far ahead it is; nor a lineage that is at most an interval behind."""
    late = announced(world, ALICE, 90, 1)
    newer, _ = world.checkpoint(BOB, ROLE, 50, term=world.holds(BOB, ROLE, 2))
    world.announces(BOB, newer, ROLE)
    world.attests(ORGANISER, ROLE, late, newer, loss=0.5)
    observation = await seen(world)
    assert observation.newest[ROLE].data == newer
    assert {one.data for one in observation.candidates[ROLE]} == {late, newer}
    await trio.sleep(world.signed.manifest.lease.ttl_s)  # nobody holds the role any more
    assert (await seen(world)).newest[ROLE].data == late
    close = announced(world, CAROL, 90 - INTERVAL, 2)
    world.attests(ORGANISER, ROLE, late, newer, close, loss=0.5)
    assert (await seen(world)).newest[ROLE].data == close


async def test_strangers_terms_do_not_make_little_training_the_newest(
    world: Any, autojump_clock: Any
) -> None:
    """Of two steps, or the holder's own checkpoint signed again, by somebody who never had the role."""
    honest, made = world.checkpoint(ALICE, ROLE, 60, term=world.holds(ALICE, ROLE, 3))
    world.announces(ALICE, honest, ROLE)
    little = announced(world, MALLORY, 2, 1000)
    again = dataclasses.replace(made, term=Term(1000 << 32), holder=BOB.node_id)
    copied = sign_statement(again, BOB)
    world.announces(BOB, copied, ROLE)
    world.attests(ORGANISER, ROLE, honest, little, copied, loss=0.5)
    observation = await seen(world)
    assert observation.newest[ROLE].data == honest and observation.safe.get(ROLE) in (None, made)
    await trio.sleep(world.signed.manifest.lease.ttl_s)
    assert (await seen(world)).newest[ROLE].statement.weights == made.weights


async def test_in_a_restricted_run_only_the_admitted_speak(world: Any, autojump_clock: Any) -> None:
    world.signed = world.make_run("closed", restricted=True, claimants=(ALICE.node_id,))
    for who in (ALICE, BOB, CAROL, MALLORY):
        world.takes_part(who)
    world.holds(MALLORY, ROLE)
    world.announces(MALLORY, world.checkpoint(MALLORY, ROLE, 100)[0], ROLE)
    good = announced(world, ALICE, 100)
    for who in (BOB, CAROL):
        world.attests(who, ROLE, good)
    observation = await seen(world)
    assert observation.view.claims[ROLE] == []
    assert [one.data for one in observation.candidates[ROLE]] == [good] and ROLE not in observation.newest
    world.attests(ORGANISER, ROLE, good, loss=0.5)
    assert (await seen(world)).finished([ROLE])


async def test_a_checkpoint_made_with_a_pass_outlives_the_pass_and_its_maker(
    world: Any, autojump_clock: Any
) -> None:
    world.signed = world.make_run("closed", restricted=True)
    access = world.gives_pass(BOB, 60)
    data, _ = world.checkpoint(BOB, ROLE, 50, created_unix=world.start_unix)
    late, _ = world.checkpoint(BOB, ROLE, 75, created_unix=world.start_unix + 61)
    world.announces(ALICE, data, ROLE, access)
    world.announces(MALLORY, late, ROLE, access)
    (found,) = (await seen(world)).candidates[ROLE]
    assert (found.data, found.access, found.providers) == (data, access, {ALICE.node_id})
