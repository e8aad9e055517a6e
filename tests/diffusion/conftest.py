"""Toy recipes, shards and components for the diffusion tests: real formats, a few thousand parameters."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paris_p2p.diffusion import expert, networks, router
from paris_p2p.diffusion.recipes import preset
from paris_p2p.diffusion.shards import FILE_NAME, Examples, Shard
from paris_p2p.diffusion.training import Trainer
from paris_p2p.ids import InfoHash, Role
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import (
    FORMAT,
    Architecture,
    Cluster,
    LeaseTimes,
    Manifest,
    Recipe,
    SignedManifest,
    Training,
    sign_manifest,
)

TOKENS, WIDTH, CLUSTERS = 4, 8, 2
ORGANISER = Identity(bytes(range(32)))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """More threads than cores only slow these sizes down, and reductions must not depend on their number."""
    torch.set_num_threads(1)


def toy_expert() -> Architecture:
    config = {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "in_channels": 1,
        "out_channels": 1,
        "patch_size": 4,
        "sample_size": 8,
        "caption_channels": WIDTH,
        "use_additional_conditions": False,
    }
    return networks.describe(expert.MODEL_CLASS, config)


def toy_router(text: bool = True, clusters: int = CLUSTERS) -> Architecture:
    config = {
        "clusters": clusters,
        "in_channels": 1,
        "sample_size": 8,
        "patch_size": 4,
        "hidden_size": 16,
        "num_layers": 1,
        "num_attention_heads": 2,
        "text_width": WIDTH if text else None,
    }
    return networks.describe(router.MODEL_CLASS, config)


def short(training: Training, steps: int) -> Training:
    return dataclasses.replace(training, steps=steps, batch_size=8, warmup_steps=2)


def toy_recipe(steps: int = 8, interval: int = 4, text: bool = True, clusters: int = CLUSTERS) -> Recipe:
    recipe = preset("tiny", channels=1, image_size=8, clusters=clusters, tokens=TOKENS, text_width=WIDTH)
    chosen = recipe.experts[0]
    return dataclasses.replace(
        recipe,
        experts=(
            dataclasses.replace(chosen, architecture=toy_expert(), training=short(chosen.training, steps)),
        ),
        router=dataclasses.replace(
            recipe.router,
            text=text,
            architecture=toy_router(text, clusters),
            training=short(recipe.router.training, steps),
        ),
        checkpoint_interval_steps=interval,
    )


def toy_shard(cluster: int, images: int = 20, captions: int = 3) -> Shard:
    """Images of one shade of grey each, told by caption and cluster: something to learn."""
    generator = torch.Generator().manual_seed(cluster)
    shade = (torch.arange(images) % captions - 1) * 0.3 + (0.5 if cluster % 2 else -0.5)
    return Shard(
        cluster,
        shade.view(-1, 1, 1, 1) + 0.05 * torch.randn(images, 1, 8, 8, generator=generator),
        torch.arange(images) % captions,
        torch.randn(captions, TOKENS, WIDTH, generator=generator),
        torch.zeros(TOKENS, WIDTH),
    )


def write_shard(folder: Path, shard: Shard, **changes: torch.Tensor) -> Path:
    texts = json.dumps([f"caption {number}" for number in range(len(shard.captions))]).encode()
    tensors = {
        "latents": shard.latents,
        "caption_index": shard.caption_index,
        "captions": shard.captions,
        "uncond": shard.uncond,
        "caption_texts": torch.tensor(list(texts), dtype=torch.uint8),
        **changes,
    }
    metadata = {"format": "2", "cluster": str(shard.cluster)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE_NAME, metadata)
    return folder


def toy_trainer(recipe: Recipe, role: str = "expert-0", variant: int = 0) -> Trainer:
    clusters = range(CLUSTERS) if role == "router" else (int(role.removeprefix("expert-")),)
    shards = [toy_shard(cluster) for cluster in clusters]
    return Trainer(recipe, Role(role), variant, Examples(shards), Examples(shards), "cpu")


def some_ref(number: int) -> ContentRef:
    return ContentRef(InfoHash(bytes([number]) * 32), 1, 1 << 14)


def toy_manifest(recipe: Recipe, clusters: int = CLUSTERS) -> SignedManifest:
    manifest = Manifest(
        format=FORMAT,
        name="toy",
        organiser=ORGANISER.node_id,
        recipe=recipe,
        clusters=tuple(Cluster(k, 20, 20, some_ref(2 * k), some_ref(2 * k + 1)) for k in range(clusters)),
        components={"text_encoder": some_ref(100), "tokenizer": some_ref(101)},
        lease=LeaseTimes(ttl_s=10.0, renew_s=2.0, settle_s=1.0, poll_s=1.0),
        replicas=0,
        example_prompts=("caption 0",),
    )
    return sign_manifest(manifest, ORGANISER)


@pytest.fixture(scope="session")
def make_components(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, Path]]:
    """Folders of a real, tiny text encoder and tokenizer, as they travel with a run."""
    made: dict[str, Path] = {}

    def make() -> dict[str, Path]:
        if not made:
            from paris_p2p.components.text import TextEncoder
            from paris_p2p.components.tokenizer import Tokenizer

            root = tmp_path_factory.mktemp("components")
            tokenizer = Tokenizer.reduced(["seven", "eight"], TOKENS)
            torch.manual_seed(0)
            encoder = TextEncoder(
                vocab_size=tokenizer.vocab_size, context_length=TOKENS, width=WIDTH, heads=2, layers=1
            )
            made.update(text_encoder=root / "text_encoder", tokenizer=root / "tokenizer")
            encoder.save_pretrained(made["text_encoder"])
            tokenizer.save_pretrained(made["tokenizer"])
        return made

    return make
