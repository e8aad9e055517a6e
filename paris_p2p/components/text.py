"""The text encoder: a CLIP text tower that turns token ids into the encodings the experts read.

Owns: building an open_clip text tower from a config, its folder on disk (`config.json`,
`diffusion_pytorch_model.safetensors`). Does not own: tokens (`tokenizer`), training a tower (`tiny_clip`).
open_clip is imported when a tower is built, not with this module: it drags in torchvision and timm.
"""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from paris_p2p.components import clip_folder
from paris_p2p.errors import ConfigError

# A config comes from the network: bound what building it may allocate.
MAX_VOCABULARY = 1 << 20
MAX_CONTEXT_LENGTH = 4096
MAX_WIDTH = 8192
MAX_LAYERS = 128


class TextEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers ships no types
    """A causal transformer over tokens (CLIP, Radford et al. 2021, section 2.4), without CLIP's projection.

    The defaults are CLIP ViT-L/14's text tower (`quick_gelu` as OpenAI trained it). `context_length` is the
    most tokens a caption may have. Token 0 pads; the end-of-text token is the highest id of the vocabulary.
    Raises `ValueError` for sizes out of range.
    """

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        vocab_size: int = 49408,
        context_length: int = 77,
        width: int = 768,
        heads: int = 12,
        layers: int = 12,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(vocab_size, context_length, width, heads, layers, mlp_ratio)
        from open_clip.transformer import QuickGELU, TextTransformer

        self.tower = TextTransformer(
            context_length=context_length,
            vocab_size=vocab_size,
            width=width,
            heads=heads,
            layers=layers,
            mlp_ratio=mlp_ratio,
            output_dim=None,
            act_layer=QuickGELU if quick_gelu else nn.GELU,
            output_tokens=True,
        )

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: (N, T) int64, T <= context_length. Returns the last hidden states after the final norm,
        (N, T, width), padding positions included (the published experts attend to them too)."""
        return self.encode(token_ids)[1]

    def encode(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both views of (N, T) token ids: the hidden state at the end-of-text token (N, width), and the last
        hidden states (N, T, width)."""
        pooled, tokens = self.tower(token_ids)
        return pooled, tokens

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments: Any) -> Self:
        """The encoder in `folder`, ours or a CLIP text model of the transformers library, from safetensors
        only: diffusers would fall back to a pickle. Raises `ConfigError` for a foreign one that does not fit.
        """
        if clip_folder.is_clip_folder(Path(folder)):
            return cls._from_clip(Path(folder), arguments.get("torch_dtype") or torch.float32)
        encoder: Self = super().from_pretrained(folder, **{**arguments, "use_safetensors": True})
        return encoder

    @classmethod
    def _from_clip(cls, folder: Path, dtype: torch.dtype) -> Self:
        sizes = clip_folder.encoder_arguments(folder)
        try:
            encoder: Self = cls(**sizes)
            encoder.load_state_dict(clip_folder.encoder_state(folder, sizes["layers"], dtype), assign=True)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{folder} is no CLIP text model: {error}") from None
        encoder.to(dtype).eval()
        return encoder

    @torch.no_grad()
    def encode_in_batches(self, token_ids: Tensor, batch_size: int = 256) -> Tensor:
        """As `forward`, without gradients, `batch_size` captions at once: (N, T) -> (N, T, width)."""
        chunks = torch.split(token_ids, batch_size)
        return torch.cat([self.forward(chunk.to(self.device)) for chunk in chunks])


def _check_sizes(
    vocab_size: int, context_length: int, width: int, heads: int, layers: int, mlp_ratio: float
) -> None:
    in_range = (
        2 <= vocab_size <= MAX_VOCABULARY
        and 2 <= context_length <= MAX_CONTEXT_LENGTH
        and 1 <= width <= MAX_WIDTH
        and 1 <= layers <= MAX_LAYERS
        and 0 < mlp_ratio <= 16
    )
    if not in_range or heads < 1 or width % heads:
        raise ValueError("a text encoder size is out of range, or heads do not divide width")
