"""Tests of `paris_node.fitting`."""

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from paris_node import fitting
from paris_node.fitting import Fit, ask, fitting_roles, is_big
from paris_p2p.errors import ConfigError
from paris_p2p.ids import ROUTER, Role
from paris_p2p.wire.manifest import Manifest, TensorSpec
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
