"""Checkpoints on disk: the published weights, and the bundle another node resumes from.

Owns: both folders' formats, and distrust of a bundle's maker. Does not own: when they are written.

A weights folder: `config.json`, `diffusion_pytorch_model.safetensors` (the EMA weights, F32).
A resume folder: `resume.safetensors` with `weights/<name>`, `ema/<name>`, `exp_avg/<name>` and
`exp_avg_sq/<name>` for every parameter; `resume.json` with `format`, `role`, `variant`, `step`,
`data_cursor` (images read so far), `path` (which of the seed's streams of noise is drawn from). AdamW's own
count is `step`: every step moves every parameter. No state of a random number generator: one that a
stranger chose (all zero, say) would go on for ever, and spoil the role long after.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paris_p2p.diffusion.networks import DTYPE_NAMES
from paris_p2p.diffusion.training import PATHS, Trainer, TrainingError

FORMAT = 2
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
TENSORS_NAME = "resume.safetensors"
STATE_NAME = "resume.json"
MAX_STATE_BYTES = 4096
_PARTS = ("weights", "ema", "exp_avg", "exp_avg_sq")
MOMENT_SLACK = 1.05
"""Rounding in fp32 moves a moment by 0.01 % or so over its memory of 1000 steps."""


def save_weights(trainer: Trainer, folder: Path) -> None:
    """Write the trainer's EMA weights and the network's config into `folder`, making it. Raises `OSError`."""
    folder.mkdir(parents=True)
    trainer.model.save_config(folder)  # type: ignore[operator]  # ConfigMixin's, untyped
    names = [name for name, _ in trainer.model.named_parameters()]
    averages = dict(zip(names, trainer.ema.shadow_params, strict=True))
    _save(_on_cpu(averages), folder / WEIGHTS_NAME, {"format": "pt"})


def save_resume(trainer: Trainer, folder: Path) -> None:
    """Write everything a successor needs to go on from `trainer.step` into `folder`, making it. Raises
    `OSError`."""
    folder.mkdir(parents=True)
    _save(_on_cpu(_tensors(trainer)), folder / TENSORS_NAME)
    state = {
        "format": FORMAT,
        "role": trainer.plan.role,
        "variant": trainer.plan.variant,
        "step": trainer.step,
        "data_cursor": trainer.step * trainer.plan.training.batch_size,
        "path": trainer.path,
    }
    (folder / STATE_NAME).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_resume(trainer: Trainer, folder: Path, signed_step: int | None = None) -> None:
    """Put a fresh `trainer` where the bundle in `folder` stopped.

    The bundle is a stranger's: everything is checked before anything is used. `signed_step`: the step its
    signed statement names, if known; without it a bundle that claims to be finished is refused. Raises
    `TrainingError` of kind `bad_resume` naming what is wrong.
    """
    step, path = _checked_state(trainer, folder / STATE_NAME, signed_step)
    tensors = _checked_tensors(trainer, folder / TENSORS_NAME)
    trainer.path = path
    named = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for (name, parameter), average in zip(named.items(), trainer.ema.shadow_params, strict=True):
            parameter.copy_(tensors[f"weights/{name}"])
            average.copy_(tensors[f"ema/{name}"])
    trainer.ema.optimization_step = trainer.step = step
    _load_moments(trainer, tensors, list(named), step)


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    state = trainer.optimizer.optimizer.state
    averages = trainer.ema.shadow_params
    for (name, parameter), average in zip(trainer.model.named_parameters(), averages, strict=True):
        moments = state[parameter]
        tensors[f"weights/{name}"] = parameter.detach()
        tensors[f"ema/{name}"] = average
        tensors[f"exp_avg/{name}"] = moments["exp_avg"]
        tensors[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"]
    return tensors


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """As `save_file`, which says what the system answered in its message only."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(path)) from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _bad(message: str) -> TrainingError:
    return TrainingError("bad_resume", message)


