"""The DHT as the node process sees it: publish signed records, read checked ones.

Owns: the DHT worker's life (start, noticing that it hangs, restart with backoff, end), the deadline of
every request, telling what is wrong (`Notice`). Does not own: hivemind (the worker does), verifying again
whatever was read (`reading`), the records' meaning, or when to renew them.
"""

import logging
import os
import random
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from paris_p2p import clock
from paris_p2p.dht import known_peers
from paris_p2p.dht.addresses import check_announce, check_bootstrap, check_listen, fixed_listen
from paris_p2p.dht.key import ensure_key
from paris_p2p.dht.known_peers import KnownPeers
from paris_p2p.dht.link import Link
from paris_p2p.dht.notices import Notices, OnNotice
from paris_p2p.dht.own_records import OwnRecords, identity_text
from paris_p2p.dht.protocol import (
    DAEMON_DIED_STATUS,
    KEYS_PER_READ,
    MAX_VOUCHED,
    RECORDS_PER_STORE,
    Notice,
    StartMessage,
)
from paris_p2p.dht.reading import checked
from paris_p2p.dht.runtime import make_folder, runtime_folder
from paris_p2p.errors import (
    ConfigError,
    NetworkError,
    ParisError,
    StoreError,
    TransportError,
    WorkerError,
)
from paris_p2p.ids import NodeId
from paris_p2p.wire.records import Record, SignedRecord, record_key
from paris_p2p.workers.nursery import open_inner_nursery
from paris_p2p.workers.spawn import Worker, WorkerDied, open_worker

log = logging.getLogger(__name__)

