"""Which device a trainer computes on, and in which precision.

Owns: choosing devices and whether they are there, the precision that pays there, Accelerate's set-up. Does
not own: what they may be called (`device_names`), several processes of one role (`ranks`), memory (`memory`).
"""

import torch
from accelerate import Accelerator
from torch import nn

from paris_p2p.diffusion.device_names import CUDA_INDEX, SEVERAL
from paris_p2p.errors import ConfigError

PRECISIONS = ("fp32", "bf16")


def pick_device(wanted: str) -> str:
    """`cuda`, `mps` or `cpu` for `auto`; one of these or `cuda:N` for itself; `cuda` for `cuda:all` and
    `cuda:xN` (N devices), `cpu` for `cpu:xN` (N processes).

    Raises `ConfigError` when it is not there.
    """
    several = processes(wanted)
    if several > 1:
        kind = wanted.split(":")[0]
        if kind == "cuda" and several > torch.cuda.device_count():
            raise ConfigError(
                f"device {wanted!r}: this machine has {torch.cuda.device_count()}; use cuda:all"
            )
        return kind
    wanted = "cuda" if wanted == "cuda:all" else wanted
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, there in available.items() if there)
    if numbered := CUDA_INDEX.fullmatch(wanted):
        available[wanted] = int(numbered[1]) < torch.cuda.device_count()
    if not available.get(wanted, False):
        raise ConfigError(f"device {wanted!r} is not available here; use auto or cpu")
    return wanted


def processes(wanted: str) -> int:
    """How many processes train on device `wanted`: one a device."""
    if wanted == "cuda:all":
        return max(1, torch.cuda.device_count())
    several = SEVERAL.fullmatch(wanted)
    return int(several[1]) if several else 1


def accelerator_for(device: str) -> Accelerator:
    """The accelerator for device `device`. `ConfigError`.

    Precision is not its matter: Accelerate allows one for all of a process, and trainers of several roles may
    live in one."""
    picked = pick_device(device)
    if picked.startswith("cuda:"):
        torch.cuda.set_device(picked)  # Accelerate takes the current one
    return Accelerator(cpu=picked == "cpu", mixed_precision="no")


def precision_for(device: str, recipe: str, forced: str | None = None) -> str:
    """What to compute in, `fp32` or `bf16` (autocast): the `recipe`'s where `device` gains from it, else
    `fp32`; `forced`, if it is given, whatever the device gains. Raises `ConfigError`."""
    if forced is not None and forced not in PRECISIONS:
        raise ConfigError(f"there is no precision {forced!r}; there are: {', '.join(PRECISIONS)}")
    fitting = recipe if recipe != "bf16" or gains_from_bf16(pick_device(device)) else "fp32"
    return fitting if forced is None else forced


def compile_or_not(network: nn.Module) -> None:
    """Compile `network` in place at its first call, where that works: a volunteer's machine without a C
    compiler, or with a GPU that Triton does not know, trains it as it is."""
    import torch._dynamo  # here: it takes seconds, and most trainings are not compiled

    torch._dynamo.config.suppress_errors = True
    network.compile()


def gains_from_bf16(device: str) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware; emulated, they are slower than fp32."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False
