"""What a DHT node keeps for others: signed records by key and owner, bounded, shared out fairly.

Owns: local storage, who delivered what, who has to give way when it is full. Does not own: whether a record
is valid (`validator`). Imports hivemind: only the DHT worker uses this module.

Owners are free to make, so a limit for each owner is worth nothing. The DHT peer that *delivered* a record
costs a connection and a process: places are shared out among those. When a key is full, a newcomer takes a
place of the peer with the most places, unless it has as many itself. When the storage is full, each key is
charged in equal parts to all peers that delivered its records, and the keys go first of which every deliverer
is charged much: whoever floods displaces itself, two peers that deliver for each other are charged for all of
it together, and none pushes an honest peer's key out by joining it. A record that is stored again counts for
the peer that stored it last, its owner's own node. Among equals the record that would stay longest goes.

What is told of a key follows the same thought (`rows`): first the records of owners that this node vouches
for, then one of each delivering peer in turn, of each those that were here first. Who is told only a part,
because there is no room for more, is told what matters: a flood stands behind all others, whatever its size.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import msgpack

from paris_p2p import clock
from paris_p2p.dht.hivemind_import import load_hivemind_dht
from paris_p2p.dht.sharing import in_turns, levelled

load_hivemind_dht()
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue  # noqa: E402 - after the light import
from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration  # noqa: E402

MAX_KEYS = 65_536
MAX_OWNERS = 1024
"""Records under one key: with `MAX_RECORD_BYTES` each they fit hivemind's 4 MiB message with room."""
_KEYS_AT_ONCE = 256  # when the storage is full: looking for whom to displace costs a walk over all keys,
_WALK_PAUSE_S = 1.0  # so that no peer gets one more often than this

ROW_BYTES = 64
"""What a record takes in an answer besides its value: subkey, expiration, their headers."""

OURSELVES = b""
deliverer: ContextVar[bytes] = ContextVar("deliverer", default=OURSELVES)
"""The peer id whose request is being served; `OURSELVES` outside of one."""
room: ContextVar[Mapping[Any, int] | None] = ContextVar("room", default=None)
"""Bytes that `RecordStorage.get` may tell of each key; None: of all keys everything."""


class RecordStorage(DHTLocalStorage):  # type: ignore[misc]  # hivemind ships no types
    """Records by key and owner, at most `MAX_OWNERS` a key and `MAX_KEYS` keys."""

    def __init__(self) -> None:
        super().__init__()
        self._deliverers: dict[Any, dict[Any, bytes]] = {}  # key -> subkey -> peer that delivered it last
        self._walked: dict[bytes, float] = {}  # peer -> monotonic time of its last walk
        self.vouched: frozenset[Any] = frozenset()
        """Owners known to be real: theirs is told first, and never displaced."""

    def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
        """Store one owner's record; a value without an owner is refused."""
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: Any, subkey: Any, value: Any, expiration_time: float) -> bool:
        """Whether the record is in the storage now. The same record again is no change and no error."""
        entry = TimedStorage.get(self, key)
        if entry is None:
            stored = self._has_room() and self._store_first(key, subkey, value, expiration_time)
        else:
            held = entry.value.get(subkey)
            if held is not None and held.expiration_time >= expiration_time:
                return bool(held.value == value and held.expiration_time == expiration_time)
            full = held is None and len(entry.value) >= MAX_OWNERS
            if full and not self._make_place(key, entry.value, subkey in self.vouched):
                return False
            if expiration_time > entry.expiration_time:
                TimedStorage.store(self, key, entry.value, expiration_time)
            stored = bool(entry.value.store(subkey, value, expiration_time))
        if stored:
            self._deliverers.setdefault(key, {})[subkey] = deliverer.get()
            self._forget_expired(key)
        return stored

    def _forget_expired(self, key: Any) -> None:
        """Who delivered what is kept for a bounded number of records that are gone."""
        known = self._deliverers[key]
        if len(known) > 2 * MAX_OWNERS:
            live = {subkey for subkey, _ in self.data[key].value.items()}
            self._deliverers[key] = {subkey: who for subkey, who in known.items() if subkey in live}
        if len(self._deliverers) > 2 * len(self.data) + MAX_OWNERS:
            self._deliverers = {key: who for key, who in self._deliverers.items() if key in self.data}

    def _store_first(self, key: Any, subkey: Any, value: Any, expiration_time: float) -> bool:
        self._deliverers.pop(key, None)  # of records under this key that have expired
        owners = DictionaryDHTValue()
        return bool(
            owners.store(subkey, value, expiration_time)
            and TimedStorage.store(self, key, owners, expiration_time)
        )

    def _make_place(self, key: Any, owners: Any, vouched: bool) -> bool:
        """Displace a record of the peer that holds the most places of a full key, if that is fair; for one
        whose owner is `vouched` for in any case."""
        known = self._deliverers.get(key, {})
        live = {subkey: known.get(subkey, OURSELVES) for subkey, _ in owners.items()}
        self._deliverers[key] = live
        loose = {subkey: who for subkey, who in live.items() if subkey not in self.vouched}
        victims = displaced(loose, deliverer.get(), lambda subkey: owners.get(subkey).expiration_time)
        if vouched and not victims:
            victims = list(loose)[-1:]
        for subkey in victims[:1]:
            del owners[subkey]
            del live[subkey]
        return bool(victims)

    def _has_room(self) -> bool:
        """Whether one more key fits, if need be after displacing keys of peers that are charged more."""
        if len(self.data) < MAX_KEYS:
            return True
        now, newcomer = clock.monotonic(), deliverer.get()
        self._walked = {who: at for who, at in self._walked.items() if at > now - _WALK_PAUSE_S}
        if newcomer in self._walked:
            return False
        self._walked[newcomer] = now
        self._deliverers = {key: who for key, who in self._deliverers.items() if key in self.data}
        holders = {key: frozenset(who.values()) for key, who in self._deliverers.items()}
        for key in overcharged(holders, newcomer, lambda key: self.data[key].expiration_time):
            del self[key]
            self._deliverers.pop(key)
        return len(self.data) < MAX_KEYS

    def get(self, key: Any) -> Any:
        """A copy of the records under `key`, in the order of `rows`, of as many as there is `room` for: the
        search that asks merges others' into what it gets."""
        rooms = room.get()
        most = float("inf") if rooms is None else rooms.get(key, 0)
        told = []
        for subkey, item in self.rows(key):
            most -= len(item.value) + ROW_BYTES
            if most < 0:
                break
            told.append((subkey, item))
        return dictionary(told)

    def rows(self, key: Any) -> list[tuple[Any, Any]]:
        """The (owner, value with expiration) under `key`: those vouched for, then one of each delivering peer
        in turn, of each those that were here first."""
        entry = TimedStorage.get(self, key)
        if entry is None:
            return []
        known = self._deliverers.get(key, {})
        first: list[tuple[Any, Any]] = []
        delivered: dict[bytes, list[tuple[Any, Any]]] = {}
        for subkey, item in entry.value.items():  # in the order in which the owners came
            mine = first if subkey in self.vouched else delivered.setdefault(known.get(subkey, OURSELVES), [])
            mine.append((subkey, item))
        return first + in_turns(delivered.values())

    @contextmanager
    def within(self, keys: Iterable[Any], most: int) -> Iterator[None]:
        """Meanwhile `get` tells `most` bytes of the keys in all, shared by level filling."""
        token = room.set(levelled({key: self.size(key) for key in keys}, most))
        try:
            yield
        finally:
            room.reset(token)

    def size(self, key: Any) -> int:
        """About how many bytes all records under `key` take in an answer."""
        entry = TimedStorage.get(self, key)
        return 0 if entry is None else sum(len(item.value) + ROW_BYTES for _, item in entry.value.items())


