"""The DHT worker: the one process that runs hivemind, and the parent of p2pd.

Owns: p2pd, the DHT node, joining (with a diagnosis when that fails) and staying joined. Does not own: keys
that sign records, or which records live: the node process sends them signed and remembers them.
Started by `dht.client` as `python -m paris_p2p.dht.worker`. It ends when its parent does and when p2pd does;
what restarts it is the client.
"""

import asyncio
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from paris_p2p import clock
from paris_p2p.dht import hivemind_import
from paris_p2p.dht.addresses import peer_id
from paris_p2p.dht.hello import HELLO_PROTOCOL, MAX_HELLO_BYTES, encode_hello, explain_failure, judge_hello
from paris_p2p.dht.p2pd import P2pd, P2pdOptions, start_p2pd
from paris_p2p.dht.protocol import DAEMON_DIED_STATUS, FAILED_STATUS, STOPPED_STATUS, StartMessage
from paris_p2p.dht.runtime import remove_folder
from paris_p2p.errors import NetworkError, ParisError
from paris_p2p.workers.child import PARENT_GONE_STATUS, ParentLink
from paris_p2p.workers.frames import FrameReader, Message, encode

hivemind_import.load_hivemind_dht()
import hivemind.hivemind_cli  # noqa: E402 - after the light import
from hivemind.p2p import P2P, P2PDaemonError, PeerID  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402

from paris_p2p.dht.hardened import RecordNode, create_node  # noqa: E402

HELLO_DEADLINE_S = 10.0
HELLO_PAUSES_S = (0.2, 0.5, 1.0, 2.0)
HEAL_PERIOD_S = 15.0
"""A healed partition merges within one period; without pinging the bootstrap nodes it does not at all."""
_FIRST_HEAL_S = 1.0  # doubling from there: the others may be starting again just as we are
_HEAL_DEADLINE_S = 20.0
_JOIN_SEARCH_S = 5.0
_CLEANUP_S = 5
_RECEIVE_BYTES = 65_536
_CONNECTION_ERRORS = (ControlFailure, DispatchFailure, P2PDaemonError, OSError, asyncio.IncompleteReadError)


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
        own = p2p.peer_id.to_base58()
        self._bootstrap = [address for address in start.bootstrap if peer_id(address) != own]
        self._tasks: set[asyncio.Task[None]] = set()
        self._lost: set[str] = set()

    async def join(self) -> None:
        """Greet every bootstrap node and search for our neighbours through those that are sound.

        Raises `NetworkError` saying what is wrong with each when none is and the start must join.
        """
        problems = await asyncio.gather(*map(self._greet, self._bootstrap))
        broken = [
            f"{address}: {problem}"
            for address, problem in zip(self._bootstrap, problems, strict=True)
            if problem
        ]
        if broken and len(broken) == len(self._bootstrap) and self._start.must_join:
            raise NetworkError("cannot join by bootstrap " + "; ".join(broken))
        for text in broken:
            self._warn(f"bootstrap {text}")
        if len(broken) < len(self._bootstrap):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._search(), _JOIN_SEARCH_S)

    async def _greet(self, address: str) -> str | None:
        """Connect and exchange hellos; what is wrong with the node at `address`, or None."""
        try:
            return await asyncio.wait_for(self._exchange_hello(address), HELLO_DEADLINE_S)
        except TimeoutError:
            return (
                f"no answer within {HELLO_DEADLINE_S:.0f} s; is the address right, is a firewall in the way?"
            )
        except _CONNECTION_ERRORS as error:
            return explain_failure(str(error))

    async def _exchange_hello(self, address: str) -> str | None:
        peer = PeerID.from_base58(peer_id(address))
        await self._connect(address)
        for pause_s in (*HELLO_PAUSES_S, 0.0):
            sent_unix = clock.unix()
            data = await self._read_hello(peer)
            received_unix = clock.unix()
            if data:
                break
            # p2pd shows a stream that was reset (its peer is busy or just starting) as one that ended
            await asyncio.sleep(pause_s)
        problem = judge_hello(data, sent_unix, received_unix)
        if problem is None:
            await self._node.protocol.call_ping(peer)
        return problem

    async def _read_hello(self, peer: PeerID) -> bytes:
        _, reader, writer = await self._p2p.call_binary_stream_handler(peer, HELLO_PROTOCOL)
        with contextlib.closing(writer):
            data = b""
            while len(data) <= MAX_HELLO_BYTES and (part := await reader.read(MAX_HELLO_BYTES + 1)):
                data += part
        return data

    async def _connect(self, address: str) -> None:
        # hivemind's P2P connects only while starting its own daemon; its client has the call we need
        target = Multiaddr(address.rsplit("/p2p/", 1)[0]) if not address.startswith("/dnsaddr/") else None
        await self._p2p._client.connect(PeerID.from_base58(peer_id(address)), [target or Multiaddr(address)])

    async def _search(self) -> None:
        """Look for our own neighbours; fills the routing table."""
        await self._node.find_nearest_nodes([self._node.node_id])

    async def stay_joined(self) -> None:
        """For ever: find back to the others after a partition, a sleep, a bootstrap node's restart."""
        period_s = _FIRST_HEAL_S
        while True:
            await asyncio.sleep(period_s)
            period_s = min(2 * period_s, HEAL_PERIOD_S)
            self._node.blacklist.clear()
            await asyncio.gather(*map(self._check_bootstrap, self._bootstrap))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._search(), _HEAL_DEADLINE_S)

    async def _check_bootstrap(self, address: str) -> None:
        """Ping one; on failure greet it anew. Said when it changes, not every time."""
        peer = PeerID.from_base58(peer_id(address))
        if await self._node.protocol.call_ping(peer) is not None:
            self._lost.discard(address)
            return
        problem = await self._greet(address)
        if problem is None:
            self._lost.discard(address)
        elif address not in self._lost:
            self._lost.add(address)
            self._warn(f"lost bootstrap {address}: {problem}; trying again every {HEAL_PERIOD_S:.0f} s")

    def _warn(self, text: str) -> None:
        self._parent.send({"type": "warning", "text": text})

    async def addresses(self) -> list[str]:
        """Our dialable addresses, ending in /p2p/ and the peer id; none in client mode."""
        if self._start.client_mode:
            return []
        try:
            return [str(address) for address in await self._p2p.get_visible_maddrs(latest=True)]
        except ValueError:  # hivemind's word for none
            return []

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
        try:
            answer = await self._handle(message)
        except Exception as error:  # noqa: BLE001 - whatever hivemind raises is this request's failure only
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        self._parent.send({"type": "answer", "id": message["id"], **answer})

    async def _handle(self, message: Message) -> Message:
        match message["type"]:
            case "store":
                return {"ok": await self._store(message["records"])}
            case "read":
                return {"found": await self._read(message["keys"])}
            case "info":
                return self._info()
            case other:
                return {"error": f"unknown request {other!r}"}

    async def _store(self, records: Sequence[Sequence[Any]]) -> list[bool]:
        """Which of the (key, subkey, value, expiration) are stored: somewhere, and accepted."""
        keys, subkeys, values, expirations = (list(column) for column in zip(*records, strict=True))
        stored = await self._node.store_many(
            keys, values, expirations, subkeys=subkeys, exclude_self=self._start.client_mode
        )
        return [bool(stored[key, subkey]) for key, subkey in zip(keys, subkeys, strict=True)]

    async def _read(self, keys: Sequence[bytes]) -> list[list[tuple[bytes, bytes, float]]]:
        """For each key every (subkey, value, expiration) found: the latest, from all who should know."""
        found = await self._node.get_many(keys, sufficient_expiration_time=float("inf"))
        return [_flatten(found[key]) for key in keys]

    def _info(self) -> Message:
        table = self._node.protocol.routing_table
        keys = self._node.protocol.storage
        return {"peers": len(table.uid_to_peer_id), "keys": len(keys), "p2pd_pid": self._daemon.pid}


