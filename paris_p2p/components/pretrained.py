"""Pretrained parts by name or local folder: the text tower with its tokenizer, and the VAE.

Owns: finding their files (a folder, or a repository of the Hugging Face hub), writing them as a run's
components, encoding images into latents. Does not own: the networks (`text`, `diffusers`), image features
(`image_features`). Only safetensors are read: a pickle may run a stranger's code.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paris_p2p.components import clip_folder
from paris_p2p.components.text import TextEncoder
from paris_p2p.components.tokenizer import CONFIG_NAME as TOKENIZER_CONFIG
from paris_p2p.components.tokenizer import Tokenizer
from paris_p2p.errors import ConfigError

VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
VAE_BATCH = 8  # images at once: an encoder's first level at 256 px holds 128 channels a pixel
TEXT_FILES = (
    "config.json", "model.safetensors", "diffusion_pytorch_model.safetensors", "tokenizer_config.json",
    "vocab.json", "special_tokens_map.json",
)  # fmt: skip
VAE_FILES = ("config.json", VAE_WEIGHTS)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def find_folder(name: str, part: str, option: str, files: Sequence[str]) -> Path:
    """The folder called `name`, or a local copy of those `files` of the hub's repository `name`
    (`OWNER/NAME`); in it the subfolder `part` where there is one, as in a diffusers pipeline.

    `option` is the command's, for the message. Raises `ConfigError`.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _download(name, part, option, files)
    inner = folder / part
    return inner if (inner / "config.json").is_file() else folder


def _download(name: str, part: str, option: str, files: Sequence[str]) -> Path:
    advice = f"{option} takes a local folder, or the name OWNER/NAME of a repository on the Hugging Face hub"
    if not _REPOSITORY.fullmatch(name):
        raise ConfigError(f"there is no folder {name!r}: {advice}")
    from huggingface_hub import snapshot_download

    wanted = [*files, *(f"{folder}/{file}" for folder in (part, "tokenizer") for file in files)]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # noqa: BLE001 - the hub's client raises many kinds; this is the edge
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{name!r} cannot be had: {reason}. {advice}") from None


@dataclass(frozen=True, slots=True)
class Text:
    """A text tower, and the tokenizer that goes with it."""

    tokenizer: Tokenizer
    encoder: TextEncoder

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and width of a caption's encoding."""
        return self.encoder.config.context_length, self.encoder.config.width

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The encodings of `texts`: (N, T, W)."""
        tokens = self.tokenizer(texts)
        encoded: NDArray[np.float32] = self.encoder.encode_in_batches(tokens, 64).float().cpu().numpy()
        return encoded

    def save(self, folder: Path) -> None:
        """Write the components `text_encoder` and `tokenizer` into `folder`."""
        self.encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")


def load_text(name: str) -> Text:
    """The text tower called `name`, ours or transformers' CLIP (`openai/clip-vit-large-patch14`), with the
    tokenizer in its folder or in `tokenizer` beside it; without one, CLIP's own. Raises `ConfigError`."""
    folder = find_folder(name, "text_encoder", "--text-encoder", TEXT_FILES)
    _require_weights(folder, clip_folder.WEIGHTS_NAMES)
    try:
        encoder = TextEncoder.from_pretrained(folder).eval()
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - diffusers raises many kinds; this is the edge
        raise ConfigError(f"{folder} holds no text encoder: {error}") from None
    places = [
        place for place in (folder, folder.parent / "tokenizer") if (place / TOKENIZER_CONFIG).is_file()
    ]
    tokens = int(encoder.config.context_length)
    tokenizer = (
        Tokenizer.from_pretrained(places[0])
        if places
        else Tokenizer(tokens, pad_with_end=clip_folder.is_clip_folder(folder))
    )
    if tokenizer.context_length > tokens or tokenizer.vocab_size > encoder.config.vocab_size:
        raise ConfigError(
            f"{folder} reads {tokens} tokens of {encoder.config.vocab_size}, its tokenizer writes "
            f"{tokenizer.context_length} of {tokenizer.vocab_size}: they do not belong together"
        )
    return Text(tokenizer, encoder)


@dataclass(frozen=True, slots=True)
class Vae:
    """An `AutoencoderKL` and the folder it came from. Latents are `(encode(image) - shift) * scale`, where
    encode is the mean of the posterior: what is prepared twice is the same."""

    folder: Path
    network: Any

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.network.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels a latent, along a side."""
        return int(2 ** (len(self.network.config.block_out_channels) - 1))

    @property
    def scale(self) -> float:
        """See the class."""
        return float(self.network.config.scaling_factor)

    @property
    def shift(self) -> float:
        """See the class."""
        return float(self.network.config.get("shift_factor") or 0.0)

    @torch.no_grad()
    def latents(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """images: (N, S, S, 3). Returns (N, channels, S / factor, S / factor)."""
        parameter = next(self.network.parameters())
        encoded = []
        for start in range(0, len(images), VAE_BATCH):
            batch = torch.from_numpy(images[start : start + VAE_BATCH]).permute(0, 3, 1, 2)
            pixels: Tensor = batch.to(parameter.device).to(parameter.dtype) / 127.5 - 1
            encoded.append(self.network.encode(pixels).latent_dist.mean.float().cpu())
        latents: NDArray[np.float32] = ((torch.cat(encoded) - self.shift) * self.scale).contiguous().numpy()
        return latents

    def save(self, folder: Path) -> None:
        """Write the component `vae` into `folder`: the weights file as it is, and the config without the
        path it was found under, which is nobody's business and would change the item's name."""
        target = folder / "vae"
        target.mkdir(parents=True, exist_ok=True)
        config = clip_folder.read_json(self.folder / "config.json")
        config.pop("_name_or_path", None)
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(self.folder / VAE_WEIGHTS, target / VAE_WEIGHTS)


def load_vae(name: str) -> Vae:
    """The VAE called `name` (`stabilityai/sd-vae-ft-mse`, or a folder). Raises `ConfigError`."""
    from diffusers import AutoencoderKL

    folder = find_folder(name, "vae", "--vae", VAE_FILES)
    kind = clip_folder.read_json(folder / "config.json").get("_class_name")
    if kind != "AutoencoderKL":
        raise ConfigError(f"{folder} holds no AutoencoderKL (its config.json names {kind!r})")
    _require_weights(folder, (VAE_WEIGHTS,))
    try:
        network = AutoencoderKL.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as error:  # noqa: BLE001 - diffusers raises many kinds; this is the edge
        raise ConfigError(f"{folder} cannot be read as an AutoencoderKL: {error}") from None
    vae = Vae(folder, network.eval())
    if network.config.get("latents_mean") is not None:
        raise ConfigError(f"{folder} normalises its latents channel by channel, which runs cannot express")
    return vae


def _require_weights(folder: Path, names: Sequence[str]) -> None:
    if not any((folder / name).is_file() for name in names):
        raise ConfigError(
            f"{folder} holds none of {', '.join(names)}: only safetensors are read, since other weights are "
            "pickles; convert them"
        )


def digest(network: nn.Module) -> str:
    """SHA-256 of a network's tensors, by which two machines tell whether they use the same one."""
    state = network.state_dict()
    whole = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        whole.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return whole.hexdigest()
