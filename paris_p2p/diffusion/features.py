"""What images are judged by: a feature network from the library, from a folder, or trained here.

Owns: `FeatureNetwork` and its three origins, the small one's architecture and training, its file. Does not
own: the numbers made of features (`metrics`), or which images (`evaluation`).

`trained`: a small convolutional network learns the real images' captions when they are few, else their
clusters. Such features are blind to what does not tell labels apart, so their distances compare models on one
data set and mean nothing across data sets. `timm:NAME` and `open_clip:NAME` are pretrained networks.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from paris_p2p.components.image_features import fitted, load_image_features
from paris_p2p.diffusion.seeds import derived_seed
from paris_p2p.errors import ConfigError

MAX_LABELS = 256
"""More distinct captions than this are no classes: a classifier would learn them by heart."""
FILE_NAME = "features.safetensors"
BATCH = 256


@dataclass(frozen=True, slots=True)
class FeatureNetwork:
    """`name` for reports; `embed`: images (N, C, S, S) in [-1, 1] -> features (N, D); `classify`: likewise ->
    index into `labels`, or None where the network knows no labels. `accuracy`: on real images held out."""

    name: str
    embed: Callable[[Tensor], NDArray[np.float64]]
    labels: tuple[str, ...] = ()
    classify: Callable[[Tensor], NDArray[np.int64]] | None = None
    accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The small network: `width` channels at the first level, doubled twice; AdamW, one-cycle cosine."""

    width: int = 32
    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    heldout: float = 0.1


class SmallNetwork(nn.Module):
    """Three levels of two 3x3 convolutions, average-pooled: (N, C, S, S) -> features (N, 4 width)."""

    def __init__(self, channels: int, width: int, labels: int) -> None:
        super().__init__()
        sizes = (channels, width, 2 * width, 4 * width)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(below, above, 3, padding=1, stride=1 if below == channels else 2),
                nn.GroupNorm(8, above),
                nn.GELU(),
                nn.Conv2d(above, above, 3, padding=1),
                nn.GroupNorm(8, above),
                nn.GELU(),
            )
            for below, above in pairwise(sizes)
        )
        self.head = nn.Linear(4 * width, labels)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, S, S) -> (N, 4 width)."""
        for level in self.levels:
            x = level(x)
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, labels)."""
        logits: Tensor = self.head(self.features(x))
        return logits


def label_images(captions: Sequence[str], clusters: Sequence[int]) -> tuple[list[int], tuple[str, ...], bool]:
    """Each image's label, the labels' names, and whether they are captions: `captions` themselves when few
    enough are distinct, else the `clusters`."""
    distinct = sorted(set(captions))
    if len(distinct) <= MAX_LABELS and len(distinct) > 1:
        place = {caption: index for index, caption in enumerate(distinct)}
        return [place[caption] for caption in captions], tuple(distinct), True
    names = tuple(f"cluster {index}" for index in range(max(clusters) + 1))
    return list(clusters), names, False


def train_features(
    images: Tensor,
    labels: Sequence[int],
    names: tuple[str, ...],
    folder: Path,
    *,
    seed: int,
    of: str = "",
    config: TrainingConfig | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FeatureNetwork:
    """Train the small network on real `images` (N, C, S, S) in [-1, 1] and keep it in `folder`, for
    `kept_features` to find it by `of`.

    A random tenth is held out for `accuracy`. The same arguments give the same network on one kind of CPU.
    """
    config = config or TrainingConfig()
    generator = torch.Generator().manual_seed(derived_seed(seed, "features"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "features", "weights"))
        network = SmallNetwork(images.shape[1], config.width, len(names))
    order = torch.randperm(len(images), generator=generator)
    held = max(1, int(len(images) * config.heldout))
    target = torch.tensor(labels)
    _fit(network, images, target, order[held:], config, generator, progress)
    found = _in_batches(network.eval(), images[order[:held]]).argmax(1)
    accuracy = float((found == target[order[:held]]).float().mean())
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "channels": images.shape[1],
        "labels": list(names),
        "accuracy": accuracy,
        "seed": seed,
        "of": of,
        **asdict(config),
    }
    save_file(network.state_dict(), folder / FILE_NAME, {"network": json.dumps(described)})
    return _wrapped(network, names, accuracy)


def _fit(
    network: SmallNetwork,
    images: Tensor,
    target: Tensor,
    rows: Tensor,
    config: TrainingConfig,
    generator: torch.Generator,
    progress: Callable[[int, int], None],
) -> None:
    rate = config.learning_rate
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=config.steps)
    for step in range(config.steps):
        chosen = rows[torch.randint(len(rows), (config.batch_size,), generator=generator)]
        loss = functional.cross_entropy(network(images[chosen]), target[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        progress(step + 1, config.steps)


@torch.no_grad()
def _in_batches(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([run(part) for part in torch.split(images, BATCH)])


def _wrapped(network: SmallNetwork, names: tuple[str, ...], accuracy: float) -> FeatureNetwork:
    return FeatureNetwork(
        "trained",
        lambda images: _in_batches(network.features, images).double().numpy(),
        names,
        lambda images: _in_batches(network, images).argmax(1).numpy(),
        accuracy,
    )


def load_features(folder: Path) -> FeatureNetwork:
    """The network that `train_features` left in `folder`. Raises `ConfigError`."""
    return _read(folder)[0]


def kept_features(folder: Path, of: str) -> FeatureNetwork | None:
    """The network in `folder` if it was trained there for the same `of`. Raises `ConfigError` for a damaged
    file."""
    if not (folder / FILE_NAME).exists():
        return None
    network, was_of = _read(folder)
    return network if was_of == of else None


def _read(folder: Path) -> tuple[FeatureNetwork, str]:
    path = folder / FILE_NAME
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            described: Any = json.loads((file.metadata() or {})["network"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        names = tuple(str(name) for name in described["labels"])
        network = SmallNetwork(int(described["channels"]), int(described["width"]), len(names))
        network.load_state_dict(tensors)
        accuracy, of = float(described["accuracy"]), str(described.get("of", ""))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} holds no feature network that evaluate trained: {error}") from None
    return _wrapped(network.eval(), names, accuracy), of


def named_features(name: str, device: str = "cpu") -> FeatureNetwork:
    """The network called `name`: the folder of one that `train_features` left, or a pretrained one."""
    if (Path(name) / FILE_NAME).is_file():
        return load_features(Path(name))
    return pretrained_features(name, device)


def pretrained_features(name: str, device: str = "cpu") -> FeatureNetwork:
    """A pretrained network, called as `components.image_features` calls it, computing on `device`.

    Raises `ConfigError` when there is no such network or its weights cannot be had.
    """
    try:
        network = load_image_features(name)
    except ConfigError as error:
        raise ConfigError(
            f"the feature network {name!r} cannot be had: {error}. --features trained needs none"
        ) from None

    network.network.to(device)

    @torch.no_grad()
    def run(part: Tensor) -> Tensor:
        return network.embed(prepared(part.to(device), network.side, network.mean, network.std)).cpu()

    def embed(images: Tensor) -> NDArray[np.float64]:
        return _in_batches(run, images).double().numpy()

    return FeatureNetwork(name, embed)


def prepared(images: Tensor, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (N, 1 or 3, S, S) in [-1, 1] as a pretrained network reads them: (N, 3, side, side)."""
    return fitted((images.expand(-1, 3, -1, -1) + 1) / 2, side, mean, std)
