"""The run manifest: everything that defines a run, signed by its organiser and named by its hash.

Owns: the format, its limits, signing and checking. A signed manifest file is canonical msgpack
`{"body": bytes, "signature": bytes}`; the run id is SHA-256 of `body`; the signature is over
`SIGNING_CONTEXT + body` by the organiser's key, which stands in the body. Any changed bit is refused.
Does not own: making a model out of a recipe (`diffusion`), or making a recipe (`data`).
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from paris_p2p.errors import ManifestError, ParisError
from paris_p2p.ids import ROUTER, NodeId, Role, RunId, expert_role
from paris_p2p.wire import canonical
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import NODE_ID_BYTES, SIGNATURE_BYTES, Identity, verify

FORMAT = 1
MAX_MANIFEST_BYTES = 4 << 20
MAX_CLUSTERS = 1024
MAX_TENSORS = 20_000
MAX_CLAIMANTS = 4096
SIGNING_CONTEXT = b"paris-p2p run manifest 1\0"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a weights file: exact `name`, safetensors `dtype` (`F32`, `BF16`, …) and `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network: `model_class` names its builder in `diffusion`, `config` holds its keyword arguments."""

    model_class: str
    config: dict[str, Any]
    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        if len(self.tensors) > MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS} tensors")


@dataclass(frozen=True, slots=True)
class Training:
    """How one network is trained. `batch_size` images a step, `steps` optimizer steps.

    `lr_schedule`: `cosine` or `constant`, after `warmup_steps` linear ones. `caption_dropout`: the share
    of captions replaced by the empty one. `timestep_sampling`: `logit_normal` or `uniform` over [0, 1].
    `precision`: `fp32` or `bf16` (autocast). `seed` fixes initial weights, data order and noise.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    lr_schedule: str
    warmup_steps: int
    gradient_clip: float
    ema_decay: float
    caption_dropout: float
    timestep_sampling: str
    precision: str
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.warmup_steps < 0:
            raise ValueError("steps and batch_size must be at least 1, warmup_steps at least 0")
        if not (0 <= self.ema_decay < 1 and 0 <= self.caption_dropout <= 1 and self.learning_rate > 0):
            raise ValueError("ema_decay, caption_dropout or learning_rate is out of range")
        if self.lr_schedule not in ("cosine", "constant"):
            raise ValueError(f"unknown lr_schedule {self.lr_schedule!r}")
        if self.timestep_sampling not in ("logit_normal", "uniform"):
            raise ValueError(f"unknown timestep_sampling {self.timestep_sampling!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"unknown precision {self.precision!r}")


@dataclass(frozen=True, slots=True)
class ExpertVariant:
    """One kind of network an expert may be: `objective` is `flow_matching` (v = eps - x0) or `ddpm` (eps).

    `initial`: the item whose weights file every expert of this kind starts from; without one each starts from
    its own random weights."""

    name: str
    objective: str
    architecture: Architecture
    training: Training
    initial: ContentRef | None = canonical.optional(None)  # noqa: RUF009 - a `dataclasses.field`

    def __post_init__(self) -> None:
        if self.objective not in ("flow_matching", "ddpm"):
            raise ValueError(f"unknown objective {self.objective!r}")


@dataclass(frozen=True, slots=True)
class RouterRecipe:
    """The router: p(cluster | x_t, t) as published, or p(cluster | x_t, t, text) when `text` is true."""

    text: bool
    architecture: Architecture
    training: Training


@dataclass(frozen=True, slots=True)
class Latents:
    """What the experts see: x0 of shape (N, channels, size, size).

    `space` `pixel`: images scaled to [-1, 1], `image_size` == `size`, no VAE.
    `space` `vae`: `(encode(image) - shift) * scale` of the component `vae`.
    """

    space: str
    channels: int
    size: int
    image_size: int
    scale: float
    shift: float

    def __post_init__(self) -> None:
        if self.space not in ("pixel", "vae"):
            raise ValueError(f"unknown latent space {self.space!r}")
        if not (1 <= self.channels <= 64 and 1 <= self.size <= 4096 and 1 <= self.image_size <= 16384):
            raise ValueError("latent sizes are out of range")


@dataclass(frozen=True, slots=True)
class Captions:
    """What the experts read: a text encoding of shape (N, tokens, width) from component `text_encoder`."""

    tokens: int
    width: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """Defaults for generating. `top_k`: experts a step (0: all). `scheduler`: `euler`, `heun`, `unipc`
    or `dpm`."""

    steps: int
    guidance_scale: float
    top_k: int
    scheduler: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """How every role is trained. `experts` lists the allowed variants; the first is the default."""

    latents: Latents
    captions: Captions
    experts: tuple[ExpertVariant, ...]
    router: RouterRecipe
    sampling: Sampling
    checkpoint_interval_steps: int

    def __post_init__(self) -> None:
        if not self.experts or self.checkpoint_interval_steps < 1:
            raise ValueError("a recipe needs an expert variant and a checkpoint interval")


@dataclass(frozen=True, slots=True)
class Cluster:
    """One expert's data: `images` in the training shard `train`, `heldout_images` in the shard `heldout`.

    `variants`: which of the recipe's variants this expert may be, in rising order; empty: any of them."""

    index: int
    images: int
    heldout_images: int
    train: ContentRef
    heldout: ContentRef
    variants: tuple[int, ...] = canonical.optional(())


