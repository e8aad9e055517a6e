"""Training one role, alone: the step, the average of the weights, the held-out loss.

Owns: optimizer, learning rate, EMA, losses, micro-batches. Does not own: messages (`train_worker`), files
(`resume`), formulas (`objectives`), devices (`devices`), memory (`memory`). Knows no network and no other
role.

On several devices of one machine every process draws the whole batch's chance, computes its own rows, and
adds its gradients to the others': the step is the same whatever their number, up to rounding.

The same seed, machine, thread count and micro-batch give the same bits, and a resumed run the bits of an
unbroken one: all chance and the data order come from the seed, the role and the step, so that no bundle of
a stranger can bring chance of its own. (Where memory is short, another micro-batch may be chosen after a
resume: then up to rounding.)
"""

import logging
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from paris_p2p import clock
from paris_p2p.diffusion import memory, networks, objectives
from paris_p2p.diffusion.devices import accelerator_for, compile_or_not, pick_device, precision_for
from paris_p2p.diffusion.ema import WeightAverage
from paris_p2p.diffusion.expert import predict
from paris_p2p.diffusion.seeds import stream
from paris_p2p.diffusion.shards import Batch, Examples, batch_indices
from paris_p2p.errors import ConfigError, WorkerError
from paris_p2p.ids import ROUTER, Role
from paris_p2p.wire.manifest import Architecture, Recipe, Training

HELDOUT_SAMPLES = 256
"""(image, t, eps) triples a held-out loss averages over: a percent or so of noise, at little cost."""
MICRO_BATCH = 64
PATHS = 1 << 31
"""How many streams of noise a seed has. A successor believes its bundle's choice: all of them are as good."""
COMPILE_FROM_STEPS = 2000
"""On a GPU `torch.compile` costs a minute or two, and earns a tenth or more of every step after that."""
__all__ = ["Plan", "Trainer", "TrainingError", "drop_captions", "learning_rate", "pick_device", "plan"]

