"""Tests of `paris_node.fitting`."""

import dataclasses
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from paris_node import fitting
from paris_node.fitting import ChoosyMachine, Fit, TooBig, ask, fitting_roles, is_big
from paris_p2p.core.assignment import View
from paris_p2p.core.lease_actions import Action, Now, WriteClaim
from paris_p2p.errors import ConfigError
from paris_p2p.ids import ROUTER, NodeId, Role
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import LeaseTimes, Manifest, TensorSpec
from paris_p2p.workers.spawn import WorkerDied

EXPERT = Role("expert-0")
GB = 1 << 30


def with_kinds(world: Any, *allowed: int, kinds: int = 2) -> Manifest:
    manifest: Manifest = world.signed.manifest
    recipe = dataclasses.replace(manifest.recipe, experts=manifest.recipe.experts * kinds)
    clusters = tuple(dataclasses.replace(cluster, variants=allowed) for cluster in manifest.clusters)
    return dataclasses.replace(manifest, recipe=recipe, clusters=clusters)


def test_a_role_fits_if_any_variant_it_may_be_does(world: Any) -> None:
    fit = Fit("cuda", 5 * GB, router=GB, experts=(12 * GB, 3 * GB))
    assert fitting_roles(with_kinds(world), fit, None) == (EXPERT, ROUTER)
    assert fitting_roles(with_kinds(world, 0), fit, None) == (ROUTER,)
    assert fitting_roles(with_kinds(world, 1), fit, EXPERT) == (EXPERT, ROUTER)


@pytest.mark.parametrize(("wanted", "least"), [(EXPERT, "12.9 GB"), (None, "6.4 GB")])
def test_what_does_not_fit_is_said_with_both_figures(world: Any, wanted: Role | None, least: str) -> None:
    fit = Fit("cuda", 5 * GB, router=6 * GB, experts=(12 * GB, 3 * GB))
    with pytest.raises(ConfigError, match=f"{wanted or 'any role'}.*{least}.*cuda has 5.4 GB"):
        fitting_roles(with_kinds(world, 0), fit, wanted)


def test_only_big_runs_are_asked_about(world: Any) -> None:
    manifest = world.signed.manifest
    assert not is_big(manifest)
    expert = manifest.recipe.experts[0]
    wide = dataclasses.replace(expert.architecture, tensors=(TensorSpec("w", "F32", (1 << 13, 1 << 13)),))
    experts = (dataclasses.replace(expert, architecture=wide),)
    assert is_big(dataclasses.replace(manifest, recipe=dataclasses.replace(manifest.recipe, experts=experts)))


class Child:
    """Says `answer`; dies without one."""

    def __init__(self, answer: dict[str, Any] | None) -> None:
        self.answer = answer
        self.asked: dict[str, Any] = {}

    async def send(self, message: dict[str, Any]) -> None:
        self.asked = message

    async def receive(self) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if self.answer is None:
            raise WorkerDied(fitting.MODULE, 1, -9, "")
        return self.answer

    @asynccontextmanager
    async def open(self, module: str) -> AsyncIterator["Child"]:
        assert module == fitting.MODULE
        yield self


async def test_a_child_is_asked_and_one_that_cannot_say_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Child({"type": "fit", "device": "cuda", "room": 9, "router": 1, "experts": [2, 3]})
    monkeypatch.setattr(fitting, "open_worker", good.open)
    assert await ask(Path("manifest.paris"), "auto") == Fit("cuda", 9, 1, (2, 3))
    assert good.asked == {"type": "fit", "manifest": "manifest.paris", "device": "auto"}
    for answer in (None, {"type": "error", "kind": "crash", "message": "?"}):
        monkeypatch.setattr(fitting, "open_worker", Child(answer).open)
        assert await ask(Path("manifest.paris"), "auto") is None
    missing = Child({"type": "error", "kind": "config", "message": "no such device"})
    monkeypatch.setattr(fitting, "open_worker", missing.open)
    with pytest.raises(ConfigError, match="no such device"):
        await ask(Path("manifest.paris"), "cuda")


