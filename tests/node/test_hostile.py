"""Whole nodes among hostile strangers: no claim is lost, nothing false believed, the good model found."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import trio

from paris_node import checker
from paris_node.checker import WEIGHTS_FILE
from paris_node.judging import PUBLISHING
from paris_node.run_node import EXAMINE_STALL_S
from paris_p2p import clock
from paris_p2p.core.accept import LOSS_SLACK, LOSS_TOLERANCE
from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import Role
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.weights import NearLimitError
from paris_p2p.wire.checkpoint import check_statement, statement_digest
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import ClaimRecord, SignedRecord, record_key, role_scope, sign_record

ROLE = Role("expert-0")
MALLORY = Identity(b"m" * 32)
ORGANISER = Identity(b"o" * 32)
CROWD = [Identity(bytes([100 + n]) * 32) for n in range(6)]


async def run_for(seconds: float, *loops: Any) -> None:
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for loop in loops:
                nursery.start_soon(loop)


def finished_by(world: Any, name: str, **options: Any) -> tuple[bytes, Any]:
    """A node that finished the role, announces it and has released its claim."""
    network = world.network(name, seeds=True)
    term = world.holds(network.identity, ROLE, state="released")
    data, _ = world.checkpoint(network.identity, ROLE, 100, term=term, store=network.store, **options)
    world.announces(network.identity, data, ROLE)
    world.takes_part(network.identity)
    return data, network


def fakes(world: Any, *, served_by: Any = None) -> list[bytes]:
    """A crowd that says that the role is finished, in terms above all others."""
    made = []
    for who in CROWD:
        kept = None if served_by is None else served_by.store
        wrong = (
            {} if kept is None else {"weights": world.checkpoint(who, "router", 50, store=kept)[1].weights}
        )
        made.append(world.checkpoint(who, ROLE, 100, term=99 << 32, store=kept, **wrong)[0])
        world.announces(who, made[-1], ROLE)
        world.takes_part(who)
    return made


@pytest.mark.parametrize("served", [False, True])
async def test_a_crowd_of_fakes_does_not_hide_the_good_finish_from_the_mirror(
    world: Any, autojump_clock: Any, served: bool
) -> None:
    good, network = finished_by(world, "alice")
    lies = fakes(world, served_by=network if served else None)
    node, _ = world.run_node(world.network("publisher", seeds=True), mirror=True)
    await run_for(6 * EXAMINE_STALL_S, node.announce_loop, node.replicate_loop)
    observation = await node.observe()
    assert observation.newest[ROLE].data == good and observation.finished([ROLE])
    assert good in node.ledger and not any(lie in node.ledger for lie in lies)


async def test_an_idle_node_looks_at_a_finish_that_keys_vouch_for_and_discredits_them(
    world: Any, autojump_clock: Any
) -> None:
    good, network = finished_by(world, "alice")
    lies = fakes(world, served_by=network)
    for who in CROWD:
        world.attests(who, ROLE, *lies)
    node, _ = world.run_node(world.network("bob", seeds=True))
    before = await node.observe()
    assert before.newest[ROLE].data in lies  # six keys vouch for each other, and nobody has looked
    await run_for(100, node.announce_loop, node.replicate_loop)
    after = await node.observe()
    assert not any(one.credible for one in after.candidates[ROLE] if one.data in lies)
    assert {who.node_id for who in CROWD} <= node.checker.known().liars
    assert after.newest[ROLE].data == good


async def test_a_false_loss_discredits_its_signer_and_who_measured_it_and_nobody_else(
    world: Any, autojump_clock: Any
) -> None:
    bad, network = finished_by(world, "alice", loss=0.0)
    form, lied = Identity(b"f" * 32), Identity(b"l" * 32)
    for who, loss in ((form, None), (lied, 0.0), (ORGANISER, None)):
        world.takes_part(who)
        world.attests(who, ROLE, bad, loss=loss)
    world.measure = lambda _message: {"type": "measured", "loss": 0.9, "baseline": 1.2}
    node, _ = world.run_node(world.network("bob", seeds=True), mirror=True)
    await run_for(20, node.announce_loop, node.replicate_loop)
    assert bad in node.checker.known().rejected
    assert node.checker.known().liars == {network.identity.node_id, lied.node_id}


async def test_a_loss_between_two_honest_measurements_makes_nobody_a_liar(
    world: Any, autojump_clock: Any
) -> None:
    bait, _ = finished_by(world, "mallory", loss=(0.5 - LOSS_SLACK) / (1 + LOSS_TOLERANCE))
    alice = Identity(b"f" * 32)
    world.takes_part(alice)
    world.attests(alice, ROLE, bait, loss=0.5)
    world.measure = lambda _message: {"type": "measured", "loss": 0.500001, "baseline": 1.2}
    node, _ = world.run_node(world.network("bob", seeds=True), mirror=True)
    await run_for(20, node.announce_loop, node.replicate_loop)
    assert bait in node.checker.known().rejected
    assert node.checker.known().liars == set()


async def test_weights_whose_size_is_the_limit_make_nobody_a_liar(
    world: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine they add up to a little less."""
    bait, _ = finished_by(world, "mallory")
    form = Identity(b"f" * 32)
    world.takes_part(form)
    world.attests(form, ROLE, bait)

    def refuses(*_: Any) -> None:
        raise NearLimitError("tensor 'w' holds values of an insane size")

    monkeypatch.setattr(checker, "check_weights_file", refuses)
    node, _ = world.run_node(world.network("bob", seeds=True), mirror=True)
    await run_for(20, node.announce_loop, node.replicate_loop)
    assert bait in node.checker.known().rejected and node.checker.known().liars == set()


