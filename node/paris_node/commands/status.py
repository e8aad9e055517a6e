"""`paris-node status`: the run as the DHT shows it, once or live."""

import logging
from collections.abc import AsyncGenerator

import trio
from rich.console import Console
from rich.live import Live
from rich.text import Text

from paris_node.judging import Met
from paris_node.network import Network, NetworkRequest, bootstrap_addresses, open_network
from paris_node.runs import find_run
from paris_node.signals import until_interrupted
from paris_node.snapshot import Snapshot, observe, take_snapshot
from paris_node.views import status_view
from paris_p2p.errors import TransportError
from paris_p2p.programs import EXIT_DONE, EXIT_INTERRUPTED, Output
from paris_p2p.store.home import Home
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
        signed = await find_run(network, run_selector(request, home))
        if once:
            _show(network, await _snapshot(network, signed), output)
            return EXIT_DONE
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_follow, network, signed, output)
            await until_interrupted()
            nursery.cancel_scope.cancel()
    return EXIT_INTERRUPTED


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
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        async for snapshot, trouble in _watch(network, signed):
            warnings = [notice.text for notice in network.dht.notices]
            note = trouble or "\n".join([*warnings, "Ctrl-C leaves this view"])
            live.update(Text(note) if snapshot is None else status_view(snapshot, note=note), refresh=True)


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
