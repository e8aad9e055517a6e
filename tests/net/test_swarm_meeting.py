"""Nodes that hear of each other at the same moment: one session a pair, at once, and none lost."""

import itertools
from contextlib import AsyncExitStack

import pytest
import trio
from trio.testing import MockClock

from paris_p2p.net.limits import SwarmLimits
from paris_p2p.net.swarm import Swarm
from tests.net.memory_network import World

LEECHERS = 6
SLOW = SwarmLimits(up_bytes_per_s=20_000)


def pairs_connected(swarms: list[Swarm]) -> int:
    nodes = {swarm._network.node_id: swarm for swarm in swarms}
    held = {(a, b) for a, s in nodes.items() for item in s._items.values() for b in item.connections}
    return sum((a, b) in held and (b, a) in held for a, b in itertools.combinations(nodes, 2))


@pytest.mark.parametrize("known_from", ["each other's addresses", "the seeder"])
async def test_each_pair_of_a_crowd_soon_has_one_session_that_lasts(
    world: World, autojump_clock: MockClock, known_from: str
) -> None:
    seed, networks = world.store("seed"), [world.network() for _ in range(LEECHERS)]
    ref = world.content(seed, pieces=100)
    if known_from != "the seeder":
        world.hub.holders += [network.peer for network in networks]
    async with AsyncExitStack() as nodes:
        await nodes.enter_async_context(world.node(seed, holder=True, limits=SLOW))
        leechers = [
            await nodes.enter_async_context(world.node(world.store(f"mine{n}"), network, limits=SLOW))
            for n, network in enumerate(networks)
        ]
        nursery = await nodes.enter_async_context(trio.open_nursery())
        for swarm in leechers:
            nursery.start_soon(swarm.fetch, ref)
        pairs = LEECHERS * (LEECHERS - 1) // 2
        await trio.sleep(1.0)
        assert pairs_connected(leechers) == pairs
        dials = world.hub.dials
        await trio.sleep(10.0)
        assert pairs_connected(leechers) == pairs
        assert world.hub.dials == dials  # nobody lost a session and had to dial again
        if known_from == "the seeder":
            assert dials == LEECHERS + pairs
        nursery.cancel_scope.cancel()
