"""Sampling: what Top-2 costs against one expert alone, and what a memory limit holds.

Builds networks of the given preset with random weights (experts, a router that spreads samples over them, a
text encoder), then times, alternating, `steps` guided steps of `batch` images with one expert alone and with
the mixture. `ratio` in the last line's JSON is mixture / alone: in CPU seconds on the CPU, which other
programs disturb less, else in seconds (the bar is 2.2 for Top-2, batch 16); `wall_ratio` is in seconds.

The memory part generates with `max_memory` set to two experts, the router and the text encoder, in a process
of its own, and reports the most weights held and the process's peak above what it had before loading.

    python benchmarks/sampling.py [--preset tiny|small|b2|xl2] [--batch 16] [--top-k 2] [--dtype bf16]
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paris_p2p import clock
from paris_p2p.components.presets import PRESETS
from paris_p2p.components.text import TextEncoder
from paris_p2p.components.tokenizer import Tokenizer
from paris_p2p.diffusion import networks
from paris_p2p.diffusion.generate import DTYPES
from paris_p2p.diffusion.pipeline import ParisPipeline
from paris_p2p.diffusion.recipes import preset
from paris_p2p.diffusion.sampling import Ensemble, Member, Routing, make_scheduler, sample
from paris_p2p.wire.manifest import Recipe

ENCODERS: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 2048, "context_length": 16, "width": 64, "heads": 4, "layers": 2},
    "b2": {"context_length": 77, "width": 768, "heads": 12, "layers": 12},  # CLIP ViT-L/14's
}


def make_recipe(name: str, side: int | None, clusters: int) -> tuple[Recipe, dict[str, int]]:
    """The recipe, and the arguments of its text encoder."""
    big = name in ("b2", "xl2")
    encoder = ENCODERS["b2" if big else "tiny"]
    recipe = preset(
        name,
        channels=3,
        image_size=side or (256 if big else 32),
        clusters=clusters,
        tokens=encoder["context_length"],
        text_width=encoder["width"],
    )
    return recipe, encoder


@torch.no_grad()
def shaken(network: nn.Module, scale: float) -> nn.Module:
    """`network` with what starts at zero made random: a fresh one would answer every sample alike."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if not bool(parameter.any()):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def make_networks(recipe: Recipe, count: int) -> tuple[list[nn.Module], nn.Module]:
    """`count` experts and the router, with random weights."""
    experts = [shaken(networks.build(recipe.experts[0].architecture, k), 0.02) for k in range(count)]
    return experts, shaken(networks.build(recipe.router.architecture, 99), 0.3)


def write_model(root: Path, recipe: Recipe, encoder: dict[str, int], count: int) -> None:
    """A model folder, network after network, so that one is in memory at a time."""
    index: dict[str, Any] = {"_class_name": "ParisPipeline", "run_id": "", "clusters": count, "missing": []}
    for k in range(count):
        network = shaken(networks.build(recipe.experts[0].architecture, k), 0.02)
        network.save_pretrained(root / f"expert_{k}")  # type: ignore[operator]  # ModelMixin's, untyped
        index[f"expert_{k}"] = ["diffusers", "PixArtTransformer2DModel"]
    router = shaken(networks.build(recipe.router.architecture, 99), 0.3)
    router.save_pretrained(root / "router")  # type: ignore[operator]
    TextEncoder(**encoder).save_pretrained(root / "text_encoder")
    kept = range(512, 512 + encoder.get("vocab_size", 49408) - 514) if "vocab_size" in encoder else None
    Tokenizer(encoder["context_length"], kept).save_pretrained(root / "tokenizer")
    index |= {
        "router": ["paris_p2p.diffusion.router", "Router"],
        "text_encoder": ["paris_p2p.components.text", "TextEncoder"],
        "tokenizer": ["paris_p2p.components.tokenizer", "Tokenizer"],
        "latents": asdict(recipe.latents),
        "captions": asdict(recipe.captions),
        "sampling": asdict(recipe.sampling),
        "objectives": {f"expert_{k}": "flow_matching" for k in range(count)},
    }
    (root / "model_index.json").write_text(json.dumps(index))


