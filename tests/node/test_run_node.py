"""Tests of `paris_node.run_node`."""

import dataclasses
from typing import Any

import pytest
import trio

from paris_node import choosing, run_node
from paris_node.announcer import PROVIDE_TTL_S
from paris_node.run_node import HAND_OVER_S, RunNode
from paris_node.snapshot import observe
from paris_p2p import clock
from paris_p2p.ids import Role
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import LeaseTimes
from paris_p2p.wire.records import MemberRecord, role_scope
from tests.samples import ORGANISER

ROLE = Role("expert-0")
TRAINER = Identity(b"t" * 32)


async def run_for(seconds: float, *loops: Any) -> None:
    """Run endless tasks for a while."""
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for loop in loops:
                nursery.start_soon(loop)


def trained(world: Any, name: str = "trainer", step: int = 50, role: str = ROLE) -> tuple[bytes, Any, Any]:
    """A node that holds and announces a checkpoint: signed statement, statement, its network."""
    network = world.network(name)
    term = world.holds(network.identity, role)
    data, statement = world.checkpoint(network.identity, role, step, term=term, store=network.store)
    world.announces(network.identity, data, role)
    return data, statement, network


async def test_a_node_says_what_it_is_and_has(world: Any, autojump_clock: Any) -> None:
    node, _ = world.run_node(world.network("alice", seeds=True))
    await run_for(1, node.announce_loop)
    me = node.network.identity.node_id
    (run,) = world.live("run", b"")
    assert (run.owner, run.payload.run_id) == (me, world.signed.run_id)
    (member,) = world.live("member", world.signed.run_id)
    assert (member.payload.activity, member.payload.up_bytes_per_s) == ("joining", 10)
    for ref in (run.payload.manifest, *world.signed.manifest.shards(ROLE)):
        assert [one.owner for one in world.live("provide", ref.info_hash)] == [me]


async def test_after_a_restart_what_was_held_is_announced_again(world: Any, autojump_clock: Any) -> None:
    network = world.network("alice", seeds=True)
    node, _ = world.run_node(network)
    data, statement = world.checkpoint(TRAINER, ROLE, 50, store=network.store)
    await node.hold(data, statement)
    world.records.clear()
    again, _ = world.run_node(network)
    await run_for(1, again.announce_loop)
    (record,) = world.live("announce", role_scope(world.signed.run_id, ROLE))
    assert record.payload.statement == data


@pytest.mark.parametrize("lease", [LeaseTimes(20.0, 6.0, 2.0, 3.0), LeaseTimes(3600.0, 1800.0, 60.0, 600.0)])
async def test_every_record_stays_alive_whatever_the_lease_times(
    world: Any, autojump_clock: Any, lease: LeaseTimes
) -> None:
    world.signed = world.make_run("digits", lease=lease)
    node, _ = world.run_node(world.network("alice", seeds=True))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.announce_loop)
        for _ in range(60):
            await trio.sleep(20)
            (member,) = world.live("member", world.signed.run_id)
            assert clock.unix() - member.payload.updated_unix < 60
            assert world.live("run", b"") and world.live(
                "provide", world.signed.manifest.shards(ROLE)[0].info_hash
            )
        nursery.cancel_scope.cancel()


