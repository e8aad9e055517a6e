"""`paris-node status`: the run as the DHT shows it, once or live."""

import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict

import trio
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from paris_node.judging import Met
from paris_node.network import Network, NetworkRequest, bootstrap_addresses, open_network
from paris_node.runs import announced_runs, find_run
from paris_node.signals import until_interrupted
from paris_node.snapshot import Snapshot, observe, take_snapshot
from paris_node.views import RunLine, runs_view, status_view
from paris_p2p.errors import TransportError
from paris_p2p.programs import EXIT_DONE, EXIT_INTERRUPTED, Output
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import peer_id_text
from paris_p2p.wire.manifest import SignedManifest

log = logging.getLogger(__name__)

REFRESH_S = 2.0


def run(request: NetworkRequest, once: bool, output: Output) -> int:
    """Show the run's state; with `once` a single time."""
    home = Home.resolve(request.home)
    bootstrap = bootstrap_addresses(request, home)
    return trio.run(_status, request, home, bootstrap, once, output)


def run_selector(request: NetworkRequest, home: Home) -> str | None:
    """The run asked for; else, without `--bootstrap`, the remembered one; else any.

    Who names a bootstrap node wants the run that is announced there, not an old one of this home.
    """
    if request.run is not None:
        return request.run
    return None if request.bootstrap else home.context().get("run_id")


async def _status(
    request: NetworkRequest, home: Home, bootstrap: tuple[str, ...], once: bool, output: Output
) -> int:
    async with open_network(request, home=home, identity=None, bootstrap=bootstrap) as network:
        selector = run_selector(request, home)
        runs = [] if selector is not None else await announced_runs(network)
        if len(runs) > 1:
            await _list(network, runs, output)
            return EXIT_DONE
        signed = await find_run(network, selector)
        if once:
            _show(network, await _snapshot(network, signed), output)
            return EXIT_DONE
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_follow, network, signed, output)
            await until_interrupted()
            nursery.cancel_scope.cancel()
    return EXIT_INTERRUPTED


async def _list(network: Network, runs: Sequence[SignedManifest], output: Output) -> None:
    """The runs that are announced there, one a line."""
    lines: list[RunLine] = []
    for signed in runs:
        roles = signed.manifest.roles
        try:
            observation = await observe(network.dht, signed)
            finished = sum(observation.finished([role]) for role in roles)
        except TransportError as error:
            log.warning("the run %s: %s", signed.run_id.hex()[:12], error)
            finished = None
        organiser = peer_id_text(signed.manifest.organiser)
        name, run_id = signed.manifest.name, signed.run_id.hex()
        lines.append(RunLine(name, run_id, organiser, finished, len(roles)))
    if output.as_json:
        output.data({"runs": [asdict(line) for line in lines]})
    else:
        Console().print(runs_view(lines))


async def _snapshot(network: Network, signed: SignedManifest, met: Met | None = None) -> Snapshot:
    return take_snapshot(await observe(network.dht, signed, met=met), signed)


def _show(network: Network, snapshot: Snapshot, output: Output) -> None:
    warnings = [notice.text for notice in network.dht.notices]
    if output.as_json:
        output.data({**snapshot.to_json(), "warnings": warnings})
    else:
        Console().print(status_view(snapshot, note="\n".join(warnings)))


async def _follow(network: Network, signed: SignedManifest, output: Output) -> None:
    """Show the run for ever; while the network is away, what was seen last and that it is away."""
    if output.as_json:
        async for snapshot, trouble in _watch(network, signed):
            if snapshot is not None and not trouble:
                _show(network, snapshot, output)
            if trouble:
                log.warning("%s", trouble)
        return
    console = Console()
    last: RenderableType = ""
    try:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            async for snapshot, trouble in _watch(network, signed):
                warnings = [notice.text for notice in network.dht.notices]
                note = trouble or "\n".join([*warnings, "Ctrl-C leaves this view"])
                if snapshot is None:
                    live.update(Text(note), refresh=True)
                    continue
                last = status_view(snapshot, note=trouble or "\n".join(warnings))
                height = console.height if console.is_terminal else None
                live.update(status_view(snapshot, note=note, height=height), refresh=True)
    finally:
        if last and console.is_terminal:  # the other screen has gone: leave what was seen last
            console.print(last)


async def _watch(
    network: Network, signed: SignedManifest
) -> AsyncGenerator[tuple[Snapshot | None, str], None]:
    """The newest snapshot, every few seconds, and what is wrong when it is not fresh."""
    snapshot: Snapshot | None = None
    met = Met()
    while True:
        trouble = ""
        try:
            snapshot = await _snapshot(network, signed, met)
        except TransportError as error:
            trouble = f"the network does not answer, trying again: {error}"
        yield snapshot, trouble
        await trio.sleep(REFRESH_S)
