"""Pretrained parts as small as can be, in folders as their own libraries write them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL


@pytest.fixture
def vae_folder(tmp_path: Path) -> Callable[..., Path]:
    """`vae_folder(levels)`: an `AutoencoderKL` of random weights; a latent covers 2^(levels - 1) pixels."""

    def make(levels: int = 2, **config: object) -> Path:
        torch.manual_seed(0)
        network = AutoencoderKL(
            block_out_channels=(4,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=2,
            latent_channels=4,
            **config,
        )
        network.save_pretrained(tmp_path / "vae")
        return tmp_path / "vae"

    return make
