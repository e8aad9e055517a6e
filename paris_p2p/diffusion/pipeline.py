"""`ParisPipeline`: the assembled model as a diffusers pipeline.

Owns: parts and settings, loading and saving the folder (`store.model_folder` describes it), prompts in,
pictures out. Does not own: the mixture's mathematics (`sampling`), fetching, PNG files (`generate`).

    pipe = ParisPipeline.from_pretrained("model")
    pipe("a handwritten digit seven").images[0]

The number of experts differs from run to run, which diffusers' loader cannot express: it reads a pipeline's
parts off the signature of `__init__`. So the parts are read off the folder here (`parts`). A folder in the
published layout (`published`) is loaded the same way.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from paris_p2p.diffusion.parts import (
    EXPERT_NAME,
    PART_NAMES,
    Loader,
    OnPart,
    check_part,
    is_network,
    is_part,
    read_index,
    weights_bytes,
)
from paris_p2p.diffusion.residency import Residency, Shelved
from paris_p2p.diffusion.sampling import Ensemble, Member, Routing, image_noise, make_scheduler, sample
from paris_p2p.errors import ConfigError

MAX_IMAGES = 4096
SAMPLING_NEEDS = ("router",)
"""What stays in memory beside the experts while images are sampled: every step asks it."""
_REMEDIES = {
    "text_encoder": "to read prompts: put one into the folder text_encoder, or pass text_encoder=…",
    "tokenizer": "to read prompts: put one into the folder tokenizer, or pass tokenizer=…",
    "vae": "to make pictures of latents: put one into the folder vae, pass vae=…, or ask for latents",
}

OnStep = Callable[[int, int], None]
"""Called with (evaluations done, evaluations in all)."""


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
        self.resident = Residency({})
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
        max_memory: int | None = None,
        offload: bool = False,
        **replacements: Any,
    ) -> Self:
        """The pipeline in `folder`, a run's or one in the published layout, in evaluation mode, on the CPU.

        `replacements`: parts to use instead of the folder's, `expert_1=None` leaves one out. `torch_dtype` is
        for the networks. `on_part` is called before each part and after the last. With `lazy_experts` an
        expert is loaded when it is first given weight or asked for by name, so that `ConfigError` may come
        then, and `on_part` hears of it as one part more. `max_memory`: bytes of weights to hold at once;
        every network is then loaded when it is needed and the longest unused ones leave for it, into main
        memory with `offload` (where the pipeline is on another device), else to be read again. Raises
        `ConfigError`.
        """
        root = Path(folder)
        index = {**read_index(root), **replacements}
        names = [name for name in index if is_part(name) and name not in replacements]
        for name in names:
            check_part(root / name, index[name])
        later = {
            name: index.pop(name)
            for name in names
            if (max_memory is not None and is_network(index[name]))
            or (lazy_experts and EXPERT_NAME.fullmatch(name))
        }
        loader = Loader(root, torch_dtype, on_part, len(names) - len(later))
        for name in names:
            if name not in later:
                index[name] = loader.load(name, index[name])
        pipe = cls(**index)
        shelf = {
            name: Shelved(partial(loader.load_one_more, name, entry), weights_bytes(root / name, torch_dtype))
            for name, entry in later.items()
        }
        pipe._shelve(Residency(shelf, max_memory, offload), later)
        return pipe

    def _shelve(self, resident: Residency, entries: Mapping[str, Any]) -> None:
        """Take the parts named in `entries` from `resident` from now on."""
        self.resident = resident
        self.register_to_config(**{name: tuple(entry) for name, entry in entries.items()})
        for name in entries:
            self.__dict__.pop(name, None)  # so that `__getattr__` is asked

    def __getattr__(self, name: str) -> Any:
        """A part on the shelf, loaded if it has to be; called only for what is no attribute."""
        resident = self.__dict__.get("resident")
        if resident is None or name not in resident.shelf:
            return super().__getattr__(name)
        return resident.get(name)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As diffusers' own: device, dtype or both. What is loaded later goes there too."""
        super().to(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                self.resident.dtype = value
            elif isinstance(value, str | torch.device):
                self.resident.device = torch.device(value)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are, or would be if they were loaded."""
        device: torch.device = self.resident.device if self.resident.shelf else super().device
        return device

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write every part and `model_index.json` into `save_directory`, making it."""
        root = Path(save_directory)
        for name in filter(is_part, list(self.config)):
            part = getattr(self, name)
            if part is not None:
                part.save_pretrained(root / name)
            else:
                self.register_to_config(**{name: (None, None)})
        self.save_config(root)

    @classmethod
    def _get_signature_keys(cls, obj: Any) -> tuple[list[str], list[str]]:
        """What diffusers takes for the parts and the settings of `obj` (`components`, `to`, …): of the parts
        those that are loaded."""
        keys = {key for key in obj.config if not key.startswith("_")}
        parts = {key for key in keys if is_part(key) and (key in obj.__dict__ or key in obj.resident.loaded)}
        return sorted(parts), sorted(keys - parts)

    @property
    def experts(self) -> dict[int, nn.Module]:
        """The experts there are, by cluster, loading what is not loaded yet."""
        return {cluster: self._expert(cluster) for cluster in self.present}

    @property
    def present(self) -> list[int]:
        """The clusters whose expert is there, loaded or not."""
        return sorted(
            int(name.removeprefix("expert_"))
            for name in self.config
            if EXPERT_NAME.fullmatch(name) and self.__dict__.get(name, name) is not None
        )

    def _expert(self, cluster: int, keep: Sequence[str] = ()) -> nn.Module:
        name = f"expert_{cluster}"
        if name in self.resident.shelf and name not in self.__dict__:
            return self.resident.get(name, keep)
        network: nn.Module = getattr(self, name)
        return network

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
        scheduler: str | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        on_step: OnStep | None = None,
    ) -> Any:
        """Pictures of `prompt`: an `ImagePipelineOutput`, all images of the first prompt, then of the next.

        What is not given is the recipe's default, the seed a random one. Image i of a prompt starts from
        noise that depends on seed + i only: the same seed gives the same image, whatever else is asked for.
        `top_k`: experts a step, 0 for all. `threshold`: only experts the router gives at least this
        probability, as many as `top_k` allows (all, if it is not given). `temperature`: of the router.
        `scheduler`: `euler`, `heun`, `unipc`, `dpm`; else the part `scheduler`. `latents`: the noise to start
        from instead, one (C, S, S) an image in the order of the output. `output_type`: `pil`, `np`,
        `pt`, or `latent`. Raises `ConfigError`, naming a part that is needed for this and missing.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not 1 <= len(prompts) * num_images_per_prompt <= MAX_IMAGES:
            raise ConfigError(f"ask for 1 to {MAX_IMAGES} images, of at least one prompt")
        count = len(prompts) * num_images_per_prompt
        if output_type != "latent" and self.config["latents"]["space"] == "vae":
            self._require("vae")  # said now, not after minutes of sampling
        defaults = self.config["sampling"]
        text = self.encode_prompts([*prompts, ""])  # (P + 1, T, W)
        self.seed_used = secrets.randbits(31) if seed is None else seed
        sampled = self._sampled(
            self.routing(top_k, threshold, temperature),
            defaults["guidance_scale"] if guidance_scale is None else guidance_scale,
            self.scheduler
            if scheduler is None and self.scheduler is not None
            else self._scheduler(scheduler),
            self._noise(num_images_per_prompt, len(prompts))
            if latents is None
            else self._checked(latents, count),
            text[:-1].repeat_interleave(num_images_per_prompt, dim=0),  # (N, T, W)
            text[-1],
            defaults["steps"] if num_inference_steps is None else num_inference_steps,
            None if on_step is None else lambda done, total, _: on_step(done, total),
        )
        return ImagePipelineOutput(images=self._images(sampled, output_type))

    def routing(
        self, top_k: int | None = None, threshold: float | None = None, temperature: float = 1.0
    ) -> Routing:
        """The routing that a call with these arguments uses. Raises `ConfigError`."""
        if top_k is None:
            top_k = self.config["sampling"]["top_k"] if threshold is None else 0
        return Routing(top_k, threshold or 0.0, temperature)

    def _sampled(self, routing: Routing, guidance_scale: float, scheduler: Any, *arguments: Any) -> Tensor:
        """Latents. A function of its own: what it holds on to may be unloaded when it is over."""
        router = self.router
        ensemble = Ensemble(self._members(), router, routing, guidance_scale, self._order)
        latents = sample(ensemble, scheduler, *arguments)
        self.experts_used = {f"expert_{k}": ensemble.calls[k] for k in ensemble.members}
        return latents

    def _order(self, clusters: Sequence[int]) -> list[int]:
        """`clusters`, the ones whose expert is in memory first."""
        names = self.resident.order([f"expert_{k}" for k in clusters])
        return [int(name.removeprefix("expert_")) for name in names]

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """What the experts read for `prompts`: (N, T, W), F32."""
        tokenizer, text_encoder = self._needed("tokenizer"), self._needed("text_encoder")
        encoded: Tensor = text_encoder(tokenizer(prompts).to(text_encoder.device))  # (N, T, W)
        return encoded.to(self.device, torch.float32)

    def _members(self) -> Mapping[int, Member]:
        objectives = self.config["objectives"]
        limit = 1.0 if self.config["latents"]["space"] == "pixel" else 8.0  # VAE latents have no hard bound
        return _Members(
            self.present, lambda k: Member(self._expert(k, SAMPLING_NEEDS), objectives[f"expert_{k}"], limit)
        )

    def _scheduler(self, name: str | None) -> Any:
        return make_scheduler(self.config["sampling"]["scheduler"] if name is None else name)

    def _noise(self, images: int, prompts: int) -> Tensor:
        latents = self.config["latents"]
        shape = (latents["channels"], latents["size"], latents["size"])
        assert self.seed_used is not None
        return (
            image_noise(self.seed_used, images, shape).repeat(prompts, 1, 1, 1).to(self.device)
        )  # (N, C, S, S)

    def _checked(self, latents: Tensor, count: int) -> Tensor:
        """Noise that was given, if it is of the model's shape."""
        wanted = self.config["latents"]
        shape = (count, wanted["channels"], wanted["size"], wanted["size"])
        if tuple(latents.shape) != shape:
            raise ConfigError(f"latents of shape {tuple(latents.shape)} were given; wanted is {shape}")
        return latents.to(self.device, torch.float32)

    def decoded(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Pictures of `latents` (N, C, S, S) as the experts see them, as a call would return them."""
        return self._images(latents.to(self.device), output_type)

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
        self._require(name)
        return getattr(self, name)

    def _require(self, name: str) -> None:
        """Raises `ConfigError` if the part `name` is missing. Loads nothing."""
        if self.__dict__.get(name, name) is None:
            raise ConfigError(f"the model has no {name}, which is needed {_REMEDIES[name]}")