log = logging.getLogger(__name__)


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
        initial: Path | None = None,
        precision: str | None = None,
    ) -> None:
        """`initial`: the folder of the weights to start from, where the recipe names some. `precision`: to
        compute in this one (`fp32`, `bf16`), not in the recipe's where the device gains from it."""
        self.plan = plan(recipe, role, variant)
        self.train_data, self.heldout_data = train, heldout
        self.step = 0
        self.waited_s = 0.0  # for images, so far
        self._recipe = recipe
        training = self.plan.training
        self.accelerator = accelerator_for(device)
        self.precision = precision_for(device, training.precision, precision)  # what is computed in
        architecture = recipe.router.architecture if role == ROUTER else recipe.experts[variant].architecture
        self.model = networks.build(architecture, training.seed, role, "weights", initial=initial)
        self.model.to(self.accelerator.device)
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=self.accelerator.device.type in ("cpu", "cuda"),
        )
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.ema = WeightAverage(self.model.parameters(), training.ema_decay)
        self.path = 0
        self._reader = ThreadPoolExecutor(1) if self.device.type == "cuda" else None
        self._ahead: tuple[int, Future[Batch]] | None = None
        self._use(self._memory_plan(architecture))
        if self.device.type == "cuda" and training.steps >= COMPILE_FROM_STEPS:
            compile_or_not(self.model)

    def _memory_plan(self, architecture: Architecture) -> memory.StepPlan:
        """What fits into the device's free memory now."""
        need = step_memory(architecture, self.plan, self._recipe, self.precision)
        rows = math.ceil(self.plan.training.batch_size / self.accelerator.num_processes)
        return memory.choose(need, rows, memory.free_bytes(self.device))

    def _use(self, plan: memory.StepPlan) -> None:
        self.memory_plan = plan
        if plan.checkpointing:
            self.model.enable_gradient_checkpointing()  # type: ignore[operator]  # ModelMixin's, untyped

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
        """One optimizer step. Returns its loss, still on the device: reading it would wait for it.

        When memory runs out the step is computed again in smaller parts; chance is drawn before, so the
        result is the same up to rounding. Raises `TrainingError` of kind `oom` when nothing can shrink.
        """
        training = self.plan.training
        batch = self._next_batch()
        chance = stream(training.seed, self.plan.role, "noise", self.path, self.step)
        drop_captions(batch, training.caption_dropout, chance)
        t = objectives.sample_timesteps(training.timestep_sampling, training.batch_size, chance)
        eps = torch.randn(batch.latents.shape, generator=chance)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(training, self.step)
        self.model.train()
        loss = self._gradients(batch, t, eps)
        self.accelerator.clip_grad_norm_(self.model.parameters(), training.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.model.parameters())
        self.step += 1
        return loss

    def _next_batch(self) -> Batch:
        """This step's images, and the time it took to have them in `waited_s`."""
        began = clock.monotonic()
        batch = self._read_batch()
        self.waited_s += clock.monotonic() - began
        return batch

    def _read_batch(self) -> Batch:
        """While a GPU computes, a thread gathers the next step's: it is a matter of the step's number
        only."""
        if self._reader is None:
            return self._gathered(self.step)
        ahead, self._ahead = self._ahead, None
        known = ahead is not None and ahead[0] == self.step
        batch = ahead[1].result() if ahead is not None and known else self._gathered(self.step)
        self._ahead = (self.step + 1, self._reader.submit(self._gathered, self.step + 1))
        return batch

    def _gathered(self, step: int) -> Batch:
        training = self.plan.training
        indices = batch_indices(
            training.seed, self.plan.role, len(self.train_data), step, training.batch_size
        )
        batch = self.train_data.gather(indices)
        if self.device.type != "cuda":
            return batch
        return replace(batch, latents=batch.latents.pin_memory(), text=batch.text.pin_memory())

    def _gradients(self, batch: Batch, t: Tensor, eps: Tensor) -> Tensor:
        """Leave the whole batch's gradients in the parameters; its loss."""
        mine = torch.arange(self.accelerator.process_index, len(t), self.accelerator.num_processes)
        while True:
            try:
                loss = self._accumulate(batch, t, eps, mine)
                fits = True
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                fits, loss = False, torch.zeros((), device=self.device)
            if self._everywhere(fits):
                return self._summed(loss)
            self._shrink()

    def _accumulate(self, batch: Batch, t: Tensor, eps: Tensor, mine: Tensor) -> Tensor:
        total = torch.zeros((), device=self.device)
        for rows in torch.split(mine, self.memory_plan.micro_batch):
            part = self.losses(batch.rows(rows), t[rows], eps[rows]).sum() / len(t)
            self.accelerator.backward(part)
            total += part.detach()
        return total

    def _everywhere(self, fits: bool) -> bool:
        """Whether every process of this machine's could do its part."""
        if self.accelerator.num_processes == 1:
            return fits
        count = self.accelerator.reduce(torch.tensor(float(fits), device=self.device), "sum")
        return bool(float(count) == self.accelerator.num_processes)

    def _summed(self, loss: Tensor) -> Tensor:
        """The loss and, in place, the gradients, added up over this machine's processes."""
        if self.accelerator.num_processes == 1:
            return loss
        for parameter in self.model.parameters():
            if parameter.grad is None:  # a process may have no row of a small batch
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(self.accelerator.reduce(parameter.grad, "sum"))
        total: Tensor = self.accelerator.reduce(loss, "sum")
        return total

    def _shrink(self) -> None:
        """After running out of memory: free what the step left, and take the next smaller plan."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        plan = memory.smaller(self.memory_plan)
        if plan is None:
            raise TrainingError(
                "oom",
                "one image at a time, with gradient checkpointing, does not fit into the memory of "
                f"{self.device}: use a device with more, or free what other programs hold of it",
            )
        log.warning(
            "out of memory at step %d: going on with micro-batches of %d%s",
            self.step,
            plan.micro_batch,
            " and gradient checkpointing" if plan.checkpointing else "",
        )
        self._use(plan)

    def take_another_path(self, attempt: int) -> None:
        """Draw the noise from here on from another stream (`attempt` >= 1): the way out of a loss that
        was not finite, since the same chance would lead there again. Successors stay on it."""
        self.path = (self.path + attempt) % PATHS

    def losses(self, batch: Batch, t: Tensor, eps: Tensor) -> Tensor:
        """The loss of every example, (B,): mean squared error of the objective's target, or cross-entropy."""
        x0, text, t, eps = (self._sent(part).float() for part in (batch.latents, batch.text, t, eps))
        with self._autocast():
            if self.plan.objective == "routing":
                logits = self.model(objectives.noised(x0, eps, t), t, text if self.plan.reads_text else None)
                return functional.cross_entropy(logits.float(), self._sent(batch.cluster), reduction="none")
            if self.plan.objective == "ddpm":
                steps = (t * objectives.DDPM_STEPS).long().clamp(max=objectives.DDPM_STEPS - 1)
                x = objectives.ddpm_noised(x0, eps, steps)
                output, target = predict(self.model, x, steps / objectives.DDPM_STEPS, text), eps
            else:
                x = objectives.noised(x0, eps, t)
                output, target = predict(self.model, x, t, text), objectives.velocity(x0, eps)
        return (output.float() - target).square().flatten(1).mean(1)

    def _sent(self, part: Tensor) -> Tensor:
        """`part` on the device. From pinned memory, so that the CPU does not wait for the steps before and
        has the next batch ready when the GPU is done with this one."""
        if self.device.type != "cuda":
            return part.to(self.device)
        return (part if part.is_pinned() else part.pin_memory()).to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @torch.no_grad()
    def heldout_loss(self, *, raw: bool = False) -> float:
        """The average weights' loss on held-out images, at the same t and noise every time it is asked.
        `raw`: roughly that of the weights themselves, on every fourth of the samples."""
        generator = stream(self.plan.training.seed, self.plan.role, "heldout")
        indices = torch.arange(HELDOUT_SAMPLES) % len(self.heldout_data)
        t = (torch.randperm(HELDOUT_SAMPLES, generator=generator) + 0.5) / HELDOUT_SAMPLES
        self.model.eval()
        total, samples = 0.0, torch.arange(0, HELDOUT_SAMPLES, 4 if raw else 1)
        with nullcontext() if raw else self.ema.applied(self.model.parameters()):
            for rows in torch.split(samples, min(MICRO_BATCH, self.memory_plan.micro_batch)):
                batch = self.heldout_data.gather(indices[rows])
                eps = torch.randn(batch.latents.shape, generator=generator)
                total += float(self.losses(batch, t[rows], eps).sum())
        return total / len(samples)