KEEP_S = 60.0
MAKER = Identity(b"m" * 32)


def made(world: Any, step: int, variant: int, role: Role = EXPERT) -> CheckpointStatement:
    return world.checkpoint(MAKER, role, step, variant=variant)[1]  # type: ignore[no-any-return]


def test_roles_are_left_alone_while_their_newest_checkpoint_is_too_big_and_it_is_told_once(
    world: Any,
) -> None:
    big = TooBig(Fit("cpu", 10, router=5, experts=(20, 6)), KEEP_S)
    assert (
        big.see([EXPERT, ROUTER], {ROUTER: made(world, 9, 0, ROUTER), EXPERT: made(world, 9, 1)}, 0.0) == []
    )
    assert not big.roles
    first, later = made(world, 10, 0), made(world, 20, 0)
    assert big.see([EXPERT, ROUTER], {EXPERT: first}, 1.0) == [first]
    assert big.see([EXPERT, ROUTER], {EXPERT: later}, 2.0) == []
    assert big.see([EXPERT], {}, 2.0 + KEEP_S) == [] and list(big.roles) == [EXPERT]  # a read may lack it
    assert big.see([ROUTER], {}, 3.0 + KEEP_S) == [] and list(big.roles) == [EXPERT]  # nothing was read of it
    assert big.see([EXPERT], {}, 3.0 + KEEP_S) == [] and not big.roles
    assert big.see([EXPERT], {EXPERT: later}, 90.0) == [] and list(big.roles) == [EXPERT]
    assert big.see([EXPERT], {EXPERT: made(world, 100, 0)}, 91.0) == [] and not big.roles  # it is finished


def test_where_memory_does_not_matter_nothing_is_left_alone(world: Any) -> None:
    big = TooBig(None, KEEP_S)
    assert big.see([EXPERT], {EXPERT: made(world, 10, 0)}, 0.0) == [] and not big.roles


def test_the_shortage_is_said_with_the_kind_and_both_figures(world: Any) -> None:
    fit = Fit("cuda", 5 * GB, router=6 * GB, experts=(12 * GB, 3 * GB))
    manifest = with_kinds(world)
    name = manifest.recipe.experts[0].name
    assert fit.shortage(manifest, made(world, 40, 0)) == (
        f"its newest checkpoint (step 40) is of kind {name} and takes at least 12.9 GB of memory to train, "
        "cuda has 5.4 GB for it"
    )
    assert "(step 40) takes at least 6.4 GB" in fit.shortage(manifest, made(world, 40, 0, ROUTER))


def test_the_machine_bids_for_no_role_that_is_left_alone_and_goes_on_looking(world: Any) -> None:
    """Any seed: without it each role is bid for by some."""
    for seed in range(8):
        times = LeaseTimes(60.0, 20.0, 3.0, 10.0)
        machine = ChoosyMachine(NodeId(bytes([seed]) * 32), (EXPERT, ROUTER), times, rng=random.Random(seed))
        machine.left_alone = {EXPERT}
        assert _bids(machine, steps=3) == [ROUTER]
        machine = ChoosyMachine(NodeId(bytes([seed]) * 32), (EXPERT,), times, rng=random.Random(seed))
        machine.left_alone = {EXPERT}
        assert _bids(machine, steps=3) == []
        assert machine.next_wakeup() > 12.0  # after a poll, not at once
        machine.left_alone = ()
        assert _bids(machine, steps=3) == [EXPERT]


def _bids(machine: ChoosyMachine, steps: int) -> list[Role]:
    """The roles it bids for when it sees a run that nobody works on."""
    actions: list[Action] = []
    at = 0.0
    for _ in range(steps):
        at = max(at, machine.next_wakeup())
        now = Now(at, 1_750_000_000.0 + at)
        if machine.wants_view(now):
            actions += machine.step(View(now.unix, dict.fromkeys(machine.reads, ())), now)
    return [action.role for action in actions if isinstance(action, WriteClaim)]
