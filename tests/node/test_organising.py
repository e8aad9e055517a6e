"""Tests of `paris_node.organising`."""

import dataclasses
import io
import json
from typing import Any

from paris_node.organising import News
from paris_node.snapshot import observe
from paris_p2p.ids import Role
from paris_p2p.programs import Output
from paris_p2p.wire.identity import Identity
from tests.samples import ORGANISER

ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
EXPERT, ROUTER = Role("expert-0"), Role("router")


async def test_checkpoints_finished_roles_and_the_end_are_told_once(world: Any, autojump_clock: Any) -> None:
    said, plain = io.StringIO(), io.StringIO()
    outputs = [Output(True, said), Output(False, plain)]
    news = [News(output, (EXPERT, ROUTER), "paris-node fetch-model") for output in outputs]
    network = world.network("organiser")

    async def sees(role: Role, step: int) -> None:
        data, _ = world.checkpoint(ALICE, role, step, store=network.store)
        for who in (ALICE, BOB):
            world.announces(who, data, role)
        world.attests(ORGANISER, role, data, loss=0.441)
        observation = await observe(network.dht, world.signed)
        for one in (*news, *news):
            one.see(observation)

    for step in (10, 20, 40, 100):  # the second is hardly news
        await sees(EXPERT, step)
    await sees(ROUTER, 100)
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    told = [(event["event"], event.get("role"), event.get("step")) for event in events]
    assert told == [
        ("role_checkpoint", EXPERT, 10),
        ("role_checkpoint", EXPERT, 40),
        ("role_finished", EXPERT, 100),
        ("role_finished", ROUTER, 100),
        ("complete", None, None),
    ]
    lines = plain.getvalue().splitlines()
    assert lines[2] == "expert-0 is finished, checked (held-out loss 0.441), 2 copies"
    assert lines[-1] == "every role is finished; get the model with: paris-node fetch-model"


async def test_a_last_step_that_nobody_checked_is_not_told_of_as_finished(
    world: Any, autojump_clock: Any
) -> None:
    said, network = io.StringIO(), world.network("organiser")
    for who in (ALICE, BOB):
        world.takes_part(who)
    data, _ = world.checkpoint(ALICE, EXPERT, 100)
    world.announces(ALICE, data, EXPERT)
    news = News(Output(True, said), (EXPERT,), "fetch")
    observation = await observe(network.dht, world.signed)
    news.see(observation)
    news.see(dataclasses.replace(observation, newest={}))
    assert said.getvalue() == ""
