"""The trainer process: `python -m paris_p2p.diffusion.train_worker`, started by the node.

Owns: the messages to and from the parent, when to report and when to write a checkpoint. Does not own: the
training itself (`training`), the files' formats (`resume`). Reads local files only.

First message down: {"type": "start", "manifest", "role", "variant", "device", "shards": [{"cluster",
"train", "heldout"}], "resume", "resume_step" and "resume_loss" (optional: the step and the held-out loss
that the bundle's signed statement names), "out", "threads", "attempt" (optional: how often this role's loss
was not finite here), "initial" (optional: for each variant the folder of the weights it starts from, or
null)}, then at any time {"type": "stop"}. Messages up: "ready", "step", "checkpoint", "finished",
"stopped", "unsaved" (the disk has no room for a checkpoint, "message" says more: training goes on, and it
is tried again), "error" (with a "kind"). A folder named in a "checkpoint" belongs to the parent from then
on. Exit status: 0 finished or stopped, 1 after "error", 70 when the parent is gone.
"""

import math
import os
import shutil
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from paris_p2p import clock
from paris_p2p.diffusion.ranks import in_step
from paris_p2p.errors import ConfigError, DiskFullError, LocalProtocolError, ParisError
from paris_p2p.ids import Role
from paris_p2p.store.durable import disk
from paris_p2p.workers.child import ParentLink

if TYPE_CHECKING:
    from paris_p2p.diffusion.training import Trainer
    from paris_p2p.wire.manifest import Manifest

REPORT_INTERVAL_S = 0.25
SAVE_AGAIN_S = 30.0
"""How often a checkpoint that the disk had no room for is tried again."""


class Link(Protocol):
    """What the trainer needs of its parent (`workers.child.ParentLink`)."""

    def send(self, message: dict[str, Any]) -> None:
        """Tell the parent."""

    def poll(self) -> dict[str, Any] | None:
        """What the parent said, if anything."""

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """What the parent says within `timeout_s` seconds, if anything."""


@dataclass(frozen=True, slots=True)
class Start:
    """The parent's first message. `shards`: (cluster, folder of the train shard, of the held-out one).

    `resume_step`: the step the signed statement of `resume` names, if the parent says it. `variant`: None
    to take the first one the role may be that fits into the device's memory. `attempt`: 0, or how often
    training from here came to a loss that was not finite, to take another path this time. `resume_loss`: the
    held-out loss that the statement of `resume` names, if the parent says it. `initial`: for each variant of
    the recipe the folder of the weights it starts from, if it names some."""

    manifest: Path
    role: Role
    variant: int | None
    device: str
    shards: tuple[tuple[int, Path, Path], ...]
    resume: Path | None
    out: Path
    threads: int
    resume_step: int | None = None
    attempt: int = 0
    resume_loss: float | None = None
    initial: tuple[Path | None, ...] = ()


