"""The options that several commands of `paris-node` have in common, and how a command ends.

Owns: names, types and help texts; turning what a command returns or raises into the exit code. Does not own:
which command takes which (`cli`, `cli_content`), what they mean (`commands`).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from paris_p2p.programs import run_program, set_up_logging, version_text


def go(body: Callable[[], int | None], debug: bool) -> None:
    """Run a command's body and exit with its code."""
    set_up_logging(debug)
    raise typer.Exit(run_program(body, debug=debug))


def finite(value: float | None) -> float | None:
    """`value` of an option, refused where it is no number: a lower limit lets nan pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def named_path(text: str) -> Path:
    """`text` as a path. Nothing is no path, though `pathlib` takes it for the present folder: it is what a
    script's unset variable leaves, and that folder would be shared with strangers, or become a home."""
    if not text:
        raise typer.BadParameter("it is empty: name a file or a folder (. is the present one)")
    return Path(text)


def path_option(name: str, *, help: str) -> Any:
    """An option that takes a path."""
    return typer.Option(name, help=help, parser=named_path, metavar="PATH")


def path_argument(*, help: str, metavar: str = "PATH") -> Any:
    """An argument that is a path."""
    return typer.Argument(help=help, parser=named_path, metavar=metavar)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_text("paris-node"))
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit."),
]

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout; logs on stderr.")]
HomeOption = Annotated[
    Path | None, path_option("--home", help="The node's folder. Default: $PARIS_HOME, else the data folder.")
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
PieceLengthOption = Annotated[
    int | None, typer.Option("--piece-length", help="Bytes, a power of two >= 16384. Default: by size.")
]
ShareListenOption = Annotated[
    list[str] | None,
    typer.Option(
        "--listen",
        help="Listen multiaddr: /ip4/IP/tcp/PORT/tls (fast), or without /tls (libp2p). Repeatable. "
        "Default: any port, TLS.",
    ),
]
ViaOption = Annotated[
    list[str] | None,
    typer.Option(
        "--via",
        help="Behind a router: the TLS address of a public node that relays (paris-bootstrap prints one). "
        "Repeatable.",
    ),
]
LimitUpOption = Annotated[
    str | None, typer.Option("--limit-up", help="Upload at most so many bytes a second: 500k, 2.5MB, 1MiB.")
]
LimitDownOption = Annotated[
    str | None,
    typer.Option("--limit-down", help="Download at most so many bytes a second: 500k, 2.5MB, 1MiB."),
]
PeerLimitUpOption = Annotated[
    str | None,
    typer.Option("--peer-limit-up", help="Upload at most so many bytes a second to each peer: 500k, 2.5MB."),
]
PeerLimitDownOption = Annotated[
    str | None,
    typer.Option(
        "--peer-limit-down", help="Download at most so many bytes a second from each peer: 500k, 2.5MB."
    ),
]
SeedRatioOption = Annotated[
    str | None,
    typer.Option("--seed-ratio", help="A complete item is served until so many times its size was sent."),
]
SeedTimeOption = Annotated[
    str | None, typer.Option("--seed-time", help="A complete item is served for so long: 90s, 30m, 12h, 7d.")
]
LanOption = Annotated[
    bool,
    typer.Option(
        "--lan/--no-lan", help="Find peers on the local network (mDNS), which then see this node's addresses."
    ),
]
ClustersOption = Annotated[
    int | None, typer.Option("--clusters", min=1, help="Experts. Default: 4 for digits, else 8.")
]
VariantOption = Annotated[
    list[str] | None,
    typer.Option("--variant", help="Another kind of expert volunteers may train: SIZE or SIZE:ddpm."),
]
VariantOfOption = Annotated[
    list[str] | None,
    typer.Option(
        "--variant-of",
        help="Kind of one expert: expert-3=small:ddpm. It alone may be of that kind. Repeatable.",
    ),
]
PublishedRouterOption = Annotated[
    bool, typer.Option("--published-router", help="A router that reads no text, as published.")
]
InitFromOption = Annotated[
    Path | None,
    path_option("--init-from", help="Folder of a DiT, PixArt or Paris expert that all experts start from."),
]
InitShareOption = Annotated[
    float | None,
    typer.Option(
        "--init-share", help="Share of the samples that --init-from has seen: experts train on the rest."
    ),
]
StartOption = Annotated[
    float | None,
    typer.Option(
        "--start",
        metavar="SHARE",
        help="Train what experts start from (`prepare --init-from`) on this share of the samples.",
    ),
]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Training steps an expert.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Fixes everything that is drawn at random.")]
RunNameOption = Annotated[str | None, typer.Option("--name", help="The run's name. Default: the source's.")]
AllowOption = Annotated[
    list[str] | None,
    typer.Option("--allow", help="Peer id of a node that may claim roles; others may not. Repeatable."),
]
RestrictedOption = Annotated[
    bool, typer.Option("--restricted", help="Only nodes with a pass (`delegate`) may claim roles.")
]
BalancedOption = Annotated[bool, typer.Option("--balanced", help="Clusters of nearly equal size.")]
ShortLeaseOption = Annotated[
    bool,
    typer.Option(
        "--short-lease", help="Leases of 20 s, not 60 s: for a demonstration of minutes on an idle machine."
    ),
]
DropDuplicatesOption = Annotated[
    bool, typer.Option("--drop-duplicates", help="Leave near-duplicates out, instead of only listing them.")
]
FolderArgument = Annotated[Path, path_argument(metavar="FOLDER", help="What `prepare --out` wrote.")]
ModelOption = Annotated[Path | None, path_option("--model", help="Model folder. Default: the last fetched.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
TrainerDeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="auto, cpu, cuda, cuda:N or mps; several GPUs for one role: cuda:all or cuda:xN "
        "(cpu:xN: so many processes).",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="fp32, bf16 or fp16.")]
