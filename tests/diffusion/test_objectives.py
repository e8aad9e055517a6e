"""Tests of `paris_p2p.diffusion.objectives`."""

import torch
from torch import Tensor

from paris_p2p.diffusion import objectives

DATA_STD = 0.5


def test_the_path_runs_from_image_to_noise_at_constant_velocity() -> None:
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    ends = objectives.noised(x0, eps, torch.tensor([0.0, 1.0, 0.5]))
    assert torch.equal(ends[0], x0[0])
    assert torch.equal(ends[1], eps[1])
    step = objectives.noised(x0, eps, torch.full((3,), 0.75)) - objectives.noised(
        x0, eps, torch.full((3,), 0.25)
    )
    assert torch.allclose(step, 0.5 * objectives.velocity(x0, eps), atol=1e-6)


def test_timesteps_follow_their_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = objectives.sample_timesteps("uniform", 20_000, generator)
    normal = objectives.sample_timesteps("logit_normal", 20_000, generator)
    for t in (uniform, normal):
        assert float(t.min()) > 0
        assert float(t.max()) < 1
        assert abs(float(t.mean()) - 0.5) < 0.01
    assert abs(float(uniform.std()) - 12**-0.5) < 0.01
    assert abs(float(torch.logit(normal).std()) - 1) < 0.02


def test_timesteps_are_reproducible() -> None:
    first, second = (
        objectives.sample_timesteps("logit_normal", 5, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)


def gaussian_eps(x: Tensor, step: Tensor) -> Tensor:
    """The exact E[eps | x_s] for data N(0, DATA_STD^2), alpha bar interpolated in its logarithm."""
    log_a = objectives.alpha_bars().log()
    low = step.floor().long().clamp(max=objectives.DDPM_STEPS - 2)
    fraction = (step - low).double()
    a = torch.exp(log_a[low] * (1 - fraction) + log_a[low + 1] * fraction).to(x.dtype).view(-1, 1, 1, 1)
    return (1 - a).sqrt() * x / (a * DATA_STD**2 + 1 - a)


def test_a_noise_predictor_gives_the_exact_velocity_of_a_gaussian() -> None:
    t = torch.linspace(0.02, 0.99, 40)
    x = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    wide = t.view(-1, 1, 1, 1)
    # E[eps - x0 | x_t] for x_t = (1 - t) x0 + t eps with x0 ~ N(0, s^2), eps ~ N(0, 1), by linear regression.
    exact = (wide - (1 - wide) * DATA_STD**2) / ((1 - wide) ** 2 * DATA_STD**2 + wide**2) * x
    found = objectives.velocity_from_eps(gaussian_eps, x, t, limit=100.0)
    assert torch.allclose(found, exact, atol=2e-3)


def test_the_velocity_stays_finite_at_both_ends() -> None:
    x = torch.randn(2, 1, 4, 4)
    found = objectives.velocity_from_eps(gaussian_eps, x, torch.tensor([0.0, 1.0]), limit=1.0)
    assert bool(torch.isfinite(found).all())


def test_the_ddpm_step_has_the_signal_to_noise_ratio_of_the_flow_time() -> None:
    steps = torch.arange(10, 990, 49)
    a = objectives.alpha_bars()[steps]
    t = (1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt())
    assert torch.allclose(objectives.ddpm_step(t), steps.double(), atol=1e-6)


def test_ddpm_noising_keeps_unit_variance() -> None:
    x0, eps = torch.randn(2, 4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = objectives.ddpm_noised(x0, eps, torch.tensor([0, 300, 600, 999]))
    assert torch.allclose(noisy.flatten(1).std(1), torch.ones(4), atol=0.03)
