"""`components.tiny_clip`: the small CLIP learns, repeatably, and does not push equal captions apart."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from paris_p2p.components.image import ImageEncoder
from paris_p2p.components.tiny_clip import (
    TinyClip,
    TinyClipConfig,
    contrastive_loss,
    embed_images,
    train_tiny_clip,
)

SMALL = TinyClipConfig(
    width=16, heads=2, text_layers=1, image_layers=1, context_length=8, steps=40, batch_size=16
)
NAMES = ("left", "right", "top", "bottom")


def half_lit(count: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Grey images with one half lit, and which half."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (count, 8, 8, 1)).astype(np.uint8)
    halves = [np.s_[:, :4], np.s_[:, 4:], np.s_[:4], np.s_[4:]]
    for index in range(count):
        images[index][halves[index % 4]] += 150
    return images, [f"lit at the {NAMES[index % 4]}" for index in range(count)]


def trained(seed: int = 0) -> TinyClip:
    images, captions = half_lit(64)
    return train_tiny_clip(images, captions, config=SMALL, seed=seed, progress=lambda *_: None)


def test_training_lowers_the_loss_and_separates_the_captions() -> None:
    images, _ = half_lit(64)
    clip = trained()
    assert clip.losses[-1] < 0.8 * clip.losses[0]
    features = embed_images(clip.image, images, lambda *_: None)
    means = np.stack([features[kind::4].mean(axis=0) for kind in range(4)])  # (4, W)
    nearest = np.linalg.norm(features[:, None] - means, axis=2).argmin(axis=1)
    assert (nearest == np.arange(64) % 4).mean() > 0.95


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = trained(), trained(), trained(1)
    assert first.losses == again.losses != other.losses
    for left, right in zip(first.text.parameters(), again.text.parameters(), strict=True):
        assert torch.equal(left, right)


def test_training_leaves_torchs_settings_as_they_were() -> None:
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.random.get_rng_state(),
    )
    trained()
    assert torch.get_num_threads() == before[0]
    assert torch.are_deterministic_algorithms_enabled() == before[1]
    assert torch.equal(torch.random.get_rng_state(), before[2])


def test_progress_counts_every_step() -> None:
    images, captions = half_lit(8)
    seen: list[tuple[int, int]] = []
    config = TinyClipConfig(width=8, heads=1, text_layers=1, image_layers=1, steps=4)
    train_tiny_clip(
        images, captions, config=config, seed=0, progress=lambda step, of, _: seen.append((step, of))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_images_that_share_a_caption_are_all_its_positives() -> None:
    caption_of = torch.tensor([0, 0, 1])
    right = 20 * torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # (B, M)
    one_pushed_away = 20 * torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    # What is left of a perfect fit is the entropy of two equal positives, in one of the two directions.
    torch.testing.assert_close(contrastive_loss(right, caption_of), torch.tensor(np.log(2) / 4).float())
    assert contrastive_loss(one_pushed_away, caption_of) > contrastive_loss(right, caption_of)


def test_the_image_encoder_saved_and_loaded_gives_the_same_features(tmp_path: Path) -> None:
    images, _ = half_lit(8)
    encoder = ImageEncoder(image_size=8, patch_size=2, width=16, heads=2, layers=1).eval()
    encoder.save_pretrained(tmp_path)
    features = embed_images(ImageEncoder.from_pretrained(tmp_path), images, lambda *_: None)
    assert np.array_equal(features, embed_images(encoder, images, lambda *_: None))