async def test_a_false_statement_about_good_weights_does_not_take_them_away_from_an_honest_copy(
    world: Any, autojump_clock: Any
) -> None:
    network = world.network("alice")
    good, statement = world.checkpoint(network.identity, ROLE, 100, store=network.store)
    away = ContentStore(world.folder / "away")
    away.adopt(network.store, statement.resume.info_hash)
    network.store.remove(statement.resume.info_hash)  # the honest copy waits for it
    weights = {"weights": statement.weights}
    lie, _ = world.checkpoint(MALLORY, ROLE, 100, term=9 << 32, store=network.store, loss=0.0, **weights)
    for who, data in ((network.identity, good), (MALLORY, lie)):
        world.announces(who, data, ROLE)
    measured = {"type": "measured", "loss": 0.5, "baseline": 1.2}
    world.measure = lambda _message: measured
    node, _ = world.run_node(world.network("bob", seeds=True), mirror=True)

    async def comes_back() -> None:
        await trio.sleep(6)
        network.store.adopt(away, statement.resume.info_hash)

    await run_for(60, node.announce_loop, node.replicate_loop, comes_back)
    assert lie in node.checker.known().rejected and good in node.ledger
    assert node.network.store.has(statement.weights.info_hash)


async def test_weights_that_measure_worse_than_stated_are_refused_and_said_to_be(
    world: Any, autojump_clock: Any
) -> None:
    bad, _ = finished_by(world, "alice", loss=0.1)
    world.measure = lambda _message: {"type": "measured", "loss": 0.9, "baseline": 1.2}
    node, _ = world.run_node(world.network("publisher", seeds=True), mirror=True)
    await run_for(20, node.announce_loop, node.replicate_loop)
    assert bad not in node.ledger and ROLE not in (await node.observe()).newest
    (said,) = world.live("attest", role_scope(world.signed.run_id, ROLE))
    assert [check.good for check in said.payload.checks] == [False]