async def test_a_network_that_is_away_is_waited_out(world: Any, autojump_clock: Any) -> None:
    node, _ = world.run_node(world.network("alice"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.announce_loop)
        nursery.start_soon(node.replicate_loop)
        node.network.dht.down = True
        await trio.sleep(600)
        assert world.live("member", world.signed.run_id) == []
        node.network.dht.down = False
        await trio.sleep(60)
        assert len(world.live("member", world.signed.run_id)) == 1
        nursery.cancel_scope.cancel()


async def test_a_checkpoint_that_too_few_hold_is_copied_and_announced(
    world: Any, autojump_clock: Any
) -> None:
    data, statement, _ = trained(world)
    node, _ = world.run_node(world.network("alice"))
    await run_for(10, node.announce_loop, node.replicate_loop)
    assert data in node.ledger and node.network.store.has(statement.resume.info_hash)
    owners = {r.owner for r in world.live("announce", role_scope(world.signed.run_id, ROLE))}
    assert owners == {statement.holder, node.network.identity.node_id}


async def test_the_holders_checkpoint_is_announced_and_without_a_holder_the_one_of_most_steps(
    world: Any, autojump_clock: Any
) -> None:
    """A zombie's later steps, or a stranger's invented ones, must not keep the holder's work from safety."""
    node, _ = world.run_node(world.network("alice"))
    store, me = node.network.store, node.network.identity.node_id
    zombie = world.checkpoint(Identity(b"z" * 32), ROLE, 90, term=1 << 32, store=store)
    made = world.checkpoint(TRAINER, ROLE, 30, term=world.holds(TRAINER, ROLE, 2), store=store)

    async def announced() -> Any:
        await node.observe()
        await run_for(1, node.announce_loop)
        records = world.live("announce", role_scope(world.signed.run_id, ROLE))
        return next(record.payload.statement for record in records if record.owner == me)

    await node.hold(*zombie)
    await node.hold(*made)
    assert await announced() == made[0]
    await trio.sleep(world.signed.manifest.lease.ttl_s)
    assert await announced() == zombie[0] and made[0] in node.ledger


async def test_only_what_is_served_is_announced_and_what_counts_as_held_is_always_served(
    world: Any, autojump_clock: Any
) -> None:
    """With `--seed-ratio` a node may refuse an item that it has; not one that makes a checkpoint safe."""
    node, _ = world.run_node(world.network("alice", seeds=True))
    data, statement = world.checkpoint(TRAINER, ROLE, 50, store=node.network.store)
    await node.hold(data, statement)
    shard = world.signed.manifest.shards(ROLE)[0].info_hash
    held = {statement.weights.info_hash, statement.resume.info_hash}
    node.network.swarm.satisfied = {shard, *held}
    await run_for(2 * PROVIDE_TTL_S, node.announce_loop)
    assert world.live("provide", shard) == []
    assert all(world.live("provide", item) for item in held)
    node.progress.role = ROLE  # it trains on the shard
    assert not node.network.swarm.refuses(shard)


async def test_enough_copies_are_not_added_to_but_a_mirror_takes_all(world: Any, autojump_clock: Any) -> None:
    data, _, _ = trained(world)
    world.announces(world.network("copy").identity, data, ROLE)  # `replicas` is 1
    node, _ = world.run_node(world.network("alice"))
    mirror, _ = world.run_node(world.network("mirror"), mirror=True)
    await run_for(10, node.replicate_loop, mirror.replicate_loop)
    assert data not in node.ledger and data in mirror.ledger


async def test_every_member_gathers_the_components_a_model_needs(world: Any, autojump_clock: Any) -> None:
    world.network("publisher", seeds=True)
    node, _ = world.run_node(world.network("alice"))
    await run_for(10, node.announce_loop, node.replicate_loop)
    for ref in world.signed.manifest.components.values():
        assert node.network.store.has(ref.info_hash)
        assert world.live("provide", ref.info_hash)


@pytest.mark.parametrize("bad", ["router", "nothing", "folder"])
async def test_a_bad_checkpoint_is_removed_and_the_good_one_behind_it_copied(
    world: Any, autojump_clock: Any, bad: str
) -> None:
    good, _, network = trained(world, step=50)
    item = bad_item(world, network.store, bad)
    term = world.holds(TRAINER, ROLE, 2)
    lie, false = world.checkpoint(TRAINER, ROLE, 75, term=term, store=network.store, weights=item)
    world.announces(TRAINER, lie, ROLE)
    node, _ = world.run_node(world.network("alice", seeds=True), mirror=True)
    await run_for(30, node.replicate_loop)
    assert lie not in node.ledger and good in node.ledger
    assert not node.network.store.has(false.weights.info_hash)
    assert (await node.observe()).newest[ROLE].data == good


def bad_item(world: Any, store: Any, kind: str) -> Any:
    """An item that a statement may name, but that holds no weights of an expert."""
    folder = world.folder / "bad" / "weights"
    folder.mkdir(parents=True)
    if kind == "router":
        return world.checkpoint(TRAINER, "router", 50, store=store)[1].weights
    if kind == "folder":
        (folder / "diffusion_pytorch_model.safetensors").mkdir()
        (folder / "diffusion_pytorch_model.safetensors" / "x").write_bytes(bytes(100))
    else:
        (folder / "other").write_bytes(bytes(100))
    return store.add(folder, mode="copy")


async def test_a_good_item_under_a_false_flag_is_kept(world: Any, autojump_clock: Any) -> None:
    """A stranger calls our router's weights an expert's: refusing that must not cost us the router."""
    network = world.network("alice", seeds=True)
    node, _ = world.run_node(network)
    data, router = world.checkpoint(TRAINER, "router", 50, store=network.store)
    await node.hold(data, router)
    shard = world.signed.manifest.shards(ROLE)[0]
    for number, item in enumerate((router.weights, dataclasses.replace(shard))):
        lie, _ = world.checkpoint(TRAINER, ROLE, 75 + number, store=network.store, weights=item)
        world.announces(Identity(bytes([number]) * 32), lie, ROLE)
    mirror = RunNode(network, world.signed, node.output, mirror=True)
    await run_for(30, mirror.replicate_loop)
    assert (await mirror.observe()).candidates[ROLE] == ()
    assert network.store.has(router.weights.info_hash) and network.store.has(shard.info_hash)


async def test_a_checkpoint_nobody_serves_does_not_keep_others_from_being_copied(
    world: Any, autojump_clock: Any
) -> None:
    world.announces(TRAINER, world.checkpoint(TRAINER, "router", 50)[0], "router")
    data, _, _ = trained(world)
    node, _ = world.run_node(world.network("alice"), mirror=True)
    await run_for(100, node.replicate_loop)
    assert data in node.ledger


async def test_a_full_disk_is_said_and_the_node_goes_on(
    world: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data, _, _ = trained(world)
    node, _ = world.run_node(world.network("alice"), mirror=True)

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("paris_node.ledger.write_atomic", full)
        await run_for(10, node.replicate_loop)
    assert "disk full" in caplog.text and data not in node.ledger
    await run_for(60, node.replicate_loop)
    assert data in node.ledger


async def test_handing_over_waits_until_another_peer_has_the_newest_checkpoint(
    world: Any, autojump_clock: Any
) -> None:
    node, _ = world.run_node(world.network("alice"))
    me = node.network.identity
    term = world.holds(me, ROLE, state="released")
    data, statement = world.checkpoint(me, ROLE, 50, term=term, store=node.network.store)
    await node.hold(data, statement)
    peer, _ = world.run_node(world.network("bob"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.announce_loop)
        await trio.sleep(1)

        async def copy_later() -> None:
            await trio.sleep(5)
            nursery.start_soon(peer.replicate_loop)

        nursery.start_soon(copy_later)
        started = trio.current_time()
        await node.hand_over()
        assert 5 <= trio.current_time() - started < HAND_OVER_S
        assert data in peer.ledger
        nursery.cancel_scope.cancel()


async def test_handing_over_is_bounded_and_skipped_when_nobody_is_there(
    world: Any, autojump_clock: Any
) -> None:
    node, _ = world.run_node(world.network("alice"))
    made = world.checkpoint(node.network.identity, ROLE, 50, store=node.network.store)
    await node.hold(*made)
    started = trio.current_time()
    await node.hand_over()
    assert trio.current_time() - started < 1
    absent = MemberRecord((), "seeding", Role(""), 0, 0, 0, 0.0, 0.0, 0, 0, clock.unix())  # type: ignore[arg-type]
    world.says(TRAINER, absent, world.signed.run_id)
    world.announces(TRAINER, made[0], ROLE)  # it never asked for a byte of it
    await node.hand_over()
    assert HAND_OVER_S <= trio.current_time() - started < HAND_OVER_S + 2


async def test_who_looks_at_the_whole_run_anyway_looks_once_for_copying_too(
    world: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, _ = world.run_node(world.network("alice", seeds=True))
    poll_s = world.signed.manifest.lease.poll_s
    looks = 0

    async def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        return await observe(*arguments, **options)

    monkeypatch.setattr(run_node, "observe", counting)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.replicate_loop)
        for _ in range(20):
            await node.observe()
            await trio.sleep(0.9 * poll_s)
        together, looks = looks, 0
        await trio.sleep(18 * poll_s)
        nursery.cancel_scope.cancel()
    assert together <= 21 and 17 <= looks <= 19


@pytest.mark.parametrize("mirror", [False, True])
async def test_what_has_the_fewest_copies_is_copied_first_and_what_has_enough_only_by_a_mirror(
    world: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch, mirror: bool
) -> None:
    monkeypatch.setattr(choosing, "MAX_COPIES", 1)
    world.signed = world.make_run("digits", clusters=3, replicas=3)
    copies = {"expert-0": 2, "expert-1": 0, "expert-2": 3, "router": 1}  # beside the trainer's own
    weights = {}
    for role, count in copies.items():
        data, statement, _ = trained(world, f"trainer-{role}", role=role)
        weights[statement.weights.info_hash] = role
        world.attests(ORGANISER, role, data, loss=0.5)  # nobody need look at it
        for number in range(count):
            world.announces(world.network(f"copy-{number}").identity, data, role)
    node, _ = world.run_node(world.network("alice", seeds=True), mirror=mirror)
    await run_for(30, node.announce_loop, node.replicate_loop)
    order = [weights[ref.info_hash] for ref in node.network.swarm.asked if ref.info_hash in weights]
    assert order == ["expert-1", "router", "expert-0", *(["expert-2"] if mirror else [])]
