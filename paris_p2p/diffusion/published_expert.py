"""The expert in the published tensor layout: what the published weights load into, name by name.

Owns: the network. Does not own: reading and writing folders of it (`published`), the run's own expert
(`expert`, diffusers' PixArt transformer), which differs in two places: sin-cos positions that are no
parameter, and two linear layers over the text instead of one.

Architecture (arXiv 2510.03434; after PixArt-alpha, Chen et al. 2023): DiT with AdaLN-single, that is one
table of six modulations a block added to one projection of the time; un-normed, un-gated cross-attention to
the text between self-attention and MLP; layer norms without affine.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from paris_p2p.diffusion.blocks import TimeEmbedding, feed_forward, modulated, xavier_

MODEL_CLASS = "PublishedExpert"
TEXT_PROJECTIONS = ("linear", "mlp")


class PublishedExpert(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers ships no types
    """A velocity (or noise) predictor. Its defaults are the published XL/2: 605,970,448 parameters.

    `text_projection`: `linear` as published, or `mlp` (two linear layers, GELU-tanh between them), which is
    how a run's own PixArt experts read their text. Called like a diffusers transformer. Raises `ValueError`
    for sizes that do not fit each other.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        hidden_size: int = 1152,
        in_channels: int = 4,
        out_channels: int = 4,
        patch_size: int = 2,
        sample_size: int = 32,
        text_width: int = 768,
        text_projection: str = "linear",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if text_projection not in TEXT_PROJECTIONS:
            raise ValueError(f"text_projection is one of {TEXT_PROJECTIONS}, not {text_projection!r}")
        if hidden_size % num_attention_heads or sample_size % patch_size:
            raise ValueError("heads must divide the hidden size, and patches the sample")
        grid = sample_size // patch_size
        self.gradient_checkpointing = False
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, hidden_size))
        self.time_embed = TimeEmbedding(hidden_size)
        self.text_proj = _text_projection(text_projection, text_width, hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.layers = nn.ModuleList(
            _Block(hidden_size, num_attention_heads, norm_eps) for _ in range(num_layers)
        )
        self.final_layer = _FinalLayer(hidden_size, patch_size * patch_size * out_channels, norm_eps)
        _initialise(self, grid)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """hidden_states: (N, C, S, S); encoder_hidden_states: (N, T, W); timestep: (N,) or one number, on the
        scale 0..1000. Returns `.sample`, (N, C, S, S), or with `return_dict=False` a tuple of it.

        Raises `ValueError` for images of another size: the positions are learned.
        """
        size, channels = self.config.sample_size, self.config.in_channels
        if tuple(hidden_states.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"this expert sees {channels} x {size} x {size}, not {tuple(hidden_states.shape[1:])}"
            )
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(len(hidden_states))  # (N,)
        x = self.patch_embed(hidden_states).flatten(2).transpose(1, 2) + self.pos_embed  # (N, P, H)
        time = self.time_embed(timestep)  # (N, H)
        shared = self.t_block(time).view(len(time), 6, -1)  # (N, 6, H)
        text = self.text_proj(encoder_hidden_states)  # (N, T, H)
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(layer, x, shared, text)
            else:
                x = layer(x, shared, text)  # (N, P, H)
        sample = self._unpatched(self.final_layer(x, time))  # (N, C, S, S)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _unpatched(self, patches: Tensor) -> Tensor:
        """(N, P, p p C) -> (N, C, S, S)."""
        patch, channels = self.config.patch_size, self.config.out_channels
        grid = self.config.sample_size // patch
        parts = patches.view(-1, grid, grid, patch, patch, channels)  # (N, g, g, p, p, C)
        image: Tensor = parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return image  # (N, C, g p, g p)


class _Block(nn.Module):
    def __init__(self, hidden_size: int, heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale_shift_table = nn.Parameter(torch.empty(6, hidden_size))
        self.attn = nn.MultiheadAttention(hidden_size, heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(hidden_size, heads, batch_first=True)
        self.mlp = feed_forward(hidden_size)

    def forward(self, x: Tensor, shared: Tensor, text: Tensor) -> Tensor:
        modulation = (self.scale_shift_table + shared).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # each (N, 1, H)
        h = modulated(x, shift1, scale1, self.eps)  # (N, P, H)
        x = x + gate1 * self.attn(h, h, h, need_weights=False)[0]  # (N, P, H)
        x = x + self.cross_attn(x, text, text, need_weights=False)[0]  # (N, P, H)
        h = modulated(x, shift2, scale2, self.eps)  # (N, P, H)
        return x + gate2 * self.mlp(h)  # type: ignore[no-any-return]  # (N, P, H)


class _FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale_shift_table = nn.Parameter(torch.empty(2, hidden_size))
        self.linear = nn.Linear(hidden_size, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)  # each (N, 1, H)
        patches: Tensor = self.linear(modulated(x, shift, scale, self.eps))  # (N, P, p p C)
        return patches


def _text_projection(kind: str, text_width: int, hidden_size: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(text_width, hidden_size)
    return nn.Sequential(
        nn.Linear(text_width, hidden_size),
        nn.GELU(approximate="tanh"),
        nn.Linear(hidden_size, hidden_size),
    )


@torch.no_grad()
def _initialise(expert: PublishedExpert, grid: int) -> None:
    """As PixArt-alpha starts: Xavier, sin-cos positions, small tables, cross-attention and output closed."""
    xavier_(expert)
    nn.init.xavier_uniform_(expert.patch_embed.weight.flatten(1))  # a linear layer over patches
    expert.pos_embed.copy_(get_2d_sincos_pos_embed(expert.pos_embed.shape[-1], grid, output_type="pt")[None])
    for name, parameter in expert.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.startswith("final_layer.linear.") or ".cross_attn.out_proj." in name:
            parameter.zero_()
