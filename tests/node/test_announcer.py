"""Tests of `paris_node.announcer`."""

from typing import Any

import pytest
import trio

from paris_node.announcer import PROVIDE_TTL_S, Announcer
from paris_p2p import clock
from paris_p2p.errors import TransportError
from paris_p2p.ids import Role
from paris_p2p.wire.addresses import MAX_ADDRESS_CHARS
from paris_p2p.wire.records import MAX_ADDRESSES, ProvideRecord, RunRecord, role_scope

LOOK_S = 3.0


@pytest.fixture
def network(world: Any) -> Any:
    return world.network("alice", seeds=True)


@pytest.fixture
def item(world: Any) -> Any:
    return world.signed.manifest.clusters[0].train


def provided(world: Any, info_hash: bytes) -> list[Any]:
    return list(world.live("provide", info_hash))


async def test_what_is_said_is_written_once_until_it_is_due(
    world: Any, network: Any, item: Any, autojump_clock: Any
) -> None:
    announcer = Announcer(network)
    announcer.provide([item.info_hash])
    assert await announcer.flush() == 0 and await announcer.flush() == 0
    (record,) = provided(world, item.info_hash)
    assert record.owner == network.identity.node_id and record.payload.addresses == network.swarm.addresses
    assert len(network.dht.published) == 1


async def test_records_are_renewed_before_they_expire_and_not_at_every_look(
    world: Any, network: Any, item: Any, autojump_clock: Any
) -> None:
    announcer = Announcer(network)
    announcer.provide([item.info_hash])
    until = trio.current_time() + 4 * PROVIDE_TTL_S
    while trio.current_time() < until:
        await announcer.flush()
        left = [record.expiration_unix - clock.unix() for record in provided(world, item.info_hash)]
        assert left and left[0] > PROVIDE_TTL_S / 2
        await trio.sleep(LOOK_S)
    assert 8 <= len(network.dht.published) <= 11


async def test_a_changed_record_is_written_at_once(
    world: Any, network: Any, item: Any, autojump_clock: Any
) -> None:
    announcer = Announcer(network)
    announcer.say(RunRecord("one", world.signed.run_id, item), b"", 600.0)
    await announcer.flush()
    announcer.say(RunRecord("two", world.signed.run_id, item), b"", 600.0)
    await announcer.flush()
    (record,) = world.live("run", b"")
    assert record.payload.name == "two"


async def test_a_removed_item_is_no_longer_renewed(
    world: Any, network: Any, item: Any, autojump_clock: Any
) -> None:
    announcer = Announcer(network)
    other = world.signed.manifest.components["tokenizer"]
    announcer.provide([item.info_hash, other.info_hash])
    await announcer.flush()
    network.store.remove(item.info_hash)
    announcer.forget_refused()
    await trio.sleep(PROVIDE_TTL_S - 1)
    await announcer.flush()
    await trio.sleep(2)
    assert provided(world, item.info_hash) == [] and len(provided(world, other.info_hash)) == 1


async def test_what_could_not_be_written_stays_due(
    world: Any, network: Any, item: Any, autojump_clock: Any
) -> None:
    announcer = Announcer(network)
    announcer.provide([item.info_hash])
    network.dht.down = True
    with pytest.raises(TransportError):
        await announcer.flush()
    network.dht.down = False
    await announcer.flush()
    assert len(provided(world, item.info_hash)) == 1


async def test_records_that_were_not_stored_are_counted_and_tried_again(
    world: Any, network: Any, item: Any, autojump_clock: Any
) -> None:
    announcer = Announcer(network)
    world.says(network.identity, ProvideRecord(True, ()), item.info_hash, 2 * PROVIDE_TTL_S)
    announcer.provide([item.info_hash])
    assert await announcer.flush() == 1
    await trio.sleep(PROVIDE_TTL_S + 1)
    assert await announcer.flush() == 0


async def test_a_checkpoint_is_announced_with_its_two_items(
    world: Any, network: Any, autojump_clock: Any
) -> None:
    data, statement = world.checkpoint(network.identity, "router", 50, store=network.store)
    announcer = Announcer(network)
    announcer.provide_checkpoint(world.signed.run_id, data, statement)
    await announcer.flush()
    (record,) = world.live("announce", role_scope(world.signed.run_id, Role("router")))
    assert record.payload.statement == data
    assert provided(world, statement.weights.info_hash) and provided(world, statement.resume.info_hash)


async def test_addresses_that_no_record_can_hold_are_left_out(
    world: Any, network: Any, item: Any, autojump_clock: Any
) -> None:
    long = "/dns4/" + "x" * MAX_ADDRESS_CHARS + "/tcp/4001"
    network.swarm.addresses = (long, *(f"/ip4/127.0.0.1/tcp/{port}" for port in range(1, 6)))
    announcer = Announcer(network)
    announcer.provide([item.info_hash])
    await announcer.flush()
    (record,) = provided(world, item.info_hash)
    assert record.payload.addresses == network.swarm.addresses[1 : 1 + MAX_ADDRESSES]


async def test_the_largest_checkpoint_announcement_fits_a_record(
    world: Any, network: Any, autojump_clock: Any
) -> None:
    big = world.signed.manifest.clusters[0].train
    data, statement = world.checkpoint(
        network.identity,
        "expert-1023",
        (1 << 31) - 1,
        term=(1 << 31) - 1,
        total_steps=(1 << 31) - 1,
        weights=type(big)(big.info_hash, 1 << 40, 1 << 26),
        resume=type(big)(big.info_hash, 1 << 40, 1 << 26),
        parent=b"p" * 32,
        variant=1 << 20,
    )
    network.swarm.addresses = tuple("/" + "a" * (MAX_ADDRESS_CHARS - 1) for _ in range(3))
    announcer = Announcer(network)
    announcer.provide_checkpoint(world.signed.run_id, data, statement)
    assert await announcer.flush() == 0