def cpu_seconds() -> float:
    """CPU time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def steps_of(
    ensemble: Ensemble, noise: Tensor, text: Tensor, uncond: Tensor, steps: int
) -> tuple[float, float]:
    """Seconds, and CPU seconds, that `steps` steps take."""
    started, used = clock.monotonic(), cpu_seconds()
    sample(ensemble, make_scheduler("euler"), noise, text, uncond, steps)
    if noise.device.type == "cuda":
        torch.cuda.synchronize()
    return clock.monotonic() - started, cpu_seconds() - used


def time_part(given: argparse.Namespace) -> dict[str, Any]:
    """One expert alone against the mixture, alternating."""
    recipe, _ = make_recipe(given.preset, given.image_size, given.clusters)
    experts, router = make_networks(recipe, given.clusters)
    place = partial(nn.Module.to, device=given.device, dtype=DTYPES[given.dtype])
    members = {k: Member(place(network)) for k, network in enumerate(experts)}
    latents, captions = recipe.latents, recipe.captions
    noise = torch.randn(given.batch, latents.channels, latents.size, latents.size).to(given.device)
    text = torch.randn(given.batch, captions.tokens, captions.width).to(given.device)
    uncond = torch.randn(captions.tokens, captions.width).to(given.device)
    guidance = recipe.sampling.guidance_scale if given.guidance is None else given.guidance
    alone = Ensemble({0: members[0]}, None, Routing(1), guidance)
    mixed = Ensemble(members, place(router), Routing(given.top_k), guidance)
    steps_of(alone, noise, text, uncond, 1)
    steps_of(mixed, noise, text, uncond, 1)
    pairs = [
        tuple(steps_of(ensemble, noise, text, uncond, given.steps) for ensemble in (alone, mixed))
        for _ in range(given.repeats)
    ]
    on_cpu = int(noise.device.type == "cpu")
    ratios = sorted(mixture[on_cpu] / one[on_cpu] for one, mixture in pairs)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)],
        "wall_ratio": round(statistics.median(mixture[0] / one[0] for one, mixture in pairs), 3),
        "alone_s": round(statistics.median(one[on_cpu] for one, _ in pairs), 4),
        "mixture_s": round(statistics.median(mixture[on_cpu] for _, mixture in pairs), 4),
        "experts_used": sum(1 for calls in mixed.calls.values() if calls),
        "guidance": guidance,
    }


def memory_kb(name: str) -> int:
    """A figure of this process's status (`VmRSS`, `VmHWM`), kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"no {name}")


def limited(model: Path, given: dict[str, Any], experts: int) -> dict[str, Any]:
    """Generate under a limit of `experts` experts, the router and the text encoder."""
    torch.set_num_threads(given["threads"])
    dtype = DTYPES[given["dtype"]]
    sizes = {
        name: shelved.size
        for name, shelved in ParisPipeline.from_pretrained(
            model, torch_dtype=dtype, max_memory=1
        ).resident.shelf.items()
    }
    budget = experts * sizes["expert_0"] + sizes["router"] + sizes["text_encoder"]
    pipe = ParisPipeline.from_pretrained(
        model, torch_dtype=dtype, max_memory=budget, offload=given["offload"]
    ).to(given["device"])
    on_gpu = torch.device(given["device"]).type == "cuda"
    before = memory_kb("VmRSS")
    started = clock.monotonic()
    images = pipe(
        ["a picture"] * given["batch"],
        num_inference_steps=given["steps"],
        top_k=given["top_k"],
        seed=1,
        output_type="latent",
    ).images
    return {
        "budget_mb": round(budget / 1e6, 1),
        "held_mb": round(pipe.resident.peak / 1e6, 1),
        "peak_rss_mb": round((memory_kb("VmHWM") - before) / 1e3, 1),
        "peak_device_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1) if on_gpu else None,
        "seconds": round(clock.monotonic() - started, 3),
        "loads": sum(pipe.resident.loads.values()),
        "checksum": round(float(images.double().abs().mean()), 6),
    }


def memory_part(given: argparse.Namespace) -> dict[str, Any]:
    """The same images with two experts in memory and with all of them, each in a fresh process."""
    recipe, encoder = make_recipe(given.preset, given.image_size, given.clusters)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), recipe, encoder, given.clusters)
        results = []
        for experts in (2, given.clusters):
            with spawn.Pool(1) as pool:  # a process each: a peak is never taken back
                results.append(pool.apply(limited, (Path(folder), vars(given), experts)))
    two, everything = results
    return {
        "memory": two,
        "memory_all": everything,
        "memory_ratio": round(two["held_mb"] / two["budget_mb"], 3),
        "same_images": two["checksum"] == everything["checksum"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; the last line on stdout is JSON."""
    parser = argparse.ArgumentParser(description="Top-2 sampling against one expert alone")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--image-size", type=int, help="pixels a side; default 32, or 256 with a VAE")
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--guidance", type=float, help="default: the preset's")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--offload", action="store_true", help="what leaves a GPU waits in main memory")
    parser.add_argument("--skip", choices=("time", "memory"), help="leave one part out")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    result = {} if given.skip == "time" else time_part(given)
    if given.skip != "memory":
        result |= memory_part(given)
    print(json.dumps({**vars(given), **result}))


if __name__ == "__main__":
    main()