START_DEADLINE_S = 60.0
REQUEST_DEADLINE_S = 30.0
REPUBLISH_PERIOD_S = 120.0
"""Records are stored again this often, so that they survive the nodes that held them."""
PING_PERIOD_S = 5.0
HUNG_S = 20.0
"""A worker that does not answer for this long is killed: it hangs, or somebody stopped it."""
DAEMON_HUNG_S = 15.0
"""The same for p2pd, which its worker asks."""
PEERS_PERIOD_S = 60.0
"""Known peers are written at most this often, and at the end."""
KNOWN_AT_START = 32
_STOP_GRACE_S = 4.0
_ASK_AGAIN_S = (1.0, 5.0)  # pause before a read that nobody answered is repeated; what it must have left
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
    can be joined at first (a bootstrap node itself goes on without the others). `peers_path`: where the peers
    that answered are kept between runs (read, and written unless in client mode); None: nowhere.
    """

    listen: tuple[str, ...]
    announce: tuple[str, ...]
    bootstrap: tuple[str, ...]
    key_path: Path | None
    client_mode: bool
    runtime_dir: Path
    log_path: Path | None = None
    must_join: bool = True
    peers_path: Path | None = None


@dataclass(frozen=True, slots=True)
class DhtInfo:
    """`peers`: nodes in the routing table; `known`: peers remembered for the next start; `keys`: keys stored
    here for others; `restarts` of the worker."""

    peers: int
    known: int
    keys: int
    restarts: int
    worker_pid: int
    p2pd_pid: int


@asynccontextmanager
async def open_dht(config: DhtConfig, *, on_notice: OnNotice | None = None) -> AsyncIterator["Dht"]:
    """Join the DHT for the duration of the block. `on_notice` is called with everything that goes wrong
    later, and again (not `active`) when it is over.

    Raises `ConfigError` (an address or key is wrong: nothing was started), `StoreError` (no room for sockets
    or key) or `NetworkError` naming why joining failed. After that the worker is restarted whenever it dies.
    """
    _check_config(config)
    with runtime_folder(config.runtime_dir) as folder:
        key_path = config.key_path if config.key_path is not None else folder / "dht.key"
        dht = Dht(config, folder, key_path, on_notice)
        async with open_inner_nursery() as nursery:
            nursery.start_soon(dht._supervise)
            await dht._joined.wait()
            nursery.start_soon(dht._republish_for_ever)
            nursery.start_soon(dht._save_peers_for_ever)
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


class Dht:
    """The open DHT. Made by `open_dht`. Any number of tasks may use it."""

    def __init__(
        self, config: DhtConfig, folder: Path, key_path: Path, on_notice: OnNotice | None = None
    ) -> None:
        self._config, self._folder, self._key_path = config, folder, key_path
        self._notices = Notices(on_notice)
        self._peers = KnownPeers()
        if config.peers_path is not None:
            self._peers = known_peers.load(config.peers_path, config.bootstrap)
        self._peers_changed = False
        self._rng = random.Random(os.urandom(16))
        self._listen = config.listen
        self._addresses: tuple[str, ...] = ()
        self._link: Link | None = None
        self._link_changed = trio.Event()
        self._joined = trio.Event()
        self._restarts = 0
        self._closing = trio.Event()
        self._client_mode = config.client_mode
        self._started_mode = config.client_mode  # the running worker's
        self._changing = False  # the worker is ended so that the next one starts in another mode
        self._own = OwnRecords()
        self._vouched: tuple[NodeId, ...] = ()
        self._wants_republishing = trio.Event()

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What is wrong with the network side now, oldest first."""
        return self._notices.standing

    @property
    def addresses(self) -> tuple[str, ...]:
        """The worker's dialable multiaddrs with /p2p/, as it last started; none in client mode."""
        return self._addresses

    def vouch_for(self, owners: Iterable[NodeId]) -> None:
        """Of these owners (the first `MAX_VOUCHED`) it is known that they are no flood: under a flood their
        records are kept, checked and told to others before all others. From the next request on."""
        self._vouched = tuple(dict.fromkeys((*self._vouched, *owners)))[:MAX_VOUCHED]

    @property
    def vouched(self) -> tuple[NodeId, ...]:
        """Whom this node vouches for."""
        return self._vouched

    def only_ask(self, client_mode: bool) -> None:
        """Ask and publish only, or answer others too: a node that cannot be dialled must not stand in their
        routing tables. The worker is replaced when that changes; requests wait a second."""
        self._client_mode = client_mode
        self._change_mode()

    def _change_mode(self) -> None:
        """Ends a worker of the other mode; one that is still starting is asked for again once it runs."""
        if self._link is not None and self._started_mode != self._client_mode:
            self._changing = True
            self._link.worker.kill()

    async def publish(
        self, records: Sequence[SignedRecord], *, deadline_s: float = REQUEST_DEADLINE_S
    ) -> list[bool]:
        """Store records, and keep them stored until they expire or a later one takes their place.

        Returns which were stored: by at least one other node, except where nobody else can be known (no
        bootstrap node, empty routing table). False also where a newer one of the same owner is known. Raises
        `TransportError` when `deadline_s` passes; the records stay remembered all the same.
        """
        now = clock.unix()
        for record in records:
            self._own.remember(record, now)
        stored: list[bool] = []
        for batch in _batches(records, RECORDS_PER_STORE):
            rows = [[record.key, record.subkey, record.value, record.expiration_unix] for record in batch]
            answer = await self._request(
                {"type": "store", "records": rows, "vouched": list(self._vouched)}, deadline_s
            )
            stored += [bool(ok) for ok in answer["ok"]]
        return stored

    async def read(self, kind: str, scope: bytes) -> list[Record]:
        """Every live record of `kind` about `scope` that nodes who should know it told, verified here.

        Raises `TransportError` when no other node answered in time: that is not the same as no records.
        """
        return (await self.read_many([(kind, scope)]))[0]

    async def read_many(
        self, keys: Sequence[tuple[str, bytes]], *, deadline_s: float = REQUEST_DEADLINE_S
    ) -> list[list[Record]]:
        """`read` for many (kind, scope) at once, in their order. Keys of which nobody answered are asked for
        again until `deadline_s` has passed."""
        found: dict[tuple[str, bytes], list[Record]] = {}
        end = trio.current_time() + deadline_s
        while unread := [key for key in dict.fromkeys(keys) if key not in found]:
            answers = zip(unread, await self._read(unread, None, end - trio.current_time()), strict=True)
            found |= {key: records for key, records in answers if records is not None}
            if found.keys() >= set(unread):
                break
            if trio.current_time() + sum(_ASK_AGAIN_S) >= end:
                raise TransportError(f"no other node of the network answered a read in {deadline_s:.0f} s")
            await trio.sleep(_ASK_AGAIN_S[0])
        return [found[key] for key in keys]

    async def read_some(
        self,
        keys: Sequence[tuple[str, bytes]],
        *,
        patience_s: float,
        deadline_s: float = REQUEST_DEADLINE_S,
    ) -> list[list[Record] | None]:
        """As `read_many`, once, with None for every key that was not read: no other node answered about it,
        or its search took longer than `patience_s` seconds (a dead node holds up those that come by it)."""
        return await self._read(keys, patience_s, deadline_s)

    async def _read(
        self, keys: Sequence[tuple[str, bytes]], patience_s: float | None, deadline_s: float
    ) -> list[list[Record] | None]:
        wanted = list(dict.fromkeys(record_key(kind, scope) for kind, scope in keys))
        found: dict[bytes, list[Record] | None] = {}
        failures: list[TransportError] = []

        async def read_batch(batch: Sequence[bytes]) -> None:
            message = {"type": "read", "keys": list(batch), "patience_s": patience_s}
            message["vouched"] = list(self._vouched)
            try:
                answer = await self._request(message, deadline_s)
            except TransportError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()
                return
            now = clock.unix()
            for key, rows in zip(batch, answer["found"], strict=True):
                found[key] = None if rows is None else await checked(key, rows, now)
                self._look_for_our_name(found[key] or (), now)

        async with open_inner_nursery() as nursery:
            for batch in _batches(wanted, KEYS_PER_READ):
                nursery.start_soon(read_batch, batch)
        if failures:
            raise failures[0]
        return [found[record_key(kind, scope)] for kind, scope in keys]

    async def info(self) -> DhtInfo:
        """What the worker knows now. Raises `TransportError` when it does not answer."""
        answer = await self._request({"type": "info"}, REQUEST_DEADLINE_S)
        pid = self._link.worker.pid if self._link is not None else 0
        peers, keys, p2pd_pid = answer["peers"], answer["keys"], answer["p2pd_pid"]
        return DhtInfo(peers, len(self._peers), keys, self._restarts, pid, p2pd_pid)

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

    async def _running(self) -> Link:
        while self._link is None:
            await self._link_changed.wait()
        return self._link

    async def _changed_from(self, link: Link) -> None:
        while self._link is link:
            await self._link_changed.wait()

    def _set_link(self, link: Link | None) -> None:
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
                if not self._changing:
                    self._notices.say(Notice("worker", "", f"{_summary(error)}; starting it again"))
                self._changing = False
                if isinstance(error, NetworkError):
                    # a port that is fixed only because the last worker had it may be someone else's now
                    self._listen = self._config.listen
            finally:
                self._set_link(None)
                self._notices.worker_died()
            self._restarts += 1
            if came_up:
                fixed = fixed_listen(self._listen, self._addresses)
                self._listen = self._config.listen if self._config.announce else fixed
            backoff_s = _FIRST_BACKOFF_S if came_up else min(backoff_s * 2, _MAX_BACKOFF_S)
            await trio.sleep(backoff_s)

    async def _start(self, worker: Worker) -> None:
        """Configure a fresh worker and wait until it has joined. Raises what it says is wrong."""
        self._prepare_files()
        self._started_mode = self._client_mode
        start = StartMessage(
            folder=str(self._folder),
            key_path=str(self._key_path),
            listen=list(self._listen),
            announce=list(self._config.announce),
            bootstrap=list(self._config.bootstrap),
            known=self._peers.candidates(clock.unix(), KNOWN_AT_START, self._rng),
            client_mode=self._started_mode,
            must_join=self._config.must_join and not self._joined.is_set(),
            daemon_hung_s=DAEMON_HUNG_S,
        )
        try:
            with trio.fail_after(START_DEADLINE_S):
                await worker.send(start.message())
                while (message := await worker.receive())["type"] not in ("ready", "failed"):
                    self._told(message)
        except trio.TooSlowError:
            raise NetworkError(
                f"the DHT worker did not start within {START_DEADLINE_S:.0f} s: this machine is overloaded, "
                "or something stops its processes"
            ) from None
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
        link = Link(worker)
        self._notices.worker_is_up()
        async with open_inner_nursery() as nursery:
            nursery.start_soon(link.pump, self._told)
            self._set_link(link)
            self._change_mode()
            nursery.start_soon(self._kill_when_hung, link)
            nursery.start_soon(self._republish)
            await trio.sleep_forever()

    async def _kill_when_hung(self, link: Link) -> None:
        """A worker that is stopped or spins answers nothing and does not die: end it, to be replaced."""
        while True:
            await trio.sleep(PING_PERIOD_S)
            with trio.move_on_after(HUNG_S) as waiting, suppress(WorkerError):  # `pump` tells of its death
                await link.request({"type": "ping"})
            if waiting.cancelled_caught:
                self._notices.say(
                    Notice("worker", "", f"the DHT worker has not answered for {HUNG_S:.0f} s: ending it")
                )
                link.worker.kill()
                return

    # --- what the worker says, and what is told about it --------------------------------------------

    def _told(self, message: Mapping[str, Any]) -> None:
        """Something the worker says unasked."""
        if message["type"] == "notice":
            notice = Notice.parse(dict(message))
            self._notices.say(notice)
            if notice.kind == "split" and notice.active:
                self._wants_republishing.set()
        elif message["type"] == "peers":
            if message["answered"]:
                self._peers.answered(message["addresses"], clock.unix())
            else:
                self._peers.failed(message["peer"])
            self._peers_changed = True

    def _look_for_our_name(self, records: Iterable[Record], now_unix: float) -> None:
        for record in records:
            if self._own.is_strange(record, now_unix):
                self._notices.say(Notice("identity", "", identity_text(record)))
        if not self._own.shared(now_unix):
            self._notices.say(Notice("identity", "", "nobody else uses this identity now", active=False))

    async def _save_peers_for_ever(self) -> None:
        while True:
            await trio.sleep(PEERS_PERIOD_S)
            self._save_peers()

    def _save_peers(self) -> None:
        """A disk that refuses costs only the memory of the peers."""
        path = self._config.peers_path
        if path is None or self._config.client_mode or not self._peers_changed:
            return
        try:
            known_peers.save(path, self._peers)
        except StoreError as error:
            self._notices.say(
                Notice("peers", "", f"the peers met cannot be remembered for the next start: {error}")
            )
        else:
            self._peers_changed = False
            self._notices.say(Notice("peers", "", "the peers met are remembered again", active=False))

    # --- records that must stay published -----------------------------------------------------------

    async def _republish_for_ever(self) -> None:
        while True:
            with trio.move_on_after(REPUBLISH_PERIOD_S):
                await self._wants_republishing.wait()
            self._wants_republishing = trio.Event()
            await self._republish()

    async def _republish(self) -> None:
        """Store every live record again; a failure is only said, the next round comes."""
        live = self._own.live(clock.unix())
        try:
            await self.publish(live)
        except TransportError as error:
            log.warning("records were not published again: %s", error)

    async def _close(self) -> None:
        self._closing.set()
        self._save_peers()
        if self._link is not None:
            with trio.CancelScope(shield=True):
                await self._link.worker.stop(_STOP_GRACE_S)


_FAILURES: dict[str, type[ParisError]] = {"ConfigError": ConfigError, "StoreError": StoreError}


def _failure(message: Mapping[str, Any]) -> ParisError:
    return _FAILURES.get(message["error"], NetworkError)(message["message"])


def _summary(error: Exception) -> str:
    if not isinstance(error, WorkerDied):
        return f"the DHT worker did not start: {error}"
    return "the DHT's libp2p daemon ended, or hung" if error.status == DAEMON_DIED_STATUS else error.summary


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
