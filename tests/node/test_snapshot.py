"""Tests of `paris_node.snapshot`."""

import dataclasses
import json
from typing import Any

import pytest
import trio

from paris_node.announcer import PROVIDE_TTL_S
from paris_node.judging import Known, Met, going_on_order
from paris_node.snapshot import MEMBERS_KEPT_S, observe, plausible, take_snapshot
from paris_p2p.core.assignment import best_claim
from paris_p2p.errors import TransportError
from paris_p2p.ids import Role, Term
from paris_p2p.wire.checkpoint import sign_statement
from paris_p2p.wire.identity import Identity, peer_id_text
from paris_p2p.wire.records import AnnounceRecord, MemberRecord, role_scope

ALICE = Identity(b"a" * 32)
BOB = Identity(b"b" * 32)
MALLORY = Identity(b"m" * 32)
ORGANISER = Identity(b"o" * 32)
ROLE = Role("expert-0")

# the contract for `status --once --json`
STATUS_KEYS = {"run_id", "roles", "peers"}
ROLE_KEYS = {"role", "state", "holder", "term", "step", "total_steps", "age_s", "content_id", "providers"}
MORE_ROLE_KEYS = {
    "overdue",
    *("announced_step", "loss", "images_per_s", "eta_s", "safe_step", "checked", "checked_by"),
    *("measured_loss", "made_by", "made_in_term", "parent", "variant"),
    *("training_loss", "heldout_loss"),
}


def member(world: Any, **changed: Any) -> MemberRecord:
    fields: dict[str, Any] = {
        "addresses": (),
        "activity": "training",
        "role": ROLE,
        "term": Term(1),
        "step": 30,
        "total_steps": 100,
        "loss": 0.25,
        "images_per_s": 80.0,
        "up_bytes_per_s": 10,
        "down_bytes_per_s": 20,
        "updated_unix": world.start_unix - 4.0,
    }
    return MemberRecord(**(fields | changed))


def trains(world: Any, who: Identity, **changed: Any) -> Term:
    """`who` holds the role and says how far it is; the claim's term."""
    term = world.holds(who, ROLE)
    world.says(who, member(world, **({"term": term} | changed)), world.signed.run_id)
    return Term(term)


async def seen(world: Any, **known: Any) -> Any:
    return await observe(world.network("viewer").dht, world.signed, known=Known(**known))


async def test_the_json_has_the_contracts_keys_and_the_documented_others(
    world: Any, autojump_clock: Any
) -> None:
    term = trains(world, ALICE)
    data, statement = world.checkpoint(ALICE, ROLE, 25, term=term, parent=b"p" * 32)
    for who in (ALICE, BOB):
        world.announces(who, data, ROLE)
    world.takes_part(BOB)
    world.attests(ORGANISER, ROLE, data, loss=0.51)
    state = take_snapshot(await seen(world), world.signed).to_json()
    assert state.keys() == STATUS_KEYS | {"name", "members", "up_bytes_per_s", "down_bytes_per_s"}
    assert [role["role"] for role in state["roles"]] == ["expert-0", "router"]
    for role in state["roles"]:
        assert role.keys() == ROLE_KEYS | MORE_ROLE_KEYS
    expert, router = state["roles"]
    assert (expert["state"], expert["step"], expert["total_steps"]) == ("training", 30, 100)
    assert (expert["holder"], expert["term"]) == (peer_id_text(ALICE.node_id), 1)
    assert expert["content_id"] == statement.weights.info_hash.hex() and expert["providers"] == 2
    assert (expert["safe_step"], expert["checked"], expert["checked_by"]) == (25, True, 1)
    assert expert["measured_loss"] == 0.51 and expert["parent"] == (b"p" * 32).hex()
    assert (expert["made_by"], expert["made_in_term"]) == (peer_id_text(ALICE.node_id), 1)
    assert (router["safe_step"], router["checked"], router["made_by"]) == (0, False, None)
    assert expert["age_s"] == pytest.approx(4.0, abs=0.2) and expert["eta_s"] == 7.0
    assert (router["state"], router["holder"], router["content_id"]) == ("unclaimed", None, None)
    assert (state["peers"], state["up_bytes_per_s"], state["down_bytes_per_s"]) == (2, 10, 20)
    assert json.loads(json.dumps(state)) == state


async def test_a_provider_that_does_not_announce_again_is_overdue(world: Any, autojump_clock: Any) -> None:
    term = trains(world, ALICE)
    data, _ = world.checkpoint(ALICE, ROLE, 25, term=term)
    record, scope = AnnounceRecord(data, ()), role_scope(world.signed.run_id, ROLE)
    world.says(ALICE, record, scope)
    world.says(BOB, record, scope, ttl_s=PROVIDE_TTL_S / 5)  # as if written most of its life ago
    line = take_snapshot(await seen(world), world.signed).roles[0]
    assert (line.providers, line.overdue) == (2, 1)


