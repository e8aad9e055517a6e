"""The commands of `paris-node` for content without a run: `seed`, `get`, `verify` and their like.

Owns: their arguments. Does not own: the program (`cli`), the short way into `seed` and `get` (`quick`).
"""

from pathlib import Path
from typing import Annotated

import typer

from paris_node.options import (
    AnnounceOption,
    DebugOption,
    HomeOption,
    JsonOption,
    LanOption,
    LimitDownOption,
    LimitUpOption,
    PeerLimitDownOption,
    PeerLimitUpOption,
    PieceLengthOption,
    SeedRatioOption,
    SeedTimeOption,
    ShareListenOption,
    ViaOption,
    go,
    path_argument,
    path_option,
)
from paris_p2p.programs import Output

PANEL = "Content without a run"
content = typer.Typer()


@content.command("content-id", rich_help_panel=PANEL)
def content_id(
    path: Annotated[Path, path_argument(help="A file or a folder.")],
    piece_length: PieceLengthOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """The BitTorrent v2 content id of a file or folder."""
    from paris_node.commands import content_id as command

    del home  # every command takes --home; this one needs none
    go(lambda: command.run(path, piece_length, Output(as_json)), debug)


@content.command(rich_help_panel=PANEL)
def seed(
    path: Annotated[Path, path_argument(help="A file or a folder. It is served from where it is.")],
    piece_length: PieceLengthOption = None,
    listen: ShareListenOption = None,
    announce: AnnounceOption = None,
    via: ViaOption = None,
    limit_up: LimitUpOption = None,
    limit_down: LimitDownOption = None,
    peer_limit_up: PeerLimitUpOption = None,
    peer_limit_down: PeerLimitDownOption = None,
    seed_ratio: SeedRatioOption = None,
    seed_time: SeedTimeOption = None,
    lan: LanOption = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Serve a file or folder to whoever knows its id. No bootstrap node is needed. Stays up until stopped."""
    from paris_node import quick

    share = quick.Share(
        *(home, listen, announce, limit_up, limit_down, lan, seed_ratio, seed_time, via),
        *(peer_limit_up, peer_limit_down),
    )
    go(lambda: quick.seed(path, piece_length, share, as_json), debug)


@content.command(rich_help_panel=PANEL)
def get(
    item: Annotated[
        str, typer.Argument(metavar="ID|MAGNET|TORRENT", help="What to fetch: its id, or a v2 .torrent file.")
    ],
    out: Annotated[Path, path_option("--out", help="The folder that gets the file or folder.")],
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
    peer_limit_up: PeerLimitUpOption = None,
    peer_limit_down: PeerLimitDownOption = None,
    seed_ratio: SeedRatioOption = None,
    seed_time: SeedTimeOption = None,
    lan: LanOption = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Fetch one item from peers, verified piece by piece. Goes on where an interrupted fetch stopped."""
    from paris_node import quick

    share = quick.Share(
        *(home, listen, announce, limit_up, limit_down, lan, seed_ratio, seed_time, via),
        *(peer_limit_up, peer_limit_down),
    )
    go(lambda: quick.get(item, peer, out, keep_seeding, share, as_json), debug)


@content.command("export-torrent", rich_help_panel=PANEL)
def export_torrent(
    item: Annotated[
        str, typer.Argument(help="The id (or its beginning) of an item in the home's store, or a path.")
    ],
    out: Annotated[Path, path_option("--out", help="The .torrent file to write.")],
    piece_length: PieceLengthOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
    debug: DebugOption = False,
) -> None:
    """Write an item's BitTorrent v2 .torrent for other clients, and print its magnet link."""
    from paris_node.commands import export_torrent as command

    request = command.ExportRequest(item, out, piece_length, home)
    go(lambda: command.run(request, Output(as_json)), debug)


@content.command(rich_help_panel=PANEL)
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

    go(body, debug)
