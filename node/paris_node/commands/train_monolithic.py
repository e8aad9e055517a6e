"""`paris-node train-monolithic`: one network on all of a run's data, trained here alone.

It is the baseline, or (`--start`) what the experts of a second `prepare` start from.
"""

import dataclasses
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paris_node.bars import count_bars
from paris_node.commands.publish import load_prepared, prepared_item
from paris_node.text import printable
from paris_node.torch_cache import keep_torch_cache
from paris_p2p import clock
from paris_p2p.diffusion.device_names import check_device_name
from paris_p2p.errors import ConfigError
from paris_p2p.ids import InfoHash, Term, expert_role
from paris_p2p.programs import Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.durable import disk, write_atomic
from paris_p2p.store.hashing import content_id
from paris_p2p.store.home import Home
from paris_p2p.store.model_folder import refuse_foreign, write_model_folder
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import Recipe, SignedManifest

if TYPE_CHECKING:
    from paris_p2p.diffusion.local import Trained
    from paris_p2p.diffusion.shards import Examples

ROLE = expert_role(0)


@dataclass(frozen=True, slots=True)
class MonolithicRequest:
    """The options of `train-monolithic`, as given. `variant`: a name or number. `start`: train what experts
    start from instead, on this share of the samples."""

    folder: Path
    out: Path
    batch_size: int | None
    variant: str
    device: str
    threads: int | None
    home: Path | None
    start: float | None = None


def run(request: MonolithicRequest, output: Output) -> None:
    """Train the baseline of the prepared run in `request.folder` and write it as a model folder."""
    signed = load_prepared(request.folder)
    refuse_foreign(request.out)
    keep_torch_cache(Home.resolve(request.home))
    check_device_name(request.device)
    recipe = _recipe(request, signed)
    work = _work_folder(request, signed, recipe)
    store = ContentStore(request.folder / "store")
    train, heldout = _data(signed, store)
    training = recipe.experts[0].training
    output.event(
        "training",
        f"one network on {len(train)} images: {training.steps} steps of {training.batch_size}",
        images=len(train),
        total_steps=training.steps,
        batch_size=training.batch_size,
    )
    begins = recipe.experts[0].initial  # where the experts begin, so that neither has an advantage
    initial = None if begins is None else prepared_item(store, begins)
    done = _train(request, recipe, (train, heldout), work, initial, output)
    _write(request, signed, recipe, done, len(train))
    shutil.rmtree(work, ignore_errors=True)
    output.event(
        "trained",
        f"{request.out}: held-out loss {done.heldout_loss:.4f} after {done.samples} samples\n"
        + _next(request),
        path=str(request.out.resolve()),
        heldout_loss=done.heldout_loss,
        steps=done.steps,
        samples=done.samples,
    )


def _train(
    request: MonolithicRequest,
    recipe: Recipe,
    data: "tuple[Examples, Examples]",
    work: Path,
    initial: Path | None,
    output: Output,
) -> "Trained":
    """Train on `data` (to train on, held out), or go on from what `work` holds, and show how far it is.
    `initial`: the weights to start from, if the run has some."""
    import torch

    from paris_p2p.diffusion import local

    if request.threads is not None:
        torch.set_num_threads(max(1, request.threads))
    with count_bars(output, remaining=True) as bars:

        def show(done: int, total: int, loss: float) -> None:
            bars.show("training", done, total, f"loss {loss:.4f}")
            output.event("step", step=done, total_steps=total, loss=loss)

        return local.train(recipe, ROLE, *data, work, device=request.device, initial=initial, on_step=show)


def _recipe(request: MonolithicRequest, signed: SignedManifest) -> Recipe:
    """What the one network is trained by. Raises `ConfigError`."""
    from paris_p2p.diffusion.local import monolithic
    from paris_p2p.diffusion.start import start_recipe

    recipe, clusters = signed.manifest.recipe, len(signed.manifest.clusters)
    variant = variant_number(recipe, request.variant)
    if request.start is None:
        return monolithic(recipe, clusters, variant=variant, batch_size=request.batch_size)
    if request.batch_size is not None:
        raise ConfigError("a start has an expert's batch size: leave --batch-size out, or --start")
    return start_recipe(recipe, clusters, request.start, variant=variant)