async def test_a_forged_statement_is_no_candidate(world: Any, autojump_clock: Any) -> None:
    data, _ = world.checkpoint(ALICE, ROLE, 25)
    forged = bytearray(data)
    forged[-1] ^= 1
    _, claimed = world.checkpoint(ALICE, ROLE, 75)
    world.announces(BOB, data, ROLE)
    world.announces(MALLORY, bytes(forged), ROLE)
    world.announces(Identity(b"n" * 32), sign_statement(claimed, MALLORY), ROLE)  # in Alice's name
    found = (await seen(world)).candidates[ROLE]
    assert [(one.data, one.providers) for one in found] == [(data, frozenset({BOB.node_id}))]


async def test_statements_of_other_roles_runs_and_sizes_are_no_candidates(
    world: Any, autojump_clock: Any
) -> None:
    shard = world.signed.manifest.clusters[0].train
    changes: list[dict[str, Any]] = [
        {"role": Role("router")},
        {"run_id": b"r" * 32},
        {"total_steps": 99},
        {"variant": 1},
        {"heldout_loss": -1.0},
        {"weights": dataclasses.replace(shard, length=1)},
        {"resume": dataclasses.replace(shard, length=1 << 39)},
    ]
    for number, change in enumerate(changes):
        data, _ = world.checkpoint(ALICE, ROLE, 25, **change)
        world.announces(Identity(bytes([number]) * 32), data, ROLE)
    observation = await seen(world)
    assert observation.candidates[ROLE] == () and ROLE not in observation.newest


async def test_a_rejected_statement_is_left_out_and_the_next_one_counts(
    world: Any, autojump_clock: Any
) -> None:
    good, _ = world.checkpoint(ALICE, ROLE, 50)
    bad, _ = world.checkpoint(MALLORY, ROLE, 100, term=9)
    world.announces(ALICE, good, ROLE)
    world.announces(MALLORY, bad, ROLE)
    world.attests(ORGANISER, ROLE, good, bad, loss=0.5)
    assert (await seen(world)).newest[ROLE].data == bad
    observation = await seen(world, rejected={bad})
    assert observation.newest[ROLE].data == good and not observation.finished([ROLE])


async def test_a_key_that_takes_one_held_role_after_the_other_is_not_heard(
    world: Any, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dht, met, led = world.network("viewer").dht, Met(), []
    for number in range(1, 11, 2):
        world.holds(Identity(bytes([50 + number]) * 32), ROLE, number)
        await observe(dht, world.signed, met=met)
        await trio.sleep(1)
        world.holds(MALLORY, ROLE, number + 1)
        best = best_claim(ROLE, (await observe(dht, world.signed, met=met)).view)
        led.append(best is not None and best.owner == MALLORY.node_id)
    assert led == [True, True, True, False, False]
    assert sum("takes one held role after the other" in message for message in caplog.messages) == 1


async def test_candidates_are_ordered_for_use_and_for_going_on(world: Any, autojump_clock: Any) -> None:
    made = []
    for who, term, step in ((ALICE, 1, 75), (BOB, 2, 50), (MALLORY, 2, 25)):
        made.append(world.checkpoint(who, ROLE, step, term=term)[0])
        world.announces(who, made[-1], ROLE)
    world.attests(ORGANISER, ROLE, *made, loss=0.5)
    observation = await seen(world)
    found = observation.candidates[ROLE]
    assert [one.statement.step for one in found] == [75, 50, 25]
    assert [one.statement.step for one in going_on_order(found, 4, within_steps=25)] == [50, 75, 25]
    assert [one.statement.step for one in going_on_order(found, 4, within_steps=50)] == [50, 75, 25]
    assert [one.statement.step for one in going_on_order(found, 2, within_steps=24)] == [75, 50]
    assert observation.newest[ROLE].statement.step == 50
    best = observation.best(ROLE)
    assert best is not None and best.step == 75


async def test_all_who_announce_a_checkpoint_are_its_providers(world: Any, autojump_clock: Any) -> None:
    data, _ = world.checkpoint(ALICE, ROLE, 25)
    world.announces(ALICE, data, ROLE)
    world.announces(BOB, data, ROLE)
    (candidate,) = (await seen(world)).candidates[ROLE]
    assert candidate.providers == {ALICE.node_id, BOB.node_id}


async def test_a_run_is_finished_when_every_role_has_its_last_step(world: Any, autojump_clock: Any) -> None:
    roles = world.signed.manifest.roles
    for role, finished in zip(roles, (False, True), strict=True):
        data, _ = world.checkpoint(ALICE, role, 100)
        world.announces(ALICE, data, role)
        assert not (await seen(world)).finished(roles)  # its signer's word
        world.attests(ORGANISER, role, data, loss=0.5)
        assert (await seen(world)).finished(roles) is finished


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": 101},
        {"total_steps": 1 << 60, "step": 1 << 59},
        {"loss": -1e300},
        {"images_per_s": 1e300},
        {"images_per_s": -1.0},
        {"up_bytes_per_s": -1},
        {"down_bytes_per_s": 1 << 62},
        {"updated_unix": -1e308},
        {"updated_unix": 1e308},
        {"updated_unix": 0.0},
        {"updated_unix": -1.0},
        {"updated_unix": 2.0**63},
    ],
)
async def test_a_member_with_impossible_numbers_says_nothing(
    world: Any, autojump_clock: Any, change: dict[str, Any]
) -> None:
    assert not plausible(member(world, **change), world.start_unix)
    trains(world, MALLORY, **change)
    observation = await seen(world)
    assert observation.view.members == {}
    assert take_snapshot(observation, world.signed).roles[0].state == "claimed"