async def test_a_good_finish_is_measured_and_attested_with_its_loss(world: Any, autojump_clock: Any) -> None:
    finished_by(world, "alice", loss=0.5)
    world.measure = lambda _message: {"type": "measured", "loss": 0.51, "baseline": 1.2}
    node, _ = world.run_node(world.network("publisher", seeds=True), mirror=True)
    await run_for(20, node.announce_loop, node.replicate_loop)
    (said,) = world.live("attest", role_scope(world.signed.run_id, ROLE))
    assert [(check.good, check.loss) for check in said.payload.checks] == [(True, 0.51)]
    (asked,) = world.asked_to_measure
    assert (asked["role"], [shard["cluster"] for shard in asked["shards"]]) == (ROLE, [0])


def forged(world: Any, who: Identity, **changed: Any) -> SignedRecord:
    scope = role_scope(world.signed.run_id, ROLE)
    claim = ClaimRecord("hold", world.holds(MALLORY, "router"), clock.unix())
    record = sign_record(MALLORY, claim, scope, clock.unix() + changed.pop("ttl_s", 20.0))
    fields = {"key": record.key, "subkey": record.subkey, "value": record.value}
    return SignedRecord(**(fields | {"expiration_unix": record.expiration_unix} | changed))


async def test_no_hostile_record_costs_a_claim(world: Any, autojump_clock: Any) -> None:
    alice = Identity(b"a" * 32)
    term = world.holds(alice, ROLE)
    key = record_key("claim", role_scope(world.signed.run_id, ROLE))
    attempts: list[dict[str, Any]] = [
        {"subkey": alice.node_id},  # forged
        {"key": record_key("claim", role_scope(world.signed.run_id, Role("router")))},  # replayed elsewhere
        {"subkey": b""},  # ownerless
        {"subkey": b"plain"},
        {"value": b"x" * 5000},  # oversized
        {"ttl_s": 100 * 365 * 86_400.0},  # far future
        {"key": key, "value": b"\xc0", "subkey": alice.node_id, "ttl_s": 19.0},  # wiping
    ]
    for attempt in attempts:
        with pytest.raises(RemoteProtocolError):
            world.store_record(forged(world, alice, **attempt))
    node, _ = world.run_node(world.network("bob"))
    claims = (await node.observe()).view.claims[ROLE]
    assert [(claim.owner, claim.term) for claim in claims] == [(alice.node_id, term)]


async def test_a_trainer_keeps_announcing_what_others_copy_until_it_is_safe(
    world: Any, autojump_clock: Any
) -> None:
    network = world.network("alice", seeds=True)
    node, _ = world.run_node(network)
    world.takes_part(MALLORY)  # a member that copies nothing
    node.progress.role = ROLE
    node.progress.term = term = world.holds(network.identity, ROLE)
    made = []
    for step in (10, 20, 30, 40):
        made.append(world.checkpoint(network.identity, ROLE, step, term=term, store=network.store))
        await node.hold(*made[-1])
    (shown,) = (await node.observe()).candidates[ROLE]
    assert shown.data == made[0][0] and [s.step for _, s in node.ledger.held()] == [10, 40]
    await run_for(5, node.replicate_loop)
    for who in CROWD[:2]:  # they hold nothing
        world.takes_part(who)
        world.announces(who, made[0][0], ROLE)
    await run_for(5, node.replicate_loop)
    assert {one.statement.step for one in (await node.observe()).candidates[ROLE]} == {10}
    assert node.lacks_copies(ROLE)
    world.announces(MALLORY, made[0][0], ROLE)
    for item in (made[0][1].weights, made[0][1].resume):
        world.taken.add((id(network.store), item.info_hash, MALLORY.node_id))
    await run_for(5, node.replicate_loop)
    observation = await node.observe()
    assert observation.safe[ROLE].step == 10 and made[0][0] in node.ledger
    assert {one.statement.step for one in observation.candidates[ROLE]} == {10, 40}
    last = world.checkpoint(network.identity, ROLE, 50, term=term, store=network.store)
    await node.hold(*last)
    assert sorted(s.step for _, s in node.ledger.held()) == [10, 40, 50]  # safe, announced, newest


def noise(world: Any, network: Any, step: int) -> bytes:
    """Untrained values of the right form, said to be all but finished in a term above all others."""
    mallory = network.identity
    bad, _ = world.checkpoint(mallory, ROLE, step, term=1000 << 32, store=network.store, loss=0.001)
    world.announces(mallory, bad, ROLE)
    world.takes_part(mallory)
    return bytes(bad)


