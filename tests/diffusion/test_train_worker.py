"""Tests of `paris_p2p.diffusion.train_worker`: as a real child process, and its decisions in this one."""

import dataclasses
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from safetensors import SafetensorError
from safetensors.torch import save_file

from paris_p2p.core.yielding import UploadYield
from paris_p2p.diffusion import ranks, resume, train_worker
from paris_p2p.diffusion.resume import save_resume
from paris_p2p.diffusion.shards import Batch, Examples
from paris_p2p.diffusion.train_worker import Session, error_kind, make_trainer, parse_start, run
from paris_p2p.diffusion.training import TrainingError
from paris_p2p.errors import ConfigError, LocalProtocolError
from paris_p2p.wire.manifest import Recipe
from paris_p2p.workers.spawn import Worker, WorkerDied, open_worker

from .conftest import toy_manifest, toy_recipe, toy_shard, toy_trainer, write_shard

DEADLINE_S = 600.0


def start_message(root: Path, recipe: Recipe, resume: str | None = None, out: str = "out") -> dict[str, Any]:
    (root / "manifest.paris").write_bytes(toy_manifest(recipe).data)
    shard = str(write_shard(root / "shard", toy_shard(0)))
    return {
        "type": "start",
        "manifest": str(root / "manifest.paris"),
        "role": "expert-0",
        "variant": 0,
        "device": "cpu",
        "shards": [{"cluster": 0, "train": shard, "heldout": shard}],
        "resume": resume,
        "out": str(root / out),
        "threads": 1,
    }


async def until_end(worker: Worker) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    with trio.fail_after(DEADLINE_S):
        try:
            while True:
                messages.append(await worker.receive())
        except WorkerDied:
            assert await worker.wait() == 0
    return messages


async def test_a_stopped_trainer_is_resumed_by_another_with_the_weights_of_an_unbroken_run(
    tmp_path: Path,
) -> None:
    recipe = toy_recipe(steps=2000, interval=1500)
    async with open_worker("paris_p2p.diffusion.train_worker") as worker:
        await worker.send(start_message(tmp_path, recipe))
        with trio.fail_after(DEADLINE_S):
            ready = await worker.receive()
            assert (ready["type"], ready["step"], ready["total_steps"]) == ("ready", 0, 2000)
            assert (await worker.receive())["type"] == "step"
        await worker.send({"type": "stop"})
        messages = await until_end(worker)
    checkpoint = messages[-2]
    assert [checkpoint["type"], messages[-1]["type"]] == ["checkpoint", "stopped"]
    step = int(checkpoint["step"])
    assert 0 < step < 1500

    short = toy_recipe(steps=2000, interval=step + 3)
    async with open_worker("paris_p2p.diffusion.train_worker") as worker:
        await worker.send(start_message(tmp_path, short, checkpoint["resume"], "second"))
        with trio.fail_after(DEADLINE_S):
            assert (await worker.receive())["step"] == step
            while (message := await worker.receive())["type"] != "checkpoint":
                pass
    unbroken = toy_trainer(recipe)
    while unbroken.step < message["step"]:
        unbroken.train_step()
    assert message["step"] == step + 3
    assert message["heldout_loss"] == unbroken.heldout_loss()


async def test_two_processes_of_one_machine_train_one_role_as_one_does(tmp_path: Path) -> None:
    recipe = toy_recipe(steps=6, interval=3)
    async with open_worker("paris_p2p.diffusion.train_worker") as worker:
        await worker.send({**start_message(tmp_path, recipe), "device": "cpu:x2"})
        messages = await until_end(worker)
    assert messages[-1] == {"type": "finished", "step": 6}
    alone = toy_trainer(recipe)
    found = {m["step"]: m["heldout_loss"] for m in messages if m["type"] == "checkpoint"}
    for step in (3, 6):
        while alone.step < step:
            alone.train_step()
        assert found[step] == pytest.approx(alone.heldout_loss(), rel=1e-4)