@pytest.mark.parametrize("field", ["updated_unix", "loss", "images_per_s"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_implausible(world: Any, field: str, number: float) -> None:
    assert plausible(member(world), world.start_unix)
    assert not plausible(member(world, **{field: number}), world.start_unix)


async def test_numbers_that_make_endless_times_are_shown_as_unknown(world: Any, autojump_clock: Any) -> None:
    trains(world, ALICE, images_per_s=5e-324)
    data, _ = world.checkpoint(BOB, "router", 10, created_unix=-1e308)
    world.announces(BOB, data, "router")
    world.attests(ORGANISER, "router", data, loss=0.5)
    expert, router = take_snapshot(await seen(world), world.signed).roles
    assert expert.state == "training" and expert.eta_s is None
    assert router.state == "stale" and router.age_s is None


async def test_the_kind_of_an_expert_is_known_from_its_checkpoint_or_from_the_run(
    world: Any, autojump_clock: Any
) -> None:
    manifest = world.signed.manifest
    one = manifest.recipe.experts[0]
    recipe = dataclasses.replace(manifest.recipe, experts=(one, dataclasses.replace(one, name="noise")))

    async def kinds(variants: tuple[int, ...]) -> list[str | None]:
        world.signed = world.make_run("digits", recipe=recipe, variants=variants)
        return [line.variant for line in take_snapshot(await seen(world), world.signed).roles]

    assert await kinds(()) == [None, None]
    assert await kinds((1,)) == ["noise", None]
    world.signed = world.make_run("digits", recipe=recipe)
    data, _ = world.checkpoint(ALICE, ROLE, 50, term=trains(world, ALICE), variant=1)
    world.announces(ALICE, data, ROLE)
    assert take_snapshot(await seen(world), world.signed).roles[0].variant == "noise"


@pytest.mark.parametrize("kind", ["claim", "announce", "attest"])
async def test_a_role_of_which_anything_was_not_read_is_not_seen_at_all(
    world: Any, autojump_clock: Any, kind: str
) -> None:
    """Without its announcements a trained role would look free, without its attestations a bad one good."""
    data, _ = world.checkpoint(ALICE, ROLE, 100, term=trains(world, ALICE))
    world.announces(ALICE, data, ROLE)
    dht = world.network("viewer").dht
    dht.late = {(kind, role_scope(world.signed.run_id, ROLE))}
    observation = await observe(dht, world.signed, patience_s=1.0)
    assert set(observation.view.claims) == set(observation.candidates) == {Role("router")}
    dht.late = set()
    observation = await observe(dht, world.signed, patience_s=1.0)
    assert observation.view.statements[ROLE].step == 100


async def test_members_that_were_not_read_are_those_of_a_minute_ago_or_an_error(
    world: Any, autojump_clock: Any
) -> None:
    """Where nobody takes part but its trainer, a checkpoint counts without a witness."""
    trains(world, ALICE)
    dht, met = world.network("viewer").dht, Met()
    dht.late = {("member", world.signed.run_id)}
    with pytest.raises(TransportError, match="members"):
        await observe(dht, world.signed, met=met, patience_s=1.0)
    await observe(dht, world.signed, met=met)
    observation = await observe(dht, world.signed, met=met, patience_s=1.0)
    assert set(observation.view.members) == {ALICE.node_id}
    await trio.sleep(MEMBERS_KEPT_S)
    with pytest.raises(TransportError, match="members"):
        await observe(dht, world.signed, met=met, patience_s=1.0)


async def test_the_organiser_and_named_claimants_are_vouched_for(world: Any, autojump_clock: Any) -> None:
    dht = world.network("viewer").dht
    await observe(dht, world.signed)
    manifest = world.signed.manifest
    assert set(dht.vouched) == {manifest.organiser, *manifest.claimants}