class WriteThrough(DHTLocalStorage):  # type: ignore[misc]  # hivemind ships no types
    """Stands in for the cache: what peers store "in cache" joins the storage; nothing is found here."""

    def __init__(self, storage: RecordStorage) -> None:
        super().__init__()
        self._storage = storage

    def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
        """As `RecordStorage.store`."""
        return self._storage.store(key, value, expiration_time, subkey)

    def store_subkey(self, key: Any, subkey: Any, value: Any, expiration_time: float) -> bool:
        """As `RecordStorage.store_subkey`."""
        return self._storage.store_subkey(key, subkey, value, expiration_time)


def displaced(held: Mapping[Any, bytes], newcomer: bytes, expiration_of: Callable[[Any], float]) -> list[Any]:
    """What of `held` (place -> peer that delivered it) gives way to `newcomer`'s next: some places of the
    peer with the most, the longest-lived first; none if the newcomer has as many (or one fewer) itself."""
    counts = Counter(held.values())
    if not counts:
        return []
    most, count = counts.most_common(1)[0]
    if count <= counts[newcomer] + 1:
        return []
    theirs = sorted((place for place, who in held.items() if who == most), key=expiration_of, reverse=True)
    return theirs[: min(_KEYS_AT_ONCE, count - counts[newcomer] - 1)]


def overcharged(
    holders: Mapping[Any, frozenset[bytes]], newcomer: bytes, expiration_of: Callable[[Any], float]
) -> list[Any]:
    """The keys of `holders` (key -> peers that delivered its records) that give way to `newcomer`'s next:
    some of those whose every peer is charged more than the newcomer would be, the most charged first."""
    charges: defaultdict[bytes, float] = defaultdict(float)
    for peers in holders.values():
        for peer in peers:
            charges[peer] += 1 / len(peers)
    weight = {key: min(charges[peer] for peer in peers) for key, peers in holders.items() if peers}
    over = [key for key, charge in weight.items() if charge > charges[newcomer] + 1]
    over.sort(key=lambda key: (weight[key], expiration_of(key)), reverse=True)
    excess = int(weight[over[0]] - charges[newcomer]) if over else 0
    return over[: min(_KEYS_AT_ONCE, excess)]


def _unpack(raw: bytes) -> Any:
    """A dictionary value from the wire, of at most `MAX_OWNERS` records: a message has room for a hundred
    times as many, and each takes a few microseconds. Nothing in it may be a dictionary again."""
    _, _, items = msgpack.unpackb(raw, raw=False)
    value = DictionaryDHTValue()
    with value.freeze():
        for subkey, data, until in items[:MAX_OWNERS]:
            value.store(subkey, data, until)
    return value


DictionaryDHTValue.unpackb = staticmethod(_unpack)


def dictionary(items: Iterable[tuple[Any, Any]]) -> Any:
    """A fresh dictionary value of the unexpired `items` with the latest of their expirations, or None."""
    fresh = DictionaryDHTValue()
    for subkey, item in items:
        fresh.store(subkey, item.value, item.expiration_time)
    return ValueWithExpiration(fresh, fresh.latest_expiration_time) if fresh else None