def _checked_state(trainer: Trainer, path: Path, signed_step: int | None) -> tuple[int, int]:
    """The bundle's step and its stream of noise."""
    try:
        if path.stat().st_size > MAX_STATE_BYTES:
            raise ValueError(f"larger than {MAX_STATE_BYTES} bytes")
        state: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(f"{path.name} of the bundle is unreadable: {error}") from None
    step = state.get("step") if isinstance(state, dict) else None
    training = trainer.plan.training
    if type(step) is not int or not 0 < step <= training.steps:
        raise _bad(f"the bundle names step {step!r} of {training.steps}")
    if signed_step is not None and step != signed_step:
        raise _bad(f"the bundle is of step {step}, its signed statement of step {signed_step}")
    if signed_step is None and step == training.steps:
        raise _bad(f"the bundle claims that all {step} steps are done, which no signed statement says")
    wanted = {
        "format": FORMAT,
        "role": trainer.plan.role,
        "variant": trainer.plan.variant,
        "data_cursor": step * training.batch_size,
    }
    for name, value in wanted.items():
        if state.get(name) != value:
            raise _bad(f"the bundle has {name} {state.get(name)!r}, not {value!r}")
    noise = state.get("path")
    if type(noise) is not int or not 0 <= noise < PATHS:
        raise _bad(f"the bundle's path is {noise!r}, not a number from 0 to {PATHS - 1}")
    return step, noise


def _checked_tensors(trainer: Trainer, path: Path) -> dict[str, Tensor]:
    wanted: dict[str, tuple[str, list[int]]] = {}
    for name, parameter in trainer.model.named_parameters():
        for part in _PARTS:
            wanted[f"{part}/{name}"] = (DTYPE_NAMES[parameter.dtype], list(parameter.shape))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
            if names != wanted.keys():
                odd = ", ".join(sorted(names ^ wanted.keys())[:3])
                raise _bad(f"the bundle's tensors are not the recipe's: {odd}")
            for name in names:
                part = file.get_slice(name)
                found = (part.get_dtype(), part.get_shape())
                if found != wanted[name]:
                    raise _bad(f"the bundle's {name} is {found}, not {wanted[name]}")
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise _bad(f"{path.name} of the bundle is unreadable: {error}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _bad(f"the bundle's {name} is not finite")
        if name.startswith("exp_avg_sq/") and bool((tensor < 0).any()):
            raise _bad(f"the bundle's {name} is negative, which no square is")
    _check_moments(trainer, tensors)
    return tensors


def _check_moments(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    """Refuse moments that no gradients g leave behind: a step is as long as exp_avg / sqrt(exp_avg_sq).

    m = (1 - b1) sum b1^k g_k and v = (1 - b2) sum b2^k g_k^2, so by Cauchy-Schwarz, with b1^k g_k as
    (b1 / sqrt(b2))^k times sqrt(b2)^k g_k, m^2 <= v (1 - b1)^2 / (1 - b2) / (1 - b1^2 / b2). Where v has
    underflowed, m is below Adam's epsilon, and moves no weight further than any step does. The gradients are
    clipped, so all of v comes to the clip's square at most; more would stop the training for long.
    """
    group = trainer.optimizer.optimizer.param_groups[0]
    (b1, b2), tiny = group["betas"], float(group["eps"])
    steepest = MOMENT_SLACK * (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2))
    total = 0.0
    for name, squares in tensors.items():
        if not name.startswith("exp_avg_sq/"):
            continue
        of = name.removeprefix("exp_avg_sq/")
        total += float(squares.double().sum())
        if bool((tensors[f"exp_avg/{of}"].abs() > steepest * squares.sqrt() + tiny).any()):
            raise _bad(f"the bundle's exp_avg/{of} is larger than its exp_avg_sq allows")
    clip = trainer.plan.training.gradient_clip
    if clip > 0 and total > MOMENT_SLACK * clip**2:
        raise _bad(f"the bundle's exp_avg_sq come to {total:.3g}, gradients are clipped to {clip:g}")


def _load_moments(trainer: Trainer, tensors: dict[str, Tensor], names: list[str], step: int) -> None:
    optimizer = trainer.optimizer.optimizer
    state = {
        index: {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors[f"exp_avg/{name}"],
            "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
        }
        for index, name in enumerate(names)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
