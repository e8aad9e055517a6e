"""Pretrained image encoders by name or local folder: what a big run's data is clustered by.

Owns: `ImageFeatures`, loading them through timm and open_clip, preparing pictures for them. Does not own: the
small encoder trained on a run's own data (`image`, `tiny_clip`), clustering (`data.cluster`). They are no
component of a run: nodes never need one. Only safetensors are read.

Names: `timm:NAME`, `open_clip:ARCHITECTURE/PRETRAINED` (a tag, or a .safetensors file), or a folder as timm,
open_clip or `ImageEncoder` write it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from paris_p2p.components.clip_folder import read_json
from paris_p2p.components.image import ImageEncoder
from paris_p2p.components.pretrained import digest
from paris_p2p.errors import ConfigError

DINO_V2 = "timm:vit_large_patch14_dinov2.lvd142m"
"""DINOv2 ViT-L/14, 1024 features: what the papers cluster by."""
MAX_SIDE = 224
"""Pixels: larger pictures cost several times as much and tell clusters apart no better."""
BATCH = 64
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
TIMM_WEIGHTS, OPEN_CLIP_WEIGHTS = "model.safetensors", "open_clip_model.safetensors"


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """An image encoder: `embed` maps (N, 3, side, side), normalised by `mean` and `std`, to (N, W)."""

    network: nn.Module
    embed: Callable[[Tensor], Tensor]
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """images: (N, S, S, 3). Returns their features (N, W)."""
        device = next(self.network.parameters()).device
        found = []
        for start in range(0, len(images), BATCH):
            batch = torch.from_numpy(images[start : start + BATCH]).to(device).permute(0, 3, 1, 2)
            found.append(self.embed(self._prepared(batch)).float().cpu())
        features: NDArray[np.float32] = torch.cat(found).numpy()
        return features

    def _prepared(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) of bytes as the network reads them: (N, 3, side, side)."""
        return fitted(images.float() / 255, self.side, self.mean, self.std)

    @property
    def identity(self) -> str:
        """Two encoders with the same one give the same features."""
        return f"{digest(self.network)} {self.side} {self.mean} {self.std}"


def fitted(pictures: Tensor, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures (N, 3, S, S) in [0, 1] in a network's size and scale: (N, 3, side, side)."""
    if pictures.shape[-1] != side:
        pictures = functional.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    shift, scale = (pictures.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (pictures - shift) / scale


def load_image_features(name: str) -> ImageFeatures:
    """The image encoder called `name`, as in the module's header.

    Raises `ConfigError` when there is none or its weights cannot be had.
    """
    kind, _, rest = name.partition(":")
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return _from_folder(folder)
        if kind == "timm" and rest:
            return _from_timm(rest, None)
        if kind == "open_clip" and rest:
            return _from_open_clip(rest)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - hubs and model zoos raise many kinds; this is the edge
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"the image encoder {name!r} cannot be had: {reason}. Without a network connection, name a local "
            "folder with --image-encoder"
        ) from None
    raise ConfigError(
        f"{name!r} is no image encoder: use timm:NAME, open_clip:ARCHITECTURE/PRETRAINED, or a local folder"
    )


def _from_folder(folder: Path) -> ImageFeatures:
    config = read_json(folder / "config.json")
    if config.get("_class_name") == "ImageEncoder":
        own = ImageEncoder.from_pretrained(folder).eval()
        return ImageFeatures(own, own, int(own.config.image_size), (0.5,) * 3, (0.5,) * 3)
    if "architecture" in config:
        return _from_timm(str(config["architecture"]), folder)
    if (folder / "open_clip_config.json").is_file():
        _require(folder / OPEN_CLIP_WEIGHTS)
        return _tower(_open_clip_model(f"local-dir:{folder}", None, None), {})
    raise ConfigError(f"{folder} holds no image encoder as timm, open_clip or this program writes one")


def _from_timm(name: str, folder: Path | None) -> ImageFeatures:
    import timm
    from timm.data.config import resolve_model_data_config

    config = read_json(folder / "config.json") if folder is not None else {}
    described: dict[str, Any] = dict(config.get("pretrained_cfg") or {})
    if folder is None:
        known = timm.models.get_pretrained_cfg(name)
        if known is None or not known.hf_hub_id:
            raise ConfigError(f"timm knows no weights called {name!r}")
        described = known.to_dict()  # type: ignore[no-untyped-call]
        weights = _hub_file(str(known.hf_hub_id), name)
    else:
        weights = _require(folder / TIMM_WEIGHTS)
    arguments: dict[str, Any] = {**(config.get("model_args") or {}), "num_classes": 0}
    side = int(described.get("input_size", (3, MAX_SIDE, MAX_SIDE))[-1])
    if side > MAX_SIDE:
        side = MAX_SIDE
        if described.get("fixed_input_size"):
            arguments["img_size"] = side
    overlay = {
        **described,
        "file": str(weights),
        "hf_hub_id": None,
        "url": None,
        "source": None,
        "custom_load": False,
    }
    network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    data = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    return ImageFeatures(network, network, side, tuple(data["mean"]), tuple(data["std"]))


def _hub_file(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    repository = f"{repository}{name}" if repository.endswith("/") else repository
    return Path(hf_hub_download(repository, TIMM_WEIGHTS))


def _from_open_clip(name: str) -> ImageFeatures:
    import open_clip

    architecture, _, pretrained = name.partition("/")
    if Path(pretrained).suffix == ".safetensors":
        return _tower(_open_clip_model(architecture, _require(Path(pretrained).expanduser()), None), {})
    if Path(pretrained).suffix in PICKLES:
        raise _pickle(pretrained)
    config = open_clip.get_pretrained_cfg(architecture, pretrained)
    if not config or not config.get("hf_hub"):
        raise ConfigError(f"open_clip has no safetensors called {pretrained!r} for {architecture!r}")
    weights = Path(open_clip.download_pretrained(config))
    if weights.suffix != ".safetensors":
        raise _pickle(weights)
    return _tower(_open_clip_model(architecture, weights, bool(config.get("quick_gelu"))), config)


def _pickle(weights: Path | str) -> ConfigError:
    return ConfigError(f"{weights} is a pickle, which may run a stranger's code: name a safetensors file")


def _open_clip_model(name: str, weights: Path | None, quick_gelu: bool | None) -> Any:
    import open_clip

    pretrained = None if weights is None else str(weights)
    return open_clip.create_model(name, pretrained, device="cpu", force_quick_gelu=bool(quick_gelu)).eval()


def _tower(model: Any, config: dict[str, Any]) -> ImageFeatures:
    """The image half of a CLIP, with its projection."""
    import open_clip

    visual = model.visual
    size = visual.image_size
    mean = config.get("mean") or getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = config.get("std") or getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    side = int(size[0] if isinstance(size, Sequence) else size)
    return ImageFeatures(visual, visual, side, tuple(mean), tuple(std))


def _require(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"there is no {path}: only safetensors are read")
    return path
