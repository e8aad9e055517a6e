"""A training step of ours against a plain diffusers + accelerate loop of the same model, in the same run.

Both train the preset's expert on the same random latents and captions: AdamW, gradient clipping, EMA, the
recipe's precision, caption dropout, flow matching. Blocks of steps alternate (ours, plain, plain, ours, ...),
so that a machine that speeds up or slows down meets both alike. The last line is one JSON object; `ratio` is
the median of ours / plain in images/s over the pairs of blocks, with its spread. On a CPU that others use too
`cpu_ratio`, the same of images a CPU second, says more.

    python benchmarks/train_step.py --preset small --threads 2
    python benchmarks/train_step.py --preset b2 --device cuda --batch-size 256
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from paris_p2p.diffusion import networks
from paris_p2p.diffusion.expert import predict
from paris_p2p.diffusion.recipes import preset
from paris_p2p.diffusion.shards import Examples, Shard
from paris_p2p.diffusion.training import Trainer
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


def ours(recipe: Recipe, shard: Shard, device: str) -> tuple[Callable[[], Tensor], Trainer]:
    """One step of this project's trainer."""
    examples = Examples([shard])
    trainer = Trainer(recipe, expert_role(0), 0, examples, examples, device)
    return trainer.train_step, trainer


def plain(recipe: Recipe, shard: Shard, device: str, precision: str) -> Callable[[], Tensor]:
    """One step of a loop as diffusers' training examples write it."""
    training = recipe.experts[0].training
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


def utilisation(recipe: Recipe, images_per_s: float) -> float | None:
    """Model FLOPs utilisation against the GPU's dense bf16 peak, if it is known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((peak for part, peak in PEAK_BF16.items() if part in name), None)
    return None if peak is None else step_flops(recipe) * images_per_s / peak


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything the last line says."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    recipe = recipe_for(arguments)
    batch = recipe.experts[0].training.batch_size
    shard = shard_for(recipe)
    own_step, trainer = ours(recipe, shard, arguments.device)
    plain_step = plain(recipe, shard, arguments.device, trainer.precision)
    for step in (own_step, plain_step):
        seconds(step, arguments.warmup)
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    cpu_rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(arguments.rounds):
        order = [("ours", own_step), ("plain", plain_step)]
        for name, step in order if number % 2 == 0 else order[::-1]:
            wall, cpu = seconds(step, arguments.steps)
            rates[name].append(batch * arguments.steps / wall)
            cpu_rates[name].append(batch * arguments.steps / cpu)
    ratios = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
    cpu_ratios = [a / b for a, b in zip(cpu_rates["ours"], cpu_rates["plain"], strict=True)]
    best = statistics.median(rates["ours"])
    return {
        "benchmark": "train_step",
        "preset": arguments.preset,
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else trainer.device.type,
        "precision": trainer.precision,
        "batch_size": batch,
        "micro_batch": trainer.memory_plan.micro_batch,
        "checkpointing": trainer.memory_plan.checkpointing,
        "threads": arguments.threads,
        "images_per_s": round(best, 2),
        "plain_images_per_s": round(statistics.median(rates["plain"]), 2),
        "model_flops_utilisation": utilisation(recipe, best),
        "gflops_per_image": round(step_flops(recipe) / 1e9, 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "cpu_ratio_min": round(min(cpu_ratios), 3),
        "cpu_ratio_max": round(max(cpu_ratios), 3),
        "rounds": arguments.rounds,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small", choices=["tiny", "small", "b2", "xl2"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: the preset's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2, help="steps not counted, of each")
    parser.add_argument("--steps", type=int, default=4, help="steps a block")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of blocks")
    parser.add_argument("--compile", action="store_true", help="let a GPU compile, as long trainings do")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
