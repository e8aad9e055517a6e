"""Tests of `paris_node.choosing`; what comes of the choices is in `test_run_node` and `test_hostile`."""

from typing import Any

from paris_node.choosing import REST_FACTOR, Choosing, Look
from paris_p2p.ids import Role
from paris_p2p.wire.identity import Identity

ROLES = (Role("expert-0"), Role("router"))
ME = Identity(b"a" * 32)
TRAINER = Identity(b"t" * 32)


async def seen(world: Any) -> Any:
    node, _ = world.run_node(world.network("viewer"))
    return await node.observe()


def works(world: Any, role: str, step: int) -> bytes:
    """The role's holder announces a checkpoint of its claim."""
    who = Identity(role.encode().ljust(32, b"w"))
    data, _ = world.checkpoint(who, role, step, term=world.holds(who, role))
    world.announces(who, data, role)
    return bytes(data)


async def test_measuring_what_the_run_goes_by_goes_round_the_roles_and_takes_a_share_of_the_time(
    world: Any, autojump_clock: Any
) -> None:
    choosing = Choosing(ME.node_id, world.signed, mirror=True)
    held = {works(world, role, 25) for role in ROLES}
    observation = await seen(world)
    looked: list[Role] = []
    for now in range(0, 100, 10):
        found = [
            one for one, look in choosing.looks(observation, held, now, idle=True) if look is Look.COUNTING
        ]
        for one in found:
            looked.append(one.statement.role)
            choosing.looked(one, now, done=True, measured_s=30 / REST_FACTOR)
    assert sorted(looked[:2]) == sorted(ROLES) and looked == looked[:2] * 2  # at 0, 30, 60 and 90


async def test_strangers_unfinished_checkpoints_are_measured_for_a_share_of_the_time_only(
    world: Any, autojump_clock: Any
) -> None:
    choosing = Choosing(ME.node_id, world.signed, mirror=True)
    for number in range(4):
        who = Identity(bytes([100 + number]) * 32)
        data, _ = world.checkpoint(who, ROLES[0], 99, term=9 << 32)
        world.announces(who, data, ROLES[0])
    observation = await seen(world)
    first = [one for one, _ in choosing.looks(observation, (), 0.0, idle=True)]
    assert len(first) == 2
    for one in first:
        choosing.looked(one, 10.0, done=False, measured_s=10.0)
    assert list(choosing.looks(observation, (), 10.0 + 10.0 * REST_FACTOR - 1, idle=True)) == []
    assert len(list(choosing.looks(observation, (), 10.0 + 10.0 * REST_FACTOR, idle=True))) == 2


async def test_members_measure_what_they_hold_while_the_organiser_does_not(
    world: Any, autojump_clock: Any
) -> None:
    data = works(world, ROLES[0], 25)

    async def looks(held: set[bytes], *, idle: bool) -> list[bytes]:
        choosing = Choosing(ME.node_id, world.signed, mirror=False)
        return [one.data for one, _ in choosing.looks(await seen(world), held, 0.0, idle=idle)]

    assert await looks({data}, idle=True) == [data]
    assert await looks({data}, idle=False) == await looks(set(), idle=True) == []
    world.takes_part(Identity(b"o" * 32), "publishing")
    assert await looks({data}, idle=True) == []
