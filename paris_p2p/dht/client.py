"""The DHT as the node process sees it: publish signed records, read checked ones.

Owns: the DHT worker's life (start, restart with backoff, end), the deadline of every request, the records
that must stay published, verifying again whatever was read. Does not own: hivemind (the worker does), the
records' meaning, or when to renew them.
"""

import itertools
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from paris_p2p import clock
from paris_p2p.dht.addresses import check_announce, check_bootstrap, check_listen, host_port
from paris_p2p.dht.key import ensure_key
from paris_p2p.dht.protocol import DAEMON_DIED_STATUS, KEYS_PER_READ, RECORDS_PER_STORE, StartMessage
from paris_p2p.dht.runtime import make_folder, runtime_folder
from paris_p2p.errors import (
    ConfigError,
    NetworkError,
    ParisError,
    RemoteProtocolError,
    StoreError,
    TransportError,
    WorkerError,
)
from paris_p2p.wire.records import Record, SignedRecord, check_record, key_id, record_key
from paris_p2p.workers.nursery import open_inner_nursery
from paris_p2p.workers.spawn import Worker, WorkerDied, open_worker

log = logging.getLogger(__name__)

START_DEADLINE_S = 60.0
REQUEST_DEADLINE_S = 30.0
REPUBLISH_PERIOD_S = 120.0
"""Records are stored again this often, so that they survive the nodes that held them."""
_STOP_GRACE_S = 4.0
_FIRST_BACKOFF_S = 0.2
_MAX_BACKOFF_S = 15.0
_WORKER_MODULE = "paris_p2p.dht.worker"


@dataclass(frozen=True, slots=True)
class DhtConfig:
    """How to take part.

    `listen`, `announce`, `bootstrap`: multiaddrs; bootstrap ones end in /p2p/ and a peer id, and none means
    being the first. `key_path`: the DHT daemon's own key (not the node's), made if missing; None: one for
    this time only. `client_mode`: ask and publish, but store and answer nothing (short commands).
    `runtime_dir`: where a private folder for sockets may be made; one folder may serve many processes.
    `log_path`: what the worker prints is appended there. `must_join`: it is an error when no bootstrap node
    can be joined at first (a bootstrap node itself goes on without the others).
    """

    listen: tuple[str, ...]
    announce: tuple[str, ...]
    bootstrap: tuple[str, ...]
    key_path: Path | None
    client_mode: bool
    runtime_dir: Path
    log_path: Path | None = None
    must_join: bool = True


@dataclass(frozen=True, slots=True)
class DhtInfo:
    """`peers`: nodes in the routing table; `keys`: keys stored here for others; `restarts` of the worker."""

    peers: int
    keys: int
    restarts: int
    worker_pid: int
    p2pd_pid: int


@asynccontextmanager
async def open_dht(config: DhtConfig) -> AsyncIterator["Dht"]:
    """Join the DHT for the duration of the block.

    Raises `ConfigError` (an address or key is wrong: nothing was started) or `NetworkError` naming why
    joining failed. After that the worker is restarted whenever it dies.
    """
    _check_config(config)
    with runtime_folder(config.runtime_dir) as folder:
        key_path = config.key_path if config.key_path is not None else folder / "dht.key"
        dht = Dht(config, folder, key_path)
        async with open_inner_nursery() as nursery:
            nursery.start_soon(dht._supervise)
            await dht._joined.wait()
            nursery.start_soon(dht._republish_for_ever)
            try:
                yield dht
            finally:
                await dht._close()
                nursery.cancel_scope.cancel()


def _check_config(config: DhtConfig) -> None:
    for address in config.bootstrap:
        check_bootstrap(address)
    for address in config.listen:
        check_listen(address)
    for address in config.announce:
        check_announce(address)


class _Link:
    """A started worker and the requests under way in it."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._numbers = itertools.count()
        self._waiting: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}

    async def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer. Raises `WorkerError` when it dies meanwhile."""
        number = next(self._numbers)
        sender, receiver = trio.open_memory_channel[dict[str, Any]](1)
        self._waiting[number] = sender
        try:
            await self.worker.send({**message, "id": number})
            return await receiver.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise WorkerError("the DHT worker died") from None
        finally:
            self._waiting.pop(number, None)

    async def pump(self) -> None:
        """Hand out answers until the worker dies, which raises `WorkerError`."""
        try:
            while True:
                message = await self.worker.receive()
                if message["type"] == "warning":
                    log.warning("%s", message["text"])
                elif (sender := self._waiting.get(message["id"])) is not None:
                    sender.send_nowait(message)
        finally:
            for sender in self._waiting.values():
                sender.close()


