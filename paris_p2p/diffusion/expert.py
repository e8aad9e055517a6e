"""The expert: diffusers' `PixArtTransformer2DModel` as a velocity (or noise) predictor.

Owns: building it, its zero initialisation, calling it with t in [0, 1]. Does not own: what it is trained on
(`objectives`, `training`), or how several are mixed (`sampling`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from paris_p2p.diffusion.deferred import defer

defer("diffusers.models.transformers")
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel  # noqa: E402

MODEL_CLASS = "PixArtTransformer2DModel"
TIMESTEP_SCALE = 1000.0
"""The network reads t * 1000: its sinusoids are laid out for 0..1000 and see nothing in [0, 1]."""


def build_expert(config: dict[str, Any]) -> nn.Module:
    """A fresh expert from the keyword arguments of `PixArtTransformer2DModel`.

    Works under `torch.device("meta")`. Raises `TypeError` or `ValueError` for arguments it does not take,
    and for a config without cross-attention (diffusers would silently ignore the text).
    """
    if config.get("cross_attention_dim") is None:
        raise ValueError("an expert needs cross_attention_dim, or it would never read its text")
    expert: nn.Module = PixArtTransformer2DModel(**config)
    zero_outputs(expert)
    return expert


@torch.no_grad()
def zero_outputs(expert: nn.Module) -> None:
    """Start as the zero function with closed cross-attention (PixArt-alpha, section 2.3; DiT, section 3.2).

    diffusers leaves both at random values, which costs a few hundred steps to unlearn.
    """
    for name, parameter in expert.named_parameters():
        if name.startswith("proj_out.") or ".attn2.to_out." in name:
            parameter.zero_()


def predict(expert: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """What `expert` predicts: x (N, C, S, S), t (N,) in [0, 1], text (N, T, W) -> (N, C, S, S)."""
    output: tuple[Tensor] = expert(
        x, encoder_hidden_states=text, timestep=t * TIMESTEP_SCALE, return_dict=False
    )
    return output[0]
