"""A training step of ours against a plain diffusers + accelerate loop of the same model, in the same run.

Both train the preset's expert on the same random latents and captions: AdamW, gradient clipping, EMA, the
recipe's precision, caption dropout, flow matching. Blocks of steps alternate (ours, plain, plain, ours, ...),
so that a machine that speeds up or slows down meets both alike. The last line is one JSON object; `ratio` is
the median of ours / plain in images/s over the pairs of blocks, with its spread. On a CPU that others use too
`cpu_ratio`, the same of images a CPU second, says more.

`peak_mb` is what our steps take (device memory; on a CPU the process's, above what it had before), beside
`estimate_mb`, what the trainer counts on (docs/models.md). `--alone` leaves the plain loop out: one step of a
big model on a CPU, where two would take all its memory and hours.

    python benchmarks/train_step.py --preset small --threads 2
    python benchmarks/train_step.py --preset b2 --precision bf16 --batch-size 2 --warmup 0 --steps 1 --alone
    python benchmarks/train_step.py --preset b2 --device cuda --batch-size 256
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from paris_p2p.diffusion import networks
from paris_p2p.diffusion.expert import predict
from paris_p2p.diffusion.recipes import preset
from paris_p2p.diffusion.shards import Examples, Shard
from paris_p2p.diffusion.training import Trainer, step_memory
from paris_p2p.ids import expert_role
from paris_p2p.wire.manifest import Recipe

IMAGES = 512
CAPTIONS = 64
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "L4": 121e12}
"""Dense bf16 tensor FLOP/s from the makers' data sheets, by a part of the device's name."""


def recipe_for(arguments: argparse.Namespace) -> Recipe:
    """The preset's recipe, for its usual image size, with the batch size and precision asked for."""
    latent = arguments.preset in ("b2", "xl2")
    side, tokens, width = (256, 77, 768) if latent else (32, 16, 64)
    made = preset(
        arguments.preset,
        channels=3,
        image_size=side,
        clusters=8,
        tokens=tokens,
        text_width=width,
        steps=100_000,
    )
    training = made.experts[0].training
    training = dataclasses.replace(
        training,
        batch_size=arguments.batch_size or training.batch_size,
        precision=arguments.precision or training.precision,
        steps=100_000 if arguments.compile else 1999,  # shorter trainings are not compiled
    )
    return dataclasses.replace(made, experts=(dataclasses.replace(made.experts[0], training=training),))


def shard_for(recipe: Recipe) -> Shard:
    """Random images and captions of the recipe's shapes."""
    generator = torch.Generator().manual_seed(0)
    latents, text = recipe.latents, recipe.captions
    return Shard(
        0,
        torch.randn(IMAGES, latents.channels, latents.size, latents.size, generator=generator),
        torch.randint(CAPTIONS, (IMAGES,), generator=generator),
        torch.randn(CAPTIONS, text.tokens, text.width, generator=generator),
        torch.zeros(text.tokens, text.width),
    )


def ours(recipe: Recipe, shard: Shard, device: str, precision: str | None) -> Trainer:
    """This project's trainer. `precision`: in this one even where the hardware does not gain."""
    examples = Examples([shard])
    return Trainer(recipe, expert_role(0), 0, examples, examples, device, precision=precision)


def estimate_bytes(trainer: Trainer, recipe: Recipe) -> int:
    """What the trainer reckons its step takes, weights and average included."""
    variant = recipe.experts[0]
    need = step_memory(variant.architecture, trainer.plan, recipe, trainer.precision)
    plan = trainer.memory_plan
    per_image = need.per_image_checkpointed if plan.checkpointing else need.per_image
    return need.fixed * 5 // 3 + plan.micro_batch * per_image  # 20 bytes a parameter, 12 of them fixed


def peak_bytes(device: torch.device, before: int) -> int:
    """The most memory taken so far: of a GPU by its allocator, else by the process above `before`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    """A figure of this process's status on Linux (`VmRSS`, `VmHWM`); 0 elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")]
    return found[0] if found else 0


