"""The command line of `paris-node`: parses, calls one command module, returns its exit code.

Heavy imports stay inside the command bodies: `paris-node --help` imports neither torch nor hivemind nor
libp2p.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from paris_node.options import (
    AllowOption,
    AnnounceOption,
    BalancedOption,
    BootstrapOption,
    ClustersOption,
    DebugOption,
    DeviceOption,
    DropDuplicatesOption,
    DtypeOption,
    FolderArgument,
    HomeOption,
    InitFromOption,
    JsonOption,
    LanOption,
    LimitDownOption,
    LimitUpOption,
    ListenOption,
    ModelOption,
    PieceLengthOption,
    PublishedRouterOption,
    RestrictedOption,
    RunNameOption,
    RunOption,
    SeedOption,
    SeedRatioOption,
    SeedTimeOption,
    ShareListenOption,
    StepsOption,
    ThreadsOption,
    VariantOfOption,
    VariantOption,
    ViaOption,
)
from paris_p2p.programs import Output, run_program, set_up_logging

app = typer.Typer(
    name="paris-node",
    help="Train a text-to-image model together with strangers, share it like a torrent, and use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _go(body: Callable[[], int | None], as_json: bool, debug: bool) -> None:
    set_up_logging(debug)
    raise typer.Exit(run_program(body, debug=debug))


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(help="`digits`, a folder of captioned images, a parquet file, or webdataset tars."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the run's manifest and content.")],
    clusters: ClustersOption = None,
    preset: Annotated[str, typer.Option(help="Size of the model: tiny, small, b2 or xl2.")] = "tiny",
    variant: VariantOption = None,
    variant_of: VariantOfOption = None,
    published_router: PublishedRouterOption = False,
    init_from: InitFromOption = None,
    image_size: Annotated[int | None, typer.Option(min=8, help="Pixels a side.")] = None,
    image_encoder: Annotated[
        str | None,
        typer.Option(
            "--image-encoder", help="What to cluster by: timm:NAME, open_clip:ARCHITECTURE/TAG, or a folder."
        ),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option("--text-encoder", help="A CLIP text model: a folder, or OWNER/NAME.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option("--vae", help="An AutoencoderKL: a folder, or OWNER/NAME.")
    ] = None,
    device: Annotated[str, typer.Option(help="Of the encoders: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    shard: Annotated[
        str | None,
        typer.Option("--shard", help="I/N: read and encode only part I of N; then `prepare-merge`."),
    ] = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    name: RunNameOption = None,
    balanced: BalancedOption = False,
    drop_duplicates: DropDuplicatesOption = False,
    allow: AllowOption = None,
    restricted: RestrictedOption = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Make a run out of captioned images: cluster, encode, shard, sign."""
    from paris_node.commands.prepare import PrepareRequest, run

    request = PrepareRequest(
        source=source,
        out=out,
        clusters=clusters,
        preset=preset,
        image_size=image_size,
        steps=steps,
        seed=seed,
        name=name,
        home=home,
        restricted=restricted,
        allow=tuple(allow or ()),
        init_from=init_from,
        variants=tuple(variant or ()),
        variant_of=tuple(variant_of or ()),
        router_text=not published_router,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        vae=vae,
        device=device,
        shard=shard,
        balanced=balanced,
        drop_duplicates=drop_duplicates,
    )
    _go(lambda: run(request, Output(as_json)), as_json, debug)


@app.command("prepare-merge")
def prepare_merge(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR…", help="What `prepare --shard I/N --out` wrote, all parts.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the run. Default: the first DIR.")
    ] = None,
    clusters: ClustersOption = None,
    variant: VariantOption = None,
    variant_of: VariantOfOption = None,
    published_router: PublishedRouterOption = False,
    init_from: InitFromOption = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    name: RunNameOption = None,
    balanced: BalancedOption = False,
    drop_duplicates: DropDuplicatesOption = False,
    allow: AllowOption = None,
    restricted: RestrictedOption = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Make a run out of the parts that `prepare --shard` made: cluster, shard, sign."""
    from paris_node.commands.prepare import PrepareRequest, run

    request = PrepareRequest(
        source="",
        out=out or folders[0],
        clusters=clusters,
        steps=steps,
        seed=seed,
        name=name,
        home=home,
        restricted=restricted,
        allow=tuple(allow or ()),
        init_from=init_from,
        variants=tuple(variant or ()),
        variant_of=tuple(variant_of or ()),
        router_text=not published_router,
        balanced=balanced,
        drop_duplicates=drop_duplicates,
        parts=tuple(folders),
    )
    _go(lambda: run(request, Output(as_json)), as_json, debug)


@app.command()
def delegate(
    folder: FolderArgument,
    peer: Annotated[str, typer.Argument(metavar="PEER_ID", help="The node that may claim roles.")],
    expires: Annotated[
        str, typer.Option("--expires", help="Until when: 12h, 30d, 8w from now, or a date 2027-01-31 (UTC).")
    ] = "30d",
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Let one node claim roles of a restricted run for a while: prints a pass, for its `join --pass FILE`."""
    from paris_node.commands import delegate as command

    _go(lambda: command.run(folder, peer, expires, home, Output(as_json)), as_json, debug)