def parse_start(message: dict[str, Any] | None) -> Start:
    """Raises `LocalProtocolError`: parent and child are of the same version, or something is very wrong."""
    try:
        if message is None or message["type"] != "start":
            raise ValueError(f"the first message is {message!r:.80}")
        return Start(
            manifest=Path(message["manifest"]),
            role=Role(message["role"]),
            variant=_optional_int(message["variant"]),
            device=str(message["device"]),
            shards=tuple(
                (int(s["cluster"]), Path(s["train"]), Path(s["heldout"])) for s in message["shards"]
            ),
            resume=Path(message["resume"]) if message["resume"] is not None else None,
            out=Path(message["out"]),
            threads=int(message["threads"]),
            resume_step=_optional_int(message.get("resume_step")),
            attempt=int(message.get("attempt", 0)),
            resume_loss=_optional_float(message.get("resume_loss")),
            initial=tuple(Path(folder) if folder else None for folder in message.get("initial", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LocalProtocolError(f"the start message is malformed: {error!r}") from None


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)


def _optional_float(value: Any) -> float | None:
    return None if value is None else float(value)


def run(start: Start, link: Link, message: dict[str, Any] | None = None) -> None:
    """Train until finished or told to stop. `message`: what `start` was parsed from, for further processes.

    Raises `ParisError`, or whatever torch raises.
    """
    from paris_p2p.diffusion.devices import processes  # here, as in `make_trainer`
    from paris_p2p.diffusion.ranks import further_ranks

    start = replace(start, variant=chosen_variant(start))
    # Told to the others: each would look at its own device's memory, and might train another network.
    with further_ranks(processes(start.device), {**(message or {}), "variant": start.variant}):
        trainer = make_trainer(start)
        recipe = read_manifest(start.manifest).recipe
        Session(trainer, link, start.out, recipe.checkpoint_interval_steps).run()


def read_manifest(path: Path) -> "Manifest":
    """The manifest in the file `path`."""
    from paris_p2p.wire.manifest import check_manifest

    return check_manifest(path.read_bytes()).manifest


def make_trainer(start: Start) -> "Trainer":
    """The trainer that `start` describes, where its resume bundle stopped. Raises `ParisError`."""
    import torch  # here, so that a parent that is gone is noticed before the seconds this takes

    from paris_p2p.diffusion.resume import load_resume
    from paris_p2p.diffusion.shards import Examples, load_shard
    from paris_p2p.diffusion.training import Trainer

    torch.set_num_threads(max(1, start.threads))
    recipe, variant = read_manifest(start.manifest).recipe, chosen_variant(start)
    train = Examples([load_shard(folder, recipe, cluster) for cluster, folder, _ in start.shards])
    heldout = Examples([load_shard(folder, recipe, cluster) for cluster, _, folder in start.shards])
    initial = start.initial[variant] if start.initial and start.resume is None else None
    trainer = Trainer(recipe, start.role, variant, train, heldout, start.device, initial)
    if start.resume is not None:
        load_resume(trainer, start.resume, start.resume_step)
        if start.resume_loss is not None:
            check_resumed(trainer, start.resume_loss)
    if start.attempt:
        trainer.take_another_path(start.attempt)
    return trainer


def chosen_variant(start: Start) -> int:
    """The variant that `start` names, or the first one the role may be that fits into the device's memory."""
    if start.variant is not None:
        return start.variant
    from paris_p2p.diffusion.training import fitting_variant

    manifest = read_manifest(start.manifest)
    return fitting_variant(manifest.recipe, start.role, start.device, manifest.variants(start.role))


def check_resumed(trainer: "Trainer", stated_loss: float) -> None:
    """Refuse a bundle whose average weights are worse than its signed statement says, or whose raw ones,
    which training goes on from and nobody else looks at, are not theirs: well formed is not yet well trained.
    Raises `TrainingError` of kind `bad_resume`."""
    from paris_p2p.core.accept import loss_refusal, raw_loss_refusal
    from paris_p2p.diffusion.training import TrainingError

    reason = loss_refusal(stated_loss, trainer.heldout_loss()) or raw_loss_refusal(
        stated_loss, trainer.heldout_loss(raw=True)
    )
    if reason is not None:
        raise TrainingError("bad_resume", f"the bundle's weights are not what was announced: {reason}")


class Session:
    """One trainer's life: steps, reports, checkpoints, and the parent's wish to stop."""

    def __init__(self, trainer: Any, link: Link, out: Path, checkpoint_interval_steps: int) -> None:
        self.trainer, self.link, self.out = trainer, link, out
        self.interval = checkpoint_interval_steps
        self.saved_step: int = trainer.step
        self.losses: list[Any] = []  # since the last report, still on the device
        self.reported_at = 0.0
        self.waited_s = 0.0  # the trainer's, as of the last report
        self.save_at = math.inf  # monotonic: the disk was full

    def run(self) -> None:
        """Until finished or stopped. Raises `TrainingError` of kind `nan` when a loss is not finite."""
        trainer = self.trainer
        total = trainer.plan.training.steps
        self.link.send(
            {
                "type": "ready",
                "step": trainer.step,
                "total_steps": total,
                "variant": trainer.plan.variant,
                "device": str(trainer.device.type),
                "precision": trainer.precision,
                "micro_batch": trainer.memory_plan.micro_batch,
                "checkpointing": trainer.memory_plan.checkpointing,
            }
        )
        self.reported_at = clock.monotonic()
        while not trainer.finished:
            if not in_step(trainer, not self._told_to_stop()):
                return self._stop()
            self.losses.append(trainer.train_step())
            if clock.monotonic() - self.reported_at >= REPORT_INTERVAL_S or trainer.finished:
                self._report()
            due = trainer.step % self.interval == 0 or clock.monotonic() >= self.save_at
            if due or trainer.finished:
                self._checkpoint()
        in_step(trainer, False)
        told_to_stop = False
        while not told_to_stop and self.save_at < math.inf:  # without its end the role is not finished
            told_to_stop = _says_stop(self.link.receive(SAVE_AGAIN_S))
            self._checkpoint()
        self.link.send({"type": "stopped" if told_to_stop else "finished", "step": trainer.step})

    def _told_to_stop(self) -> bool:
        return _says_stop(self.link.poll())

    def _stop(self) -> None:
        """Leave with a checkpoint of whatever is new: one without progress would be its own parent."""
        if self.trainer.step > self.saved_step:
            self._report()
            self._checkpoint()
        self.link.send({"type": "stopped", "step": self.trainer.step})

    def _report(self) -> None:
        """Send the mean loss, the throughput and the time spent waiting for images since the last report."""
        if not self.losses:
            return
        loss = self._finite(sum(float(loss) for loss in self.losses) / len(self.losses), "training")
        now = clock.monotonic()
        images = len(self.losses) * self.trainer.plan.training.batch_size
        rate = images / max(now - self.reported_at, 1e-6)
        seconds, waited = now - self.reported_at, self.trainer.waited_s
        self.link.send(
            {
                "type": "step",
                "step": self.trainer.step,
                "loss": loss,
                "images_per_s": rate,
                "seconds": seconds,
                "waited_s": waited - self.waited_s,
            }
        )
        self.losses.clear()
        self.reported_at, self.waited_s = now, waited

    def _checkpoint(self) -> None:
        """Write weights and resume bundle, tell the parent, and forget about the folders. Where the disk has
        no room the parent is told that, and training goes on."""
        for loss in self.losses:
            self._finite(float(loss), "training")
        started = clock.monotonic()
        step = self.trainer.step
        heldout_loss = self._finite(self.trainer.heldout_loss(), "held-out")
        folder = self.out / f"step-{step:08d}"
        try:
            self._write(folder)
        except DiskFullError as error:
            self.save_at = clock.monotonic() + SAVE_AGAIN_S
            self.link.send({"type": "unsaved", "step": step, "message": str(error)})
            return
        self.saved_step, self.save_at = step, math.inf
        self.link.send(
            {
                "type": "checkpoint",
                "step": step,
                "heldout_loss": heldout_loss,
                "weights": str(folder / "weights"),
                "resume": str(folder / "resume"),
            }
        )
        self.reported_at += clock.monotonic() - started  # saving is no training time

    def _write(self, folder: Path) -> None:
        """Both folders of a checkpoint into `folder`, or nothing. Raises `StoreError`."""
        from paris_p2p.diffusion.resume import save_resume, save_weights

        try:
            with disk("writing a checkpoint", self.out):
                save_weights(self.trainer, folder / "weights")
                save_resume(self.trainer, folder / "resume")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _finite(self, loss: float, which: str) -> float:
        if math.isfinite(loss):
            return loss
        from paris_p2p.diffusion.training import TrainingError

        raise TrainingError("nan", f"the {which} loss is {loss} at step {self.trainer.step}")


def _says_stop(message: dict[str, Any] | None) -> bool:
    return message is not None and message.get("type") == "stop"


def error_kind(error: BaseException) -> str:
    """The `kind` of an "error" message: `nan`, `oom`, `bad_resume`, `config`; `crash` for the rest."""
    kind = getattr(error, "kind", None)
    if isinstance(error, ParisError) and isinstance(kind, str):
        return kind
    if isinstance(error, ConfigError):
        return "config"
    from paris_p2p.diffusion.training import out_of_memory

    return "oom" if out_of_memory(error) else "crash"


def main() -> int:
    """The process's whole life. Returns its exit status."""
    link = ParentLink.from_environment()
    try:
        message = link.receive()
        run(parse_start(message), link, message)
    except Exception as error:  # noqa: BLE001 - reported to the parent, whatever it was
        traceback.print_exc()
        link.send({"type": "error", "kind": error_kind(error), "message": str(error)[:2000]})
        return 1
    return 0


if __name__ == "__main__":
    STATUS = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STATUS)  # all is said and written; unloading torch would take up to seconds on a busy machine
