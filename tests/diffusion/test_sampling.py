"""Tests of `paris_p2p.diffusion.sampling`, against mixtures whose answers are known in closed form."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paris_p2p.diffusion import networks
from paris_p2p.diffusion.expert import TIMESTEP_SCALE
from paris_p2p.diffusion.sampling import (
    Ensemble,
    Member,
    Routing,
    expert_weights,
    image_noise,
    make_scheduler,
    sample,
    set_steps,
)
from paris_p2p.errors import ConfigError

from .conftest import TOKENS, WIDTH, toy_expert

MEANS, STDS, SHARES = (-0.6, 0.2, 0.7), (0.1, 0.2, 0.15), (0.5, 0.3, 0.2)
TEXT, UNCOND = torch.ones(1, TOKENS, WIDTH), torch.zeros(TOKENS, WIDTH)


class GaussianExpert(nn.Module):
    """The exact velocity for data N(mean, std^2); `mean` moves by `shift` where the text is not empty."""

    def __init__(self, mean: float, std: float, shift: float = 0.0) -> None:
        super().__init__()
        self.mean, self.std, self.shift = mean, std, shift

    def forward(
        self, x: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        t = (timestep / TIMESTEP_SCALE).view(-1, 1, 1, 1)
        mean = self.mean + self.shift * encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        gain = (t - (1 - t) * self.std**2) / variance
        return (gain * (x - (1 - t) * mean) - mean,)


class GaussianRouter(nn.Module):
    """The exact posterior over the mixture's components, for images of one pixel."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None) -> Tensor:
        logits = []
        for mean, std, share in zip(MEANS, STDS, SHARES, strict=True):
            variance = (1 - t) ** 2 * std**2 + t**2
            distance = (x.flatten() - (1 - t) * mean) ** 2
            logits.append(math.log(share) - 0.5 * torch.log(variance) - 0.5 * distance / variance)
        return torch.stack(logits, dim=1)


def mixture(**arguments: Any) -> Ensemble:
    pairs = zip(MEANS, STDS, strict=True)
    members = {k: Member(GaussianExpert(mean, std)) for k, (mean, std) in enumerate(pairs)}
    return Ensemble(members, GaussianRouter(), **arguments)


def draw(ensemble: Ensemble, count: int, steps: int = 60, scheduler: str = "euler") -> Tensor:
    noise = image_noise(0, count, (1, 1, 1))
    text = TEXT.expand(count, -1, -1)
    return sample(ensemble, make_scheduler(scheduler), noise, text, UNCOND, steps).flatten()


def test_full_routing_with_the_exact_posterior_samples_the_mixture() -> None:
    x = draw(mixture(routing=Routing(0)), 3000)
    mean = sum(share * m for share, m in zip(SHARES, MEANS, strict=True))
    second = sum(w * (m**2 + s**2) for w, m, s in zip(SHARES, MEANS, STDS, strict=True))
    assert float(x.mean()) == pytest.approx(mean, abs=0.03)
    assert float(x.square().mean()) == pytest.approx(second, abs=0.03)
    assert float((x < -0.2).float().mean()) == pytest.approx(SHARES[0], abs=0.03)


def test_sparse_routing_favours_the_likeliest_component_the_less_the_more_experts_speak() -> None:
    # At t = 1 the posterior is the prior, so Top-1 starts every sample towards the largest component.
    shares = [float((draw(mixture(routing=Routing(k)), 1000) < -0.2).float().mean()) for k in (1, 2, 3)]
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] == pytest.approx(SHARES[0], abs=0.05)