def variant_number(recipe: Recipe, text: str) -> int:
    """Which of the recipe's expert variants `text` names, or numbers from 0. Raises `ConfigError`."""
    names = [variant.name for variant in recipe.experts]
    if text in names:
        return names.index(text)
    if text.isascii() and text.isdigit() and int(text[:9]) < len(names):
        return int(text)
    known = ", ".join(f"{number} or {printable(name)}" for number, name in enumerate(names))
    raise ConfigError(f"--variant {text}: the run's experts may be {known}")


def _next(request: MonolithicRequest) -> str:
    """What to do with the model."""
    if request.start is not None:
        return (
            "next: the same prepare once more, with --init-from "
            f"{request.out / 'expert_0'} --init-share {request.start:g}"
        )
    return (
        f"next: paris-node evaluate {request.folder} --model {request.out} --model FOLDER\n"
        f'  or: paris-node generate "…" --model {request.out}'
    )


def _work_folder(request: MonolithicRequest, signed: SignedManifest, recipe: Recipe) -> Path:
    """Where checkpoints are kept until the model is written. Raises `ConfigError` when another training was
    interrupted there: to go on from its weights would be neither the one nor the other."""
    training = recipe.experts[0].training
    variant = variant_number(signed.manifest.recipe, request.variant)
    kind = f"variant {variant}" if request.start is None else f"a start, variant {variant}"
    this = f"run {signed.run_id.hex()}, {kind}, {training.steps} x {training.batch_size}\n"
    work = request.out.with_name(f".{request.out.name}.training")
    note = work / "of.txt"
    with disk("keeping the training's checkpoints", work):
        if note.exists() and note.read_text(encoding="utf-8") != this:
            raise ConfigError(
                f"{work} holds an interrupted training of another run or with other options: remove that "
                "folder, or give the options it was started with"
            )
        work.mkdir(parents=True, exist_ok=True)
        write_atomic(note, this.encode())
    return work


def _data(signed: SignedManifest, store: ContentStore) -> "tuple[Examples, Examples]":
    """All clusters' training images, and all their held-out ones."""
    from paris_p2p.diffusion.shards import Examples, load_shard

    manifest = signed.manifest

    def load(index: int, ref: ContentRef) -> object:
        return load_shard(prepared_item(store, ref), manifest.recipe, index)

    train = Examples([load(c.index, c.train) for c in manifest.clusters])  # type: ignore[misc]
    heldout = Examples([load(c.index, c.heldout) for c in manifest.clusters])  # type: ignore[misc]
    return train, heldout


def _write(
    request: MonolithicRequest, signed: SignedManifest, recipe: Recipe, done: "Trained", images: int
) -> None:
    """The model folder. It says whose data it is of, and that it is one network; nothing of it is signed."""
    manifest = signed.manifest
    # One cluster, so that nothing is missing. Its refs stand for all data and are not written anywhere.
    whole = dataclasses.replace(manifest.clusters[0], images=images, variants=())
    derived = dataclasses.replace(
        manifest, name=f"{manifest.name[:51]}, monolithic", recipe=recipe, clusters=(whole,)
    )
    info, layout = content_id(done.weights)
    weights = ContentRef(InfoHash(hashlib.sha256(info).digest()), layout.length, layout.piece_length)
    statement = CheckpointStatement(
        run_id=signed.run_id,
        role=ROLE,
        term=Term(1),
        holder=manifest.organiser,
        step=done.steps,
        total_steps=done.steps,
        variant=0,
        weights=weights,
        resume=weights,  # of what is read here only the weights' id ends up in the folder
        parent=b"",
        heldout_loss=done.heldout_loss,
        created_unix=clock.unix(),
    )
    store = ContentStore(request.folder / "store")
    components = {name: prepared_item(store, ref) for name, ref in manifest.components.items()}
    write_model_folder(
        request.out,
        SignedManifest(derived, signed.run_id, b""),
        {ROLE: done.weights},
        components,
        {ROLE: statement},
    )
