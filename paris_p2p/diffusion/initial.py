"""Initial weights from a published model: what `paris-node prepare --init-from` puts into a run.

Owns: finding a counterpart for each of an expert's tensors in a DiT, PixArt or Paris folder, and starting
afresh what has none. Does not own: the item's way into the manifest (`data.prepare`), reading it when a role
starts (`networks`).

Tensors are matched by name, after translation, and taken when their shapes agree. One adaptation: an output
layer that also predicts a variance (DiT, PixArt-alpha) gives its first half, the noise. A class-conditional
DiT has no cross-attention and its own modulation in each block: both start afresh.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from paris_p2p.diffusion import networks
from paris_p2p.diffusion.published import weights_file
from paris_p2p.diffusion.published_names import as_pixart, published_tensors
from paris_p2p.errors import ConfigError
from paris_p2p.store.model_folder import WEIGHTS_NAME
from paris_p2p.wire.manifest import Architecture, Recipe

_OUTPUTS = ("proj_out.", "final_layer.linear.")
_DIT_TIME = "transformer_blocks.0.norm1.emb.timestep_embedder."
_TIME = "adaln_single.emb.timestep_embedder."
_NUMBER = re.compile(r"\.[0-9]+\.")


@dataclass(frozen=True, slots=True)
class Initial:
    """Weights for `variant`: how many of its `parameters` were `taken`, and what starts afresh (groups of
    names, layer numbers as `*`)."""

    taken: int
    parameters: int
    fresh: tuple[str, ...]


def write_initial(architecture: Architecture, seed: int, source: Path, out: Path) -> Initial:
    """Write a weights file for `architecture` into the new folder `out`, from the model in `source` (a folder
    of one network, or of a pipeline with a `transformer`), and fresh from `seed` where that has nothing.

    Raises `ConfigError` when nothing at all fits.
    """
    found = _found(source)
    state = networks.build(architecture, seed, "initial").state_dict()
    fresh = []
    taken = 0
    for name, tensor in state.items():
        match = _fitting(name, tensor, found, architecture.config["patch_size"])
        if match is None:
            fresh.append(name)
        else:
            tensor.copy_(match)
            taken += tensor.numel()
    if not taken:
        raise ConfigError(f"nothing in {source} fits this run's experts: their sizes differ everywhere")
    out.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out / WEIGHTS_NAME)
    groups = dict.fromkeys(_NUMBER.sub(".*.", name).rsplit(".", 1)[0] for name in fresh)
    return Initial(taken, sum(tensor.numel() for tensor in state.values()), tuple(groups))


def source_file(source: Path) -> Path:
    """The weights file of the network in `source`, or of its `transformer`. Raises `ConfigError`."""
    return weights_file(source / "transformer" if (source / "transformer").is_dir() else source)


def _found(source: Path) -> dict[str, Tensor]:
    """The tensors in `source` under PixArt and published names."""
    path = source_file(source)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    for name in [name for name in tensors if name.startswith(_DIT_TIME)]:
        tensors.setdefault(_TIME + name.removeprefix(_DIT_TIME), tensors[name])
    for kind in ("weight", "bias"):
        if f"proj_out_2.{kind}" in tensors:  # DiT's
            tensors.setdefault(f"proj_out.{kind}", tensors[f"proj_out_2.{kind}"])
    return tensors | (as_pixart(tensors) if "patch_embed.weight" in tensors else published_tensors(tensors))


def _fitting(name: str, wanted: Tensor, found: dict[str, Tensor], patch: int) -> Tensor | None:
    match = found.get(name)
    if match is None or not match.is_floating_point() or match.ndim != wanted.ndim:
        return None
    if match.shape == wanted.shape:
        return match
    doubled = (2 * wanted.shape[0], *wanted.shape[1:])
    if not name.startswith(_OUTPUTS) or tuple(match.shape) != doubled:
        return None
    # Rows are (patch row, patch column, channel); the variance is the second half of the channels.
    channels = wanted.shape[0] // patch**2
    return match.view(patch**2, 2 * channels, *match.shape[1:])[:, :channels].reshape(wanted.shape)


def add_initial(source: Path, seed: int, recipe: Recipe, folder: Path) -> tuple[str, ...]:
    """Write `folder`/initial-<n> for each variant n of `recipe`, from the model in `source`.

    Returns a sentence on each: what was taken and what starts afresh. Raises `ConfigError`."""
    said = []
    for number, variant in enumerate(recipe.experts):
        made = write_initial(variant.architecture, seed, source, folder / f"initial-{number}")
        share = 100 * made.taken / made.parameters
        rest = f"; afresh: {', '.join(made.fresh)}" if made.fresh else ""
        said.append(f"{variant.name}: {share:.1f} % of {made.parameters} parameters from {source.name}{rest}")
    return tuple(said)
