"""The sizes that a run may be prepared in, by name, and the published parts that the large ones take.

Owns: the names, and what is known of those parts. Does not own: what a size means
(`diffusion.recipes`), loading parts (`pretrained`).
"""

from paris_p2p.errors import ConfigError

PIXEL_PRESETS = ("tiny", "small")
"""They see pixels unless a VAE is named."""
LATENT_PRESETS = ("b2", "xl2")
"""The published sizes; they see a VAE's latents."""
PRESETS = (*PIXEL_PRESETS, *LATENT_PRESETS)

CLIP_TEXT = "openai/clip-vit-large-patch14"
"""CLIP ViT-L/14: 77 tokens, 768 wide, as the published experts read."""
PUBLISHED_VAE = "stabilityai/sd-vae-ft-mse"
VAE_CHANNELS, VAE_FACTOR, VAE_SCALE = 4, 8, 0.18215
"""Of that VAE: latent channels, pixels a latent, and the factor that brings latents to unit variance."""
PUBLISHED_SIDE = 256
"""Pixels a side that the published experts draw."""


def check_preset(name: str) -> None:
    """Raises `ConfigError` unless `name` is a preset's."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