MIN_LEASE_S = 0.5


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds. A claim lives `ttl_s` unless renewed every `renew_s`; a bid waits `settle_s`; free or stale
    roles are looked for every `poll_s`. None is below `MIN_LEASE_S`: at each of them every member reads or
    writes records, so an organiser could make a run's members flood the network."""

    ttl_s: float
    renew_s: float
    settle_s: float
    poll_s: float

    def __post_init__(self) -> None:
        if not MIN_LEASE_S <= self.settle_s < self.ttl_s <= 3600:
            raise ValueError(f"lease times need {MIN_LEASE_S} <= settle_s < ttl_s <= 3600")
        if not MIN_LEASE_S <= self.renew_s <= self.ttl_s / 2:
            raise ValueError(f"lease times need {MIN_LEASE_S} <= renew_s <= ttl_s / 2")
        if not MIN_LEASE_S <= self.poll_s <= 3600:
            raise ValueError(f"poll_s is not between {MIN_LEASE_S} and 3600")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A run. `components` maps `text_encoder`, `tokenizer` and, in latent space, `vae` to their items.

    `replicas`: how many peers beside the trainer should hold each newest checkpoint.
    `example_prompts`: captions to show newcomers (at most 64, 200 characters each).
    `restricted`: only the organiser, the `claimants` and nodes with the organiser's pass may claim roles and
    speak about checkpoints (`core.access`); anybody may hold and serve content.
    `max_roles_per_node`: so many live claims of one key count (`core.assignment.honoured`), its newest.
    """

    format: int
    name: str
    organiser: NodeId
    recipe: Recipe
    clusters: tuple[Cluster, ...]
    components: dict[str, ContentRef]
    lease: LeaseTimes
    replicas: int
    example_prompts: tuple[str, ...]
    restricted: bool = canonical.optional(False)
    claimants: tuple[NodeId, ...] = canonical.optional(())
    max_roles_per_node: int = canonical.optional(1)

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= 64:
            raise ValueError("name must have 1 to 64 characters")
        if len(self.organiser) != NODE_ID_BYTES:
            raise ValueError("organiser is not a 32-byte key")
        if not 1 <= len(self.clusters) <= MAX_CLUSTERS:
            raise ValueError(f"a run has 1 to {MAX_CLUSTERS} clusters")
        if [cluster.index for cluster in self.clusters] != list(range(len(self.clusters))):
            raise ValueError("clusters are not numbered 0, 1, 2, …")
        kinds = set(range(len(self.recipe.experts)))
        if any(list(cluster.variants) != sorted(kinds & {*cluster.variants}) for cluster in self.clusters):
            raise ValueError("a cluster's variants are not numbers of the recipe's, each once, rising")
        if not 0 <= self.replicas <= 64 or len(self.components) > 16:
            raise ValueError("replicas or components out of range")
        if not 1 <= self.max_roles_per_node <= MAX_CLUSTERS + 1:
            raise ValueError("max_roles_per_node is out of range")
        if len(self.example_prompts) > 64 or any(len(prompt) > 200 for prompt in self.example_prompts):
            raise ValueError("too many or too long example prompts")
        if len(self.claimants) > MAX_CLAIMANTS or any(len(key) != NODE_ID_BYTES for key in self.claimants):
            raise ValueError(f"claimants are at most {MAX_CLAIMANTS} keys of 32 bytes")
        if self.claimants and not self.restricted:
            raise ValueError("claimants are named only in a restricted run")

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every role of the run: the experts in order, then the router."""
        return (*(expert_role(cluster.index) for cluster in self.clusters), ROUTER)

    def variants(self, role: Role) -> tuple[int, ...]:
        """The variants that `role` may be, its default first: an expert's of the recipe's, the router's 0."""
        if role == ROUTER:
            return (0,)
        return self._cluster(role).variants or tuple(range(len(self.recipe.experts)))

    def training(self, role: Role, variant: int | None = None) -> Training:
        """How `role` is trained (an expert as `variant`, its default for None)."""
        return self.recipe.router.training if role == ROUTER else self._expert(role, variant).training

    def architecture(self, role: Role, variant: int | None = None) -> Architecture:
        """The network of `role` (an expert as `variant`, its default for None)."""
        recipe = self.recipe
        return recipe.router.architecture if role == ROUTER else self._expert(role, variant).architecture

    def initial(self, role: Role) -> tuple[ContentRef | None, ...]:
        """The item each of the recipe's variants starts from as `role`; None for random weights, and for a
        variant that the role may not be."""
        if role == ROUTER:
            return ()
        allowed = self.variants(role)
        experts = enumerate(self.recipe.experts)
        return tuple(variant.initial if number in allowed else None for number, variant in experts)

    def shards(self, role: Role) -> tuple[ContentRef, ...]:
        """The items `role` needs for training: its own cluster's, or every cluster's for the router."""
        wanted = self.clusters if role == ROUTER else (self._cluster(role),)
        return tuple(ref for cluster in wanted for ref in (cluster.train, cluster.heldout))

    def _cluster(self, role: Role) -> Cluster:
        return self.clusters[int(role.removeprefix("expert-"))]

    def _expert(self, role: Role, variant: int | None) -> ExpertVariant:
        return self.recipe.experts[self.variants(role)[0] if variant is None else variant]


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A checked manifest with the exact bytes it came from. `run_id` = SHA-256 of `body`."""

    manifest: Manifest
    run_id: RunId
    data: bytes


@dataclass(frozen=True, slots=True)
class _Envelope:
    body: bytes
    signature: bytes


def sign_manifest(manifest: Manifest, organiser: Identity) -> SignedManifest:
    """Sign `manifest`; its `organiser` must be the given identity's key. Raises `ManifestError`."""
    if manifest.organiser != organiser.node_id:
        raise ManifestError("the manifest names another organiser than the key that signs it")
    body = canonical.encode(manifest)
    return check_manifest(canonical.encode(_Envelope(body, organiser.sign(SIGNING_CONTEXT + body))))


