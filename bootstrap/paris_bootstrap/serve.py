"""The bootstrap node: a DHT worker with a key and a port that stay, until a signal ends it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from paris_bootstrap.relay import help_to_be_reached
from paris_p2p.dht.client import DhtConfig, open_dht
from paris_p2p.dht.notices import notice_events
from paris_p2p.dht.protocol import Notice
from paris_p2p.errors import ConfigError
from paris_p2p.programs import EXIT_DONE, EXIT_INTERRUPTED, Output
from paris_p2p.store.home import Home
from paris_p2p.store.locks import holder, try_lock

KEY_FILE = "bootstrap.key"
PEERS_FILE = "bootstrap-peers.json"


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """The options as given; `others`: bootstrap nodes to unite with, as far as they can be reached."""

    listen: tuple[str, ...]
    announce: tuple[str, ...]
    others: tuple[str, ...]
    home: Path | None
    relay: bool = False


def run(request: ServeRequest, output: Output) -> int:
    """Serve until SIGTERM (exit code 0) or SIGINT (130)."""
    home = Home.resolve(request.home)
    config = DhtConfig(
        listen=request.listen,
        announce=request.announce,
        bootstrap=request.others,
        key_path=home.path / KEY_FILE,
        client_mode=False,
        runtime_dir=home.path / "run",
        must_join=False,
        peers_path=home.path / PEERS_FILE,
    )
    with _only_one(home):
        return trio.run(_serve, config, request.relay, output)


@contextmanager
def _only_one(home: Home) -> Iterator[None]:
    """Two nodes with one key would take each other's connections. Raises `ConfigError`."""
    path = home.path / "bootstrap.lock"
    lock = try_lock(path)
    if lock is None:
        raise ConfigError(
            f"another paris-bootstrap uses {home.path} ({holder(path)}): stop it or choose another --home"
        )
    try:
        yield
    finally:
        lock.release()


async def _serve(config: DhtConfig, relay: bool, output: Output) -> int:
    code = EXIT_DONE
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            nursery.start_soon(_serve_until_cancelled, config, relay, output)
            code = _exit_code(await anext(signals))
            output.say("stopped")
            nursery.cancel_scope.cancel()
    return code


def _exit_code(signum: int) -> int:
    return EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_DONE


async def _serve_until_cancelled(config: DhtConfig, relay: bool, output: Output) -> None:
    tell = notice_events(output.event)
    listening = trio.Event()  # what is wrong is told after the addresses: they are the first line

    def tell_later(notice: Notice) -> None:
        if listening.is_set():
            tell(notice)

    async with open_dht(config, on_notice=tell_later) as dht:
        output.event("listening", _greeting(dht.addresses), addresses=list(dht.addresses))
        listening.set()
        for notice in dht.notices:
            tell(notice)
        await help_to_be_reached(dht, config, relay, output)
        await trio.sleep_forever()


def _greeting(addresses: tuple[str, ...]) -> str:
    lines = "\n".join(f"  {address}" for address in addresses)
    join = f"others join with: paris-node join --bootstrap {addresses[0]}\n" if addresses else ""
    return f"Listening. Others join with --bootstrap and one of\n{lines}\n{join}Ctrl-C stops."
