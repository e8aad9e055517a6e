"""How much memory one training step takes, and how to make it fit.

Owns: counting what a step keeps (on the meta device, so at no cost), and the choice of micro-batch and
gradient checkpointing from the memory there is. Does not own: what to do when it was wrong (`training`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from paris_p2p.errors import ConfigError

SHARE = 0.85
"""Of the free memory: the rest is the allocator's fragmentation and what a step needs for a moment."""
STATE_BYTES_PER_PARAMETER = 12
"""Beside weights and average: a gradient and AdamW's two moments, in fp32."""
BF16_SHARE = 0.6
"""Of fp32's activations that bf16 autocast keeps: matrix products halve, norms and losses stay in fp32."""
WORTHWHILE = 8
"""Images a micro-batch: with fewer, recomputing activations costs less than the idle hardware."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes: `fixed` for gradients and moments, and what each image of a micro-batch keeps until its backward
    pass, without and with gradient checkpointing."""

    fixed: int
    per_image: int
    per_image_checkpointed: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`micro_batch` images are computed at once; `checkpointing`: activations are computed twice."""

    micro_batch: int
    checkpointing: bool


def choose(need: StepMemory, batch_size: int, free_bytes: int) -> StepPlan:
    """The fastest plan that fits into `free_bytes`; the smallest one when none does."""
    room = int(free_bytes * SHARE) - need.fixed
    plain = _fitting(need.per_image, batch_size, room)
    if plain >= min(batch_size, WORTHWHILE):
        return StepPlan(plain, False)
    checkpointed = _fitting(need.per_image_checkpointed, batch_size, room)
    return StepPlan(checkpointed, True) if checkpointed > plain else StepPlan(max(plain, 1), plain == 0)


def _fitting(per_image: int, batch_size: int, room: int) -> int:
    """The largest of batch_size, batch_size / 2, batch_size / 4, … that fits; 0 when one image does not."""
    size = batch_size
    while size * per_image > room:
        if size == 1:
            return 0
        size = math.ceil(size / 2)
    return size


def smaller(plan: StepPlan) -> StepPlan | None:
    """The plan to try after `plan` ran out of memory; None when there is none."""
    if plan.micro_batch > WORTHWHILE or (plan.checkpointing and plan.micro_batch > 1):
        return StepPlan(math.ceil(plan.micro_batch / 2), plan.checkpointing)
    if not plan.checkpointing:
        return StepPlan(plan.micro_batch, True)
    return None


def measure(
    make: Callable[[], nn.Module], forward: Callable[[nn.Module], Tensor], *, bf16: bool
) -> StepMemory:
    """Count a step of the network that `make` builds; `forward(network)` gives the output for one image.

    Both run under `torch.device("meta")`: shapes only. Attention is counted with its scores, which fused
    kernels do not keep, so the count is on the safe side.
    """
    with torch.device("meta"):
        network = make()
        plain = _kept(network, forward)
        network.enable_gradient_checkpointing()  # type: ignore[operator]  # ModelMixin's, untyped
        checkpointed = _kept(network, forward)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    checkpointed += plain // _depth(network)  # one block at a time is computed again, and keeps its own
    share = BF16_SHARE if bf16 else 1.0
    return StepMemory(
        parameters * STATE_BYTES_PER_PARAMETER, math.ceil(plain * share), math.ceil(checkpointed * share)
    )


def _depth(network: nn.Module) -> int:
    """How many blocks the network is a stack of."""
    stacks = [len(module) for module in network.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, default=1)


def _kept(network: nn.Module, forward: Callable[[nn.Module], Tensor]) -> int:
    """Bytes of every tensor that autograd keeps for the backward pass of one image, weights not counted."""
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # by identity; held, so that none is used again meanwhile

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    network.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(network)
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total


def free_bytes(device: torch.device) -> int:
    """Memory that training may take on `device` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    raise ConfigError(f"how much memory a {device.type} device has is not known here; use cuda, mps or cpu")
