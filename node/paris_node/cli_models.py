"""The commands of `paris-node` that use models, train one alone, and the demo.

Owns: their arguments. Does not own: the program (`cli`), options that several take (`options`), what a
command does (`commands`). Heavy imports stay inside the command bodies.
"""

from pathlib import Path
from typing import Annotated

import typer

from paris_node.options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    FolderArgument,
    HomeOption,
    JsonOption,
    ModelOption,
    StartOption,
    ThreadsOption,
    finite,
    go,
    path_argument,
    path_option,
)
from paris_p2p.programs import Output

models = typer.Typer()


@models.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw.")],
    model: ModelOption = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, max=1024, help="How many images.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same image.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, callback=finite, help="Classifier-free guidance scale.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Experts a step; 0 means all.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            callback=finite,
            help="Only experts the router gives at least this probability.",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.01, callback=finite, help="Of the router; below 1 it is believed more.")
    ] = 1.0,
    scheduler: Annotated[str | None, typer.Option(help="euler, heun, unipc or dpm.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "fp32",
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", help="Most weights to hold at once: 2GB, 800MiB. Default: all."),
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="With --max-memory on a GPU: keep the rest in main memory.")
    ] = False,
    out: Annotated[
        Path | None, path_option("--out", help="A .png file for one image, or a folder. Default: here.")
    ] = None,
    grid: Annotated[
        Path | None, path_option("--grid", help="Also write one PNG with a row of images a prompt.")
    ] = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Draw images for a prompt with a fetched model. Needs no network."""
    from paris_node.commands.generate import GenerateRequest, run

    request = GenerateRequest(
        prompts=tuple(prompts),
        model=model,
        n=n,
        seed=seed,
        steps=steps,
        guidance=guidance,
        top_k=top_k,
        threshold=threshold,
        temperature=temperature,
        scheduler=scheduler,
        device=device,
        dtype=dtype,
        max_memory=max_memory,
        offload=offload,
        out=out,
        grid=grid,
        home=home,
    )
    go(lambda: run(request, Output(as_json)), debug)


@models.command("train-monolithic")
def train_monolithic(
    folder: FolderArgument,
    out: Annotated[Path, path_option("--out", help="Folder for the model.")],
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", help="Default: an expert's times the clusters; the samples stay the same."
        ),
    ] = None,
    variant: Annotated[
        str, typer.Option(help="Which of the recipe's expert variants to train: its name, or its number.")
    ] = "0",
    start: StartOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """The baseline: one network on all of a run's data, with the samples its experts see together."""
    from paris_node.commands import train_monolithic as command

    request = command.MonolithicRequest(folder, out, batch_size, variant, device, threads, home, start)
    go(lambda: command.run(request, Output(as_json)), debug)


@models.command()
def evaluate(
    folder: Annotated[Path, path_argument(help="The prepared folder whose images the models are judged by.")],
    model: Annotated[list[Path], path_option("--model", help="Model folder. May be repeated.")],
    out: Annotated[Path, path_option("--out", help="Folder for the report.")] = Path("evaluation"),
    samples: Annotated[int, typer.Option(min=16, help="Images a model.")] = 2000,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps. Default: the recipe's.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, callback=finite, help="Guidance scale. Default: the recipe's.")
    ] = None,
    routing: Annotated[
        list[str] | None, typer.Option("--routing", help="top1, top2, topN, full. Default: the first three.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="trained (here, on the real images), the folder of an earlier evaluation's features, "
            "timm:NAME, open_clip:ARCHITECTURE/PRETRAINED, or the folder of such a network."
        ),
    ] = "trained",
    real_samples: Annotated[
        int | None,
        typer.Option(
            "--real-samples",
            min=16,
            help="Most real images to compare with, by chance. Default: all; they are held in memory.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, noise and the feature network.")] = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Judge models: Frechet distance, precision, recall, prompt fidelity; as JSON, a table and grids."""
    from paris_node.commands import evaluate as command

    request = command.EvaluateRequest(
        folder,
        tuple(model),
        out,
        samples,
        steps,
        guidance,
        tuple(routing or command.ROUTINGS),
        features,
        seed,
        device,
        threads,
        home,
        real_samples,
    )
    go(lambda: command.run(request, Output(as_json)), debug)


@models.command("export-model")
def export_model(
    out: Annotated[Path, path_option("--out", help="New folder for the model.")],
    model: ModelOption = None,
    dtype: DtypeOption = "fp32",
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a model in the folder layout that Paris was published in."""
    from paris_node.commands import export_model as command

    go(lambda: command.run(model, out, dtype, home, Output(as_json)), debug)


@models.command()
def demo(
    out: Annotated[Path, path_option("--out", help="Where the demo keeps everything it makes.")] = Path(
        "demo-out"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps an expert.")] = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """The whole loop on this machine: seven processes, one killed, digits at the end."""
    from paris_node.commands import demo as command

    del home  # the demo's nodes have homes of their own under --out
    go(lambda: command.run(out, steps, Output(as_json)), debug)
