"""The command line of `paris-bootstrap`: parses, calls `serve`, returns its exit code."""

from pathlib import Path
from typing import Annotated

import typer

from paris_p2p.programs import Output, run_program, set_up_logging, version_text

DEFAULT_LISTEN = "/ip4/0.0.0.0/tcp/31337"

app = typer.Typer(
    name="paris-bootstrap",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _folder(text: str) -> Path:
    if not text:  # a script's unset variable; `pathlib` would take it for the present folder
        raise typer.BadParameter("it is empty: name a folder (. is the present one)")
    return Path(text)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_text("paris-bootstrap"))
        raise typer.Exit


@app.command()
def bootstrap(
    listen: Annotated[
        list[str] | None,
        typer.Option("--listen", help=f"Listen multiaddr, default {DEFAULT_LISTEN}. May be repeated."),
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option("--announce", help="Multiaddr to print and tell others instead. May be repeated."),
    ] = None,
    other: Annotated[
        list[str] | None,
        typer.Option("--bootstrap", help="Address of another bootstrap node to unite with. May be repeated."),
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(
            "--home",
            parser=_folder,
            metavar="PATH",
            help="Folder of this node's key. Default: $PARIS_HOME, else the data folder.",
        ),
    ] = None,
    relay: Annotated[
        bool,
        typer.Option(
            "--relay/--no-relay",
            help="Relay up to 2 MB/s for nodes behind routers, on the port after the one listened on.",
        ),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line on stdout; logs on stderr.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Verbose logs, and tracebacks for errors.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit."),
    ] = False,
) -> None:
    """The long-lived node by which others join. Prints its addresses, which stay the same over restarts.

    Stops on Ctrl-C (exit code 130) and SIGTERM (exit code 0).
    """
    from paris_bootstrap.serve import ServeRequest, run

    del version  # its callback prints it
    set_up_logging(debug)
    request = ServeRequest(
        tuple(listen or [DEFAULT_LISTEN]), tuple(announce or []), tuple(other or []), home, relay
    )
    raise typer.Exit(run_program(lambda: run(request, Output(as_json)), debug=debug))
