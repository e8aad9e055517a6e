"""Networks from a recipe: the one place that turns an `Architecture` into a module.

Owns: the table of model classes, tensor specs, seeded construction. Does not own: the networks themselves.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from paris_p2p.diffusion import expert, published_expert, router
from paris_p2p.diffusion.seeds import derived_seed
from paris_p2p.errors import ConfigError, RemoteProtocolError
from paris_p2p.store.model_folder import WEIGHTS_NAME
from paris_p2p.store.weights import check_weights_file
from paris_p2p.wire.manifest import Architecture, TensorSpec

BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    expert.MODEL_CLASS: expert.build_expert,
    published_expert.MODEL_CLASS: lambda config: published_expert.PublishedExpert(**config),
    router.MODEL_CLASS: lambda config: router.Router(**config),
}

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
}
"""What safetensors calls the dtypes used here."""


def tensor_specs(module: nn.Module) -> tuple[TensorSpec, ...]:
    """Name, dtype and shape of every tensor in a module's weights file, sorted by name."""
    return tuple(
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in sorted(module.state_dict().items())
    )


def describe(model_class: str, config: dict[str, Any]) -> Architecture:
    """The `Architecture` of a config. Allocates nothing: the network is made on the meta device."""
    with torch.device("meta"):
        module = _construct(model_class, config)
    return Architecture(model_class, config, tensor_specs(module))


def construct(architecture: Architecture) -> nn.Module:
    """A network of this architecture, with whatever weights the current random state gives. `ConfigError`."""
    return _construct(architecture.model_class, architecture.config)


def build(
    architecture: Architecture, seed: int, *stream: str | int, initial: Path | None = None
) -> nn.Module:
    """A fresh network whose initial weights depend on `seed` and the names in `stream` only; with `initial`,
    a folder with a weights file, they are that file's.

    A manifest comes from a stranger, so the config must give exactly the tensors the manifest lists before
    memory is spent on it. Raises `ConfigError`.
    """
    if describe(architecture.model_class, architecture.config).tensors != architecture.tensors:
        raise ConfigError(
            f"the recipe's {architecture.model_class} does not have the tensors the manifest lists for it: "
            "the run was made with another version of this program"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, *stream))
        network = _construct(architecture.model_class, architecture.config)
    if initial is not None:
        _load_initial(network, architecture, initial / WEIGHTS_NAME)
    return network


def _load_initial(network: nn.Module, architecture: Architecture, path: Path) -> None:
    """The bytes were verified against the manifest's hash, so a misfit is the organiser's mistake."""
    try:
        check_weights_file(path, architecture.tensors)
    except RemoteProtocolError as error:
        raise ConfigError(f"the run's initial weights do not fit its recipe: {error}") from None
    network.load_state_dict(load_file(path))


def _construct(model_class: str, config: dict[str, Any]) -> nn.Module:
    if model_class not in BUILDERS:
        known = ", ".join(sorted(BUILDERS))
        raise ConfigError(f"the recipe names a model class {model_class!r}; this program knows {known}")
    try:
        return BUILDERS[model_class](config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"a {model_class} cannot be built from the recipe: {error}") from None
