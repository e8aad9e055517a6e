"""Tests of `paris_p2p.diffusion.residency`."""

import pytest
import torch
from torch import nn

from paris_p2p.diffusion.residency import Residency, Shelved
from paris_p2p.errors import ConfigError


def setup(sizes: str, budget: int | None) -> Residency:
    """Networks called a, b, c, … of the given one-digit sizes."""
    names = "abcdefgh"
    shelf = {name: Shelved(nn.Identity, int(size)) for name, size in zip(names, sizes, strict=False)}
    return Residency(shelf, budget)


def test_what_fits_is_loaded_once() -> None:
    resident = setup("111", 3)
    first = resident.get("a")
    for name in "abcabc":
        resident.get(name)
    assert resident.get("a") is first
    assert resident.loads == {"a": 1, "b": 1, "c": 1}
    assert (resident.held, resident.peak) == (3, 3)


def test_the_longest_unused_makes_room() -> None:
    resident = setup("1111", 2)
    for name in "abac":
        resident.get(name)
    assert set(resident.loaded) == {"a", "c"}
    resident.get("d", keep=("a",))
    assert set(resident.loaded) == {"a", "d"}
    assert resident.peak == 2


def test_as_many_leave_as_one_needs() -> None:
    resident = setup("1124", 4)
    for name in "abc":
        resident.get(name)
    resident.get("d")
    assert set(resident.loaded) == {"d"}
    assert resident.peak == 4


def test_without_a_budget_nothing_leaves() -> None:
    resident = setup("999", None)
    for name in "abc":
        resident.get(name)
    assert resident.held == 27


def test_what_can_never_fit_is_refused_before_anything_is_unloaded() -> None:
    resident = setup("315", 4)
    resident.shelf = {**resident.shelf, "a2": Shelved(nn.Identity, 4)}
    resident.get("a")
    resident.get("b")
    with pytest.raises(ConfigError, match="give at least 5"):
        resident.get("c")
    with pytest.raises(ConfigError, match="beside b"):
        resident.get("a2", keep=("b",))
    assert set(resident.loaded) == {"a", "b"}
    with pytest.raises(KeyError):
        resident.get("z")


def test_those_in_memory_come_first() -> None:
    resident = setup("1111", 2)
    resident.get("c")
    resident.get("d")
    assert resident.order(["a", "b", "c", "d"]) == ["c", "d", "a", "b"]


def test_what_leaves_another_device_may_wait_in_main_memory() -> None:
    made: list[nn.Linear] = []

    def load() -> nn.Module:
        made.append(nn.Linear(2, 2))
        return made[-1]

    shelf = {name: Shelved(load, 1) for name in "ab"}
    resident = Residency(shelf, 1, offload=True, device=torch.device("meta"))
    resident.waiting["a"] = nn.Linear(2, 2)
    assert next(resident.get("a").parameters()).device.type == "meta"
    assert (resident.loads, resident.waiting) == ({}, {})
    cpu = Residency(shelf, 1, offload=True)
    cpu.get("a")
    cpu.get("b")
    assert cpu.waiting == {}  # main memory is where they already were


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_what_leaves_a_gpu_frees_its_memory_and_comes_back_the_same() -> None:
    shelf = {name: Shelved(lambda: nn.Linear(1024, 1024), 1024 * 1025 * 4) for name in "ab"}
    resident = Residency(shelf, 1024 * 1025 * 4, offload=True, device=torch.device("cuda"))
    before = torch.cuda.memory_allocated()
    weight = next(resident.get("a").parameters()).detach().cpu()
    resident.get("b")
    assert torch.cuda.memory_allocated() - before < 1.5 * shelf["a"].size
    assert torch.equal(next(resident.get("a").parameters()).detach().cpu(), weight)
    assert resident.loads == {"a": 1, "b": 1}
