"""The command line of `paris-node`: parses, calls one command module, returns its exit code.

Heavy imports stay inside the command bodies: `paris-node --help` imports neither torch nor hivemind nor
libp2p.
"""

from pathlib import Path
from typing import Annotated

import typer

from paris_p2p.programs import Output, run_program, set_up_logging

app = typer.Typer(
    name="paris-node",
    help="Train a text-to-image model together with strangers, share it like a torrent, and use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout; logs on stderr.")]
HomeOption = Annotated[
    Path | None, typer.Option("--home", help="The node's folder. Default: $PARIS_HOME, else the data folder.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Verbose logs, and tracebacks for errors.")]
ListenOption = Annotated[
    list[str] | None,
    typer.Option("--listen", help="Listen multiaddr, for example /ip4/0.0.0.0/tcp/4001. May be repeated."),
]
AnnounceOption = Annotated[
    list[str] | None,
    typer.Option("--announce", help="Multiaddr to tell others instead of what is listened on. Repeatable."),
]
BootstrapOption = Annotated[
    list[str] | None,
    typer.Option("--bootstrap", help="Address of a bootstrap node, /ip4/…/tcp/…/p2p/…. May be repeated."),
]
RunOption = Annotated[str | None, typer.Option("--run", help="Run id (or its beginning) or name.")]


def _go(body: object, as_json: bool, debug: bool) -> None:
    set_up_logging(debug)
    raise typer.Exit(run_program(body, debug=debug))  # type: ignore[arg-type]


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(help="`digits`, a folder of captioned images, a parquet file, or webdataset tars."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the run's manifest and content.")],
    clusters: Annotated[
        int | None, typer.Option(min=1, help="Experts. Default: 4 for digits, else 8.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Size of the model.")] = "tiny",
    image_size: Annotated[int | None, typer.Option(min=8, help="Pixels a side.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps an expert.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes everything that is drawn at random.")] = 0,
    name: Annotated[str | None, typer.Option(help="The run's name. Default: the source's.")] = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Make a run out of captioned images: cluster, encode, shard, sign."""
    from paris_node.commands.prepare import PrepareRequest, run

    request = PrepareRequest(source, out, clusters, preset, image_size, steps, seed, name, home)
    _go(lambda: run(request, Output(as_json)), as_json, debug)


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="What `prepare --out` wrote.")],
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the trainer.")] = None,
    until_complete: Annotated[
        bool, typer.Option("--until-complete", help="Exit 0 when every role is finished.")
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

    network = NetworkRequest(home, bootstrap, listen, announce, run)
    request = command.JoinRequest(network, role, device, threads, until_complete)
    _go(lambda: command.run(request, Output(as_json)), as_json, debug)


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
    model: Annotated[
        Path | None, typer.Option("--model", help="Model folder. Default: the last fetched.")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, max=1024, help="How many images.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same image.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="Classifier-free guidance scale.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Experts a step; 0 means all.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="euler, heun, unipc or dpm.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
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
        tuple(prompts), model, n, seed, steps, guidance, top_k, scheduler, device, out, grid, home
    )
    _go(lambda: run(request, Output(as_json)), as_json, debug)


@app.command("content-id")
def content_id(
    path: Annotated[Path, typer.Argument(help="A file or a folder.")],
    piece_length: Annotated[
        int | None, typer.Option("--piece-length", help="Bytes, a power of two >= 16384. Default: by size.")
    ] = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """The BitTorrent v2 content id of a file or folder."""
    from paris_node.commands import content_id as command

    del home  # every command takes --home; this one needs none
    _go(lambda: command.run(path, piece_length, Output(as_json)), as_json, debug)


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
