"""The model folder: verified content items, laid out as a diffusers pipeline on disk.

Owns: the folder's layout and JSON files, scheduler configs, writing it all or nothing. Does not own: fetching
or verifying items, loading the model (`diffusion.pipeline`). It runs in the network process: no torch.

    model_index.json                   the class of each part, and the pipeline's settings
    expert_<i>/, router/               config.json, diffusion_pytorch_model.safetensors
    text_encoder/, tokenizer/, (vae/)  the run's components
    scheduler/scheduler_config.json
    paris.json                         the run, each role's checkpoint, missing roles: for people and scripts

Weights are hard links to the store's files, or copies on another file system; never symbolic links, which
would dangle when the store is emptied. A network's config comes from the manifest, not from its trainer.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paris_p2p.errors import ConfigError, IncompleteError, StoreError
from paris_p2p.ids import ROUTER, Role
from paris_p2p.store.durable import disk
from paris_p2p.store.files import link_or_copy, share_tree
from paris_p2p.wire.canonical import to_plain
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.manifest import Architecture, Manifest, SignedManifest

INDEX_NAME = "model_index.json"
SUMMARY_NAME = "paris.json"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "unipc": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ),
    "dpm": (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ),
}
"""A recipe's scheduler names: diffusers' class and its arguments for flow matching."""

NETWORK_CLASSES = {
    "PixArtTransformer2DModel": ("diffusers", "PixArtTransformer2DModel"),
    "PublishedExpert": ("paris_p2p.diffusion.published_expert", "PublishedExpert"),
    "Router": ("paris_p2p.diffusion.router", "Router"),
}
COMPONENT_CLASSES = {
    "text_encoder": ("paris_p2p.components.text", "TextEncoder"),
    "tokenizer": ("paris_p2p.components.tokenizer", "Tokenizer"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def part_name(role: Role) -> str:
    """The folder of `role`: `expert_3` for `expert-3`, `router` for `router`."""
    return role.replace("-", "_")


def write_model_folder(
    out: Path,
    signed: SignedManifest,
    weights: Mapping[Role, Path],
    components: Mapping[str, Path],
    statements: Mapping[Role, CheckpointStatement],
) -> Path:
    """Write the model of a run to `out`, replacing a model that is there, and return `out`.

    `weights`: for each role there is, the folder of its verified weights item; `components`: likewise for
    each of the manifest's components; `statements`: the checkpoint each of the `weights` is. Roles
    without weights are listed as missing. Raises `IncompleteError` when a component or every expert is
    missing, `ConfigError` when `out` holds something that is not a model, `StoreError` when the disk refuses.
    """
    manifest = signed.manifest
    absent = sorted(manifest.components.keys() - components.keys())
    if absent or not weights.keys() - {ROUTER}:
        raise IncompleteError(
            f"a model needs at least one expert and its components; missing: {absent or 'experts'}"
        )
    refuse_foreign(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error}") from None
    try:
        new.chmod(0o755)  # mkdtemp's folders are private
        _fill(new, signed, weights, components, statements)
        _swap(new, out)
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return out


def refuse_foreign(out: Path) -> None:
    """Raises `ConfigError` when `out` holds something that is not a model, which one must not replace."""
    with disk("looking at what is there", out):
        if not out.exists() or (out.is_dir() and ((out / INDEX_NAME).exists() or not any(out.iterdir()))):
            return
    raise ConfigError(f"{out} exists and is not a model: name another folder with --out")


def _fill(
    new: Path,
    signed: SignedManifest,
    weights: Mapping[Role, Path],
    components: Mapping[str, Path],
    statements: Mapping[Role, CheckpointStatement],
) -> None:
    manifest = signed.manifest
    for role, item in weights.items():
        folder = new / part_name(role)
        folder.mkdir()
        link_or_copy(str(item / WEIGHTS_NAME), str(folder / WEIGHTS_NAME))
        architecture = manifest.architecture(role, statements[role].variant)
        _write_json(folder / CONFIG_NAME, _network_config(architecture))
    for name in manifest.components:
        share_tree(components[name], new / name)
    class_name, config = SCHEDULERS[manifest.recipe.sampling.scheduler]
    (new / "scheduler").mkdir()
    _write_json(new / "scheduler" / "scheduler_config.json", {**_header(class_name), **config})
    _write_json(new / SUMMARY_NAME, summary(signed, statements))
    _write_json(new / INDEX_NAME, model_index(signed, statements))


def model_index(signed: SignedManifest, statements: Mapping[Role, CheckpointStatement]) -> dict[str, Any]:
    """The contents of `model_index.json`: diffusers' part table, and the settings the pipeline needs."""
    manifest = signed.manifest
    parts: dict[str, Any] = {
        part_name(role): NETWORK_CLASSES[manifest.architecture(role, statement.variant).model_class]
        for role, statement in statements.items()
    }
    for name in manifest.components:
        parts[name] = COMPONENT_CLASSES[name]
    parts["scheduler"] = ("diffusers", SCHEDULERS[manifest.recipe.sampling.scheduler][0])
    return {
        **_header("ParisPipeline"),
        **dict(sorted(parts.items())),
        "run_id": signed.run_id.hex(),
        "clusters": len(manifest.clusters),
        "latents": to_plain(manifest.recipe.latents),
        "captions": to_plain(manifest.recipe.captions),
        "sampling": to_plain(manifest.recipe.sampling),
        "objectives": _objectives(manifest, statements),
        "missing": [part_name(role) for role in manifest.roles if role not in statements],
    }


def _objectives(manifest: Manifest, statements: Mapping[Role, CheckpointStatement]) -> dict[str, str]:
    return {
        part_name(role): manifest.recipe.experts[statement.variant].objective
        for role, statement in statements.items()
        if role != ROUTER
    }


def summary(signed: SignedManifest, statements: Mapping[Role, CheckpointStatement]) -> dict[str, Any]:
    """The contents of `paris.json`."""
    manifest = signed.manifest
    roles = {
        role: {
            "term": statement.term,
            "step": statement.step,
            "total_steps": statement.total_steps,
            "heldout_loss": statement.heldout_loss,
            "variant": statement.variant,
            "content_id": statement.weights.info_hash.hex(),
        }
        for role, statement in statements.items()
    }
    return {
        "run_id": signed.run_id.hex(),
        "name": manifest.name,
        "roles": roles,
        "missing": [role for role in manifest.roles if role not in statements],
        "sampling": to_plain(manifest.recipe.sampling),
        "latents": to_plain(manifest.recipe.latents),
        "example_prompts": list(manifest.example_prompts),
    }


def _network_config(architecture: Architecture) -> dict[str, Any]:
    return {**_header(architecture.model_class), **architecture.config}


def _header(class_name: str) -> dict[str, Any]:
    """What diffusers writes first into every config file."""
    return {"_class_name": class_name, "_diffusers_version": version("diffusers")}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _swap(new: Path, out: Path) -> None:
    """Put `new` at `out`. A model that was there moves aside first, and back when that fails; a crash leaves
    one of them whole."""
    if not out.exists():
        new.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    old = aside / "model"
    try:
        out.rename(old)
        new.rename(out)
    except OSError:
        _put_back(old, out)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _put_back(old: Path, out: Path) -> None:
    if old.exists():
        try:
            old.rename(out)
        except OSError as error:
            raise OSError(f"{error}; the model that was there is whole, at {old}") from None
