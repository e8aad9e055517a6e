"""A shared start: one network sees the first part of a run's samples, every expert goes on from it.

Owns: how the samples and the schedule are divided between the two. Does not own: training the start
(`local`), its way into the manifest (`initial`).

The video successor of Paris (arXiv 2605.26064) trains its experts so. Here the start keeps its learning rate
and the experts bring it down, each on its own cluster: a rate that comes down twice takes back at the second
beginning what the first end gained (warm-up, stable rate, decay: Hu et al. 2024, arXiv 2404.06395; Hagele et
al. 2024, arXiv 2405.18392).
"""

from dataclasses import replace

from paris_p2p.errors import ConfigError
from paris_p2p.wire.manifest import Recipe, Training


def start_recipe(recipe: Recipe, clusters: int, share: float, *, variant: int = 0) -> Recipe:
    """The recipe of one network for all data that sees `share` of the samples that `clusters` experts see
    together, at an expert's batch size and a rate that stays. Raises `ConfigError`."""
    chosen = recipe.experts[variant]
    training = chosen.training
    _check(share)
    steps = max(1, round(training.steps * clusters * share))
    interval = max(1, round(recipe.checkpoint_interval_steps * steps / training.steps))
    whole = replace(training, steps=steps, lr_schedule="constant")
    return replace(recipe, experts=(replace(chosen, training=whole),), checkpoint_interval_steps=interval)


def after_start(recipe: Recipe, share: float) -> Recipe:
    """`recipe` with experts of the steps that a start of `share` leaves them.

    They warm up again, since the optimizer's moments stay behind (with them every node would fetch three
    times the bytes), but no longer than a tenth of their steps. The router does not start from it, and stays
    as it is. Raises `ConfigError`.
    """
    _check(share)
    experts = tuple(
        replace(variant, training=_shortened(variant.training, share)) for variant in recipe.experts
    )
    quarter = max(1, min(variant.training.steps for variant in experts) // 4)
    interval = min(recipe.checkpoint_interval_steps, quarter)
    return replace(recipe, experts=experts, checkpoint_interval_steps=interval)


def _shortened(training: Training, share: float) -> Training:
    steps = max(1, round(training.steps * (1 - share)))
    return replace(training, steps=steps, warmup_steps=min(training.warmup_steps, steps // 10))


def _check(share: float) -> None:
    if not 0 < share < 1:
        raise ConfigError(f"a start's share of the samples is between 0 and 1, not {share:g}")
