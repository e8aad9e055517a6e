"""Tests of `paris_node.standing_by`."""

import io
import json
from typing import Any

import pytest

from paris_node.standing_by import StandingBy, Why, situation
from paris_p2p.ids import Role
from paris_p2p.programs import Output
from paris_p2p.wire.identity import Identity
from tests.samples import ORGANISER

EXPERT, ROUTER = Role("expert-0"), Role("router")
ROLES = (EXPERT, ROUTER)
ME = Identity(b"m" * 32)
HOLDERS = {role: Identity(role[:1].encode() * 32) for role in ROLES}


def finish(world: Any, role: Role, *, checked: bool = True) -> None:
    """The role's holder announces the last checkpoint; the organiser says that it is good."""
    holder = HOLDERS[role]
    data, _ = world.checkpoint(holder, role, 100, term=world.holds(holder, role))
    world.announces(holder, data, role)
    if checked:
        world.attests(ORGANISER, role, data, loss=0.5)


class Waiting:
    """A node without a role, and what it says."""

    def __init__(self, world: Any, *, as_json: bool = True, **options: Any) -> None:
        self.node, _ = world.run_node(world.network("alice"))
        self.said = io.StringIO()
        self.standing_by = StandingBy(Output(as_json, self.said), ROLES, ME.node_id, **options)

    async def looks(self, claimable: tuple[Role, ...] = ROLES, **options: Any) -> None:
        self.standing_by.see(await self.node.observe(), claimable, **options)

    def why(self) -> list[str]:
        return [json.loads(line)["why"] for line in self.said.getvalue().splitlines()]


async def test_each_role_is_in_the_group_that_people_would_put_it_in(world: Any, autojump_clock: Any) -> None:
    node, _ = world.run_node(world.network("alice"))

    async def sees(claimable: tuple[Role, ...]) -> Any:
        return situation(await node.observe(), ROLES, claimable, ME.node_id)

    assert await sees(ROLES) is None and await sees((ROUTER,)) is None  # there is something to claim
    world.holds(ME, ROUTER)
    assert await sees((ROUTER,)) is None  # this node's own claim, which it has given up
    found = await sees(())
    assert (found.why, found.left) == (Why.HELD, ROLES)
    world.holds(HOLDERS[ROUTER], ROUTER)
    found = await sees((ROUTER,))
    assert (found.why, found.held, found.left) == (Why.HELD, (ROUTER,), (EXPERT,))
    finish(world, ROUTER, checked=False)
    found = await sees((ROUTER,))
    assert (found.why, found.checking, found.held) == (Why.HELD, (ROUTER,), ())
    finish(world, EXPERT)
    found = await sees((EXPERT,))
    assert (found.why, found.finished, found.checking) == (Why.OURS_FINISHED, (EXPERT,), (ROUTER,))
    finish(world, ROUTER)
    found = await sees(ROLES)
    assert (found.why, found.finished) == (Why.FINISHED, ROLES)


async def test_a_reading_that_lacks_a_role_says_nothing(world: Any, autojump_clock: Any) -> None:
    waiting = Waiting(world)
    for role in ROLES:
        world.holds(HOLDERS[role], role)
    waiting.standing_by.see(await waiting.node.observe([ROUTER]), ROLES)
    assert waiting.why() == []
    await waiting.looks()
    assert waiting.why() == ["held"]


async def test_it_is_said_once_and_a_change_when_two_readings_show_it_or_when_it_is_sure(
    world: Any, autojump_clock: Any
) -> None:
    waiting = Waiting(world)
    for role in ROLES:
        finish(world, role)
    for _ in range(3):
        await waiting.looks()
    assert waiting.why() == ["finished"]
    records, world.records = world.records, {}
    world.holds(HOLDERS[EXPERT], EXPERT)
    world.holds(HOLDERS[ROUTER], ROUTER)
    await waiting.looks()
    assert waiting.why() == ["finished"]
    await waiting.looks()
    assert waiting.why() == ["finished", "held"]
    world.records = records
    await waiting.looks(sure=True)
    assert waiting.why() == ["finished", "held", "finished"]
    waiting.standing_by.has_claimed()
    await waiting.looks()
    assert len(waiting.why()) == 4


async def test_what_was_said_otherwise_is_not_said_again(world: Any, autojump_clock: Any) -> None:
    waiting = Waiting(world, said=Why.HELD)
    await waiting.looks(())
    await waiting.looks(())
    assert waiting.why() == []


STANDS_BY = "this node stands by: it copies, seeds and checks what there is, the least replicated first"


@pytest.mark.parametrize("leaves", [False, True])
async def test_people_are_told_what_is_so_what_the_node_does_and_how_to_get_the_model(
    world: Any, autojump_clock: Any, leaves: bool
) -> None:
    waiting = Waiting(world, as_json=False, fetch_model="paris-node fetch-model --home h")
    waiting.standing_by.leaves = leaves
    world.holds(HOLDERS[ROUTER], ROUTER)
    await waiting.looks((ROUTER,))
    finish(world, ROUTER)
    await waiting.looks((ROUTER,), sure=True)
    finish(world, EXPERT)
    await waiting.looks(sure=True)
    does = "this node checks what only strangers vouch for, then leaves" if leaves else STANDS_BY
    assert waiting.said.getvalue().splitlines() == [
        "no role is free for this node (held by others: router; left to others: expert-0): "
        f"{STANDS_BY}, and claims a role that becomes free",
        "what this node may claim is finished, others are not (finished: router; left to others: expert-0): "
        f"{STANDS_BY}",
        f"every role is finished: {does}; get the model with: paris-node fetch-model --home h",
    ]


async def test_a_script_is_told_the_roles_and_the_command(world: Any, autojump_clock: Any) -> None:
    waiting = Waiting(world)
    for role in ROLES:
        finish(world, role)
    await waiting.looks()
    assert json.loads(waiting.said.getvalue()) == {
        "event": "standing_by",
        "why": "finished",
        "finished": ["expert-0", "router"],
        "checking": [],
        "held": [],
        "left": [],
        "fetch_model": "paris-node fetch-model",
    }
