"""The DHT worker: the one process that runs hivemind, and the parent of p2pd.

Owns: p2pd, the DHT node, answering the node process. Does not own: joining and staying joined
(`membership`), keys that sign records, or which records live: the node process sends them signed and
remembers them.
Started by `dht.client` as `python -m paris_p2p.dht.worker`. It ends when its parent does and when p2pd does;
what restarts it is the client.
"""

import asyncio
import contextlib
import hashlib
import heapq
import math
import os
import random
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from paris_p2p import clock
from paris_p2p.dht import hivemind_import
from paris_p2p.dht.hello import HELLO_PROTOCOL, encode_hello
from paris_p2p.dht.known_peers import is_loopback
from paris_p2p.dht.p2pd import P2pd, P2pdOptions, start_p2pd, usable_listen
from paris_p2p.dht.protocol import (
    DAEMON_DIED_STATUS,
    FAILED_STATUS,
    MAX_ROWS_A_KEY,
    ROWS_A_READ,
    STOPPED_STATUS,
    Notice,
    StartMessage,
)
from paris_p2p.dht.runtime import remove_folder
from paris_p2p.dht.sharing import levelled
from paris_p2p.errors import ParisError
from paris_p2p.wire.records import record_key
from paris_p2p.workers.child import PARENT_GONE_STATUS, ParentLink
from paris_p2p.workers.frames import FrameReader, Message, encode

hivemind_import.load_hivemind_dht()
import hivemind.hivemind_cli  # noqa: E402 - after the light import
from hivemind.p2p import P2P, P2PDaemonError  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402

from paris_p2p.dht.hardened import RecordNode, create_node  # noqa: E402
from paris_p2p.dht.membership import Membership  # noqa: E402

_CLEANUP_S = 5
LONGEST_S = 25.0
"""A search that nobody waits for any longer is ended: the client gives up after 30 s."""
_RECEIVE_BYTES = 65_536
_TELLING = tuple(record_key(kind, b"") for kind in ("run", "claim", "member"))
"""Keys whose records show whether two parts of the network know each other."""


Row = tuple[bytes, bytes, float]
"""Subkey, value, expiration."""


class Parent:
    """The link to the node process, for asyncio."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames = FrameReader()

    def send(self, message: Message) -> None:
        """Send without waiting: the parent always reads."""
        self._writer.write(encode(message))

    async def flush(self) -> None:
        """Wait until what was sent has left; a parent that is gone is noticed by the reading side."""
        with contextlib.suppress(OSError):
            await self._writer.drain()

    async def messages(self) -> AsyncIterator[Message]:
        """Every message until the parent's end closes."""
        while (message := await self.receive()) is not None:
            yield message

    async def receive(self) -> Message | None:
        """The next message; None when the parent's end is closed."""
        while (message := self._frames.next()) is None:
            data = await self._read()
            if not data:
                return None
            self._frames.feed(data)
        return message

    async def _read(self) -> bytes:
        try:
            return await self._reader.read(_RECEIVE_BYTES)
        except OSError:
            return b""


