"""`paris-node publish`: put a prepared run online and keep it there."""

import shlex
from pathlib import Path

import trio

from paris_node.judging import PUBLISHING
from paris_node.network import NetworkRequest, bootstrap_addresses, open_network
from paris_node.organising import News
from paris_node.run_node import RunNode, run_items
from paris_node.runs import MANIFEST_FILE, save_manifest
from paris_node.signals import until_interrupted
from paris_node.standing_by import fetch_model_command
from paris_node.text import printable
from paris_node.torch_cache import keep_torch_cache
from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.programs import EXIT_INTERRUPTED, Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.home import Home
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import SignedManifest, check_manifest


def run(folder: Path, request: NetworkRequest, output: Output) -> int:
    """Publish `folder` until interrupted."""
    signed = load_prepared(folder)
    home = Home.resolve(request.home)
    bootstrap = bootstrap_addresses(request, home)
    keep_torch_cache(home)  # the child that measures losses inherits it
    with home.lock():
        adopt(folder, signed, home.store(clean=True))
        save_manifest(home, signed)
        return trio.run(_publish, request, home, bootstrap, signed, output)


def load_prepared(folder: Path) -> SignedManifest:
    """The manifest of a prepared folder; `ConfigError` if it is none."""
    try:
        return check_manifest((folder / MANIFEST_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{folder} holds no {MANIFEST_FILE}: run `paris-node prepare … --out {folder}` first"
        ) from None
    except OSError as error:
        raise ConfigError(f"the manifest in {folder} cannot be read: {error}") from None


def prepared_item(store: ContentStore, ref: ContentRef) -> Path:
    """The folder of an item of a prepared run; `ConfigError` if its store has lost it."""
    try:
        return store.files(ref.info_hash)
    except StoreError:
        raise ConfigError(
            f"the prepared folder lacks the item {ref.info_hash.hex()[:16]}…: run prepare again"
        ) from None


def adopt(folder: Path, signed: SignedManifest, store: ContentStore) -> None:
    """Take the run's items into this node's store (hard links).

    Raises `ConfigError` naming what is missing.
    """
    prepared = ContentStore(folder / "store")
    for ref in run_items(signed.manifest):
        if store.has(ref.info_hash):
            continue
        if not prepared.has(ref.info_hash):
            raise ConfigError(
                f"{folder} lacks the item {ref.info_hash.hex()[:16]}… of its manifest: run prepare again"
            )
        store.adopt(prepared, ref.info_hash)
        if store.verify(ref.info_hash):  # better to know now than from leechers who refuse it
            raise ConfigError(
                f"the item {ref.info_hash.hex()[:16]}… in {folder} is damaged: remove {folder / 'store'} and "
                "run prepare again"
            )


async def _publish(
    request: NetworkRequest,
    home: Home,
    bootstrap: tuple[str, ...],
    signed: SignedManifest,
    output: Output,
) -> int:
    opened = open_network(request, home=home, identity=home.identity(), bootstrap=bootstrap, output=output)
    async with opened as network:
        home.remember(bootstrap=list(bootstrap), run_id=signed.run_id.hex())
        node = RunNode(network, signed, output, mirror=True)
        node.progress.activity = PUBLISHING
        await node.announcer.flush()
        output.event(
            "published",
            f"run {signed.manifest.name} ({signed.run_id.hex()[:12]}) is online; Ctrl-C ends it\n"
            f"volunteers join with: {_join_command(bootstrap, signed.manifest.name)}",
            run_id=signed.run_id.hex(),
            addresses=list(network.swarm.addresses),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.announce_loop)
            nursery.start_soon(node.replicate_loop)
            nursery.start_soon(_tell, node, request.home)
            await until_interrupted()
            output.say("stopped: volunteers go on, and the same command puts the organiser online again")
            nursery.cancel_scope.cancel()
    return EXIT_INTERRUPTED


def _join_command(bootstrap: tuple[str, ...], name: str) -> str:
    addresses = "".join(f" --bootstrap {address}" for address in bootstrap[:1])
    return f"paris-node join{addresses} --run {shlex.quote(printable(name))}"


async def _tell(node: RunNode, home: Path | None) -> None:
    """Say for ever how the run gets on."""
    news = News(node.output, node.signed.manifest.roles, fetch_model_command(home))
    while True:
        await trio.sleep(node.signed.manifest.lease.poll_s)
        if node.seen is not None:
            news.see(node.seen)