def step_memory(architecture: Architecture, plan: Plan, recipe: Recipe, precision: str) -> memory.StepMemory:
    """What one step of `plan` takes, counted on the meta device."""
    latents, captions = recipe.latents, recipe.captions

    def forward(network: nn.Module) -> Tensor:
        x = torch.empty(1, latents.channels, latents.size, latents.size)
        t, text = torch.empty(1), torch.empty(1, captions.tokens, captions.width)
        if plan.objective == "routing":
            logits: Tensor = network(x, t, text if plan.reads_text else None)
            return logits
        return predict(network, x, t, text)

    return memory.measure(lambda: networks.construct(architecture), forward, bf16=precision == "bf16")


def least_bytes(recipe: Recipe, role: Role, variant: int) -> int:
    """The least memory `role` can be trained in as `variant`: one image at a time, activations computed
    twice."""
    chosen = plan(recipe, role, variant)
    architecture = recipe.router.architecture if role == ROUTER else recipe.experts[variant].architecture
    need = step_memory(architecture, chosen, recipe, "fp32")
    return need.fixed * 5 // 3 + need.per_image_checkpointed  # weights and their average come to the fixed


def room(device: str) -> int:
    """Bytes that training may take on `device` now. Raises `ConfigError`."""
    return int(memory.free_bytes(torch.device(pick_device(device))) * memory.SHARE)


def fitting_variant(recipe: Recipe, role: Role, device: str, allowed: Sequence[int]) -> int:
    """The first of the `allowed` variants that `device` has the memory to train; the smallest one when none
    fits."""
    if len(allowed) == 1:
        return allowed[0]
    free, needs = room(device), []
    for number in allowed:
        least = least_bytes(recipe, role, number)
        if least <= free:
            return number
        needs.append((least, number))
    return min(needs)[1]


def drop_captions(batch: Batch, share: float, generator: torch.Generator) -> None:
    """Replace a random `share` of the batch's captions by the encoding of the empty one, in place: a copy of
    them would be as large as the step's whole reading."""
    dropped = torch.rand(len(batch.latents), generator=generator) < share  # (B,)
    batch.text[dropped] = batch.uncond.to(batch.text.dtype)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: a device's, the CPU allocator's or Python's."""
    text = str(error).lower()
    refused = "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and refused)
