"""`paris-node get`: fetch one item from the peers that are named, and from those they name.

While it is incomplete the item lies in the hidden folder `.paris.part` of the output folder, a store as any
other: what was verified is kept when the command is interrupted or killed, and the next one goes on there.
A complete item gets its name in the output folder by a hard link, never by a copy.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from paris_node.bars import fetch_bar
from paris_node.pausing import UntilRoom
from paris_node.sharing import ShareRequest, open_sharing, own_identity, parse_peer, until_seeded
from paris_node.signals import unless_interrupted
from paris_p2p import clock
from paris_p2p.errors import ConfigError
from paris_p2p.net.swarm import Peer, Progress, Swarm
from paris_p2p.programs import EXIT_DONE, EXIT_INTERRUPTED, Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.durable import disk
from paris_p2p.store.home import Home
from paris_p2p.wire.content import AnyRef, MagnetRef
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.torrent import MAX_TORRENT_BYTES, Torrent, parse_item_id, read_torrent

PART_FOLDER = ".paris.part"
STALL_S = 120.0
PROGRESS_S = 1.0


@dataclass(frozen=True, slots=True)
class GetRequest:
    """The options of `get`, as given. `item`: an id, a magnet link, or the path of a `.torrent`."""

    item: str
    peers: tuple[str, ...]
    out: Path
    keep_seeding: bool
    share: ShareRequest


def run(request: GetRequest, output: Output) -> int:
    """Fetch the item, and with `keep_seeding` go on serving it as long as the limits say."""
    limits = request.share.limits
    if (limits.seed_ratio or limits.seed_time_s) and not request.keep_seeding:
        raise ConfigError("--seed-ratio and --seed-time say how long to seed: add --keep-seeding")
    ref, torrent = read_item(request.item)
    peers = [parse_peer(text) for text in request.peers]
    if not peers and not request.share.lan:
        raise ConfigError("nobody is known who has it: name a peer with --peer, or look near by with --lan")
    home = Home(request.share.home) if request.share.home is not None else None
    with _parts(request.out) as store, own_identity(home) as identity:
        if torrent is not None:
            store.foretell(torrent.ref, torrent.info, torrent.layers)
        _recheck(store, ref)
        code = trio.run(_get, request, ref, peers, store, identity, output)
        if store.has(ref.info_hash):  # its files have their name in the output folder
            store.remove(ref.info_hash)
        return code


def read_item(text: str) -> tuple[AnyRef, Torrent | None]:
    """What `get` was asked for. Raises `ConfigError`."""
    info_hash = parse_item_id(text)
    if info_hash is not None:
        return MagnetRef(info_hash), None
    path = Path(text)
    if text.startswith("magnet:") or not path.is_file():
        raise ConfigError(
            f"{text!r} is neither an item's id (64 hexadecimal digits), a magnet link with urn:btmh:1220…, "
            "nor a .torrent file"
        )
    with disk("reading a torrent", path.parent), path.open("rb") as file:
        data = file.read(MAX_TORRENT_BYTES + 1)
    try:
        torrent = read_torrent(data)
    except ConfigError as error:
        raise ConfigError(
            f"{path} is no .torrent of BitTorrent v2 ({error}): name one, an item's id or a magnet link"
        ) from None
    return torrent.ref, torrent


@contextmanager
def _parts(out: Path) -> Iterator[ContentStore]:
    """The store below `out`; gone at the end when nothing is left in it."""
    with disk("creating the output folder", out):
        out.mkdir(parents=True, exist_ok=True)
    store = ContentStore(out / PART_FOLDER, clean=True)
    try:
        yield store
    finally:
        if not store.holdings():
            _remove_empty(store.root)


def _remove_empty(root: Path) -> None:
    """Removes the store's folders as far as nothing is in them: another process may be beginning there."""
    for folder, _, _ in os.walk(root, topdown=False):
        with suppress(OSError):  # something is in it
            Path(folder).rmdir()


def _target(request: "GetRequest", ref: AnyRef, store: ContentStore) -> Path | None:
    """What stands where the item shall be, if anything does; None too while its name is not known."""
    layout = store.begun(ref.info_hash)
    if layout is None or store.has(ref.info_hash) or not (request.out / layout.name).exists():
        return None
    return request.out / layout.name