@app.command()
def publish(
    folder: FolderArgument,
    bootstrap: BootstrapOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Announce a prepared run, seed its content, mirror its checkpoints. Stays up until stopped."""
    from paris_node.commands.publish import run
    from paris_node.network import NetworkRequest

    network = NetworkRequest(home, bootstrap, listen, announce, None)
    _go(lambda: run(folder, network, Output(as_json)), as_json, debug)


@app.command()
def join(
    bootstrap: BootstrapOption = None,
    run: RunOption = None,
    role: Annotated[str | None, typer.Option(help="Claim only this role: expert-N or router.")] = None,
    device: DeviceOption = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the trainer. Default: half the cores.")
    ] = None,
    until_complete: Annotated[
        bool, typer.Option("--until-complete", help="Exit 0 when every role is finished.")
    ] = False,
    pass_file: Annotated[
        Path | None, typer.Option("--pass", help="File with the organiser's pass, for a restricted run.")
    ] = None,
    limit_up: LimitUpOption = None,
    limit_down: LimitDownOption = None,
    seed_ratio: SeedRatioOption = None,
    seed_time: SeedTimeOption = None,
    max_disk: Annotated[
        str | None, typer.Option("--max-disk", help="The store may take this much: 50G. Default: the disk.")
    ] = None,
    relay: Annotated[
        bool,
        typer.Option(
            "--relay/--no-relay",
            help="Relay up to 2 MB/s for nodes behind routers, if this one can be dialled.",
        ),
    ] = False,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Join a run: claim a free role, train it here, share the checkpoints; then the next role."""
    from paris_node.commands import join as command
    from paris_node.network import NetworkRequest
    from paris_node.sizes import read_bytes, read_limits

    def body() -> int:
        limits = read_limits(limit_up, limit_down, seed_ratio, seed_time)
        disk = read_bytes(max_disk, "--max-disk")
        network = NetworkRequest(home, bootstrap, listen, announce, run, limits, disk, relay)
        request = command.JoinRequest(network, role, device, threads, until_complete, pass_file=pass_file)
        return command.run(request, Output(as_json))

    _go(body, as_json, debug)


@app.command()
def status(
    bootstrap: BootstrapOption = None,
    run: RunOption = None,
    once: Annotated[bool, typer.Option("--once", help="Print the state once and exit.")] = False,
    listen: ListenOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Watch a run: every role, who holds it, how far it is."""
    from paris_node.commands import status as command
    from paris_node.network import NetworkRequest

    network = NetworkRequest(home, bootstrap, listen, None, run)
    _go(lambda: command.run(network, once, Output(as_json)), as_json, debug)


@app.command("fetch-model")
def fetch_model(
    bootstrap: BootstrapOption = None,
    run: RunOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Model folder. Default: in the home folder.")
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Write the model even if roles are missing.")
    ] = False,
    listen: ListenOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Gather router and experts from whoever has them, verify them, write a diffusers folder."""
    from paris_node.commands import fetch_model as command
    from paris_node.network import NetworkRequest

    network = NetworkRequest(home, bootstrap, listen, None, run)
    _go(lambda: command.run(network, out, allow_partial, Output(as_json)), as_json, debug)


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw.")],
    model: ModelOption = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, max=1024, help="How many images.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same image.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="Classifier-free guidance scale.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Experts a step; 0 means all.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Only experts the router gives at least this probability."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.01, help="Of the router; below 1 it is believed more.")
    ] = 1.0,
    scheduler: Annotated[str | None, typer.Option(help="euler, heun, unipc or dpm.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "fp32",
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", help="Most weights to hold at once, for example 2GB. Default: all."),
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="With --max-memory on a GPU: keep the rest in main memory.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="A .png file for one image, or a folder. Default: here.")
    ] = None,
    grid: Annotated[
        Path | None, typer.Option("--grid", help="Also write one PNG with a row of images a prompt.")
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
    _go(lambda: run(request, Output(as_json)), as_json, debug)


@app.command("train-monolithic")
def train_monolithic(
    folder: FolderArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for the model.")],
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", help="Default: an expert's times the clusters; the samples stay the same."
        ),
    ] = None,
    variant: Annotated[int, typer.Option(help="Which of the recipe's expert variants to train.")] = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """The baseline: one network on all of a run's data, with the samples its experts see together."""
    from paris_node.commands import train_monolithic as command

    request = command.MonolithicRequest(folder, out, batch_size, variant, device, threads, home)
    _go(lambda: command.run(request, Output(as_json)), as_json, debug)


@app.command()
def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="The prepared folder whose images the models are judged by.")
    ],
    model: Annotated[list[Path], typer.Option("--model", help="Model folder. May be repeated.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the report.")] = Path("evaluation"),
    samples: Annotated[int, typer.Option(min=16, help="Images a model.")] = 2000,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps. Default: the recipe's.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Guidance scale. Default: the recipe's.")
    ] = None,
    routing: Annotated[
        list[str] | None, typer.Option("--routing", help="top1, top2, topN, full. Default: the first three.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="trained (here, on the real images), the folder of an earlier evaluation's features, "
            "timm:NAME or open_clip:ARCHITECTURE/PRETRAINED."
        ),
    ] = "trained",
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
    )
    _go(lambda: command.run(request, Output(as_json)), as_json, debug)