class RecordedLink:
    """A parent in this process: says what it is told to, once `after` messages have come up."""

    def __init__(self, after: int | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self.after = after

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def poll(self) -> dict[str, Any] | None:
        return {"type": "stop"} if self.after is not None and len(self.sent) >= self.after else None

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        return self.poll()


def kinds(link: RecordedLink) -> list[str]:
    return [str(message["type"]) for message in link.sent]


def test_a_session_reports_checkpoints_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    link = RecordedLink()
    Session(toy_trainer(toy_recipe(steps=5)), link, tmp_path, 2).run()
    checkpoints = [message for message in link.sent if message["type"] == "checkpoint"]
    assert [message["step"] for message in checkpoints] == [2, 4, 5]
    assert link.sent[-1] == {"type": "finished", "step": 5}
    assert (Path(checkpoints[-1]["weights"]) / "config.json").is_file()
    assert (Path(checkpoints[-1]["resume"]) / "resume.json").is_file()


class FullDisk:
    """Refuses what is to be written into `folder` the first `times` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left = times
        monkeypatch.setattr(resume, "save_file", self)

    def __call__(self, tensors: Any, path: Path, metadata: Any = None) -> None:
        if path.name == resume.TENSORS_NAME and self.left:  # the weights did fit
            self.left -= 1
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)


def test_a_full_disk_does_not_end_training_and_the_next_checkpoint_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch, 1)
    link = RecordedLink()
    Session(toy_trainer(toy_recipe(steps=5)), link, tmp_path, 2).run()
    told = [(m["type"], m["step"]) for m in link.sent if m["type"] in ("unsaved", "checkpoint")]
    assert told == [("unsaved", 2), ("checkpoint", 4), ("checkpoint", 5)]
    assert "disk full" in next(m for m in link.sent if m["type"] == "unsaved")["message"]
    assert not (tmp_path / "step-00000002").exists()  # half of it would take what room there is


def test_a_checkpoint_that_found_no_room_is_tried_again_before_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_worker, "SAVE_AGAIN_S", 0.0)
    FullDisk(monkeypatch, 1)
    link = RecordedLink()
    Session(toy_trainer(toy_recipe(steps=5)), link, tmp_path, 3).run()
    assert [m["step"] for m in link.sent if m["type"] == "checkpoint"] == [4, 5]


def test_a_role_is_not_finished_until_its_last_checkpoint_found_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch, 3)
    link = RecordedLink()
    Session(toy_trainer(toy_recipe(steps=5)), link, tmp_path, 10).run()
    assert kinds(link)[-5:] == ["unsaved", "unsaved", "unsaved", "checkpoint", "finished"]
    FullDisk(monkeypatch, 100)
    link = RecordedLink(after=4)
    Session(toy_trainer(toy_recipe(steps=5)), link, tmp_path / "b", 5).run()
    assert kinds(link)[-1] == "stopped" and "checkpoint" not in kinds(link)


class SlowReader(Examples):
    """Images that come from a slow disk."""

    def gather(self, indices: torch.Tensor) -> Batch:
        time.sleep(0.02)
        return super().gather(indices)


def test_a_trainer_whose_images_come_slowly_says_that_it_waits_and_uploads_yield(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_worker, "REPORT_INTERVAL_S", 0.0)
    trainer, link = toy_trainer(toy_recipe(steps=8)), RecordedLink()
    trainer.train_data = SlowReader(trainer.train_data.shards)
    Session(trainer, link, tmp_path, 100).run()
    steps = [message for message in link.sent if message["type"] == "step"]
    assert len(steps) == 8 and all(0.02 <= m["waited_s"] <= m["seconds"] for m in steps)
    uploads = UploadYield()
    for now, message in enumerate(steps):
        uploads.report(message["images_per_s"], 1e6, float(now), message["waited_s"] / message["seconds"])
    assert uploads.yielding


def test_a_bad_resume_bundle_ends_it_before_it_is_ready(tmp_path: Path) -> None:
    link = RecordedLink()
    with pytest.raises(TrainingError) as caught:
        run(parse_start(start_message(tmp_path, toy_recipe(), str(tmp_path / "nothing"))), link)
    assert error_kind(caught.value) == "bad_resume"
    assert link.sent == []


def test_a_bundle_must_be_of_the_step_its_signed_statement_names(tmp_path: Path) -> None:
    recipe = toy_recipe()
    trainer = toy_trainer(recipe)
    trainer.train_step()
    save_resume(trainer, tmp_path / "bundle")
    message = start_message(tmp_path, recipe, str(tmp_path / "bundle"))
    link = RecordedLink(after=1)
    with pytest.raises(TrainingError, match="step 7") as caught:
        run(parse_start({**message, "resume_step": 7}), link)
    assert error_kind(caught.value) == "bad_resume"
    run(parse_start({**message, "resume_step": 1}), link)
    assert (kinds(link), link.sent[0]["step"]) == (["ready", "stopped"], 1)


def test_a_bundle_must_measure_as_its_signed_statement_says(tmp_path: Path) -> None:
    """Well formed is not yet well trained: a stranger may have put anything into it."""
    recipe = toy_recipe()
    trainer = toy_trainer(recipe)
    trainer.train_step()
    save_resume(trainer, tmp_path / "bundle")
    message = start_message(tmp_path, recipe, str(tmp_path / "bundle"))
    link = RecordedLink(after=1)
    with pytest.raises(TrainingError, match="as stated") as caught:
        run(parse_start({**message, "resume_loss": trainer.heldout_loss() / 2}), link)
    assert error_kind(caught.value) == "bad_resume"
    run(parse_start({**message, "resume_loss": trainer.heldout_loss()}), link)
    assert kinds(link) == ["ready", "stopped"]


def test_the_raw_weights_of_a_bundle_must_be_those_of_its_average(tmp_path: Path) -> None:
    """The average is what others check; training goes on from the raw ones."""
    recipe = toy_recipe()
    trainer = toy_trainer(recipe)
    trainer.train_step()
    stated = trainer.heldout_loss()
    assert trainer.heldout_loss(raw=True) == pytest.approx(stated, rel=0.2)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_resume(trainer, tmp_path / "bundle")
    message = start_message(tmp_path, recipe, str(tmp_path / "bundle"))
    with pytest.raises(TrainingError, match="raw weights' held-out loss") as caught:
        run(parse_start({**message, "resume_loss": stated}), RecordedLink(after=1))
    assert error_kind(caught.value) == "bad_resume"


def test_a_device_that_is_not_there_is_a_matter_of_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cuda:99") as caught:
        run(parse_start({**start_message(tmp_path, toy_recipe()), "device": "cuda:99"}), RecordedLink())
    assert error_kind(caught.value) == "config"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
async def test_the_trainer_runs_on_the_accelerator_that_was_named(tmp_path: Path) -> None:
    device = f"cuda:{torch.cuda.device_count() - 1}"
    async with open_worker("paris_p2p.diffusion.train_worker") as worker:
        await worker.send({**start_message(tmp_path, toy_recipe()), "device": device})
        messages = await until_end(worker)
    assert messages[0]["device"] == "cuda"
    assert messages[-1] == {"type": "finished", "step": 8}


def test_a_session_stopped_without_progress_writes_nothing(tmp_path: Path) -> None:
    link = RecordedLink(after=1)
    Session(toy_trainer(toy_recipe()), link, tmp_path, 2).run()
    assert kinds(link) == ["ready", "stopped"]
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_a_number_stops_training_before_a_checkpoint(tmp_path: Path) -> None:
    trainer = toy_trainer(toy_recipe())
    with torch.no_grad():
        next(iter(trainer.model.parameters())).fill_(torch.nan)
    link = RecordedLink()
    with pytest.raises(TrainingError, match="step 2") as caught:
        Session(trainer, link, tmp_path, 2).run()
    assert caught.value.kind == "nan"
    assert "checkpoint" not in kinds(link)


def test_after_a_loss_that_was_no_number_another_path_is_taken(tmp_path: Path) -> None:
    trainer = toy_trainer(toy_recipe())
    trainer.train_step()
    save_resume(trainer, tmp_path / "bundle")
    message = start_message(tmp_path, toy_recipe(), str(tmp_path / "bundle"))
    losses = [float(make_trainer(parse_start({**message, "attempt": n})).train_step()) for n in (0, 1, 1, 2)]
    assert losses[0] == float(trainer.train_step())
    assert losses[1] == losses[2]
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TrainingError("nan", "the loss is nan"), "nan"),
        (ConfigError("the shard does not fit"), "config"),
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "oom"),
        (RuntimeError("shape mismatch"), "crash"),
    ],
)
def test_errors_have_kinds(error: Exception, kind: str) -> None:
    assert error_kind(error) == kind


@pytest.mark.parametrize("message", [None, {}, {"type": "stop"}, {"type": "start", "shards": 3}])
def test_a_malformed_start_is_our_bug(message: dict[str, Any] | None) -> None:
    with pytest.raises(LocalProtocolError):
        parse_start(message)


def test_a_manifest_with_other_tensors_is_refused() -> None:
    recipe = toy_recipe()
    architecture = dataclasses.replace(recipe.experts[0].architecture, tensors=())
    odd = dataclasses.replace(
        recipe, experts=(dataclasses.replace(recipe.experts[0], architecture=architecture),)
    )
    with pytest.raises(ConfigError, match="another version"):
        toy_trainer(odd)


def test_every_process_of_a_machine_is_told_the_variant_that_the_first_one_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []

    def no_others(count: int, message: dict[str, object]) -> AbstractContextManager[None]:
        told.append(message["variant"])
        return nullcontext()

    monkeypatch.setattr(ranks, "further_ranks", no_others)
    message = {**start_message(tmp_path, toy_recipe()), "variant": None}
    run(parse_start(message), RecordedLink(after=1), message)
    assert told == [0]