def check_manifest(data: bytes, expected: RunId | None = None) -> SignedManifest:
    """The manifest in `data`, refused (`ManifestError`, naming the reason) unless every check passes.

    With `expected`, the run id must be that one: what was asked for is what is got.
    """
    try:
        envelope = canonical.decode(_Envelope, data, MAX_MANIFEST_BYTES)
        plain = canonical.unpack(envelope.body, MAX_MANIFEST_BYTES)
    except ParisError as error:
        raise ManifestError(f"this is not a run manifest, or it is damaged: {error}") from None
    run_id = RunId(hashlib.sha256(envelope.body).digest())
    if expected is not None and run_id != expected:
        raise ManifestError(
            f"the manifest hashes to run {run_id.hex()[:16]}…, not to the expected {expected.hex()[:16]}…: "
            "it was changed, or belongs to another run"
        )
    if isinstance(plain, dict) and plain.get("format") != FORMAT:
        raise ManifestError(
            f"the manifest has format {plain.get('format')!r}, this program reads format {FORMAT}: "
            "use the version of paris-p2p the run was made with"
        )
    try:
        manifest = canonical.from_plain(Manifest, plain, "manifest")
    except ParisError as error:
        raise ManifestError(f"the manifest is malformed: {error}") from None
    signature, signed = envelope.signature, SIGNING_CONTEXT + envelope.body
    if len(signature) != SIGNATURE_BYTES or not verify(manifest.organiser, signed, signature):
        raise ManifestError("the manifest's signature does not match: it was changed after it was signed")
    return SignedManifest(manifest, run_id, data)