class Dht:
    """The open DHT. Made by `open_dht`. Any number of tasks may use it."""

    def __init__(self, config: DhtConfig, folder: Path, key_path: Path) -> None:
        self._config, self._folder, self._key_path = config, folder, key_path
        self._listen = config.listen
        self._addresses: tuple[str, ...] = ()
        self._link: _Link | None = None
        self._link_changed = trio.Event()
        self._joined = trio.Event()
        self._restarts = 0
        self._closing = trio.Event()
        self._live: dict[tuple[bytes, bytes], SignedRecord] = {}

    @property
    def addresses(self) -> tuple[str, ...]:
        """The worker's dialable multiaddrs with /p2p/, as it last started; none in client mode."""
        return self._addresses

    async def publish(
        self, records: Sequence[SignedRecord], *, deadline_s: float = REQUEST_DEADLINE_S
    ) -> list[bool]:
        """Store records, and keep them stored until they expire or a later one takes their place.

        Returns which were accepted: False where a newer one of the same owner is known. Raises
        `TransportError` when `deadline_s` passes; the records stay remembered all the same.
        """
        now = clock.unix()
        for record in records:
            self._remember(record, now)
        stored: list[bool] = []
        for batch in _batches(records, RECORDS_PER_STORE):
            rows = [[record.key, record.subkey, record.value, record.expiration_unix] for record in batch]
            answer = await self._request({"type": "store", "records": rows}, deadline_s)
            stored += [bool(ok) for ok in answer["ok"]]
        return stored

    async def read(self, kind: str, scope: bytes) -> list[Record]:
        """Every live record of `kind` about `scope` that nodes who should know it told, verified here.

        Raises `TransportError` when no answer came in time.
        """
        return (await self.read_many([(kind, scope)]))[0]

    async def read_many(
        self, keys: Sequence[tuple[str, bytes]], *, deadline_s: float = REQUEST_DEADLINE_S
    ) -> list[list[Record]]:
        """`read` for many (kind, scope) at once, in their order."""
        wanted = list(dict.fromkeys(record_key(kind, scope) for kind, scope in keys))
        found: dict[bytes, list[Record]] = {}
        for batch in _batches(wanted, KEYS_PER_READ):
            answer = await self._request({"type": "read", "keys": list(batch)}, deadline_s)
            now = clock.unix()
            for key, rows in zip(batch, answer["found"], strict=True):
                found[key] = list(_checked(key, rows, now))
        return [found[record_key(kind, scope)] for kind, scope in keys]

    async def info(self) -> DhtInfo:
        """What the worker knows now. Raises `TransportError` when it does not answer."""
        answer = await self._request({"type": "info"}, REQUEST_DEADLINE_S)
        pid = self._link.worker.pid if self._link is not None else 0
        return DhtInfo(answer["peers"], answer["keys"], self._restarts, pid, answer["p2pd_pid"])

    async def _request(self, message: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
        """An answer from this worker or, should it die meanwhile, from the next: requests are repeatable."""
        try:
            with trio.fail_after(deadline_s):
                while True:
                    link = await self._running()
                    try:
                        answer = await link.request(message)
                        break
                    except WorkerError as error:
                        log.debug("asking again: %s", error)
                        await self._changed_from(link)
        except trio.TooSlowError:
            raise TransportError(
                f"the DHT did not answer a {message['type']} request in {deadline_s:.0f} s"
            ) from None
        if "error" in answer:
            raise TransportError(f"the DHT failed a {message['type']} request: {answer['error']}")
        return answer

    async def _running(self) -> _Link:
        while self._link is None:
            await self._link_changed.wait()
        return self._link

    async def _changed_from(self, link: _Link) -> None:
        while self._link is link:
            await self._link_changed.wait()

    def _set_link(self, link: _Link | None) -> None:
        self._link = link
        self._link_changed.set()
        self._link_changed = trio.Event()

    async def _supervise(self) -> None:
        """Keep a worker running. The first start's failure is raised; later ones are tried again."""
        backoff_s = _FIRST_BACKOFF_S
        while not self._closing.is_set():
            came_up = False
            try:
                async with open_worker(_WORKER_MODULE, log_path=self._config.log_path) as worker:
                    await self._start(worker)
                    self._joined.set()
                    came_up = True
                    await self._run(worker)
            except (WorkerError, NetworkError, ConfigError, StoreError) as error:
                if not self._joined.is_set():
                    raise
                if self._closing.is_set():
                    return
                log.warning("%s; starting it again", _summary(error))
            finally:
                self._set_link(None)
            self._restarts += 1
            # a port that is fixed only because the last worker had it may be someone else's now
            self._listen = self._fixed_listen() if came_up else self._config.listen
            backoff_s = _FIRST_BACKOFF_S if came_up else min(backoff_s * 2, _MAX_BACKOFF_S)
            await trio.sleep(backoff_s)

    async def _start(self, worker: Worker) -> None:
        """Configure a fresh worker and wait until it has joined. Raises what it says is wrong."""
        self._prepare_files()
        start = StartMessage(
            folder=str(self._folder),
            key_path=str(self._key_path),
            listen=list(self._listen),
            announce=list(self._config.announce),
            bootstrap=list(self._config.bootstrap),
            client_mode=self._config.client_mode,
            must_join=self._config.must_join and not self._joined.is_set(),
        )
        try:
            with trio.fail_after(START_DEADLINE_S):
                await worker.send(start.message())
                message = await worker.receive()
                while message["type"] == "warning":
                    log.warning("%s", message["text"])
                    message = await worker.receive()
        except trio.TooSlowError:
            raise NetworkError(f"the DHT worker did not start within {START_DEADLINE_S:.0f} s") from None
        if message["type"] == "failed":
            raise _failure(message)
        self._addresses = tuple(message["addresses"])

    def _prepare_files(self) -> None:
        try:
            make_folder(self._folder)
        except OSError as error:
            raise StoreError(f"the runtime folder {self._folder} cannot be made: {error}") from error
        ensure_key(self._key_path)

    async def _run(self, worker: Worker) -> None:
        """Use the worker until it dies, which raises `WorkerError`."""
        link = _Link(worker)
        async with open_inner_nursery() as nursery:
            nursery.start_soon(link.pump)
            self._set_link(link)
            if self._live:
                nursery.start_soon(self._republish)
            await trio.sleep_forever()

    async def _republish_for_ever(self) -> None:
        while True:
            await trio.sleep(REPUBLISH_PERIOD_S)
            await self._republish()

    async def _republish(self) -> None:
        """Store every live record again; a failure is only said, the next round comes."""
        now = clock.unix()
        self._live = {place: record for place, record in self._live.items() if record.expiration_unix > now}
        try:
            await self.publish(list(self._live.values()))
        except TransportError as error:
            log.warning("records were not published again: %s", error)

    def _remember(self, record: SignedRecord, now: float) -> None:
        place = (record.key, record.subkey)
        known = self._live.get(place)
        if record.expiration_unix > now and (known is None or known.expiration_unix < record.expiration_unix):
            self._live[place] = record

    def _fixed_listen(self) -> tuple[str, ...]:
        """`listen` with port 0 replaced by the port it turned out to be: a restart keeps its addresses."""
        if self._config.announce or len({_family(address) for address in self._listen}) < len(self._listen):
            return self._config.listen  # the real ports are not known, or not whose
        ports = {
            place.host_kind: place.port
            for place in map(host_port, self._addresses)
            if place is not None and place.transport == "tcp"
        }
        return tuple(
            f"{address.removesuffix('/tcp/0')}/tcp/{ports.get(_family(address), 0)}"
            if address.endswith("/tcp/0")
            else address
            for address in self._listen
        )

    async def _close(self) -> None:
        self._closing.set()
        if self._link is not None:
            with trio.CancelScope(shield=True):
                await self._link.worker.stop(_STOP_GRACE_S)


def _checked(key: bytes, rows: Iterable[Sequence[Any]], now_unix: float) -> Iterable[Record]:
    """The rows (subkey, value, expiration) that are live, rightful records of `key`."""
    for subkey, value, expiration_unix in rows:
        if expiration_unix <= now_unix:
            continue
        try:
            yield check_record(key_id(key), subkey, value, expiration_unix, now_unix)
        except RemoteProtocolError as error:  # the worker's validator let it through: it must not happen
            log.warning("refused a record that was read: %s", error)


def _failure(message: Mapping[str, Any]) -> ParisError:
    kind = ConfigError if message["error"] == "ConfigError" else NetworkError
    return kind(message["message"])


def _family(address: str) -> str:
    place = host_port(address)
    return place.host_kind if place is not None else ""


def _summary(error: Exception) -> str:
    if not isinstance(error, WorkerDied):
        return f"the DHT worker did not start: {error}"
    return "the DHT's libp2p daemon ended" if error.status == DAEMON_DIED_STATUS else error.summary


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