def measuring(world: Any, losses: dict[bytes, float]) -> None:
    """What those who measure find: by signed statement."""

    def content(data: bytes) -> bytes:
        item = check_statement(data).weights.info_hash
        keeper = next(store for store in world.stores if store.has(item))
        return bytes((keeper.files(item) / WEIGHTS_FILE).read_bytes())

    found = {content(data): loss for data, loss in losses.items()}
    world.measure = lambda message: {
        "type": "measured",
        "loss": found[(Path(message["weights"]) / WEIGHTS_FILE).read_bytes()],
        "baseline": 1.2,
    }


def publisher(world: Any) -> Any:
    """The organiser's node, which mirrors."""
    node, _ = world.run_node(
        dataclasses.replace(world.network("publisher", seeds=True), identity=ORGANISER), mirror=True
    )
    node.progress.activity = PUBLISHING
    return node


async def test_noise_that_is_all_but_finished_is_measured_and_not_what_the_run_goes_by(
    world: Any, autojump_clock: Any
) -> None:
    alice, mallory = world.network("alice", seeds=True), world.network("mallory", seeds=True)
    bad, term = noise(world, mallory, 99), world.holds(alice.identity, ROLE)
    good, _ = world.checkpoint(alice.identity, ROLE, 75, term=term, store=alice.store)
    world.announces(alice.identity, good, ROLE)
    measuring(world, {good: 0.5, bad: 1.3})
    node = publisher(world)
    await run_for(60, node.announce_loop, node.replicate_loop)
    viewer, _ = world.run_node(world.network("viewer"))
    found = await viewer.observe()
    assert found.newest[ROLE].data == found.candidates[ROLE][0].data == good
    assert [one.credible for one in found.candidates[ROLE]] == [True, False]
    assert [data for data, _ in node.ledger.held()] == [good]
    assert checks_of(world, ORGANISER) == {(False, None), (True, 0.5)}


def checks_of(world: Any, who: Identity) -> set[tuple[bool, float | None]]:
    """What `who` says of the role's checkpoints."""
    said = world.live("attest", role_scope(world.signed.run_id, ROLE))
    return {
        (one.good, one.loss)
        for record in said
        if record.owner == who.node_id
        for one in record.payload.checks
    }


async def test_what_the_run_goes_by_is_copied_first_and_vouched_for_when_it_was_measured(
    world: Any, autojump_clock: Any
) -> None:
    """A stranger that won the claim trains nothing: copies of it are not kept, and nobody says it is good."""
    mallory = world.network("mallory", seeds=True)
    bad, _ = world.checkpoint(
        mallory.identity, ROLE, 50, term=world.holds(mallory.identity, ROLE), store=mallory.store
    )
    world.announces(mallory.identity, bad, ROLE)
    measuring(world, {bad: 1.3})
    node, held = publisher(world), []

    async def watch() -> None:
        while True:
            await trio.sleep(0.5)
            held.append((bad in node.ledger, checks_of(world, ORGANISER)))

    await run_for(30, node.announce_loop, node.replicate_loop, watch)
    assert (True, set()) in held and held[-1] == (False, {(False, None)})
    assert bad not in {r.payload.statement for r in world.live("announce", b"")} and not node.ledger.held()


async def test_what_was_copied_and_never_measured_is_not_vouched_for_after_a_restart(
    world: Any, autojump_clock: Any
) -> None:
    network = world.network("alice", seeds=True)
    node, _ = world.run_node(network)
    data, statement = world.checkpoint(MALLORY, ROLE, 50, store=network.store)
    await node.hold(data, statement, vouch=False)
    mine = world.checkpoint(network.identity, "router", 50, store=network.store)
    await node.hold(*mine)
    again, _ = world.run_node(network)
    assert {statement_digest(mine[0])} == set(again.checker.known().checked)
