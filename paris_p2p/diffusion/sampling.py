"""Sampling from the mixture: which experts speak at a step, what they say together, and the steps.

Owns: routing weights, guidance, the ensemble's velocity, schedulers by name, per-image noise. Does not own:
prompts and pictures (`pipeline`), the networks.

The mixture's velocity is v(x, t) = sum_k p(k | x, t) v_k(x, t) (McAllister et al., decentralised diffusion
models, 2025), recomputed at every step. Guidance is applied inside each expert, then mixed.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from paris_p2p.diffusion import objectives
from paris_p2p.diffusion.expert import predict
from paris_p2p.errors import ConfigError
from paris_p2p.store.model_folder import SCHEDULERS

log = logging.getLogger(__name__)

MAX_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Member:
    """An expert and its `objective`. `x0_limit`: largest |x0| a DDPM expert's estimate is held to."""

    network: nn.Module
    objective: str = "flow_matching"
    x0_limit: float = 1.0

    def velocity(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x: (N, C, S, S), t: (N,), text: (N, T, W) -> (N, C, S, S)."""
        if self.objective == "ddpm":
            return objectives.velocity_from_eps(
                lambda noisy, step: predict(self.network, noisy, step / objectives.DDPM_STEPS, text),
                x,
                t,
                self.x0_limit,
            )
        return predict(self.network, x, t, text)


def expert_weights(logits: Tensor, present: Sequence[int], top_k: int) -> Tensor:
    """Each sample's weights over clusters: (N, K) logits -> (N, K), rows summing to 1.

    The posterior's `top_k` largest entries among the clusters `present`, renormalised; 0 keeps all of them.
    With all clusters present: 1 is Top-1, 2 the paper's best, 0 full.
    """
    absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    absent[list(present)] = False
    posterior = logits.float().masked_fill(absent, -torch.inf).softmax(dim=1)  # (N, K)
    if top_k == 0 or top_k >= len(present):
        return posterior
    kept, places = posterior.topk(top_k, dim=1)  # (N, k)
    kept = kept / kept.sum(dim=1, keepdim=True)
    return torch.zeros_like(posterior).scatter(1, places, kept)


@dataclass(slots=True)
class Ensemble:
    """Experts by cluster, the router among them, and how to combine them.

    Without `router` every expert present weighs the same, whatever `top_k` is: nothing tells them apart.
    A member is looked up only when it has weight, so `members` may load it then. `calls` counts the samples
    each expert computed (one a sample and step, however many network evaluations guidance makes of it).
    """

    members: Mapping[int, Member]
    router: nn.Module | None
    top_k: int = 2
    guidance_scale: float = 1.0
    calls: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("the model has no expert: fetch it again")
        if self.top_k < 0:
            raise ConfigError("top_k is the number of experts a step uses, or 0 for all")
        if self.router is None and len(self.members) > 1:
            log.warning(
                "the model's router is missing: its %d experts are mixed evenly, and the images will be poor "
                "until the router is trained and the model fetched again",
                len(self.members),
            )

    def velocity(self, x: Tensor, t: float, text: Tensor, uncond: Tensor) -> Tensor:
        """The mixture's guided velocity. x: (N, C, S, S), t in [0, 1], text: (N, T, W), uncond: (T, W)."""
        times = torch.full((len(x),), t, device=x.device)  # (N,)
        weights = self._weights(x, times, text)  # (N, K) in the order of `members`
        total = torch.zeros_like(x)
        for place, cluster in enumerate(self.members):
            rows = weights[:, place].nonzero()[:, 0]  # (n,): only these samples ask this expert
            if len(rows) == 0:
                continue
            self.calls[cluster] += len(rows)
            v = self._guided(self.members[cluster], x[rows], times[rows], text[rows], uncond)  # (n, C, S, S)
            total[rows] += weights[rows, place].view(-1, 1, 1, 1) * v
        return total

    def _weights(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        if self.router is None:
            experts = len(self.members)
            return torch.full((len(x), experts), 1 / experts, device=x.device)
        logits = self.router(x, t, text)  # (N, K)
        present = list(self.members)
        if max(present) >= logits.shape[1]:
            raise ConfigError(
                f"the router knows {logits.shape[1]} clusters, the model has an expert_{max(present)}"
            )
        return expert_weights(logits, present, self.top_k)[:, present].to(x.dtype)

    def _guided(self, member: Member, x: Tensor, t: Tensor, text: Tensor, uncond: Tensor) -> Tensor:
        """v_u + g (v_c - v_u) (Ho and Salimans 2022), both halves in one batch."""
        if self.guidance_scale == 1.0:
            return member.velocity(x, t, text)
        empty = uncond.expand_as(text)  # (n, T, W)
        both = member.velocity(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([empty, text])
        )  # (2n, C, S, S)
        v_uncond, v_text = both.chunk(2)
        return v_uncond + self.guidance_scale * (v_text - v_uncond)


def make_scheduler(name: str) -> Any:
    """The diffusers scheduler called `euler`, `heun`, `unipc` or `dpm`, set up for flow matching."""
    if name not in SCHEDULERS:
        raise ConfigError(f"there is no scheduler {name!r}; there are: {', '.join(SCHEDULERS)}")
    class_name, config = SCHEDULERS[name]
    return getattr(diffusers, class_name)(**config)


def set_steps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Prepare `scheduler` for `steps` steps from noise (t = 1) to image (t = 0)."""
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"the number of steps is 1 to {MAX_STEPS}, not {steps}")
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        # Its own spacing ends at t = 1/1000: the last step would be spent on nothing.
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    scheduler.set_begin_index(0)  # by position: integer timesteps may repeat


@torch.no_grad()
def sample(
    ensemble: Ensemble,
    scheduler: Any,
    noise: Tensor,
    text: Tensor,
    uncond: Tensor,
    steps: int,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Latents x0 from `noise`, both (N, C, S, S). text: (N, T, W), uncond: (T, W).

    `on_step(done, total, x)` is called after every evaluation; Heun evaluates twice a step.
    """
    set_steps(scheduler, steps, noise.device)
    x = noise
    total = len(scheduler.timesteps)
    for index, timestep in enumerate(scheduler.timesteps):
        # A flow scheduler's sigma is t itself; its timesteps may be rounded to integers.
        v = ensemble.velocity(x, float(scheduler.sigmas[index]), text, uncond)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
        if on_step is not None:
            on_step(index + 1, total, x)
    return x


def image_noise(seed: int, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Noise for images seed, seed + 1, …: (count, C, S, S). Image i depends on seed + i alone."""
    rows = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed + i)) for i in range(count)]
    return torch.stack(rows)
