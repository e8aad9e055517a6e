"""What experts are trained to predict, and how any of it becomes a velocity.

Owns: the two objectives' formulas and the sampling of t. Does not own: networks, loops, schedulers.

Flow matching: x_t = (1 - t) x0 + t eps, target v = eps - x0, t in [0, 1], noise at t = 1 (arXiv 2510.03434).
DDPM: x_s = sqrt(a_s) x0 + sqrt(1 - a_s) eps, target eps, s in 0..999, betas linear from 1e-4 to 0.02 (Ho et
al. 2020, section 4). A DDPM expert joins a flow sampler through `velocity_from_eps`.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

DDPM_STEPS = 1000
SMALLEST_SIGNAL = 1e-3
"""Below this 1 - t, x0 cannot be read off eps any more: the division is held there."""


def sample_timesteps(sampling: str, count: int, generator: torch.Generator) -> Tensor:
    """t: (count,) in (0, 1): `logit_normal` (sigmoid of a normal, Esser et al. 2024) or `uniform`."""
    if sampling == "logit_normal":
        return torch.normal(0.0, 1.0, (count,), generator=generator).sigmoid()
    return torch.rand(count, generator=generator)


def noised(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps. x0, eps: (N, C, S, S), t: (N,)."""
    t = t.view(-1, *([1] * (x0.ndim - 1)))
    return (1 - t) * x0 + t * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """v = dx_t / dt = eps - x0."""
    return eps - x0


@lru_cache(maxsize=1)
def alpha_bars() -> Tensor:
    """a_s for s = 0..999, float64, falling from about 1 to about 4e-5."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, DDPM_STEPS, dtype=torch.float64), dim=0)


def ddpm_noised(x0: Tensor, eps: Tensor, step: Tensor) -> Tensor:
    """x_s = sqrt(a_s) x0 + sqrt(1 - a_s) eps. step: (N,) integers in 0..999."""
    a = alpha_bars().to(x0.device)[step].to(x0.dtype).view(-1, *([1] * (x0.ndim - 1)))
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def ddpm_step(t: Tensor) -> Tensor:
    """The (fractional) step s whose signal to noise ratio is that of flow time t: a_s = (1 - t)^2 c^2.

    t: (N,). Linear interpolation of log a_s between steps; held to 0..999 at the ends.
    """
    wanted = torch.log((1 - t.double()) ** 2 / ((1 - t.double()) ** 2 + t.double() ** 2))
    known = alpha_bars().log().to(t.device)
    above = torch.searchsorted(-known, -wanted).clamp(1, DDPM_STEPS - 1)
    fraction = (wanted - known[above - 1]) / (known[above] - known[above - 1])
    return ((above - 1) + fraction).clamp(0, DDPM_STEPS - 1).to(t.dtype)


def velocity_from_eps(
    predict_eps: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, limit: float
) -> Tensor:
    """The velocity at flow time t of a network that predicts eps.

    `predict_eps(x_s, step)` is called at c x with c = 1 / sqrt((1 - t)^2 + t^2), which is DDPM's x_s for
    the step of equal signal to noise ratio. x0 = (x - t eps) / (1 - t), held to [-limit, limit], and
    v = eps - x0. x: (N, C, S, S), t: (N,).
    """
    wide = t.view(-1, *([1] * (x.ndim - 1)))  # (N, 1, 1, 1)
    c = ((1 - wide) ** 2 + wide**2).rsqrt()  # (N, 1, 1, 1)
    eps = predict_eps(c * x, ddpm_step(t))  # (N, C, S, S)
    x0 = ((x - wide * eps) / (1 - wide).clamp(min=SMALLEST_SIGNAL)).clamp(-limit, limit)  # (N, C, S, S)
    return eps - x0
