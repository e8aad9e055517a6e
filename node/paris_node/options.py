"""The options that several commands of `paris-node` have in common, and their help.

Owns: names, types and help texts. Does not own: which command takes which (`cli`), what they mean
(`commands`).
"""

from pathlib import Path
from typing import Annotated

import typer

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
    str | None, typer.Option("--limit-up", help="Upload at most this much a second: 500k, 2.5M.")
]
LimitDownOption = Annotated[
    str | None, typer.Option("--limit-down", help="Download at most this much a second: 500k, 2.5M.")
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
    typer.Option("--init-from", help="Folder of a DiT, PixArt or Paris expert that all experts start from."),
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
DropDuplicatesOption = Annotated[
    bool, typer.Option("--drop-duplicates", help="Leave near-duplicates out, instead of only listing them.")
]
FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="What `prepare --out` wrote.")]
ModelOption = Annotated[Path | None, typer.Option("--model", help="Model folder. Default: the last fetched.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="fp32, bf16 or fp16.")]
