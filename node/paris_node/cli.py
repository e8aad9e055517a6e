"""The command line of `paris-node`: parses, calls one command module, returns its exit code.

Owns: the commands that make a run and take part in it. Does not own: those that use models (`cli_models`)
and for content without a run (`cli_content`), options that several take (`options`), what a command does
(`commands`).

Heavy imports stay inside the command bodies: `paris-node --help` imports neither torch nor hivemind nor
libp2p.
"""

from pathlib import Path
from typing import Annotated

import typer

from paris_node.cli_content import content
from paris_node.cli_models import models
from paris_node.options import (
    AllowOption,
    AnnounceOption,
    BalancedOption,
    BootstrapOption,
    ClustersOption,
    DebugOption,
    DropDuplicatesOption,
    FolderArgument,
    HomeOption,
    InitFromOption,
    InitShareOption,
    JsonOption,
    LanOption,
    LimitDownOption,
    LimitUpOption,
    ListenOption,
    PeerLimitDownOption,
    PeerLimitUpOption,
    PublishedRouterOption,
    RestrictedOption,
    RunNameOption,
    RunOption,
    SeedOption,
    SeedRatioOption,
    SeedTimeOption,
    ShortLeaseOption,
    StepsOption,
    TrainerDeviceOption,
    VariantOfOption,
    VariantOption,
    VersionOption,
    go,
    path_argument,
    path_option,
)
from paris_p2p.programs import Output

app = typer.Typer(
    name="paris-node",
    help="Train a text-to-image model together with strangers, share it like a torrent, and use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _program(version: VersionOption = False) -> None:
    del version  # its callback prints it


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(help="`digits`, a folder of captioned images, a parquet file, or webdataset tars."),
    ],
    out: Annotated[Path, path_option("--out", help="Folder for the run's manifest and content.")],
    clusters: ClustersOption = None,
    preset: Annotated[str, typer.Option(help="Size of the model: tiny, small, b2 or xl2.")] = "tiny",
    variant: VariantOption = None,
    variant_of: VariantOfOption = None,
    published_router: PublishedRouterOption = False,
    init_from: InitFromOption = None,
    init_share: InitShareOption = None,
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
    short_lease: ShortLeaseOption = False,
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
        short_lease=short_lease,
        allow=tuple(allow or ()),
        init_from=init_from,
        init_share=init_share,
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
    go(lambda: run(request, Output(as_json)), debug)


@app.command("prepare-merge")
def prepare_merge(
    folders: Annotated[
        list[Path], path_argument(metavar="DIR…", help="What `prepare --shard I/N --out` wrote, all parts.")
    ],
    out: Annotated[
        Path | None, path_option("--out", help="Folder for the run. Default: the first DIR.")
    ] = None,
    clusters: ClustersOption = None,
    variant: VariantOption = None,
    variant_of: VariantOfOption = None,
    published_router: PublishedRouterOption = False,
    init_from: InitFromOption = None,
    init_share: InitShareOption = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    name: RunNameOption = None,
    balanced: BalancedOption = False,
    drop_duplicates: DropDuplicatesOption = False,
    allow: AllowOption = None,
    restricted: RestrictedOption = False,
    short_lease: ShortLeaseOption = False,
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
        short_lease=short_lease,
        allow=tuple(allow or ()),
        init_from=init_from,
        init_share=init_share,
        variants=tuple(variant or ()),
        variant_of=tuple(variant_of or ()),
        router_text=not published_router,
        balanced=balanced,
        drop_duplicates=drop_duplicates,
        parts=tuple(folders),
    )
    go(lambda: run(request, Output(as_json)), debug)


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

    go(lambda: command.run(folder, peer, expires, home, Output(as_json)), debug)


@app.command()
def publish(
    folder: FolderArgument,
    bootstrap: BootstrapOption = None,
    limit_up: LimitUpOption = None,
    limit_down: LimitDownOption = None,
    peer_limit_up: PeerLimitUpOption = None,
    peer_limit_down: PeerLimitDownOption = None,
    lan: LanOption = False,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Announce a prepared run, seed its content, mirror its checkpoints. Stays up until stopped."""
    from paris_node.commands import publish as command
    from paris_node.network import NetworkRequest
    from paris_node.sizes import read_limits

    def body() -> int:
        limits = read_limits(limit_up, limit_down, peer_limit_up, peer_limit_down)
        network = NetworkRequest(home, bootstrap, listen, announce, None, limits, lan=lan)
        return command.run(folder, network, Output(as_json))

    go(body, debug)


@app.command()
def join(
    bootstrap: BootstrapOption = None,
    run: RunOption = None,
    role: Annotated[str | None, typer.Option(help="Claim only this role: expert-N or router.")] = None,
    device: TrainerDeviceOption = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the trainer. Default: half the cores.")
    ] = None,
    until_complete: Annotated[
        bool, typer.Option("--until-complete", help="Exit 0 when every role is finished.")
    ] = False,
    pass_file: Annotated[
        Path | None, path_option("--pass", help="File with the organiser's pass, for a restricted run.")
    ] = None,
    limit_up: LimitUpOption = None,
    limit_down: LimitDownOption = None,
    peer_limit_up: PeerLimitUpOption = None,
    peer_limit_down: PeerLimitDownOption = None,
    seed_ratio: SeedRatioOption = None,
    seed_time: SeedTimeOption = None,
    max_disk: Annotated[
        str | None,
        typer.Option("--max-disk", help="The store may take this much: 50G, 200GiB. Default: the disk."),
    ] = None,
    relay: Annotated[
        bool,
        typer.Option(
            "--relay/--no-relay",
            help="Relay up to 2 MB/s for nodes behind routers, if this one can be dialled.",
        ),
    ] = False,
    lan: LanOption = False,
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
        limits = read_limits(
            limit_up, limit_down, peer_limit_up, peer_limit_down, seed_ratio=seed_ratio, seed_time=seed_time
        )
        disk = read_bytes(max_disk, "--max-disk")
        network = NetworkRequest(home, bootstrap, listen, announce, run, limits, disk, relay, lan)
        request = command.JoinRequest(network, role, device, threads, until_complete, pass_file=pass_file)
        return command.run(request, Output(as_json))

    go(body, debug)


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
    go(lambda: command.run(network, once, Output(as_json)), debug)


@app.command("fetch-model")
def fetch_model(
    bootstrap: BootstrapOption = None,
    run: RunOption = None,
    out: Annotated[
        Path | None, path_option("--out", help="Model folder. Default: in the home folder.")
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Write the model even if roles are missing.")
    ] = False,
    limit_up: LimitUpOption = None,
    limit_down: LimitDownOption = None,
    peer_limit_up: PeerLimitUpOption = None,
    peer_limit_down: PeerLimitDownOption = None,
    lan: LanOption = False,
    listen: ListenOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Gather router and experts from whoever has them, verify them, write a diffusers folder."""
    from paris_node.commands import fetch_model as command
    from paris_node.network import NetworkRequest
    from paris_node.sizes import read_limits

    def body() -> int:
        limits = read_limits(limit_up, limit_down, peer_limit_up, peer_limit_down)
        network = NetworkRequest(home, bootstrap, listen, None, run, limits, lan=lan)
        return command.run(network, out, allow_partial, Output(as_json))

    go(body, debug)


app.add_typer(models)
app.add_typer(content)
