"""Recipes by name: the presets `paris-node prepare` offers.

Owns: sizes and hyper-parameters, each with its reason. Does not own: the recipe's format (`wire.manifest`).

`tiny` trains on a CPU core in a minute, `small` in hours; both see pixels by default. `b2` and `xl2` are the
published sizes (DiT-B/2 and DiT-XL/2, arXiv 2510.03434) and see the latents of a VAE. docs/models.md has the
table of sizes and what they need.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paris_p2p.components.presets import (
    PIXEL_PRESETS,
    PRESETS,
    VAE_CHANNELS,
    VAE_FACTOR,
    VAE_SCALE,
    check_preset,
)
from paris_p2p.diffusion import expert, networks, published_expert, router
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

SMALL_IMAGE = 16
"""Up to this many pixels a side, 4 to 16 patches carry the whole image and the smallest net will do."""
PIXEL_SIDES = range(4, 129, 4)
"""Image sides that the pixel presets take: whole patches, and no more of them than a CPU can pay."""
OBJECTIVES = ("flow_matching", "ddpm")


@dataclass(frozen=True, slots=True)
class _Size:
    """A kind of expert: `layers` blocks of `heads` x `head_dim`, over patches of `patch` latents a side."""

    layers: int
    heads: int
    head_dim: int
    patch: int

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


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
    latents: Latents | None = None,
    variants: Sequence[str] = (),
) -> Recipe:
    """The recipe called `name` for images of `channels` x `image_size` x `image_size`.

    `tokens`, `text_width`: shape of a caption's encoding. `steps` replaces the preset's training length, for
    every role. `router_text=False` is the router as published. `latents`: what the experts see; None is
    pixels for `tiny` and `small`, and the published VAE's latents for `b2` and `xl2`. `variants`: further
    kinds of expert that a volunteer may train instead of the preset's own, each `SIZE` or `SIZE:ddpm`, SIZE a
    preset or a preset with `-published` (the published layout's network). Raises `ConfigError`.
    """
    check_preset(name)
    seen = _latents(name, channels, image_size) if latents is None else latents
    kinds = (name, *(kind for kind in variants if kind != name))
    check_kinds(kinds)
    expert_steps, router_steps = _lengths(name, image_size, steps)
    return Recipe(
        latents=seen,
        captions=Captions(tokens, text_width),
        experts=tuple(_variant(kind, seen, text_width, clusters, expert_steps, seed) for kind in kinds),
        router=RouterRecipe(
            router_text,
            _router(name, seen, clusters, text_width if router_text else None),
            _router_training(name, router_steps, seed),
        ),
        sampling=_sampling(name),
        checkpoint_interval_steps=_interval(name, expert_steps),
    )


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises `ConfigError` unless each is a kind of expert as `preset` takes it, and none is there twice."""
    for kind in kinds:
        _parse_kind(kind)
    if len(set(kinds)) != len(kinds):
        raise ConfigError(f"an expert variant is named twice: {', '.join(kinds)}")


def _latents(name: str, channels: int, image_size: int) -> Latents:
    """What the experts of preset `name` see by default."""
    if name in PIXEL_PRESETS:
        if channels not in (1, 3) or image_size not in PIXEL_SIDES:
            raise ConfigError(
                f"the {name} preset takes grey or RGB images of 4 to 128 pixels a side, in steps of 4"
            )
        return Latents("pixel", channels, image_size, image_size, scale=1.0, shift=0.0)
    if channels != 3 or image_size % (2 * VAE_FACTOR) or not 64 <= image_size <= 1024:
        raise ConfigError(
            f"the {name} preset takes RGB images of 64 to 1024 pixels a side, in steps of {2 * VAE_FACTOR}"
        )
    return Latents("vae", VAE_CHANNELS, image_size // VAE_FACTOR, image_size, scale=VAE_SCALE, shift=0.0)


def _size(name: str, latents: Latents) -> _Size:
    """The expert of preset `name` for images of `latents.size` a side."""
    side = latents.size
    if name == "tiny":
        # Hidden 128; 192 halves the speed on a core (94 to 52 images/s at 32 px). 4 tokens at 8 px, 64 at 32.
        return _Size(3 if side <= SMALL_IMAGE else 4, heads=4, head_dim=32, patch=4)
    if name == "small":
        # 57 to 86 images/s in training on two cores at 64 tokens; the smallest that gains from bf16.
        return _Size(layers=6, heads=6, head_dim=32, patch=2 if side <= SMALL_IMAGE or side % 4 else 4)
    if name == "b2":
        return _Size(layers=12, heads=12, head_dim=64, patch=2)
    return _Size(layers=28, heads=16, head_dim=72, patch=2)


def _variant(
    kind: str, latents: Latents, text_width: int, clusters: int, steps: int, seed: int
) -> ExpertVariant:
    """The variant called `kind`."""
    base, published, objective = _parse_kind(kind)
    size = _size(base, latents)
    if latents.size % size.patch:
        raise ConfigError(
            f"{kind} has patches of {size.patch}, which {latents.size} latents a side do not divide into"
        )
    architecture = (_published if published else _expert)(size, latents, text_width)
    training = _expert_training(base, steps, clusters, seed)
    return ExpertVariant(kind, objective, architecture, training)


def _parse_kind(kind: str) -> tuple[str, bool, str]:
    """Size, whether the published layout's network, and objective of `SIZE`, `SIZE-published`, either with
    `:ddpm`. Raises `ConfigError`."""
    network, _, objective = kind.partition(":")
    base = network.removesuffix("-published")
    if base not in PRESETS or (objective or "flow_matching") not in OBJECTIVES:
        raise ConfigError(
            f"there is no expert variant {kind!r}: use one of {', '.join(PRESETS)}, with or without "
            "-published, with or without :ddpm"
        )
    return base, network != base, objective or "flow_matching"


def _expert(size: _Size, latents: Latents, text_width: int) -> Architecture:
    config: dict[str, Any] = {
        "num_layers": size.layers,
        "num_attention_heads": size.heads,
        "attention_head_dim": size.head_dim,
        "cross_attention_dim": size.hidden,  # None would silently drop the text
        "in_channels": latents.channels,
        "out_channels": latents.channels,  # no learned variance
        "patch_size": size.patch,
        "sample_size": latents.size,
        "caption_channels": text_width,
        "use_additional_conditions": False,  # PixArt's resolution and aspect inputs
    }
    return networks.describe(expert.MODEL_CLASS, config)


def _published(size: _Size, latents: Latents, text_width: int) -> Architecture:
    config: dict[str, Any] = {
        "num_layers": size.layers,
        "num_attention_heads": size.heads,
        "hidden_size": size.hidden,
        "in_channels": latents.channels,
        "out_channels": latents.channels,
        "patch_size": size.patch,
        "sample_size": latents.size,
        "text_width": text_width,
    }
    return networks.describe(published_expert.MODEL_CLASS, config)


def _router(name: str, latents: Latents, clusters: int, text_width: int | None) -> Architecture:
    # Telling clusters apart is easier than painting them, and every step of sampling asks the router: at
    # these sizes it costs a fifth to two fifths of what an expert does.
    sizes = {"tiny": (128, 2, 4, 4), "small": (128, 3, 4, 4)}
    hidden, layers, heads, patch = sizes.get(name, (768, 12, 12, 2))  # DiT-B/2, as published
    config: dict[str, Any] = {
        "clusters": clusters,
        "in_channels": latents.channels,
        "sample_size": latents.size,
        "patch_size": patch if latents.size % patch == 0 else 2,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_attention_heads": heads,
        "text_width": text_width,
    }
    return networks.describe(router.MODEL_CLASS, config)


def _lengths(name: str, image_size: int, steps: int | None) -> tuple[int, int]:
    """Optimizer steps of an expert and of the router.

    Digits, 4 clusters, share of samples a classifier reads as the digit asked for, by steps of an expert:
    150 0.980, 200 0.995, 250 1.000; about 70 s of one core for 4 experts of 200 steps and the router.
    """
    if steps is not None:
        return steps, steps
    if name == "tiny":
        return (200, 150) if image_size <= SMALL_IMAGE else (800, 400)
    # The published run's lengths are not known: about three passes over 1.4 million images a cluster.
    return (4000, 2000) if name == "small" else (120_000, 60_000)


def _interval(name: str, steps: int) -> int:
    """Steps between checkpoints. A dead node costs its successor a quarter of a small role at most; of a big
    one an hour of a GPU or so, for bundles of 2 to 10 GB."""
    quarter = max(1, steps // 4)
    return quarter if name in PIXEL_PRESETS else min(2000, quarter)


def _sampling(name: str) -> Sampling:
    if name in PIXEL_PRESETS:
        # On digits 10 steps and guidance 1.5 to 3 score the same by a classifier: this is the safe middle.
        return Sampling(steps=20, guidance_scale=2.0, top_k=2, scheduler="euler")
    return Sampling(steps=50, guidance_scale=7.5, top_k=2, scheduler="euler")  # as published


def _expert_training(name: str, steps: int, clusters: int, seed: int) -> Training:
    if name not in PIXEL_PRESETS:
        return _big_training(steps, max(1, 256 // clusters), seed)
    tiny = name == "tiny"
    return Training(
        steps=steps,
        batch_size=64,
        learning_rate=2e-3 if tiny else 1e-3,  # a million parameters take twenty times what 600 million do
        weight_decay=0.0,  # nothing overfits in so few steps
        lr_schedule="cosine",  # a short run must land, not hover
        warmup_steps=min(20 if tiny else 100, steps // 10),  # Adam's second moment is noise before that
        gradient_clip=1.0,
        ema_decay=0.99 if tiny else 0.999,  # averages the last hundred or thousand steps
        caption_dropout=0.1,  # for classifier-free guidance
        timestep_sampling="logit_normal",  # the middle of the path is where there is most to learn
        precision="fp32" if tiny else "bf16",  # pays from hidden 192 up, where the hardware has it; else fp32
        seed=seed,
    )


def _big_training(steps: int, batch_size: int, seed: int) -> Training:
    """As the parent paper trains (arXiv 2501.05450): the monolithic batch divided among the experts."""
    return Training(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-4,
        weight_decay=0.0,  # as DiT
        lr_schedule="constant",  # the length is a guess, and a run may be prolonged
        warmup_steps=min(1000, steps // 10),
        gradient_clip=1.0,
        ema_decay=0.9999,
        caption_dropout=0.1,
        timestep_sampling="logit_normal",
        precision="bf16",
        seed=seed,
    )


def _router_training(name: str, steps: int, seed: int) -> Training:
    small = name in PIXEL_PRESETS
    return Training(
        steps=steps,
        batch_size=128 if small else 256,
        learning_rate=1e-3 if small else 1e-4,
        weight_decay=0.01,  # it sees all data many times, and must stay calibrated
        lr_schedule="cosine",
        warmup_steps=min(20 if small else 1000, steps // 10),
        gradient_clip=1.0,
        ema_decay=0.99 if small else 0.9999,
        caption_dropout=0.1,  # so that it can route the empty prompt too
        timestep_sampling="uniform",  # it is asked at every step of the path alike
        precision="fp32" if small else "bf16",
        seed=seed,
    )