def _take_or_refuse(target: Path, ref: AnyRef, store: ContentStore) -> None:
    """What stands there may be the very item: then it is complete. Raises `ConfigError` if it is not."""
    layout = store.begun(ref.info_hash)
    length = layout.piece_length if layout is not None else None
    if store.place(target, piece_length=length).info_hash != ref.info_hash:
        raise ConfigError(f"{target} exists and is something else: move it away, or choose another --out")


def _recheck(store: ContentStore, ref: AnyRef) -> None:
    """A process that was killed while it seeded left the item complete, and others may have changed it."""
    if store.has(ref.info_hash):
        store.verify(ref.info_hash)


async def _get(
    request: GetRequest,
    ref: AnyRef,
    peers: list[Peer],
    store: ContentStore,
    identity: Identity,
    output: Output,
) -> int:
    async with open_sharing(request.share, identity, store) as swarm:
        output.event("listening", None, addresses=list(swarm.addresses))
        started = clock.monotonic()
        fetch = _Fetch(request, swarm, store, ref, peers, output)
        await fetch.run()
        seconds = clock.monotonic() - started
        length = store.layout(ref.info_hash).length
        path = await trio.to_thread.run_sync(store.hand_out, ref.info_hash, request.out)
        _report(output, path, length, seconds, fetch, swarm.rates().down_bytes)
        if not request.keep_seeding:
            return EXIT_DONE
        output.say("seeding it to others; Ctrl-C ends that")
        seeded = await unless_interrupted(lambda: until_seeded(swarm, ref, length))
        return EXIT_DONE if seeded else EXIT_INTERRUPTED


class _Fetch:
    """One fetch as its user sees it: progress, a name that is taken, pauses while the disk is full."""

    def __init__(
        self,
        request: GetRequest,
        swarm: Swarm,
        store: ContentStore,
        ref: AnyRef,
        peers: list[Peer],
        output: Output,
    ) -> None:
        self._request = request
        self._swarm = swarm
        self._store = store
        self._ref = ref
        self._peers = peers
        self._output = output
        self._told = 0.0  # monotonic
        self._named = False
        self.wasted = 0

    async def run(self) -> None:
        """Until the item is complete in the store. Raises as `Swarm.fetch`, and for a name that is taken."""
        room = UntilRoom(self._output)
        while not await room.run(self._fetched):
            pass

    async def _fetched(self) -> bool:
        """False when, now that the item's name is known, it turns out to be taken."""
        target = await trio.to_thread.run_sync(_target, self._request, self._ref, self._store)
        if target is not None:
            await trio.to_thread.run_sync(_take_or_refuse, target, self._ref, self._store)
        with trio.CancelScope() as scope, fetch_bar(self._output) as show:

            def follow(progress: Progress) -> None:
                self._follow(progress)
                show(progress)
                if progress.bytes_total and not self._named:
                    self._named = True
                    if _target(self._request, self._ref, self._store) is not None:
                        scope.cancel()

            await self._swarm.fetch(self._ref, on_progress=follow, peers=self._peers, stall_timeout_s=STALL_S)
        return not scope.cancelled_caught

    def _follow(self, progress: Progress) -> None:
        self.wasted = progress.wasted_bytes
        now = clock.monotonic()
        if self._output.as_json and now - self._told >= PROGRESS_S:
            self._told = now
            self._output.event(
                "progress",
                bytes_done=progress.bytes_done,
                bytes_total=progress.bytes_total,
                peers=progress.peers,
                wasted_bytes=progress.wasted_bytes,
            )


def _report(output: Output, path: Path, length: int, seconds: float, fetch: _Fetch, received: int) -> None:
    output.event(
        "fetched",
        f"{path} ({length / 1e6:.1f} MB) in {seconds:.1f} s",
        path=str(path.resolve()),
        bytes=length,
        seconds=round(seconds, 3),
        wasted_bytes=fetch.wasted,
        received_bytes=received,
    )
