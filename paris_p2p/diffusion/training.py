"""Training one role, alone: the step, the average of the weights, the held-out loss.

Owns: optimizer, learning rate, EMA, losses, devices. Does not own: messages (`train_worker`), files
(`resume`), formulas (`objectives`). Knows no network and no other role.

The same seed, machine and thread count give the same bits, and a resumed run the bits of an unbroken one: all
chance comes from one CPU generator that is part of the resume bundle, and the data order from the step.
"""

import math
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional

from paris_p2p.diffusion import networks, objectives
from paris_p2p.diffusion.expert import predict
from paris_p2p.diffusion.seeds import stream
from paris_p2p.diffusion.shards import Batch, Examples, batch_indices
from paris_p2p.errors import ConfigError, WorkerError
from paris_p2p.ids import ROUTER, Role
from paris_p2p.wire.manifest import Recipe, Training

HELDOUT_SAMPLES = 256
"""(image, t, eps) triples a held-out loss averages over: a percent or so of noise, at little cost."""
MICRO_BATCH = 64
_CUDA_INDEX = re.compile(r"cuda:(0|[1-9][0-9]{0,2})")


class TrainingError(WorkerError):
    """Training cannot go on. `kind`: `nan`, `oom`, `bad_resume` or `config`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Plan:
    """What one role trains: `objective` is `flow_matching`, `ddpm`, or `routing` for the router."""

    role: Role
    variant: int
    objective: str
    reads_text: bool
    training: Training


def plan(recipe: Recipe, role: Role, variant: int) -> Plan:
    """The plan for `role` (an expert as `variant`). Raises `ConfigError`."""
    if role == ROUTER:
        return Plan(role, 0, "routing", recipe.router.text, recipe.router.training)
    if not 0 <= variant < len(recipe.experts):
        raise ConfigError(f"the recipe has {len(recipe.experts)} expert variants, not one numbered {variant}")
    chosen = recipe.experts[variant]
    return Plan(role, variant, chosen.objective, True, chosen.training)


def pick_device(wanted: str) -> str:
    """`cuda`, `mps` or `cpu` for `auto`; one of these or `cuda:N` for itself.

    Raises `ConfigError` when it is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, there in available.items() if there)
    if numbered := _CUDA_INDEX.fullmatch(wanted):
        available[wanted] = int(numbered[1]) < torch.cuda.device_count()
    if not available.get(wanted, False):
        raise ConfigError(f"device {wanted!r} is not available here; use auto or cpu")
    return wanted


def _accelerator(device: str, precision: str) -> Accelerator:
    """The accelerator for what `pick_device` makes of `device`."""
    picked = pick_device(device)
    if picked.startswith("cuda:"):
        torch.cuda.set_device(picked)  # Accelerate takes the current one
    return Accelerator(cpu=picked == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")


def learning_rate(training: Training, step: int) -> float:
    """The rate of step `step` (0-based): linear warm-up, then constant or a half cosine that ends at zero."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.lr_schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """One role's network, optimizer and average, at `step` finished optimizer steps."""

    def __init__(
        self,
        recipe: Recipe,
        role: Role,
        variant: int,
        train: Examples,
        heldout: Examples,
        device: str = "auto",
    ) -> None:
        self.plan = plan(recipe, role, variant)
        self.train_data, self.heldout_data = train, heldout
        self.step = 0
        training = self.plan.training
        self.accelerator = _accelerator(device, training.precision)
        architecture = recipe.router.architecture if role == ROUTER else recipe.experts[variant].architecture
        model = networks.build(architecture, training.seed, role, "weights").to(self.accelerator.device)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=self.accelerator.device.type in ("cpu", "cuda"),
        )
        self.model: nn.Module
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema = EMAModel(self.model.parameters(), decay=training.ema_decay, foreach=True)
        self.generator = stream(training.seed, role, "noise")

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def finished(self) -> bool:
        """Whether every step of the recipe is done."""
        return self.step >= self.plan.training.steps

    def train_step(self) -> Tensor:
        """One optimizer step. Returns its loss, still on the device: reading it would wait for it."""
        training = self.plan.training
        indices = batch_indices(
            training.seed, self.plan.role, len(self.train_data), self.step, training.batch_size
        )
        batch = drop_captions(self.train_data.gather(indices), training.caption_dropout, self.generator)
        t = objectives.sample_timesteps(training.timestep_sampling, len(indices), self.generator)
        eps = torch.randn(batch.latents.shape, generator=self.generator)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(training, self.step)
        self.model.train()
        loss = self.losses(batch, t, eps).mean()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), training.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.model.parameters())
        self.step += 1
        return loss.detach()

    def losses(self, batch: Batch, t: Tensor, eps: Tensor) -> Tensor:
        """The loss of every example, (B,): mean squared error of the objective's target, or cross-entropy."""
        x0, text, t, eps = (part.to(self.device) for part in (batch.latents, batch.text, t, eps))
        with self._autocast():
            if self.plan.objective == "routing":
                logits = self.model(objectives.noised(x0, eps, t), t, text if self.plan.reads_text else None)
                return functional.cross_entropy(
                    logits.float(), batch.cluster.to(self.device), reduction="none"
                )
            if self.plan.objective == "ddpm":
                steps = (t * objectives.DDPM_STEPS).long().clamp(max=objectives.DDPM_STEPS - 1)
                x = objectives.ddpm_noised(x0, eps, steps)
                output, target = predict(self.model, x, steps / objectives.DDPM_STEPS, text), eps
            else:
                x = objectives.noised(x0, eps, t)
                output, target = predict(self.model, x, t, text), objectives.velocity(x0, eps)
        return (output.float() - target).square().flatten(1).mean(1)

    def _autocast(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """The average weights' loss on held-out images, at the same t and noise every time it is asked."""
        generator = stream(self.plan.training.seed, self.plan.role, "heldout")
        indices = torch.arange(HELDOUT_SAMPLES) % len(self.heldout_data)
        t = (torch.randperm(HELDOUT_SAMPLES, generator=generator) + 0.5) / HELDOUT_SAMPLES
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        total = 0.0
        for rows in torch.split(torch.arange(HELDOUT_SAMPLES), MICRO_BATCH):
            batch = self.heldout_data.gather(indices[rows])
            eps = torch.randn(batch.latents.shape, generator=generator)
            total += float(self.losses(batch, t[rows], eps).sum())
        self.ema.restore(self.model.parameters())
        return total / HELDOUT_SAMPLES


def drop_captions(batch: Batch, share: float, generator: torch.Generator) -> Batch:
    """`batch` with a random `share` of its captions replaced by the encoding of the empty one."""
    dropped = torch.rand(len(batch.latents), generator=generator) < share  # (B,)
    text = torch.where(dropped[:, None, None], batch.uncond, batch.text)  # (B, T, W)
    return Batch(batch.latents, text, batch.uncond, batch.cluster)
