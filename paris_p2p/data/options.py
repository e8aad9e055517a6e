"""What the organiser of a run chooses, and the sizes' defaults.

Owns: `PrepareOptions`, the types of what is passed in from above, refusing what can be refused before any
work, loading the encoders they name. Does not own: what is done with them (`prepare`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from paris_p2p.components.image_features import DINO_V2, load_image_features
from paris_p2p.components.presets import (
    CLIP_TEXT,
    LATENT_PRESETS,
    PUBLISHED_SIDE,
    PUBLISHED_VAE,
    check_preset,
)
from paris_p2p.components.pretrained import Vae, load_text, load_vae
from paris_p2p.data.blocks import Encoders
from paris_p2p.errors import ConfigError
from paris_p2p.ids import NodeId
from paris_p2p.wire.manifest import MAX_CLUSTERS, Latents, LeaseTimes, Recipe

SHORT_LEASE = LeaseTimes(ttl_s=20.0, renew_s=6.0, settle_s=2.0, poll_s=3.0)
"""For demonstrations: a busy machine loses such a lease while it waits for the processor."""
LEASE = LeaseTimes(ttl_s=60.0, renew_s=20.0, settle_s=3.0, poll_s=10.0)
"""Of runs that take hours: what a node costs that stands by is in proportion to how often it looks."""
MAX_NAME_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """What the organiser chose. None: `clusters` 4 for digits and 8 otherwise; `image_size` the images' own
    when small (`ingest.native_side`), 256 for `b2` and `xl2`; `steps` the preset's; `clip_steps`, the small
    CLIP's training, by image size; `name` the source's; `image_encoder`, `text_encoder` and `vae` (a name or
    a folder) the published ones for `b2` and `xl2`, none otherwise: then a small CLIP is trained on the
    images, and pixels are the latents. `device` is the encoders'. `balanced`: clusters of nearly equal size.
    `drop_duplicates`: near-duplicates are left out, not only reported. `restricted`: only the organiser, the
    `claimants` and nodes with a pass may claim roles. `variants`: the kinds of expert that any role may be
    beside the preset's; `variant_of`: (cluster, kind) for experts that must be of one kind, if that is not in
    `variants` no other's (`allowed_variants`)."""

    source: str
    out: Path
    clusters: int | None = None
    preset: str = "tiny"
    image_size: int | None = None
    steps: int | None = None
    clip_steps: int | None = None
    seed: int = 0
    name: str | None = None
    lease: LeaseTimes | None = None
    replicas: int = 2
    restricted: bool = False
    claimants: tuple[NodeId, ...] = ()
    image_encoder: str | None = None
    text_encoder: str | None = None
    vae: str | None = None
    device: str = "cpu"
    balanced: bool = False
    drop_duplicates: bool = False
    variants: tuple[str, ...] = ()
    variant_of: tuple[tuple[int, str], ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind of expert that is named, each once: the recipe's variants beside the preset's own."""
        return tuple(dict.fromkeys((*self.variants, *(kind for _, kind in self.variant_of))))

    @property
    def lease_times(self) -> LeaseTimes:
        """Those of the protocol's table, unless others are given."""
        return self.lease or LEASE

    @property
    def published(self) -> bool:
        """Whether the preset is of the published sizes."""
        return self.preset in LATENT_PRESETS

    @property
    def side(self) -> int | None:
        """Pixels a side to ask for; None: the images' own."""
        return PUBLISHED_SIDE if self.image_size is None and self.published else self.image_size


@dataclass(frozen=True, slots=True)
class StageProgress:
    """How far a stage of `STAGES` is: `done` of `total` (images, steps, shards), None when unknown."""

    stage: str
    done: int
    total: int | None


AddInitial = Callable[[Recipe, Path], tuple[str, ...]]
"""Writes the initial weights of the recipe's variant n into the folder `initial-<n>` of the given one, and
returns a sentence on each for people."""


class MakeRecipe(Protocol):
    """`diffusion.recipes.preset`, given from above: `data` must not import `diffusion`."""

    def __call__(
        self,
        name: str,
        *,
        channels: int,
        image_size: int,
        clusters: int,
        tokens: int,
        text_width: int,
        steps: int | None,
        seed: int,
        latents: Latents | None,
    ) -> Recipe: ...


OnProgress = Callable[[StageProgress], None]


def check_options(options: PrepareOptions) -> None:
    """What can be refused before any work. Raises `ConfigError`."""
    if options.clusters is not None and not 1 <= options.clusters <= MAX_CLUSTERS:
        raise ConfigError(f"{options.clusters} clusters: a run has 1 to {MAX_CLUSTERS}")
    check_preset(options.preset)
    if any(steps is not None and steps < 1 for steps in (options.steps, options.clip_steps)):
        raise ConfigError("training takes at least 1 step")
    if options.name is not None and not 1 <= len(options.name) <= MAX_NAME_CHARACTERS:
        raise ConfigError(f"a run's name has 1 to {MAX_NAME_CHARACTERS} characters")
    if not 0 <= options.seed < 1 << 32:
        raise ConfigError(f"seed {options.seed} is not in 0 to {(1 << 32) - 1}")


def latents_of(vae: Vae | None, side: int) -> Latents | None:
    """What `vae` makes of images of `side` pixels; None without one. Raises `ConfigError`."""
    if vae is None:
        return None
    if side % vae.factor:
        raise ConfigError(
            f"an image size of {side} is no multiple of {vae.factor}, which the VAE asks for: choose another "
            "--image-size"
        )
    return Latents("vae", vae.channels, side // vae.factor, side, scale=vae.scale, shift=vae.shift)


def check_recipe(
    options: PrepareOptions, make_recipe: MakeRecipe, side: int, latents: Latents | None
) -> None:
    """Refuse, before hours of reading, what no expert could be made for: images of `side` pixels, kinds whose
    patches do not fit. What the images and captions hold does not matter to that. Raises `ConfigError`."""
    make_recipe(
        options.preset,
        channels=3,
        image_size=side,
        clusters=options.clusters or 1,
        tokens=77,
        text_width=768,
        steps=options.steps,
        seed=options.seed,
        latents=latents,
    )


def allowed_variants(options: PrepareOptions, recipe: Recipe, cluster: int) -> tuple[int, ...]:
    """Which of the recipe's variants the expert of `cluster` may be; empty: any."""
    names = [variant.name for variant in recipe.experts]
    assigned = {kind for number, kind in options.variant_of if number == cluster}
    wanted = assigned or {names[0], *options.variants}
    allowed = tuple(number for number, name in enumerate(names) if name in wanted)
    return allowed if len(allowed) < len(names) else ()


def check_variant_of(options: PrepareOptions, clusters: int) -> None:
    """Refuse roles that the run will not have. Raises `ConfigError`."""
    odd = sorted({number for number, _ in options.variant_of if number >= clusters})
    if odd:
        raise ConfigError(
            f"--variant-of expert-{odd[0]}: the run's experts are expert-0 to expert-{clusters - 1}"
        )


def load_encoders(options: PrepareOptions) -> Encoders:
    """The pretrained parts, on the device. Raises `ConfigError` when one cannot be had."""
    image, text, vae = options.image_encoder, options.text_encoder, options.vae
    if options.published:
        image, text, vae = image or DINO_V2, text or CLIP_TEXT, vae or PUBLISHED_VAE
    # The names are tried in the order of their cost: a mistyped last one is said after little loading.
    found_vae = load_vae(vae) if vae else None
    found_text = load_text(text) if text else None
    found_image = load_image_features(image) if image else None
    encoders = Encoders(found_image, found_text, found_vae)
    for network in encoders.networks():
        network.to(options.device)
    return encoders


def default_name(source: str) -> str:
    """A run's name, after its source."""
    name = Path(source).expanduser().absolute().name if source != "digits" else source
    return name.split(".")[0][:MAX_NAME_CHARACTERS] or "run"
