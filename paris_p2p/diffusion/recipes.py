"""Recipes by name: the presets `paris-node prepare` offers.

Owns: sizes and hyper-parameters, each with its reason. Does not own: the recipe's format (`wire.manifest`).
"""

from typing import Any

from paris_p2p.diffusion import expert, networks, router
from paris_p2p.errors import ConfigError
from paris_p2p.wire.manifest import (
    Architecture,
    Captions,
    ExpertVariant,
    Latents,
    Recipe,
    RouterRecipe,
    Sampling,
    Training,
)

PRESETS = ("tiny",)
SMALL_IMAGE = 16
"""Up to this many pixels a side, 4 to 16 patches carry the whole image and the smallest net will do."""


def preset(
    name: str,
    *,
    channels: int,
    image_size: int,
    clusters: int,
    tokens: int,
    text_width: int,
    steps: int | None = None,
    seed: int = 0,
    router_text: bool = True,
) -> Recipe:
    """The recipe called `name` for images of `channels` x `image_size` x `image_size`.

    `tokens`, `text_width`: shape of a caption's encoding. `steps` replaces the preset's training length, for
    every role. `router_text=False` is the router as published. Raises `ConfigError`.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
    if channels not in (1, 3) or image_size % 4 or not 4 <= image_size <= 128:
        raise ConfigError("the tiny preset takes grey or RGB images of 4 to 128 pixels a side, in steps of 4")
    expert_steps, router_steps = _lengths(image_size, steps)
    return Recipe(
        latents=Latents("pixel", channels, image_size, image_size, scale=1.0, shift=0.0),
        captions=Captions(tokens, text_width),
        experts=(
            ExpertVariant(
                "tiny",
                "flow_matching",
                _expert(channels, image_size, text_width),
                _expert_training(expert_steps, seed),
            ),
        ),
        router=RouterRecipe(
            router_text,
            _router(channels, image_size, clusters, text_width if router_text else None),
            _router_training(router_steps, image_size, seed),
        ),
        # On digits 10 steps and guidance 1.5 to 3 score the same by a classifier: this is the safe middle.
        sampling=Sampling(steps=20, guidance_scale=2.0, top_k=2, scheduler="euler"),
        # A dead node costs its successor at most a quarter of a role.
        checkpoint_interval_steps=max(1, expert_steps // 4),
    )


def _lengths(image_size: int, steps: int | None) -> tuple[int, int]:
    """Optimizer steps of an expert and of the router.

    Digits, 4 clusters, share of samples a classifier reads as the digit asked for, by steps of an expert:
    150 0.980, 200 0.995, 250 1.000; about 70 s of one core for 4 experts of 200 steps and the router.
    """
    if steps is not None:
        return steps, steps
    return (200, 150) if image_size <= SMALL_IMAGE else (800, 400)


def _expert(channels: int, image_size: int, text_width: int) -> Architecture:
    heads, head_dim = 4, 32  # hidden 128; 192 halves the speed on a core (94 to 52 images/s at 32 px)
    config: dict[str, Any] = {
        "num_layers": 3 if image_size <= SMALL_IMAGE else 4,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,  # None would silently drop the text
        "in_channels": channels,
        "out_channels": channels,  # no learned variance
        "patch_size": 4,  # 4 tokens at 8 px, 64 at 32 px: what a CPU core can pay
        "sample_size": image_size,
        "caption_channels": text_width,
        "use_additional_conditions": False,  # PixArt's resolution and aspect inputs
    }
    return networks.describe(expert.MODEL_CLASS, config)


def _router(channels: int, image_size: int, clusters: int, text_width: int | None) -> Architecture:
    config: dict[str, Any] = {
        "clusters": clusters,
        "in_channels": channels,
        "sample_size": image_size,
        "patch_size": 4,
        "hidden_size": 128,
        "num_layers": 2,  # telling clusters apart is easier than painting them
        "num_attention_heads": 4,
        "text_width": text_width,
    }
    return networks.describe(router.MODEL_CLASS, config)


def _expert_training(steps: int, seed: int) -> Training:
    return Training(
        steps=steps,
        batch_size=64,
        learning_rate=2e-3,  # a million parameters take twenty times what 600 million do
        weight_decay=0.0,  # nothing overfits in so few steps
        lr_schedule="cosine",  # a short run must land, not hover
        warmup_steps=min(20, steps // 10),  # Adam's second moment is noise before that
        gradient_clip=1.0,
        ema_decay=0.99,  # averages the last hundred steps or so
        caption_dropout=0.1,  # for classifier-free guidance
        timestep_sampling="logit_normal",  # the middle of the path is where there is most to learn
        precision="fp32",  # bf16 pays on CPUs from hidden 192 up only
        seed=seed,
    )


def _router_training(steps: int, image_size: int, seed: int) -> Training:
    return Training(
        steps=steps,
        batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.01,  # it sees all data many times, and must stay calibrated
        lr_schedule="cosine",
        warmup_steps=min(20, steps // 10),
        gradient_clip=1.0,
        ema_decay=0.99,
        caption_dropout=0.1,  # so that it can route the empty prompt too
        timestep_sampling="uniform",  # it is asked at every step of the path alike
        precision="fp32",
        seed=seed,
    )
