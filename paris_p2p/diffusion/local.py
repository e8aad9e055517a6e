"""Training without a network: one role to its end in this process, kept safe against interruption.

Owns: the monolithic baseline's recipe, the loop with its checkpoints in a working folder, and going on from
there. Does not own: the step (`training`), bundles (`resume`). A node trains through `train_worker` instead.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from paris_p2p.diffusion.resume import STATE_NAME, load_resume, save_resume, save_weights
from paris_p2p.diffusion.shards import Examples
from paris_p2p.diffusion.training import Trainer, TrainingError
from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.ids import Role
from paris_p2p.wire.manifest import Recipe

OnStep = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, the last step's training loss) every so often."""
REPORT_STEPS = 20
ATTEMPTS = 3
"""With the noise drawn, and with two others; a loss that explodes each time is the recipe's fault."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished role: the folder of its weights, its held-out loss, steps and images seen."""

    weights: Path
    heldout_loss: float
    steps: int
    samples: int


def monolithic(recipe: Recipe, clusters: int, *, variant: int = 0, batch_size: int | None = None) -> Recipe:
    """The recipe of one network for all data that sees as many samples as `clusters` experts together.

    By default the batch is `clusters` times an expert's and the steps are an expert's, as in the paper
    (arXiv 2510.03434, following 2501.05450). `batch_size`: another batch, the steps then fill up to the same
    samples; an expert's own batch size is the control that separates isolation from batch size.
    """
    chosen = recipe.experts[variant]
    training = chosen.training
    samples = training.steps * training.batch_size * clusters
    batch = training.batch_size * clusters if batch_size is None else batch_size
    if not 1 <= batch <= samples:
        raise ConfigError(
            f"--batch-size must be between 1 and the {samples} samples the experts see together"
        )
    steps = math.ceil(samples / batch)
    whole = replace(training, batch_size=batch, steps=steps)
    # as many checkpoints as an expert writes
    interval = max(1, round(recipe.checkpoint_interval_steps * steps / training.steps))
    return replace(recipe, experts=(replace(chosen, training=whole),), checkpoint_interval_steps=interval)


def train(
    recipe: Recipe,
    role: Role,
    train_data: Examples,
    heldout: Examples,
    work: Path,
    *,
    variant: int = 0,
    device: str = "auto",
    initial: Path | None = None,
    on_step: OnStep = lambda done, total, loss: None,
) -> Trained:
    """Train `role` to the recipe's last step, going on from what an earlier call left in `work`.

    `initial`: the folder of weights to start from, instead of random ones.

    After a loss that is not finite it goes back to the last checkpoint and on with other noise, and says so.

    Raises `TrainingError` (a loss that is not finite three times, memory), `ConfigError`, `StoreError`.
    """
    newest = work / "checkpoint"
    for attempt in range(ATTEMPTS):
        trainer = Trainer(recipe, role, variant, train_data, heldout, device, initial)
        if newest.is_dir():
            load_resume(trainer, newest / "resume", _step_of(newest / "resume"))
        if attempt:
            log.warning("going on from step %d of %s with other noise", trainer.step, role)
            trainer.take_another_path(attempt)
        try:
            return _finish(trainer, work, recipe.checkpoint_interval_steps, on_step)
        except TrainingError as error:
            if error.kind != "nan" or attempt == ATTEMPTS - 1:
                raise
            log.warning("%s", error)
    raise AssertionError("the last attempt returns or raises")


def _finish(trainer: Trainer, work: Path, interval: int, on_step: OnStep) -> Trained:
    """Train to the last step. No checkpoint is written after a loss that is not finite."""
    training = trainer.plan.training
    newest = work / "checkpoint"
    while not trainer.finished:
        loss = trainer.train_step()
        due = trainer.step % interval == 0 or trainer.finished
        if due or trainer.step % REPORT_STEPS == 0:
            on_step(trainer.step, training.steps, _finite(float(loss), trainer.step))
        if due:
            _check_weights(trainer)
            _save(trainer, work)
    heldout_loss = _finite(trainer.heldout_loss(), trainer.step)
    return Trained(newest / "weights", heldout_loss, trainer.step, trainer.step * training.batch_size)


def _step_of(bundle: Path) -> int:
    """The step our own bundle is of; its other contents are checked as a stranger's would be."""
    try:
        return int(json.loads((bundle / STATE_NAME).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the interrupted training in {bundle.parent} cannot be read ({error}): remove that folder"
        ) from None


def _save(trainer: Trainer, work: Path) -> None:
    """Replace the checkpoint in `work`; a crash leaves the old one or the new one."""
    new, old, newest = work / "new", work / "old", work / "checkpoint"
    try:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        save_weights(trainer, new / "weights")
        save_resume(trainer, new / "resume")
        if newest.exists():
            newest.rename(old)
        new.rename(newest)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"a checkpoint cannot be written to {work}: {error}") from None


def _check_weights(trainer: Trainer) -> None:
    """A step's loss is that of the weights before it: the last ones may be none although it was a number."""
    if not all(bool(torch.isfinite(part).all()) for part in trainer.model.parameters()):
        raise TrainingError("nan", f"weights are not finite after step {trainer.step}")


def _finite(loss: float, step: int) -> float:
    if math.isfinite(loss):
        return loss
    raise TrainingError("nan", f"the loss is {loss} at step {step}: lower the recipe's learning rate")
