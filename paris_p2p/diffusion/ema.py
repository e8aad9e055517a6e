"""The exponential moving average of a network's weights: what is sampled from, published and judged.

Owns: the average and its warm-up. Does not own: when it is updated (`training`), how it is saved (`resume`).

`diffusers.training_utils.EMAModel` is the same average. Importing it brings in pipelines, schedulers, scipy
and torchvision. Without it, and with `deferred`, a trainer or checker starts with some 2 CPU seconds and 90
MB less (of 9 and 935).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """avg <- d * avg + (1 - d) * weights after every step, d growing to `decay`.

    `shadow_params` are the averages, in the parameters' order, on their device; `optimization_step` counts
    the updates.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.optimization_step = 0
        self.shadow_params: list[Tensor] = [parameter.detach().clone() for parameter in parameters]

    def decay_at(self, update: int) -> float:
        """The d of the update numbered `update`, from 1: the first takes the weights as they are, the next
        are those of a mean that forgets its beginning (TensorFlow's ExponentialMovingAverage, `num_updates`).
        """
        done = update - 1
        return 0.0 if done <= 0 else min(self.decay, (1 + done) / (10 + done))

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take in the weights after one more optimizer step."""
        self.optimization_step += 1
        share = 1.0 - self.decay_at(self.optimization_step)
        weights: list[Tensor] = list(parameters)
        torch._foreach_lerp_(self.shadow_params, weights, share)

    @contextmanager
    def applied(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """The network with the averages for weights; its own wait in main memory."""
        own: list[Tensor] = list(parameters)
        kept = [parameter.detach().to("cpu", copy=True) for parameter in own]
        with torch.no_grad():
            torch._foreach_copy_(own, self.shadow_params)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(own, kept)
