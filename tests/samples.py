"""A sample run for tests that need a manifest and not its content: two kinds of one-tensor network.

`manifest` and `recipe` are complete and valid; a test names what it is about.
"""

from collections.abc import Sequence
from typing import Any

from paris_p2p.ids import InfoHash
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import (
    FORMAT,
    Architecture,
    Captions,
    Cluster,
    ExpertVariant,
    Latents,
    LeaseTimes,
    Manifest,
    Recipe,
    RouterRecipe,
    Sampling,
    TensorSpec,
    Training,
)

ORGANISER = Identity(b"o" * 32)
TRAINING = Training(
    steps=100,
    batch_size=8,
    learning_rate=1e-3,
    weight_decay=0.0,
    lr_schedule="cosine",
    warmup_steps=10,
    gradient_clip=1.0,
    ema_decay=0.99,
    caption_dropout=0.1,
    timestep_sampling="logit_normal",
    precision="fp32",
    seed=7,
)
EXPERT = Architecture("PixArtTransformer2DModel", {"width": 8}, (TensorSpec("w", "F32", (2, 3)),))
ROUTER = Architecture("Router", {}, (TensorSpec("r", "F32", (4,)),))


def ref(number: int) -> ContentRef:
    """A content item that nobody has."""
    return ContentRef(InfoHash(bytes([number]) * 32), 1000 + number, 1 << 14)


def variant(
    architecture: Architecture = EXPERT,
    training: Training = TRAINING,
    *,
    name: str = "tiny",
    objective: str = "flow_matching",
) -> ExpertVariant:
    """One kind of expert."""
    return ExpertVariant(name, objective, architecture, training)


def recipe(
    experts: Sequence[ExpertVariant] = (variant(),),
    router: Architecture = ROUTER,
    training: Training = TRAINING,
    *,
    scheduler: str = "euler",
    interval: int = 50,
) -> Recipe:
    """A recipe for pictures of 8 x 8 grey pixels. `training`: the router's."""
    return Recipe(
        Latents("pixel", 1, 8, 8, 1.0, 0.0),
        Captions(8, 16),
        tuple(experts),
        RouterRecipe(True, router, training),
        Sampling(20, 2.0, 2, scheduler),
        interval,
    )


def manifest(**changed: Any) -> Manifest:
    """A run of two clusters. `changed`: other values of its fields."""
    fields: dict[str, Any] = {
        "format": FORMAT,
        "name": "digits",
        "organiser": ORGANISER.node_id,
        "recipe": recipe(),
        "clusters": (Cluster(0, 10, 2, ref(1), ref(2)), Cluster(1, 11, 3, ref(3), ref(4))),
        "components": {"text_encoder": ref(5), "tokenizer": ref(6)},
        "lease": LeaseTimes(60.0, 20.0, 3.0, 10.0),
        "replicas": 2,
        "example_prompts": ("a seven",),
    }
    return Manifest(**(fields | changed))
