"""Networks from a recipe: the one place that turns an `Architecture` into a module.

Owns: the table of model classes, tensor specs, seeded construction. Does not own: the networks themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from paris_p2p.diffusion import expert, router
from paris_p2p.diffusion.seeds import derived_seed
from paris_p2p.errors import ConfigError
from paris_p2p.wire.manifest import Architecture, TensorSpec

BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    expert.MODEL_CLASS: expert.build_expert,
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


def build(architecture: Architecture, seed: int, *stream: str | int) -> nn.Module:
    """A fresh network whose initial weights depend on `seed` and the names in `stream` only.

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
        return _construct(architecture.model_class, architecture.config)


def _construct(model_class: str, config: dict[str, Any]) -> nn.Module:
    if model_class not in BUILDERS:
        known = ", ".join(sorted(BUILDERS))
        raise ConfigError(f"the recipe names a model class {model_class!r}; this program knows {known}")
    try:
        return BUILDERS[model_class](config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"a {model_class} cannot be built from the recipe: {error}") from None
