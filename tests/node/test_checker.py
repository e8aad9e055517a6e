"""Tests of `paris_node.checker`; what a finding means to others is in `test_hostile`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from paris_node import checker
from paris_node.judging import Candidate
from paris_p2p.ids import Role
from paris_p2p.wire.identity import Identity

ROLES = (Role("expert-0"), Role("router"))


class Children:
    """Counts the children that measure, and how many measure at one moment."""

    def __init__(self, world: Any) -> None:
        self._world = world
        self.started = 0
        self.busy: list[int] = []  # at the start of each measurement: how many were under way, with it
        self._now = 0

    @asynccontextmanager
    async def open(self, module: str) -> AsyncIterator["Children"]:
        assert module == checker.CHECK_MODULE
        self.started += 1
        yield self

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        self._world.asked_to_measure.append(message)
        self._now += 1
        self.busy.append(self._now)

    async def receive(self) -> dict[str, Any]:
        await trio.sleep(20)
        self._now -= 1
        return {"type": "measured", "loss": 0.5, "baseline": 1.2}


async def test_a_node_measures_one_checkpoint_at_a_time_in_one_child_whatever_waits(
    world: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a run every role's last checkpoint wants to be looked at, all in the same minute."""
    children = Children(world)
    monkeypatch.setattr(checker, "open_worker", children.open)
    node, _ = world.run_node(world.network("alice", seeds=True))
    store, made = node.network.store, []
    for number in range(8):
        holder = Identity(bytes([number + 1]) * 32)
        data, statement = world.checkpoint(holder, ROLES[number % 2], 100, store=store)
        made.append(Candidate(statement, data, frozenset({holder.node_id})))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.checker.run)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(8 * 20 + 1):  # none is starved
            async with trio.open_nursery() as examining:
                for one in made:
                    folder = store.files(one.statement.weights.info_hash)
                    examining.start_soon(partial(node.checker.examine, one, folder, measure=True))
        nursery.cancel_scope.cancel()
    assert (children.started, children.busy) == (1, [1] * 8)
    assert len(node.checker.known().checked) == 8
