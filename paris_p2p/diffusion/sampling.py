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
from paris_p2p.diffusion.router import route
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
        """x: (N, C, S, S), t: (N,), text: (N, T, W) -> (N, C, S, S). The network computes in its own dtype,
        everything around it in that of x."""
        dtype = next(self.network.parameters(), x).dtype
        text = text.to(dtype)  # (N, T, W)

        def output(noisy: Tensor, time: Tensor) -> Tensor:
            return predict(self.network, noisy.to(dtype), time, text).to(x.dtype)

        if self.objective != "ddpm":
            return output(x, t)
        return objectives.velocity_from_eps(
            lambda noisy, step: output(noisy, step / objectives.DDPM_STEPS), x, t, self.x0_limit
        )


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts speak, and how loudly.

    Of the experts there are, the `top_k` most likely ones (0: all), less those whose share of the posterior
    is below `threshold`; the most likely one always. Their shares are renormalised. `temperature` divides the
    router's logits first: below 1 it believes the router more. Raises `ConfigError` for values out of range.
    """

    top_k: int = 2
    threshold: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ConfigError("top_k is the number of experts a step uses, or 0 for all")
        if not 0 <= self.threshold <= 1:
            raise ConfigError("threshold is the least probability an expert needs, 0 to 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError("the router's temperature is a positive number")


def expert_weights(logits: Tensor, present: Sequence[int], routing: Routing) -> Tensor:
    """Each sample's weights over clusters: (N, K) logits -> (N, K), rows summing to 1, only the clusters
    `present` above 0. With all of them present `Routing(1)` is Top-1, `Routing(2)` the paper's best,
    `Routing(0)` full."""
    absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    absent[list(present)] = False
    scaled = logits.float() / routing.temperature  # (N, K)
    posterior = scaled.masked_fill(absent, -torch.inf).softmax(dim=1)  # (N, K)
    count = min(routing.top_k or len(present), len(present))
    kept, places = posterior.topk(count, dim=1)  # (N, k), falling
    silent = kept < routing.threshold  # (N, k)
    silent[:, 0] = False
    kept = kept.masked_fill(silent, 0.0)
    kept = kept / kept.sum(dim=1, keepdim=True)
    return torch.zeros_like(posterior).scatter(1, places, kept)


def as_they_come(clusters: Sequence[int]) -> Sequence[int]:
    """The order experts are asked in when nothing speaks for another."""
    return clusters


@dataclass(slots=True)
class Ensemble:
    """Experts by cluster, the router among them, and how to combine them.

    Without `router` every expert present weighs the same, whatever `routing` is: nothing tells them apart.
    A member is looked up only when it has weight, so `members` may load it then, in the order that `order`
    makes of the clusters a step needs; the result does not depend on it. `calls` counts the samples each
    expert computed (one a sample and step, however many network evaluations guidance makes of it).
    """

    members: Mapping[int, Member]
    router: nn.Module | None
    routing: Routing = Routing()
    guidance_scale: float = 1.0
    order: Callable[[Sequence[int]], Sequence[int]] = as_they_come
    calls: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("the model has no expert: fetch it again")
        if self.router is None and len(self.members) > 1:
            log.warning(
                "the model's router is missing: its %d experts are mixed evenly, and the images will be poor "
                "until the router is trained and the model fetched again",
                len(self.members),
            )

    def velocity(self, x: Tensor, t: float, text: Tensor, uncond: Tensor) -> Tensor:
        """The mixture's guided velocity. x: (N, C, S, S), t in [0, 1], text: (N, T, W), uncond: (T, W).

        Each expert is called once, with the samples that are routed to it."""
        times = torch.full((len(x),), t, device=x.device)  # (N,)
        weights = self._weights(x, times, text)  # (N, K) in the order of `members`
        shares = dict(zip(self.members, weights.unbind(dim=1), strict=True))  # cluster: (N,)
        rows = {cluster: share.nonzero()[:, 0] for cluster, share in shares.items()}  # cluster: (n,)
        parts = {}
        for cluster in self.order([cluster for cluster in rows if len(rows[cluster])]):
            mine = rows[cluster]
            self.calls[cluster] += len(mine)
            parts[cluster] = self._guided(self.members[cluster], x[mine], times[mine], text[mine], uncond)
        total = torch.zeros_like(x)
        for cluster in sorted(parts):  # always in this order: sums round
            total[rows[cluster]] += shares[cluster][rows[cluster]].view(-1, 1, 1, 1) * parts[cluster]
        return total

    def _weights(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        present = list(self.members)
        if self.router is None:
            return torch.full((len(x), len(present)), 1 / len(present), device=x.device)
        logits = route(self.router, x, t, text)  # (N, K)
        if max(present) >= logits.shape[1]:
            raise ConfigError(
                f"the router knows {logits.shape[1]} clusters, the model has an expert_{max(present)}"
            )
        return expert_weights(logits, present, self.routing)[:, present].to(x.dtype)

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
