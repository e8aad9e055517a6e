"""Which networks are in memory: loaded when they are needed, within a budget, the longest unused out first.

Owns: loading on demand, eviction, waiting in main memory while another device is full. Does not own: reading
files (`parts`), what is computed (`sampling`, `pipeline`).

The budget is for weights; what a step computes with (activations) comes on top. On the CPU, weights that need
no conversion are mapped from their file: reading them again costs little while the system has them cached.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from paris_p2p.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shelved:
    """A network that can be loaded: `size` bytes of weights once it is."""

    load: Callable[[], nn.Module]
    size: int


@dataclass(slots=True)
class Residency:
    """The networks of `shelf`, of which at most `budget` bytes (None: all) are on `device` at once.

    `offload`: what has to leave another device than the CPU waits in main memory, not in its file. `loads`
    counts loads of each from its file.
    """

    shelf: Mapping[str, Shelved]
    budget: int | None = None
    offload: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None  # cast to after loading, where it is not None
    loaded: dict[str, nn.Module] = field(default_factory=dict)  # the longest unused first
    waiting: dict[str, nn.Module] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    held: int = 0
    peak: int = 0

    def get(self, name: str, keep: Sequence[str] = ()) -> nn.Module:
        """The network `name`, on `device`; `keep`: networks that must not make room for it.

        Raises `KeyError` when it is not on the shelf, `ConfigError` when the budget is too small."""
        network = self.loaded.pop(name, None)
        if network is None:
            size = self.shelf[name].size
            self._make_room(name, size, keep)
            network = self._loaded(name)
            self.held += size
            self.peak = max(self.peak, self.held)
        self.loaded[name] = network  # now the last to go
        return network

    def order(self, names: Sequence[str]) -> list[str]:
        """`names`, those in memory first: going through more than fit, again and again, always in the same
        order would load each of them every time."""
        return sorted(names, key=lambda name: name not in self.loaded)

    def drop(self, name: str) -> None:
        """Let `name` leave, if it is in memory."""
        network = self.loaded.pop(name, None)
        if network is None:
            return
        self.held -= self.shelf[name].size
        if self.offload and self.device.type != "cpu":
            self.waiting[name] = network.to("cpu")

    def _make_room(self, name: str, size: int, keep: Sequence[str]) -> None:
        if self.budget is None:
            return
        kept = sum(self.shelf[other].size for other in keep if other in self.loaded)
        if kept + size > self.budget:
            beside = f" beside {', '.join(keep)} ({kept} bytes)" if kept else ""
            raise ConfigError(
                f"{name} is {size} bytes of weights{beside}, and max-memory allows {self.budget}: "
                f"give at least {kept + size}, or a smaller dtype"
            )
        for other in list(self.loaded):
            if self.held + size <= self.budget:
                return
            if other not in keep:
                self.drop(other)

    def _loaded(self, name: str) -> nn.Module:
        waiting = self.waiting.pop(name, None)
        if waiting is not None:
            return waiting.to(self.device)
        self.loads[name] = self.loads.get(name, 0) + 1
        network = self.shelf[name].load().to(self.device)
        same = self.dtype is None or network.dtype == self.dtype
        return network if same else network.to(self.dtype)  # diffusers warns of every cast, even of none