@pytest.mark.parametrize("scheduler", ["euler", "heun", "unipc", "dpm"])
def test_every_scheduler_reaches_the_data(scheduler: str) -> None:
    one = Ensemble({0: Member(GaussianExpert(0.5, 0.1))}, None)
    x = draw(one, 500, steps=20, scheduler=scheduler)
    assert float(x.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(x.std()) == pytest.approx(0.1, abs=0.03)


def test_a_ddpm_expert_joins_the_flow() -> None:
    class Eps(nn.Module):
        """Exact E[eps | x_s] for data N(0, 0.5^2); at s = 1000 t' the network sees step s."""

        def forward(
            self, x: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, return_dict: bool
        ) -> tuple[Tensor]:
            from paris_p2p.diffusion.objectives import alpha_bars

            a = alpha_bars()[timestep.round().long().clamp(0, 999)].to(x.dtype).view(-1, 1, 1, 1)
            return ((1 - a).sqrt() * x / (a * 0.25 + 1 - a),)

    one = Ensemble({0: Member(Eps(), "ddpm", x0_limit=10.0)}, None)
    assert float(draw(one, 800).std()) == pytest.approx(0.5, abs=0.04)


def test_weights_keep_the_largest_and_sum_to_one() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]))
    everyone = range(3)
    assert torch.equal(expert_weights(logits, everyone, Routing(1)), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
    two = torch.tensor([[0.625, 0.375, 0], [0, 2 / 9, 7 / 9]])
    assert torch.allclose(expert_weights(logits, everyone, Routing(2)), two)
    for full in (0, 3, 99):
        assert torch.allclose(expert_weights(logits, everyone, Routing(full)), logits.softmax(1))


def test_weights_are_renormalised_over_the_experts_there_are() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    assert torch.allclose(expert_weights(logits, [0, 2], Routing(2)), torch.tensor([[5 / 7, 0, 2 / 7]]))
    assert torch.equal(expert_weights(logits, [1, 2], Routing(1)), torch.tensor([[0, 1.0, 0]]))
    # Even where the posterior of all that is there underflows.
    assert torch.equal(
        expert_weights(torch.tensor([[500.0, 0, 0]]), [1], Routing(0)), torch.tensor([[0, 1.0, 0]])
    )


def test_experts_below_the_threshold_are_silent_but_never_all() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    everyone = range(3)
    some = torch.tensor([[0.625, 0.375, 0], [0, 0, 1.0]])
    assert torch.allclose(expert_weights(logits, everyone, Routing(0, threshold=0.25)), some)
    best = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    assert torch.equal(expert_weights(logits, everyone, Routing(0, threshold=1.0)), best)
    assert torch.equal(expert_weights(logits, everyone, Routing(1, threshold=0.25)), best)


def test_a_temperature_below_one_sharpens_the_posterior() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    squares = torch.tensor([[0.25, 0.09, 0.04]])
    sharp = expert_weights(logits, range(3), Routing(0, temperature=0.5))
    assert torch.allclose(sharp, squares / squares.sum())


def test_the_order_in_which_experts_are_asked_changes_no_bit() -> None:
    x = torch.linspace(-1, 1, 7).view(7, 1, 1, 1)
    asked: list[int] = []

    def backwards(clusters: Sequence[int]) -> list[int]:
        asked.extend(reversed(clusters))
        return list(reversed(clusters))

    forward, backward = mixture(routing=Routing(0)), mixture(routing=Routing(0), order=backwards)
    text = TEXT.expand(7, -1, -1)
    assert torch.equal(forward.velocity(x, 0.3, text, UNCOND), backward.velocity(x, 0.3, text, UNCOND))
    assert asked == [2, 1, 0]


def test_experts_of_different_sizes_and_objectives_share_an_ensemble() -> None:
    wide = dict(toy_expert().config) | {"num_attention_heads": 4, "cross_attention_dim": 32, "num_layers": 2}
    architectures = [toy_expert(), networks.describe(toy_expert().model_class, wide)]
    members = {
        k: Member(networks.build(architecture, k), objective)
        for k, (architecture, objective) in enumerate(
            zip(architectures, ("flow_matching", "ddpm"), strict=True)
        )
    }
    x, text = image_noise(0, 3, (1, 8, 8)), torch.ones(3, TOKENS, WIDTH)
    v = Ensemble(members, None).velocity(x, 0.5, text, UNCOND)
    # Fresh experts predict zero: v = 0, and eps = 0, so x0 = x / (1 - t), held to 1, and v = -x0.
    assert torch.allclose(v, -(x / 0.5).clamp(-1, 1) / 2, atol=1e-6)


def test_guidance_extrapolates_each_expert_from_its_unconditional_answer() -> None:
    def velocity(scale: float) -> Tensor:
        one = Ensemble({0: Member(GaussianExpert(0.0, 0.2, shift=0.3))}, None, guidance_scale=scale)
        return one.velocity(torch.full((1, 1, 1, 1), 0.4), 0.5, TEXT, UNCOND)

    unconditional, conditional = velocity(0.0), velocity(1.0)
    assert not torch.allclose(unconditional, conditional)
    assert torch.allclose(velocity(3.0), unconditional + 3 * (conditional - unconditional), atol=1e-6)


def test_only_the_samples_routed_to_an_expert_reach_it() -> None:
    ensemble = mixture(routing=Routing(1))
    x = torch.tensor([-0.6, 0.7, -0.55, 0.2]).view(4, 1, 1, 1)
    velocity = ensemble.velocity(x, 0.05, TEXT.expand(4, -1, -1), UNCOND)
    assert dict(ensemble.calls) == {0: 2, 1: 1, 2: 1}
    alone = Ensemble({2: Member(GaussianExpert(MEANS[2], STDS[2]))}, None)
    assert torch.allclose(velocity[1:2], alone.velocity(x[1:2], 0.05, TEXT, UNCOND))


@pytest.mark.parametrize("top_k", [1, 2, 0])
def test_without_a_router_all_experts_weigh_the_same_and_a_warning_says_so(
    top_k: int, caplog: pytest.LogCaptureFixture
) -> None:
    def ensemble(*means: float) -> Ensemble:
        members = {3 * k: Member(GaussianExpert(mean, 0.2)) for k, mean in enumerate(means)}
        return Ensemble(members, None, Routing(top_k))

    x, text = image_noise(0, 5, (1, 1, 1)), TEXT.expand(5, -1, -1)
    alone = [ensemble(mean).velocity(x, 0.5, text, UNCOND) for mean in MEANS]
    assert caplog.text == ""
    together = ensemble(*MEANS)
    assert "router is missing" in caplog.text
    assert torch.allclose(together.velocity(x, 0.5, text, UNCOND), sum(alone) / torch.tensor(3.0), atol=1e-6)
    assert dict(together.calls) == {0: 5, 3: 5, 6: 5}


@pytest.mark.parametrize("top_k", [1, 2, 0])
def test_identical_experts_give_one_answer_however_they_are_mixed(top_k: int) -> None:
    network = networks.build(toy_expert(), 0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05)

    class Lopsided(nn.Module):
        def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            return x.flatten(1)[:, :3]

    def picture(members: dict[int, Member], router: nn.Module | None) -> Tensor:
        ensemble = Ensemble(members, router, Routing(top_k), 2.0)
        noise, text = image_noise(7, 2, (1, 8, 8)), TEXT.expand(2, -1, -1)
        return sample(ensemble, make_scheduler("euler"), noise, text, UNCOND, 4)

    same = dict.fromkeys(range(3), Member(network))
    assert torch.allclose(picture(same, Lopsided()), picture({0: Member(network)}, None), atol=1e-5)


def test_the_noise_of_an_image_depends_on_its_own_seed_only() -> None:
    four = image_noise(10, 4, (1, 8, 8))
    assert torch.equal(four[:1], image_noise(10, 1, (1, 8, 8)))
    assert torch.equal(four[2:3], image_noise(12, 1, (1, 8, 8)))
    assert not torch.equal(four[0], four[1])


def test_euler_spends_its_last_step_on_the_image() -> None:
    scheduler = make_scheduler("euler")
    set_steps(scheduler, 4, torch.device("cpu"))
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_progress_is_told_after_every_evaluation() -> None:
    seen: list[tuple[int, int]] = []
    one = Ensemble({0: Member(GaussianExpert(0.0, 0.2))}, None)
    noise = image_noise(0, 1, (1, 1, 1))
    sample(
        one, make_scheduler("heun"), noise, TEXT, UNCOND, 3, lambda done, all_, _: seen.append((done, all_))
    )
    assert seen == [(done, 5) for done in range(1, 6)]


def test_what_cannot_be_sampled_is_named() -> None:
    member = Member(GaussianExpert(0.0, 0.2))
    with pytest.raises(ConfigError, match="no expert"):
        Ensemble({}, None)
    with pytest.raises(ConfigError, match="top_k"):
        Routing(-1)
    with pytest.raises(ConfigError, match="expert_5"):
        Ensemble({5: member}, GaussianRouter()).velocity(torch.zeros(1, 1, 1, 1), 0.5, TEXT, UNCOND)
    with pytest.raises(ConfigError, match="euler"):
        make_scheduler("magic")
    with pytest.raises(ConfigError, match="1 to 1000"):
        set_steps(make_scheduler("euler"), 0, torch.device("cpu"))
