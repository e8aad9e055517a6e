"""The router: p(cluster | x_t, t), or p(cluster | x_t, t, text).

Owns: the network, in the published tensor layout (DiT-B at full size: AdaLN-Zero blocks, a CLS token, a head
of two linear layers). Does not own: its training (`training`) or what its weights do (`sampling`).

The published router reads no text. At t near 1 it then knows nothing about the image to come, and wherever
clusters go with prompts it sends a prompt to the wrong expert. With `text_width` the text joins t in the
condition of every block, and it computes the posterior that the mixture's derivation asks for. (Appending the
text tokens to the sequence instead, one run on digits: held-out loss 0.308 against 0.320, and 0.622 without
text, at 3.5 times the time of a step.)
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from paris_p2p.diffusion.blocks import TimeEmbedding, feed_forward, modulated, xavier_

MODEL_CLASS = "Router"
POOLS = 4
"""Averages a text-aware router takes over a caption's tokens."""


class Router(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers ships no types
    """Logits over clusters. Its default sizes are the published router's: 129,136,904 parameters.

    `time_scale`: what t is multiplied by before its sinusoids are taken. A run's own router takes t in [0, 1]
    and has 1000; a published one takes 0..1000 as its experts do and has 1. `norm_eps`: of the blocks' norms
    (published: 1e-5).
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        clusters: int = 8,
        in_channels: int = 4,
        sample_size: int = 32,
        patch_size: int = 2,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        text_width: int | None = None,
        norm_eps: float = 1e-6,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        grid = sample_size // patch_size
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, hidden_size))
        self.cls_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_embed = TimeEmbedding(hidden_size)
        self.text_embed = _TextEmbedding(text_width, hidden_size) if text_width is not None else None
        self.layers = nn.ModuleList(
            _Block(hidden_size, num_attention_heads, norm_eps) for _ in range(num_layers)
        )
        self.head = nn.Sequential(
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.LayerNorm(hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, clusters),
        )
        self.gradient_checkpointing = False  # as diffusers' `enable_gradient_checkpointing` sets it
        _initialise(self, grid)

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None) -> Tensor:
        """x: (N, C, S, S), t: (N,) or one number, in [0, 1] (see `time_scale`), text: (N, T, W), read only by
        a text-aware router.

        Returns logits (N, K). Raises `ValueError` when a text-aware router gets no text.
        """
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)  # (N, P, H)
        cls_token = self.cls_token.expand(len(x), -1, -1)  # (N, 1, H)
        sequence = torch.cat([cls_token, patches + self.pos_embed], dim=1)  # (N, 1 + P, H)
        t = torch.as_tensor(t, device=x.device).expand(len(x))  # (N,)
        condition = self.time_embed(t * self.config.time_scale)  # (N, H)
        if self.text_embed is not None:
            if text is None:
                raise ValueError("this router is text-aware: it needs the prompt's encoding")
            condition = condition + self.text_embed(text)  # (N, H)
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                sequence = self._gradient_checkpointing_func(layer, sequence, condition)
            else:
                sequence = layer(sequence, condition)  # (N, 1 + P, H)
        logits: Tensor = self.head(sequence[:, 0])  # (N, K)
        return logits


def route(router: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Logits (N, K), F32, of a run's own or a published router. x: (N, C, S, S), t: (N,) in [0, 1], text:
    (N, T, W). Computed in the router's own dtype."""
    scale = getattr(getattr(router, "config", None), "time_scale", 1000.0)
    dtype = next(router.parameters(), x).dtype
    logits: Tensor = router(x.to(dtype), t * (1000.0 / scale), text.to(dtype))
    return logits.float()


class _TextEmbedding(nn.Module):
    """A caption as one vector: several learned averages over its tokens, then two linear layers."""

    def __init__(self, text_width: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_width)
        self.score = nn.Linear(text_width, POOLS)
        self.mlp = nn.Sequential(
            nn.Linear(POOLS * text_width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, text: Tensor) -> Tensor:
        text = self.norm(text)  # (N, T, W)
        share = self.score(text).softmax(dim=1)  # (N, T, A): each pool's attention over the tokens
        pooled = torch.einsum("nta,ntw->naw", share, text).flatten(1)  # (N, A W)
        embedded: Tensor = self.mlp(pooled)  # (N, H)
        return embedded


class _Block(nn.Module):
    """A transformer block with AdaLN-Zero (DiT, figure 3)."""

    def __init__(self, hidden_size: int, heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.attn = nn.MultiheadAttention(hidden_size, heads, batch_first=True)
        self.mlp = feed_forward(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition)[:, None]  # (N, 1, 6H)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # each (N, 1, H)
        h = modulated(x, shift1, scale1, self.eps)  # (N, L, H)
        x = x + gate1 * self.attn(h, h, h, need_weights=False)[0]  # (N, L, H)
        h = modulated(x, shift2, scale2, self.eps)  # (N, L, H)
        return x + gate2 * self.mlp(h)  # type: ignore[no-any-return]  # (N, L, H)


@torch.no_grad()
def _initialise(router: Router, grid: int) -> None:
    """DiT's initialisation: Xavier, blocks closed, and a head that starts undecided."""
    xavier_(router)
    nn.init.xavier_uniform_(router.patch_embed.weight.flatten(1))  # a linear layer over patches
    router.pos_embed.copy_(get_2d_sincos_pos_embed(router.pos_embed.shape[-1], grid, output_type="pt")[None])
    nn.init.normal_(router.cls_token, std=0.02)
    for name, parameter in router.named_parameters():
        if ".adaLN_modulation.1." in name or name.startswith("head.4."):
            parameter.zero_()
