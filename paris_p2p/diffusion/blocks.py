"""What the expert in the published layout and the router are both made of.

Owns: the time embedding, the feed-forward layer, tables of modulations. Does not own: the networks
(`published_expert`, `router`); names of attributes here are names of published tensors.
"""

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

FREQUENCIES = 256
"""Width of the sinusoidal encoding of the time (DiT)."""


class TimeEmbedding(nn.Module):
    """A time on the scale 0..1000 as a vector: sinusoids, then two linear layers (DiT, section 3.2)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, time: Tensor) -> Tensor:
        """time: (N,) -> (N, H)."""
        waves = get_timestep_embedding(
            time.float(), FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0
        )  # (N, 256)
        embedded: Tensor = self.mlp(waves.to(self.mlp[0].weight.dtype))  # (N, H)
        return embedded


def feed_forward(hidden_size: int) -> nn.Sequential:
    """The transformer's MLP, four times as wide inside."""
    return nn.Sequential(
        nn.Linear(hidden_size, 4 * hidden_size),
        nn.GELU(approximate="tanh"),
        nn.Linear(4 * hidden_size, hidden_size),
    )


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without affine, then `scale` and `shift`. x: (N, L, H); shift, scale: (N, 1, H)."""
    return functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


@torch.no_grad()
def xavier_(module: nn.Module) -> None:
    """DiT's initialisation of linear layers: Xavier, no bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