def plain(recipe: Recipe, shard: Shard, device: str, precision: str) -> Callable[[], Tensor]:
    """One step of a loop as diffusers' training examples write it."""
    training = recipe.experts[0].training
    AcceleratorState._reset_state()  # ours is of no precision to Accelerate, which allows one a process
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")
    model = PixArtTransformer2DModel(**recipe.experts[0].architecture.config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    data = TensorDataset(shard.latents, shard.caption_index)
    loader = DataLoader(data, batch_size=training.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = EMAModel(model.parameters(), decay=training.ema_decay)
    captions, uncond = shard.captions.to(accelerator.device), shard.uncond.to(accelerator.device)
    batches = endless(loader)

    def step() -> Tensor:
        x0, index = next(batches)
        dropped = torch.rand(len(x0), device=x0.device) < training.caption_dropout
        text = torch.where(dropped[:, None, None], uncond, captions[index])
        t = compute_density_for_timestep_sampling("logit_normal", len(x0), 0.0, 1.0).to(x0.device)
        eps = torch.randn_like(x0)
        wide = t.view(-1, 1, 1, 1)
        with accelerator.autocast():
            output = predict(model, (1 - wide) * x0 + wide * eps, t, text)
            loss = torch.nn.functional.mse_loss(output.float(), eps - x0)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        return loss.detach()

    return step


def endless(loader: Any) -> Any:
    """The loader's batches, epoch after epoch."""
    while True:
        yield from loader


def seconds(step: Callable[[], Tensor], count: int) -> tuple[float, float]:
    """Wall and CPU seconds of `count` steps, waiting for the device at both ends."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started, cpu = time.perf_counter(), time.process_time()
    loss = torch.zeros(())
    for _ in range(count):
        loss = step()
    float(loss)
    return time.perf_counter() - started, time.process_time() - cpu


def step_flops(recipe: Recipe) -> float:
    """Floating-point operations of one image's forward and backward pass (the backward is two forwards)."""
    with torch.device("meta"):
        network = networks.construct(recipe.experts[0].architecture)
        latents, text = recipe.latents, recipe.captions
        x = torch.empty(1, latents.channels, latents.size, latents.size)
        with FlopCounterMode(display=False) as counter:
            predict(network, x, torch.empty(1), torch.empty(1, text.tokens, text.width))
    return 3.0 * float(counter.get_total_flops())


def utilisation(recipe: Recipe, images_per_s: float, device: torch.device) -> float | None:
    """Model FLOPs utilisation against the GPU's dense bf16 peak, if it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAK_BF16.items() if part in name), None)
    return None if peak is None else round(step_flops(recipe) * images_per_s / peak, 4)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything the last line says."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    recipe = recipe_for(arguments)
    batch = recipe.experts[0].training.batch_size
    shard = shard_for(recipe)
    before = _status_bytes("VmRSS")
    trainer = ours(recipe, shard, arguments.device, arguments.precision)
    steps = {"ours": trainer.train_step}
    seconds(trainer.train_step, arguments.warmup)
    blocks = rounds(steps, 1, arguments.steps) if arguments.alone else None
    # before the plain loop takes its part
    peak = peak_bytes(trainer.device, before) if trainer.step else 0
    estimate = estimate_bytes(trainer, recipe)
    if blocks is None:
        steps["plain"] = plain(recipe, shard, arguments.device, trainer.precision)
        seconds(steps["plain"], arguments.warmup)
        blocks = rounds(steps, arguments.rounds, arguments.steps)
    images = batch * arguments.steps
    rate = images / statistics.median(wall for wall, _ in blocks["ours"])
    return {
        "benchmark": "train_step",
        "preset": arguments.preset,
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else trainer.device.type,
        "precision": trainer.precision,
        "batch_size": batch,
        "micro_batch": trainer.memory_plan.micro_batch,
        "checkpointing": trainer.memory_plan.checkpointing,
        "compiled": arguments.compile and trainer.device.type == "cuda",
        "threads": arguments.threads,
        "images_per_s": round(rate, 4 if rate < 1 else 2),
        "cpu_s_a_step": round(statistics.median(cpu for _, cpu in blocks["ours"]) / arguments.steps, 3),
        "model_flops_utilisation": utilisation(recipe, rate, trainer.device),
        "gflops_per_image": round(step_flops(recipe) / 1e9, 2),
        "peak_mb": round(peak / 1e6),
        "estimate_mb": round(estimate / 1e6),
        "memory_ratio": round(peak / estimate, 3) if peak else None,
        **({} if arguments.alone else compared(blocks, images)),
        "rounds": len(blocks["ours"]),
    }


def rounds(
    steps: dict[str, Callable[[], Tensor]], count: int, length: int
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of `count` blocks of `length` steps of each, in alternating order."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(count):
        order = list(steps.items())
        for name, step in order if number % 2 == 0 else order[::-1]:
            taken[name].append(seconds(step, length))
    return taken


def compared(blocks: dict[str, list[tuple[float, float]]], images: int) -> dict[str, float]:
    """Ours against the plain loop, of blocks of `images` images."""
    pairs = list(zip(blocks["ours"], blocks["plain"], strict=True))
    ratios = [theirs[0] / own[0] for own, theirs in pairs]
    cpu_ratios = [theirs[1] / own[1] for own, theirs in pairs]
    plain_s = statistics.median(wall for wall, _ in blocks["plain"])
    return {
        "plain_images_per_s": round(images / plain_s, 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "cpu_ratio_min": round(min(cpu_ratios), 3),
        "cpu_ratio_max": round(max(cpu_ratios), 3),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small", choices=["tiny", "small", "b2", "xl2"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="default: the preset's, where the device gains from it"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2, help="steps not counted, of each")
    parser.add_argument("--steps", type=int, default=4, help="steps a block")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of blocks")
    parser.add_argument("--alone", action="store_true", help="our steps only")
    parser.add_argument("--compile", action="store_true", help="let a GPU compile, as long trainings do")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
