"""hivemind's DHT node with the holes closed that a record validator cannot reach.

Owns: local storage of records, and what of a peer's answer is believed. Does not own: the acceptance rule
(`validator`). Imports hivemind: only the DHT worker uses this module.

What the stock node (1.1.12) gets wrong, each with a test in `tests/dht/hivemind_cases.py`:
- a record stored "in cache" shadows the whole key, so one valid record hides everyone else's;
- a replayed older record is refused, yet shortens the life of the newer one to its own;
- an answer's outer expiration is believed: an empty one "until the end of time" ends every search;
- one bad record makes a dictionary's good ones unreadable;
- a search merges peers' answers into the local storage itself;
- nothing bounds the number of keys or owners (a key whose records exceed 4 MiB reads as absent).
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from paris_p2p.dht.validator import RecordValidator

# isort: split
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2P, PeerID
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration

MAX_KEYS = 65_536
MAX_OWNERS = 1024
"""Records under one key: with `MAX_RECORD_BYTES` each they fit hivemind's 4 MiB message with room."""
RPC_TIMEOUT_S = 3.0
REPLICAS = 5


class RecordStorage(DHTLocalStorage):  # type: ignore[misc]  # hivemind ships no types
    """Records by key and owner. Bounded: when full, newcomers are refused rather than holders evicted."""

    def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
        """Store one owner's record; a value without an owner is refused."""
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: Any, subkey: Any, value: Any, expiration_time: float) -> bool:
        """Whether the record is in the storage now. The same record again is no change and no error."""
        entry = TimedStorage.get(self, key)
        if entry is None:
            return len(self.data) < MAX_KEYS and self._store_first(key, subkey, value, expiration_time)
        owners = entry.value
        held = owners.get(subkey)
        if held is not None and held.expiration_time >= expiration_time:
            return bool(held.value == value and held.expiration_time == expiration_time)
        if held is None and len(owners) >= MAX_OWNERS:
            return False
        if expiration_time > entry.expiration_time:
            TimedStorage.store(self, key, owners, expiration_time)
        return bool(owners.store(subkey, value, expiration_time))

    def _store_first(self, key: Any, subkey: Any, value: Any, expiration_time: float) -> bool:
        owners = DictionaryDHTValue()
        return bool(
            owners.store(subkey, value, expiration_time)
            and TimedStorage.store(self, key, owners, expiration_time)
        )

    def get(self, key: Any) -> Any:
        """A copy of the records under `key`: the search that asks merges others' into what it gets."""
        entry = TimedStorage.get(self, key)
        return None if entry is None else _dictionary(entry.value.items())


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


class RecordNode(DHTNode):  # type: ignore[misc]  # hivemind ships no types
    """A DHT node that holds and believes checked records only. Made by `create_node`."""

    async def _call_find_with_blacklist(self, peer_id: PeerID, keys: Collection[DHTID]) -> Any:
        """As upstream, with each answer rebuilt from its checked records and their own expirations."""
        response = await super()._call_find_with_blacklist(peer_id, keys)
        if not response:
            return response
        return {key: (_believed(found), peers) for key, (found, peers) in response.items()}


async def create_node(p2p: P2P, *, client_mode: bool, now: Callable[[], float]) -> RecordNode:
    """A node over a running daemon. It has not joined anything yet.

    Its DHT id follows from its peer id, so that it is the same node to others after a restart.
    """
    validator = RecordValidator(now)
    node: RecordNode = await RecordNode.create(
        p2p=p2p,
        node_id=DHTID.generate(p2p.peer_id.to_bytes()),
        num_replicas=REPLICAS,
        wait_timeout=RPC_TIMEOUT_S,
        client_mode=client_mode,
        record_validator=validator,
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
    )
    node.protocol.storage = RecordStorage()
    node.protocol.cache = WriteThrough(node.protocol.storage)
    node.protocol._validate_dictionary = lambda key, records: _prune(validator, key, records)
    return node


def _prune(validator: RecordValidator, key: bytes, records: Any) -> bool:
    """Keep only valid records of a dictionary a peer sent; in place, because the caller goes on with it."""
    with records.freeze():
        items = list(records.items())
    good = [
        (subkey, item)
        for subkey, item in items[:MAX_OWNERS]
        if validator.validate(
            DHTRecord(key, MSGPackSerializer.dumps(subkey), item.value, item.expiration_time)
        )
    ]
    fresh = _dictionary(good)
    records.clear()
    records.maxsize = float("inf")
    records.latest_expiration_time = float("-inf")
    if fresh is not None:
        for subkey, item in fresh.value.items():
            records.store(subkey, item.value, item.expiration_time)
    return True


def _believed(found: Any) -> Any:
    """A peer's answer with the expiration that its own records bear out; None for an empty one."""
    if found is None or not isinstance(found.value, DictionaryDHTValue):
        return None
    return _dictionary(found.value.items())


def _dictionary(items: Iterable[tuple[Any, Any]]) -> Any:
    """A fresh dictionary value of the unexpired `items` with the latest of their expirations, or None."""
    fresh = DictionaryDHTValue()
    for subkey, item in items:
        fresh.store(subkey, item.value, item.expiration_time)
    return ValueWithExpiration(fresh, fresh.latest_expiration_time) if fresh else None
