"""The average of the weights: diffusers' to the last decimals, applied and taken back."""

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from paris_p2p.diffusion.ema import WeightAverage


def test_it_is_the_average_that_diffusers_keeps() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]
    ours = WeightAverage(parameters, decay=0.9)
    theirs = EMAModel(parameters, decay=0.9, foreach=True)
    for _ in range(120):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        ours.step(parameters)
        theirs.step(parameters)
        for mine, other in zip(ours.shadow_params, theirs.shadow_params, strict=True):
            torch.testing.assert_close(mine, other)
    assert ours.optimization_step == theirs.optimization_step == 120


def test_the_network_gets_its_own_weights_back_bit_for_bit_even_after_an_error() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = WeightAverage([parameter], decay=0.5)
    with torch.no_grad():
        parameter.mul_(3.0)
    seen = []
    try:
        with average.applied([parameter]):
            seen.append(parameter.tolist())
            raise KeyError
    except KeyError:
        seen.append(parameter.tolist())
    assert seen == [[1.0, 2.0], [3.0, 6.0]]
    assert parameter.requires_grad
