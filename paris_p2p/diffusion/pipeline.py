"""`ParisPipeline`: the assembled model as a diffusers pipeline.

Owns: parts and settings, loading and saving the folder (`store.model_folder` describes it), prompts in,
pictures out. Does not own: the mixture's mathematics (`sampling`), fetching, PNG files (`generate`).

    pipe = ParisPipeline.from_pretrained("model")
    pipe("a handwritten digit seven").images[0]

The number of experts differs from run to run, which diffusers' loader cannot express: it reads a pipeline's
parts off the signature of `__init__`. So the parts are read off `model_index.json` here, and their classes
looked up in a fixed table: nothing in a folder can name other code to run. Weights are safetensors only.
"""

import importlib
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from paris_p2p.diffusion.sampling import Ensemble, Member, image_noise, make_scheduler, sample
from paris_p2p.errors import ConfigError
from paris_p2p.store.model_folder import COMPONENT_CLASSES, INDEX_NAME, NETWORK_CLASSES, SCHEDULERS

EXPERT_NAME = re.compile(r"expert_(0|[1-9][0-9]{0,3})")
PART_NAMES = ("scheduler", "router", "text_encoder", "tokenizer", "vae")
LOADABLE = frozenset(
    {
        *NETWORK_CLASSES.values(),
        *COMPONENT_CLASSES.values(),
        *(("diffusers", class_name) for class_name, _ in SCHEDULERS.values()),
    }
)
MAX_INDEX_BYTES = 4 << 20
MAX_IMAGES = 4096

OnStep = Callable[[int, int], None]
"""Called with (evaluations done, evaluations in all)."""
OnPart = Callable[[int, int, str], None]
"""Called with (parts loaded, parts asked for so far, the part that is next: empty if that is all)."""


class _Members(Mapping[int, Member]):
    """The experts `present`, each made by `make` when it is asked for."""

    def __init__(self, present: Sequence[int], make: Callable[[int], Member]) -> None:
        self._present, self._make = present, make

    def __getitem__(self, cluster: int) -> Member:
        if cluster not in self._present:
            raise KeyError(cluster)
        return self._make(cluster)

    def __iter__(self) -> Iterator[int]:
        return iter(self._present)

    def __len__(self) -> int:
        return len(self._present)


class ParisPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers ships no types
    """Experts, router and encoders of one run.

    Parts (each may be absent; what is needed and missing is named when it is needed): `expert_0` …,
    `router`, `text_encoder`, `tokenizer`, `scheduler`, `vae`. Settings, all plain JSON:
    `latents`, `captions`, `sampling` (the recipe's fields), `objectives` (per expert), `missing`, `clusters`,
    `run_id`.

    After a call, `experts_used` says how many samples each expert computed (one a sample and step), and
    `seed_used` which seed it was.
    """

    def __init__(self, **parts_and_settings: Any) -> None:
        super().__init__()
        parts = {name: value for name, value in parts_and_settings.items() if is_part(name)}
        for name in PART_NAMES:
            parts.setdefault(name, None)
        self.register_modules(**parts)
        settings = {name: value for name, value in parts_and_settings.items() if not is_part(name)}
        self.register_to_config(**settings)
        self._unloaded: dict[str, Callable[[], nn.Module]] = {}
        self.experts_used: dict[str, int] = {}
        self.seed_used: int | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        on_part: OnPart | None = None,
        lazy_experts: bool = False,
        **replacements: Any,
    ) -> Self:
        """The pipeline in `folder`, in evaluation mode, on the CPU.

        `replacements`: parts to use instead of the folder's, `expert_1=None` leaves one out. `torch_dtype` is
        for the networks. `on_part` is called before each part and after the last. With `lazy_experts` an
        expert is loaded when it is first given weight or asked for by name, so that `ConfigError` may come
        then, and `on_part` hears of it as one part more. Raises `ConfigError`.
        """
        root = Path(folder)
        index = {**read_index(root), **replacements}
        names = [name for name in index if is_part(name) and name not in replacements]
        for name in names:
            _check_part(root / name, index[name])
        later = {name: index.pop(name) for name in names if lazy_experts and EXPERT_NAME.fullmatch(name)}
        loader = _Loader(root, torch_dtype, on_part, len(names) - len(later))
        for name in names:
            if name not in later:
                index[name] = loader.load(name, index[name])
        pipe = cls(**index)
        pipe._unloaded = {name: partial(loader.load_one_more, name, entry) for name, entry in later.items()}
        return pipe

    def __getattr__(self, name: str) -> Any:
        """A part that is not loaded yet is loaded now; called only for what is no attribute yet."""
        unloaded = self.__dict__.get("_unloaded", {})
        if name not in unloaded:
            return super().__getattr__(name)
        network = unloaded[name]().to(self.device)
        if network.dtype != self.dtype:  # diffusers warns of every cast, even of one that changes nothing
            network = network.to(self.dtype)
        self.register_modules(**{name: network})
        del unloaded[name]
        return network

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write every part and `model_index.json` into `save_directory`, making it."""
        root = Path(save_directory)
        for cluster in self.present:
            self._expert(cluster)  # has to be loaded to be written
        for name, part in self.components.items():
            if part is not None:
                part.save_pretrained(root / name)
        self.save_config(root)

    @classmethod
    def _get_signature_keys(cls, obj: Any) -> tuple[list[str], list[str]]:
        """What diffusers takes for the parts and the settings of `obj` (`components`, `to`, …)."""
        keys = [key for key in obj.config if not key.startswith("_")]
        return sorted(filter(is_part, keys)), sorted(key for key in keys if not is_part(key))

    @property
    def experts(self) -> dict[int, nn.Module]:
        """The experts there are, by cluster, loading what is not loaded yet."""
        return {cluster: self._expert(cluster) for cluster in self.present}

    @property
    def present(self) -> list[int]:
        """The clusters whose expert is there, loaded or not."""
        loaded = (name for name in self.config if EXPERT_NAME.fullmatch(name))
        there = {name for name in loaded if getattr(self, name) is not None}
        unloaded = {name for name in self._unloaded if name not in self.__dict__}
        return sorted(int(name.removeprefix("expert_")) for name in there | unloaded)

    def _expert(self, cluster: int) -> nn.Module:
        network: nn.Module = getattr(self, f"expert_{cluster}")
        return network

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        scheduler: str | None = None,
        output_type: str = "pil",
        on_step: OnStep | None = None,
    ) -> Any:
        """Pictures of `prompt`: an `ImagePipelineOutput`, all images of the first prompt, then of the next.

        What is not given is the recipe's default, the seed a random one. Image i of a prompt starts from
        noise that depends on seed + i only: the same seed gives the same image, whatever else is asked for.
        `top_k`: experts a step, 0 for all. `scheduler`: `euler`, `heun`, `unipc`, `dpm`; else the part
        `scheduler`. `output_type`: `pil`, `np`, `pt`, or `latent`. Raises `ConfigError`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not 1 <= len(prompts) * num_images_per_prompt <= MAX_IMAGES:
            raise ConfigError(f"ask for 1 to {MAX_IMAGES} images, of at least one prompt")
        defaults = self.config["sampling"]
        ensemble = Ensemble(
            self._members(),
            self.router,
            top_k=defaults["top_k"] if top_k is None else top_k,
            guidance_scale=defaults["guidance_scale"] if guidance_scale is None else guidance_scale,
        )
        text = self.encode_prompts([*prompts, ""])  # (P + 1, T, W)
        self.seed_used = secrets.randbits(31) if seed is None else seed
        latents = sample(
            ensemble,
            self.scheduler
            if scheduler is None and self.scheduler is not None
            else self._scheduler(scheduler),
            self._noise(num_images_per_prompt, len(prompts), text),
            text[:-1].repeat_interleave(num_images_per_prompt, dim=0),  # (N, T, W)
            text[-1],
            defaults["steps"] if num_inference_steps is None else num_inference_steps,
            None if on_step is None else lambda done, total, _: on_step(done, total),
        )
        self.experts_used = {f"expert_{k}": ensemble.calls[k] for k in ensemble.members}
        return ImagePipelineOutput(images=self._images(latents, output_type))

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """What the experts read for `prompts`: (N, T, W)."""
        tokenizer, text_encoder = self._needed("tokenizer"), self._needed("text_encoder")
        encoded: Tensor = text_encoder(tokenizer(prompts).to(text_encoder.device))  # (N, T, W)
        return encoded.to(self.device)

    def _members(self) -> Mapping[int, Member]:
        objectives = self.config["objectives"]
        limit = 1.0 if self.config["latents"]["space"] == "pixel" else 8.0  # VAE latents have no hard bound
        return _Members(self.present, lambda k: Member(self._expert(k), objectives[f"expert_{k}"], limit))

    def _scheduler(self, name: str | None) -> Any:
        return make_scheduler(self.config["sampling"]["scheduler"] if name is None else name)

    def _noise(self, images: int, prompts: int, like: Tensor) -> Tensor:
        latents = self.config["latents"]
        shape = (latents["channels"], latents["size"], latents["size"])
        assert self.seed_used is not None
        return image_noise(self.seed_used, images, shape).repeat(prompts, 1, 1, 1).to(like)  # (N, C, S, S)

    def _images(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        settings = self.config["latents"]
        if settings["space"] == "vae":
            vae = self._needed("vae")
            z = latents / settings["scale"] + settings["shift"]
            latents = vae.decode(z.to(vae.dtype), return_dict=False)[0]
        return VaeImageProcessor(vae_scale_factor=1).postprocess(latents.float(), output_type=output_type)

    def _needed(self, name: str) -> Any:
        part = getattr(self, name)
        if part is None:
            raise ConfigError(f"the model has no {name}, which is needed for this: fetch the model again")
        return part


def is_part(name: str) -> bool:
    """Whether `name` is a part of the pipeline, not a setting."""
    return name in PART_NAMES or EXPERT_NAME.fullmatch(name) is not None


def read_index(folder: Path) -> dict[str, Any]:
    """The parts there are and the settings in a model folder's `model_index.json`. Raises `ConfigError`."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no model ({INDEX_NAME} is missing): fetch one with paris-node fetch-model"
        )
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"larger than {MAX_INDEX_BYTES} bytes")
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in index.items() if not name.startswith("_")}
        return {name: value for name, value in kept.items() if not is_part(name) or value[0] is not None}
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


class _Loader:
    """Loads parts of the model in `root`, one after another, and tells `on_part`.

    `total`: how many are asked for at first."""

    def __init__(self, root: Path, dtype: torch.dtype | None, on_part: OnPart | None, total: int) -> None:
        self._root, self._dtype, self._on_part = root, dtype, on_part
        self._done, self._total = 0, total

    def load(self, name: str, entry: Any) -> Any:
        """The part `name`, one of the `total`. Raises `ConfigError`."""
        self._tell(name)
        part = _load_part(self._root / name, entry, self._dtype)
        self._done += 1
        if self._done == self._total:
            self._tell("")
        return part

    def load_one_more(self, name: str, entry: Any) -> Any:
        """The part `name`, in addition to the `total` so far. Raises `ConfigError`."""
        self._total = self._done + 1
        return self.load(name, entry)

    def _tell(self, name: str) -> None:
        if self._on_part is not None:
            self._on_part(self._done, self._total, name)


def _check_part(folder: Path, entry: Any) -> None:
    """Whether `entry` of the index, (module, class), may be loaded from `folder`. Raises `ConfigError`."""
    if tuple(entry) not in LOADABLE:
        raise ConfigError(f"{folder.parent / INDEX_NAME} names an unknown class for {folder.name}: {entry}")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is missing, though {INDEX_NAME} lists it: fetch the model again")


def _load_part(folder: Path, entry: Any, dtype: torch.dtype | None) -> Any:
    """The part in `folder`; `entry` is its (module, class) in the index, as `_check_part` allows it."""
    module_name, class_name = entry
    kind = getattr(importlib.import_module(module_name), class_name)
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(folder)
    try:
        # Without use_safetensors diffusers would fall back to unpickling.
        network = kind.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype or torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder} cannot be loaded: {error}") from None
    return network.eval().requires_grad_(False)