class DhtWorker:
    """A joined node and the requests of its parent."""

    def __init__(self, start: StartMessage, parent: Parent, daemon: P2pd, p2p: P2P, node: RecordNode) -> None:
        self._start, self._parent, self._daemon, self._p2p, self._node = start, parent, daemon, p2p, node
        self.membership = Membership(
            p2p,
            node,
            bootstrap=start.bootstrap,
            known=start.known,
            send=parent.send,
            rng=random.Random(p2p.peer_id.to_bytes()),
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._salt = os.urandom(16)

    async def addresses(self) -> list[str]:
        """Our dialable addresses, ending in /p2p/ and the peer id; none in client mode."""
        if self._start.client_mode:
            return []
        try:
            return [str(address) for address in await self._p2p.get_visible_maddrs(latest=True)]
        except ValueError:  # hivemind's word for none
            return []

    async def say_hello(
        self, _stream: Any, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serve one hello: who we are, our clock, our addresses (those for this machine only last)."""
        with contextlib.closing(writer):
            writer.write(encode_hello(clock.unix(), sorted(await self.addresses(), key=is_loopback)))
            await writer.drain()

    async def daemon_hangs(self) -> None:
        """Return when p2pd stops answering: one that is stopped or stuck does not end by itself."""
        hung_s = self._start.daemon_hung_s
        while True:
            await asyncio.sleep(hung_s / 3)
            try:
                await asyncio.wait_for(self._p2p.list_peers(), hung_s)
            except (TimeoutError, OSError, P2PDaemonError, ControlFailure, asyncio.IncompleteReadError):
                return

    async def serve(self) -> int:
        """Answer requests until told to stop or the parent is gone; the exit status."""
        async for message in self._parent.messages():
            if message["type"] == "stop":
                return STOPPED_STATUS
            task = asyncio.create_task(self._answer(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return PARENT_GONE_STATUS

    async def _answer(self, message: Message) -> None:
        """Every request is answered: also with what is wrong, be it only that the answer cannot be sent."""
        kind = {"type": "answer", "id": message["id"]}
        try:
            self._parent.send({**kind, **await self._handle(message)})
        except Exception as error:  # noqa: BLE001 - whatever hivemind raises is this request's failure only
            self._parent.send({**kind, "error": f"{type(error).__name__}: {error}"[:500]})

    async def _handle(self, message: Message) -> Message:
        match message["type"]:
            case "store":
                self._node.vouch_for(message["vouched"])
                return {"ok": await self._store(message["records"])}
            case "read":
                self._node.vouch_for(message["vouched"])
                return {"found": await self._read(message["keys"], message["patience_s"])}
            case "info":
                return self._info()
            case "ping":
                return {}
            case other:
                return {"error": f"unknown request {other!r}"}

    async def _store(self, records: Sequence[Sequence[Any]]) -> list[bool]:
        """Which of the (key, subkey, value, expiration) are stored: accepted, and at least by one other node
        when there are others. Our own replica alone is lost with us, and nobody reads it."""
        self._watch([record[0] for record in records])
        others = self._has_others()
        storing = self._node.store_counting(
            [(key, subkey, value, until) for key, subkey, value, until in records],
            exclude_self=self._start.client_mode,
        )
        stored = await asyncio.wait_for(storing, LONGEST_S)
        return [
            votes.taken > 0 and votes.taken >= votes.refused if others else verdict
            for verdict, votes in stored
        ]

    async def _read(self, keys: Sequence[bytes], patience_s: float | None) -> list[list[Row] | None]:
        """For each key every (subkey, value, expiration) found: the latest, from all who should know. None
        where that took longer than `patience_s` seconds, and where others should know and too few of those
        nearest to the key answered: a network that cannot be reached is not an empty one."""
        self._watch(keys)
        others = self._has_others()  # now: who does not answer leaves the routing table
        search = await self._node.search(list(dict.fromkeys(keys)))
        _, late = await asyncio.wait(
            search.futures.values(), timeout=LONGEST_S if patience_s is None else patience_s
        )
        for one in late:
            one.cancel()  # hivemind goes on without that key
        found = {
            key: _flatten(one.result())
            for key, one in search.futures.items()
            if one not in late and (search.read(key) or not others)
        }
        shares = levelled({key: min(len(rows), MAX_ROWS_A_KEY) for key, rows in found.items()}, ROWS_A_READ)
        some = {key: self._chosen(rows, shares[key], search.ranks(key)) for key, rows in found.items()}
        return [some.get(key) for key in keys]

    def _chosen(self, rows: list[Row], most: int, ranks: Mapping[bytes, int]) -> list[Row]:
        return chosen(rows, most, ranks, self._node.vouched, self._salt)

    def _has_others(self) -> bool:
        """Whether other nodes are known, or must exist: only without any is what we hold all there is."""
        return bool(self.membership.bootstrap or self._node.protocol.routing_table.uid_to_peer_id)

    def _watch(self, keys: Sequence[bytes]) -> None:
        self.membership.watch([key for key in keys if key.startswith(_TELLING)])

    def _info(self) -> Message:
        table = self._node.protocol.routing_table
        keys = self._node.protocol.storage
        return {"peers": len(table.uid_to_peer_id), "keys": len(keys), "p2pd_pid": self._daemon.pid}


def chosen(
    rows: list[Row], most: int, ranks: Mapping[bytes, int], vouched: Collection[bytes], salt: bytes
) -> list[Row]:
    """At most `most` of the (subkey, value, expiration): those vouched for, then by the place (`ranks`) in
    the answer that named it first, so that a thousand records of one answerer stand behind the first of
    another. Among equals by a hash of the subkey that nobody else can reckon."""
    if len(rows) <= most:
        return rows

    def order(row: Row) -> tuple[bool, float, bytes]:
        salted = hashlib.blake2b(row[0], digest_size=16, key=salt).digest()
        return row[0] not in vouched, ranks.get(row[0], math.inf), salted

    return heapq.nsmallest(most, rows, key=order)


def _flatten(entry: Any) -> list[Row]:
    if entry is None or not isinstance(entry.value, dict):
        return []
    return [(subkey, item.value, item.expiration_time) for subkey, item in entry.value.items()]


async def run(connection: Any) -> int:
    """Serve the parent at the other end of socket `connection`; the exit status."""
    reader, writer = await asyncio.open_connection(sock=connection)
    parent = Parent(reader, writer)
    first = await parent.receive()
    if first is None:
        return PARENT_GONE_STATUS
    start = StartMessage.parse(first)
    try:
        status = await _run_started(start, parent)
    except ParisError as error:
        parent.send({"type": "failed", "error": type(error).__name__, "message": str(error)})
        await parent.flush()
        return FAILED_STATUS
    if status == PARENT_GONE_STATUS:  # nobody else is left to do it; otherwise our successor needs it
        remove_folder(Path(start.folder))
    return status


async def _run_started(start: StartMessage, parent: Parent) -> int:
    listen = tuple(start.listen)
    if not start.client_mode:
        listen, unusable = usable_listen(start.listen)
        for address, problem in unusable.items():
            parent.send(Notice("listen", address, problem).message())
    options = P2pdOptions(
        _prepare_folder(start.folder),
        Path(start.key_path),
        listen,
        tuple(start.announce),
        tuple(start.bootstrap),
        start.client_mode,
    )
    serving = asyncio.ensure_future(_run_daemon(start, parent, options))
    _end_on_signal(serving)
    try:
        return await serving
    except asyncio.CancelledError:
        return PARENT_GONE_STATUS


def _prepare_folder(name: str) -> Path:
    folder = Path(name)
    folder.mkdir(mode=0o700, exist_ok=True)
    for stale in folder.glob("*.sock"):  # of our predecessor, killed
        stale.unlink()
    return folder


async def _run_daemon(start: StartMessage, parent: Parent, options: P2pdOptions) -> int:
    binary = Path(next(iter(hivemind.hivemind_cli.__path__))) / "p2pd"
    daemon = await start_p2pd(binary, options)
    try:
        p2p = await _attach(daemon, options.folder)
        node = await create_node(p2p, client_mode=start.client_mode, now=clock.unix)
        worker = DhtWorker(start, parent, daemon, p2p, node)
        await p2p.add_binary_stream_handler(HELLO_PROTOCOL, worker.say_hello)
        return await _serve(worker, start, daemon, parent)
    finally:
        await daemon.stop()


async def _serve(worker: DhtWorker, start: StartMessage, daemon: P2pd, parent: Parent) -> int:
    """Join and stay joined while answering requests; ends when the parent wants it or p2pd ends."""
    died = asyncio.create_task(daemon.wait())
    hung = asyncio.create_task(worker.daemon_hangs())
    staying = asyncio.create_task(_join_and_stay(worker, start, parent))
    serving = asyncio.create_task(worker.serve())
    tasks = (died, hung, staying, serving)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if staying.done():
            staying.result()  # it never returns: this raises what went wrong
        if died.done():
            print(f"p2pd ended with status {died.result()}", file=sys.stderr)
            return DAEMON_DIED_STATUS
        if hung.done():
            print(f"p2pd has not answered for {start.daemon_hung_s:.0f} s", file=sys.stderr)
            return DAEMON_DIED_STATUS
        return serving.result()
    finally:
        for task in tasks:
            task.cancel()


async def _join_and_stay(worker: DhtWorker, start: StartMessage, parent: Parent) -> None:
    await worker.membership.join(must_join=start.must_join)
    parent.send({"type": "ready", "addresses": await worker.addresses()})
    await worker.membership.stay_joined()


async def _attach(daemon: P2pd, folder: Path) -> P2P:
    """hivemind's handle on a daemon it did not start, with its own socket in our folder."""

    class FolderP2P(P2P):  # type: ignore[misc]  # hivemind ships no types
        _UNIX_SOCKET_PREFIX = f"/unix{folder}/"

    return await FolderP2P.replicate(Multiaddr(daemon.control))


def _end_on_signal(serving: "asyncio.Future[int]") -> None:
    """SIGTERM (also what the kernel sends when the parent dies) ends us with everything put away, and if
    that takes long, all the same: p2pd dies with us, and the client removes our folder."""
    loop = asyncio.get_running_loop()

    def leave(_signal: int, _frame: object) -> None:
        signal.alarm(_CLEANUP_S)
        loop.call_soon_threadsafe(serving.cancel)

    signal.signal(signal.SIGTERM, leave)


def main() -> None:
    """The process: serve until there is nobody to serve."""
    link = ParentLink.from_environment(death_signal=signal.SIGTERM)
    status = 1
    try:
        status = asyncio.new_event_loop().run_until_complete(run(link.detach()))
    except Exception:  # noqa: BLE001 - the parent gets it as the end of our output
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # hivemind's leftover tasks and transports end here, without their complaints


if __name__ == "__main__":
    main()