@app.command("export-model")
def export_model(
    out: Annotated[Path, typer.Option("--out", help="New folder for the model.")],
    model: ModelOption = None,
    dtype: DtypeOption = "fp32",
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a model in the folder layout that Paris was published in."""
    from paris_node.commands import export_model as command

    _go(lambda: command.run(model, out, dtype, home, Output(as_json)), as_json, debug)


@app.command("content-id")
def content_id(
    path: Annotated[Path, typer.Argument(help="A file or a folder.")],
    piece_length: PieceLengthOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """The BitTorrent v2 content id of a file or folder."""
    from paris_node.commands import content_id as command

    del home  # every command takes --home; this one needs none
    _go(lambda: command.run(path, piece_length, Output(as_json)), as_json, debug)


@app.command()
def seed(
    path: Annotated[Path, typer.Argument(help="A file or a folder. It is served from where it is.")],
    piece_length: PieceLengthOption = None,
    listen: ShareListenOption = None,
    announce: AnnounceOption = None,
    via: ViaOption = None,
    limit_up: LimitUpOption = None,
    limit_down: LimitDownOption = None,
    seed_ratio: SeedRatioOption = None,
    seed_time: SeedTimeOption = None,
    lan: LanOption = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Serve a file or folder to whoever knows its id. No bootstrap node is needed. Stays up until stopped."""
    from paris_node import quick

    share = quick.Share(home, listen, announce, limit_up, limit_down, lan, seed_ratio, seed_time, via)
    _go(lambda: quick.seed(path, piece_length, share, as_json), as_json, debug)


@app.command()
def get(
    item: Annotated[
        str, typer.Argument(metavar="ID|MAGNET|TORRENT", help="What to fetch: its id, or a v2 .torrent file.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder that gets the file or folder.")],
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Address of a node that may have it; it names further ones. Repeatable."),
    ] = None,
    keep_seeding: Annotated[
        bool, typer.Option("--keep-seeding", help="Go on serving it to others until stopped.")
    ] = False,
    listen: ShareListenOption = None,
    announce: AnnounceOption = None,
    via: ViaOption = None,
    limit_up: LimitUpOption = None,
    limit_down: LimitDownOption = None,
    seed_ratio: SeedRatioOption = None,
    seed_time: SeedTimeOption = None,
    lan: LanOption = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Fetch one item from peers, verified piece by piece. Goes on where an interrupted fetch stopped."""
    from paris_node import quick

    share = quick.Share(home, listen, announce, limit_up, limit_down, lan, seed_ratio, seed_time, via)
    _go(lambda: quick.get(item, peer, out, keep_seeding, share, as_json), as_json, debug)


@app.command("export-torrent")
def export_torrent(
    item: Annotated[
        str, typer.Argument(help="The id (or its beginning) of an item in the home's store, or a path.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The .torrent file to write.")],
    piece_length: PieceLengthOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Write an item's BitTorrent v2 .torrent for other clients, and print its magnet link."""
    from paris_node.commands import export_torrent as command

    request = command.ExportRequest(item, out, piece_length, home)
    _go(lambda: command.run(request, Output(as_json)), as_json, debug)


@app.command()
def verify(
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Hash everything in the home's store again. What is damaged is set aside and fetched again."""
    from paris_node.commands import verify as command

    def body() -> int:
        from paris_p2p.store.home import Home

        return command.run(Home.resolve(home), Output(as_json))

    _go(body, as_json, debug)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the demo keeps everything it makes.")] = Path(
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
    _go(lambda: command.run(out, steps, Output(as_json)), as_json, debug)