def _flatten(entry: Any) -> list[tuple[bytes, bytes, float]]:
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
    options = P2pdOptions(
        _prepare_folder(start.folder),
        Path(start.key_path),
        tuple(start.listen),
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
        await p2p.add_binary_stream_handler(HELLO_PROTOCOL, _say_hello)
        return await _serve(DhtWorker(start, parent, daemon, p2p, node), daemon, parent)
    finally:
        await daemon.stop()


async def _serve(worker: DhtWorker, daemon: P2pd, parent: Parent) -> int:
    """Join and stay joined while answering requests; ends when the parent wants it or p2pd ends."""
    died = asyncio.create_task(daemon.wait())
    staying = asyncio.create_task(_join_and_stay(worker, parent))
    serving = asyncio.create_task(worker.serve())
    tasks = (died, staying, serving)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if staying.done():
            staying.result()  # it never returns: this raises what went wrong
        if died.done():
            print(f"p2pd ended with status {died.result()}", file=sys.stderr)
            return DAEMON_DIED_STATUS
        return serving.result()
    finally:
        for task in tasks:
            task.cancel()


async def _join_and_stay(worker: DhtWorker, parent: Parent) -> None:
    await worker.join()
    parent.send({"type": "ready", "addresses": await worker.addresses()})
    await worker.stay_joined()


async def _attach(daemon: P2pd, folder: Path) -> P2P:
    """hivemind's handle on a daemon it did not start, with its own socket in our folder."""

    class FolderP2P(P2P):  # type: ignore[misc]  # hivemind ships no types
        _UNIX_SOCKET_PREFIX = f"/unix{folder}/"

    return await FolderP2P.replicate(Multiaddr(daemon.control))


async def _say_hello(_stream: Any, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer):
        writer.write(encode_hello(clock.unix()))
        await writer.drain()


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
