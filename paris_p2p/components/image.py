"""The image encoder: a small vision transformer whose features the data is clustered by.

Owns: building an open_clip vision tower from a config, and its folder on disk. Does not own: training it
(`tiny_clip`), clustering (`data.cluster`). It is no component of a run: nodes never need it.
"""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


class ImageEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers ships no types
    """A vision transformer (open_clip's) over square images, average-pooled, without CLIP's projection."""

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        from open_clip.transformer import VisionTransformer

        self.tower = VisionTransformer(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=heads,
            mlp_ratio=mlp_ratio,
            output_dim=width,
            pool_type="avg",
        )
        self.tower.proj = None  # the contrastive projection belongs to the training

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, S, S) in [-1, 1]. Returns features (N, width)."""
        features: Tensor = self.tower(images)
        return features

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments: Any) -> Self:
        """The encoder in `folder`, from safetensors only: diffusers would fall back to a pickle."""
        encoder: Self = super().from_pretrained(folder, **{**arguments, "use_safetensors": True})
        return encoder

    @torch.no_grad()
    def encode_in_batches(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """As `forward`, without gradients, `batch_size` images at once: (N, 3, S, S) -> (N, width)."""
        return torch.cat([self.forward(chunk.to(self.device)) for chunk in torch.split(images, batch_size)])
