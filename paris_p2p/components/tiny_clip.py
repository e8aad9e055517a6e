"""A small CLIP trained from scratch on a run's own images and captions, for runs without pretrained towers.

Owns: its sizes, its contrastive loss, its training loop. Does not own: the towers (`text`, `image`), reading
images, clustering. Same data, config and seed give the same weights on the same kind of CPU: training runs on
one thread, whatever the machine has, because sums split over threads round differently.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from paris_p2p.components.image import ImageEncoder
from paris_p2p.components.text import TextEncoder
from paris_p2p.components.tokenizer import Tokenizer

MAX_LOGIT_SCALE = 4.6052  # log 100, CLIP's own bound


@dataclass(frozen=True, slots=True)
class TinyClipConfig:
    """Sizes and training of a small CLIP.

    width: of both towers' hidden states and of their common space; small, for the experts project it anyway.
    context_length: tokens a caption may have. image_size: pixels the image tower sees; larger images are
    shrunk. steps, batch_size, learning_rate: AdamW under a one-cycle cosine; some epochs over a few thousand
    images are enough for features that cluster.
    """

    width: int = 64
    heads: int = 4
    text_layers: int = 2
    image_layers: int = 2
    context_length: int = 16
    image_size: int = 32
    steps: int = 100
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05


@dataclass(frozen=True, slots=True)
class TinyClip:
    """A trained CLIP: `image` and `text` are the towers, `losses` one value a step."""

    image: ImageEncoder
    text: TextEncoder
    tokenizer: Tokenizer
    losses: tuple[float, ...]


class _Pair(nn.Module):
    """Both towers and what only training needs: projections into the common space, and the temperature."""

    def __init__(self, config: TinyClipConfig, image_size: int, vocab_size: int) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        patch = max(1, image_size // 4)  # 4 x 4 patches: 16 cost a quarter of 64 and cluster no worse
        self.image = ImageEncoder(image_size, patch, width, heads, config.image_layers)
        self.text = TextEncoder(vocab_size, config.context_length, width, heads, config.text_layers)
        self.image_projection = nn.Linear(width, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07), as in CLIP

    def logits(self, images: Tensor, token_ids: Tensor) -> Tensor:
        """Cosine similarities over the temperature: (B, 3, S, S), (M, T) -> (B, M)."""
        of_images = functional.normalize(self.image_projection(self.image(images)), dim=-1)  # (B, W)
        of_texts = functional.normalize(
            self.text_projection(self.text.encode(token_ids)[0]), dim=-1
        )  # (M, W)
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * of_images @ of_texts.T


def contrastive_loss(logits: Tensor, caption_of: Tensor) -> Tensor:
    """CLIP's symmetric loss when several images share a caption. logits: (B, M) of B images against the M
    distinct captions of the batch; caption_of: (B,) int64, each image's column.

    Every image of a caption is a positive of it (as in UniCL, Yang et al. 2022): open_clip's own `ClipLoss`
    would push equal captions apart. Each image has one right caption; each caption spreads its target evenly
    over its images.
    """
    targets = functional.one_hot(caption_of, logits.shape[1]).T.float()  # (M, B)
    targets = targets / targets.sum(dim=1, keepdim=True)
    to_captions = functional.cross_entropy(logits, caption_of)
    to_images = functional.cross_entropy(logits.T, targets)
    return (to_captions + to_images) / 2


def train_tiny_clip(
    images: NDArray[np.uint8],
    captions: Sequence[str],
    *,
    config: TinyClipConfig,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> TinyClip:
    """Train on `images` (N, S, S, 1 or 3), which may be memory-mapped, and their N `captions`.

    `progress(step, steps, loss)` is called after each step.
    """
    distinct = sorted(set(captions))
    tokenizer = Tokenizer.reduced(distinct, config.context_length)
    column = {caption: index for index, caption in enumerate(distinct)}
    caption_index = torch.tensor([column[caption] for caption in captions])
    with reproducible(seed):
        pair = _Pair(config, min(images.shape[1], config.image_size), tokenizer.vocab_size)
        losses = list(_train(pair, images, caption_index, tokenizer(distinct), config, seed, progress))
    pair.eval()
    return TinyClip(pair.image, pair.text, tokenizer, tuple(losses))


def _train(
    pair: _Pair,
    images: NDArray[np.uint8],
    caption_index: Tensor,
    token_ids: Tensor,
    config: TinyClipConfig,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> Iterator[float]:
    optimizer = torch.optim.AdamW(pair.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(len(images), config.batch_size, generator)
    for step in range(1, config.steps + 1):
        chosen = next(batches)  # (B,)
        present, caption_of = torch.unique(caption_index[chosen], return_inverse=True)  # (M,), (B,)
        batch = pixels(images, chosen, pair.image.config.image_size)  # (B, 3, S, S)
        loss = contrastive_loss(pair.logits(batch, token_ids[present]), caption_of)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        progress(step, config.steps, loss.item())
        yield loss.item()


def _batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices, each epoch in a new order; the last of an epoch may be smaller."""
    while True:
        yield from torch.split(torch.randperm(count, generator=generator), batch_size)


def pixels(images: NDArray[np.uint8], chosen: Tensor, size: int) -> Tensor:
    """The `chosen` (B,) of `images` (N, S, S, 1 or 3) as the image tower reads them: (B, 3, size, size) in
    [-1, 1], grey repeated over the three channels, shrunk by averaging where S is larger."""
    batch = torch.from_numpy(images[chosen.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
    if batch.shape[-1] != size:
        batch = functional.interpolate(batch, (size, size), mode="area")
    return batch.expand(-1, 3, -1, -1).contiguous()


@torch.no_grad()
def embed_images(
    encoder: ImageEncoder,
    images: NDArray[np.uint8],
    progress: Callable[[int, int], None],
    batch_size: int = 256,
) -> NDArray[np.float32]:
    """The features of `images` (N, S, S, 1 or 3): (N, width). `progress(done, total)` after each batch."""
    features = np.empty((len(images), encoder.config.width), dtype=np.float32)
    with reproducible(0):
        for chosen in torch.split(torch.arange(len(images)), batch_size):
            batch = encoder(pixels(images, chosen, encoder.config.image_size))
            features[int(chosen[0]) : int(chosen[-1]) + 1] = batch.numpy()
            progress(int(chosen[-1]) + 1, len(images))
    return features


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Inside: one thread, deterministic algorithms, torch's generator seeded. All restored afterwards."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            torch.set_num_threads(threads)
