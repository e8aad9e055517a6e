"""The trainer process: `python -m paris_p2p.diffusion.train_worker`, started by the node.

Owns: the messages to and from the parent, when to report and when to write a checkpoint. Does not own: the
training itself (`training`), the files' formats (`resume`). Reads local files only.

First message down: {"type": "start", "manifest", "role", "variant", "device", "shards": [{"cluster", "train",
"heldout"}], "resume", "resume_step" (optional: the step that the bundle's signed statement names), "out",
"threads"}, then at any time {"type": "stop"}. Messages up: "ready", "step", "checkpoint", "finished",
"stopped", "error" (with a "kind"). A folder named in a "checkpoint" belongs to the parent from then on. Exit
status: 0 finished or stopped, 1 after "error", 70 when the parent is gone.
"""

import math
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from paris_p2p import clock
from paris_p2p.errors import ConfigError, LocalProtocolError, ParisError
from paris_p2p.ids import Role
from paris_p2p.workers.child import ParentLink

REPORT_INTERVAL_S = 0.25


class Link(Protocol):
    """What the trainer needs of its parent (`workers.child.ParentLink`)."""

    def send(self, message: dict[str, Any]) -> None:
        """Tell the parent."""

    def poll(self) -> dict[str, Any] | None:
        """What the parent said, if anything."""


@dataclass(frozen=True, slots=True)
class Start:
    """The parent's first message. `shards`: (cluster, folder of the train shard, of the held-out one).

    `resume_step`: the step the signed statement of `resume` names, if the parent says it."""

    manifest: Path
    role: Role
    variant: int
    device: str
    shards: tuple[tuple[int, Path, Path], ...]
    resume: Path | None
    out: Path
    threads: int
    resume_step: int | None = None


def parse_start(message: dict[str, Any] | None) -> Start:
    """Raises `LocalProtocolError`: parent and child are of the same version, or something is very wrong."""
    try:
        if message is None or message["type"] != "start":
            raise ValueError(f"the first message is {message!r:.80}")
        return Start(
            manifest=Path(message["manifest"]),
            role=Role(message["role"]),
            variant=int(message["variant"]),
            device=str(message["device"]),
            shards=tuple(
                (int(s["cluster"]), Path(s["train"]), Path(s["heldout"])) for s in message["shards"]
            ),
            resume=Path(message["resume"]) if message["resume"] is not None else None,
            out=Path(message["out"]),
            threads=int(message["threads"]),
            resume_step=int(message["resume_step"]) if message.get("resume_step") is not None else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LocalProtocolError(f"the start message is malformed: {error!r}") from None


def _shard_paths(shard: dict[str, Any]) -> tuple[int, Path, Path]:
    return int(shard["cluster"]), Path(shard["train"]), Path(shard["heldout"])


def run(start: Start, link: Link) -> None:
    """Train until finished or told to stop. Raises `ParisError`, or whatever torch raises."""
    import torch  # here, so that a parent that is gone is noticed before the seconds this takes

    from paris_p2p.diffusion.resume import load_resume
    from paris_p2p.diffusion.shards import Examples, load_shard
    from paris_p2p.diffusion.training import Trainer
    from paris_p2p.wire.manifest import check_manifest

    torch.set_num_threads(max(1, start.threads))
    recipe = check_manifest(start.manifest.read_bytes()).manifest.recipe
    train = Examples([load_shard(folder, recipe, cluster) for cluster, folder, _ in start.shards])
    heldout = Examples([load_shard(folder, recipe, cluster) for cluster, _, folder in start.shards])
    trainer = Trainer(recipe, start.role, start.variant, train, heldout, start.device)
    if start.resume is not None:
        load_resume(trainer, start.resume, start.resume_step)
    Session(trainer, link, start.out, recipe.checkpoint_interval_steps).run()


class Session:
    """One trainer's life: steps, reports, checkpoints, and the parent's wish to stop."""

    def __init__(self, trainer: Any, link: Link, out: Path, checkpoint_interval_steps: int) -> None:
        self.trainer, self.link, self.out = trainer, link, out
        self.interval = checkpoint_interval_steps
        self.saved_step: int = trainer.step
        self.losses: list[Any] = []  # since the last report, still on the device
        self.reported_at = 0.0

    def run(self) -> None:
        """Until finished or stopped. Raises `TrainingError` of kind `nan` when a loss is not finite."""
        trainer = self.trainer
        total = trainer.plan.training.steps
        self.link.send(
            {"type": "ready", "step": trainer.step, "total_steps": total, "device": str(trainer.device.type)}
        )
        self.reported_at = clock.monotonic()
        while not trainer.finished:
            if self._told_to_stop():
                return self._stop()
            self.losses.append(trainer.train_step())
            if clock.monotonic() - self.reported_at >= REPORT_INTERVAL_S or trainer.finished:
                self._report()
            if trainer.step % self.interval == 0 or trainer.finished:
                self._checkpoint()
        self.link.send({"type": "finished", "step": trainer.step})

    def _told_to_stop(self) -> bool:
        message = self.link.poll()
        return message is not None and message.get("type") == "stop"

    def _stop(self) -> None:
        """Leave with a checkpoint of whatever is new: one without progress would be its own parent."""
        if self.trainer.step > self.saved_step:
            self._report()
            self._checkpoint()
        self.link.send({"type": "stopped", "step": self.trainer.step})

    def _report(self) -> None:
        """Send the mean loss and the throughput since the last report."""
        if not self.losses:
            return
        loss = self._finite(sum(float(loss) for loss in self.losses) / len(self.losses), "training")
        now = clock.monotonic()
        images = len(self.losses) * self.trainer.plan.training.batch_size
        rate = images / max(now - self.reported_at, 1e-6)
        self.link.send({"type": "step", "step": self.trainer.step, "loss": loss, "images_per_s": rate})
        self.losses.clear()
        self.reported_at = now

    def _checkpoint(self) -> None:
        """Write weights and resume bundle, tell the parent, and forget about the folders."""
        from paris_p2p.diffusion.resume import save_resume, save_weights

        for loss in self.losses:
            self._finite(float(loss), "training")
        started = clock.monotonic()
        step = self.trainer.step
        heldout_loss = self._finite(self.trainer.heldout_loss(), "held-out")
        folder = self.out / f"step-{step:08d}"
        save_weights(self.trainer, folder / "weights")
        save_resume(self.trainer, folder / "resume")
        self.saved_step = step
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

    def _finite(self, loss: float, which: str) -> float:
        if math.isfinite(loss):
            return loss
        from paris_p2p.diffusion.training import TrainingError

        raise TrainingError("nan", f"the {which} loss is {loss} at step {self.trainer.step}")


def error_kind(error: BaseException) -> str:
    """The `kind` of an "error" message: `nan`, `oom`, `bad_resume`, `config`; `crash` for the rest."""
    kind = getattr(error, "kind", None)
    if isinstance(error, ParisError) and isinstance(kind, str):
        return kind
    if isinstance(error, ConfigError):
        return "config"
    text = str(error).lower()
    refused = "out of memory" in text or "can't allocate memory" in text  # a device's, the CPU's allocator
    oom = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and refused)
    return "oom" if oom else "crash"


def main() -> int:
    """The process's whole life. Returns its exit status."""
    link = ParentLink.from_environment()
    try:
        run(parse_start(link.receive()), link)
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
