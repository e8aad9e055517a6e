"""hivemind's DHT node with the holes closed that a record validator cannot reach.

Owns: what of a peer's request is served, how much is said and asked at a time, who else holds what we store.
Does not own: what of an answer is believed (`answers`), the acceptance rule (`validator`), the storage
(`record_storage`). Imports hivemind: only the DHT worker uses this module.

What the stock node (1.1.12) gets wrong, each with a test in `tests/dht/hivemind_cases.py`:
- a record stored "in cache" shadows the whole key, so one valid record hides everyone else's;
- a replayed older record is refused, yet shortens the life of the newer one to its own;
- an answer's outer expiration is believed: an empty one "until the end of time" ends every search;
- one bad record makes a dictionary's good ones unreadable;
- a search merges peers' answers into the local storage itself;
- nothing bounds the number of keys or owners (a key whose records exceed 4 MiB reads as absent), of records
  or keys a request, of neighbours and records an answer, or the time spent on one peer's requests;
- a node may call itself, and its neighbours, by any id, near any key;
- storing counts as success when only the own replica took the record, and a search when nobody answered it;
- a search puts the square root of its keys into a call: where nearly every node is asked for every key that
  means several calls to each, and calls are what a small network spends its CPU on.
"""

import asyncio
import functools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from paris_p2p import clock
from paris_p2p.dht.answers import (
    AWAY_S,
    CHECKS_A_SEARCH,
    DECIDING,
    Votes,
    Watch,
    checked,
    enough,
    genuine,
    id_of,
    watch,
)
from paris_p2p.dht.hivemind_import import replace, require_tested
from paris_p2p.dht.record_storage import (
    MAX_OWNERS,
    RecordStorage,
    WriteThrough,
    deliverer,
    dictionary,
)
from paris_p2p.dht.sharing import Allowance, levelled
from paris_p2p.dht.validator import RecordValidator

# isort: split
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer

RPC_TIMEOUT_S = 3.0
REPLICAS = DECIDING
BUCKET_SIZE = 20
SEARCH_WORKERS = 16
"""Calls of one search at once. Upstream's 4 make as many calls, in three times as many rounds."""
READ_BEAM = 10
"""Nodes nearest to a key that a read asks in a network of more than `SMALL` nodes: twice the replicas. In
a smaller one as many as a bucket holds, so that nearly everyone is asked, wherever a record ended up."""
SMALL = 40
MAX_KEYS_A_FIND = 64
ANSWER_BYTES = 1 << 20
"""So much is told in one answer, shared by level filling, and asked for in one call, by what its keys held
last time: a message may have 4 MiB, what is larger reads as absent, and it must come within the deadline."""
USUAL_BYTES = 8192
"""What a key is taken to hold when nobody has answered about it yet."""
KEYS_AFTER_SILENCE = 4
"""So many keys at most are in the next call to a peer that did not answer one, then half as many: its answer
may have been too large. That is nothing to the calls to others: most who do not answer are away."""
NEIGHBOURS_BYTES = 2048
"""What an answer says of a key's neighbours."""
MAX_SIZES = 4096
MAX_RECORDS_A_STORE = 1024
"""Signatures of one request are checked in one go: this many take a fifth of a second. Those inside of
dictionaries count: in such, upstream hands what it holds over to nodes that it meets."""


STORES_AT_ONCE = 2048
STORES_PER_S = 128.0
"""Records that one peer may have checked here: 2.5 % of a core, and more than an honest one ever stores."""
HANDED_OVER = 512
"""Records of all keys that a node is given when it is met, for which it is nearer: it checks every one."""


WALK_PAUSE_S = 0.7e-3
"""For each key stored here, between two walks over all of them for nodes that are met (18 us a key)."""

_checks_left: ContextVar[int | None] = ContextVar("checks left", default=sys.maxsize)
"""Records in dictionaries that may still be checked at once; None: they are checked later, by `checked`."""
_keys_a_call: ContextVar[int | None] = ContextVar("keys a call", default=None)


@dataclass(frozen=True, slots=True)
class Search:
    """Searches under way: for each key the future of {subkey: value with expiration}, with what every node
    that should know it told, or of None. Cancelling one ends the search for that key."""

    futures: Mapping[bytes, "asyncio.Future[Any]"]
    _notes: Watch
    _silent: Callable[[], Collection[PeerID]]

    def read(self, key: bytes) -> bool:
        """Whether enough other nodes have answered about it by now to say what is there and what is not."""
        uid = DHTID.generate(key)
        return enough(uid, self._notes.heard.get(uid, {}), self._silent())

    def ranks(self, key: bytes) -> Mapping[bytes, int]:
        """The place of each owner in the answer that named it first: what matters comes first in honest
        ones."""
        return self._notes.ranks.get(DHTID.generate(key), {})


class RecordProtocol(DHTProtocol):  # type: ignore[misc]  # hivemind ships no types
    """The remote calls, bounded. Its name on the wire stays upstream's (`__name__` below)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stores = Allowance(STORES_AT_ONCE, STORES_PER_S)
        self._next_walk = 0.0  # monotonic

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """As upstream, for the first `MAX_RECORDS_A_STORE` records, or as many as the peer may still have
        checked, single ones before those in dictionaries; the others are refused."""
        count, peer = len(request.keys), context.remote_id.to_bytes()
        tags = request.subkeys[:MAX_RECORDS_A_STORE]
        single = sum(tag != self.IS_DICTIONARY for tag in tags)
        given = self._stores.take(peer, single, clock.monotonic())
        taken = count_until(tags, lambda tag: tag != self.IS_DICTIONARY, given)
        for name in ("keys", "subkeys", "values", "expiration_time", "in_cache"):
            del getattr(request, name)[taken:]
        token = deliverer.set(peer)
        checks = _checks_left.set(MAX_RECORDS_A_STORE - single)
        try:
            response = await super().rpc_store(request, context)
        finally:
            _checks_left.reset(checks)
            deliverer.reset(token)
        response.store_ok.extend([False] * (min(count, 1 << 16) - len(response.store_ok)))
        return response

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """As upstream, for the first `MAX_KEYS_A_FIND` keys, of which `ANSWER_BYTES` are told in all."""
        del request.keys[MAX_KEYS_A_FIND:]
        with self.storage.within(map(DHTID.from_bytes, request.keys), ANSWER_BYTES):
            return await super().rpc_find(request, context)

    async def call_find(self, peer: PeerID, keys: Collection[DHTID]) -> Any:
        """As upstream, but what is found is checked after the call, within the budget of who asks and with
        turns for others. Nothing is found where nobody asked for records."""
        token = _checks_left.set(None)
        try:
            response = await super().call_find(peer, keys)
        finally:
            _checks_left.reset(token)
        if response is None:
            return None
        notes, validator = watch.get(), self.record_validator
        return {
            key: (await checked(validator, key, found, notes), peers)
            for key, (found, peers) in response.items()
        }

    async def call_store(
        self, peer: PeerID, keys: Sequence[DHTID], values: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As upstream; notes the peer's answer where somebody watches. Whole keys, which a node that is met
        is given, are cut to `HANDED_OVER` records."""
        if any(isinstance(value, DictionaryDHTValue) for value in values):
            return await self._hand_over(peer, keys)
        answers = await super().call_store(peer, keys, values, *args, **kwargs)
        notes = watch.get()
        subkeys = kwargs.get("subkeys")
        if notes is not None and answers is not None and subkeys is not None:
            for key, subkey, ok in zip(keys, subkeys, answers, strict=False):
                votes = notes.votes.setdefault((key, subkey), Votes())
                votes.taken, votes.refused = votes.taken + bool(ok), votes.refused + (not ok)
        return answers

    async def _hand_over(self, peer: PeerID, keys: Sequence[DHTID]) -> Any:
        rows = {key: self.storage.rows(key) for key in keys[:HANDED_OVER]}
        shares = levelled({key: len(some) for key, some in rows.items()}, HANDED_OVER)
        parts = {key: dictionary(rows[key][:share]) for key, share in shares.items() if share}
        given = {key: part for key, part in parts.items() if part is not None}
        values, until = [part.value for part in given.values()], [p.expiration_time for p in given.values()]
        return await super().call_store(peer, list(given), values, until) if given else []

    async def update_routing_table(
        self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True
    ) -> None:
        """As upstream, but not for a node whose id is not its own; and who is met is handed what it should
        keep only when the last one's walk over all keys is long enough ago: keys are renewed by their owners
        anyway, and peer ids to meet are cheap."""
        if node_id is not None and node_id != id_of(peer_id):
            return
        now = clock.monotonic()
        if not responded or node_id is None or node_id in self.routing_table or now >= self._next_walk:
            if responded and node_id not in self.routing_table:
                self._next_walk = now + len(self.storage.data) * WALK_PAUSE_S
            await super().update_routing_table(node_id, peer_id, responded=responded)
        elif (oldest := self.routing_table.add_or_update_node(node_id, peer_id)) is not None:
            self._pinging = asyncio.create_task(self.call_ping(oldest[1]))  # as upstream does

    def _validate_dictionary(self, key_bytes: bytes, records: Any) -> bool:
        """Keep only valid records of a dictionary a peer sent, of as many as may be checked; in place: the
        caller goes on with it. False when none may be."""
        left = _checks_left.get()
        if left is None:
            return True
        some = min(left, len(records.data), MAX_OWNERS)
        _checks_left.set(left - some)
        most = self._stores.take(deliverer.get(), some, clock.monotonic())
        return most > 0 and prune(self.record_validator, key_bytes, records, most)


RecordProtocol.__name__ = DHTProtocol.__name__  # handlers are called `<class name>.rpc_…` on the wire
replace(DHTNode.__module__, "DHTProtocol", RecordProtocol)  # what `DHTNode.create` makes
# a peer id writes itself in base 58 when made: for the neighbours in every answer that is 40 % of a search
replace(DHTProtocol.__module__, "PeerID", functools.lru_cache(maxsize=16_384)(PeerID))


async def _traverse_packed(*args: Any, queries_per_call: int, **kwargs: Any) -> Any:
    """As upstream, with as many keys a call as `RecordNode._packing` says."""
    return await _traverse_dht(*args, queries_per_call=_keys_a_call.get() or queries_per_call, **kwargs)


_traverse_dht = replace(DHTNode.__module__, "traverse_dht", _traverse_packed)


class RecordNode(DHTNode):  # type: ignore[misc]  # hivemind ships no types
    """A DHT node that holds and believes checked records only. Made by `create_node`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sizes: dict[DHTID, int] = {}  # about the bytes of the largest answer about a key, lately
        self._portions: dict[PeerID, int] = {}  # keys a call to who did not answer the last one
        self._silent_since: dict[PeerID, float] = {}  # monotonic; of who did not answer the last call
        self.vouched: frozenset[bytes] = frozenset()

    def vouch_for(self, owners: Collection[bytes]) -> None:
        """Records of these owners are told, checked and kept before others'."""
        self.vouched = self.protocol.storage.vouched = frozenset(owners)

    def _silent(self) -> list[PeerID]:
        """Who should have answered lately and did not."""
        since = clock.monotonic() - AWAY_S
        return [peer for peer, at in self._silent_since.items() if at > since]

    @property
    def small(self) -> bool:
        """Whether the network is so small that nearly everyone is asked for everything."""
        return len(self.protocol.routing_table.uid_to_peer_id) <= SMALL

    @contextmanager
    def _packing(self, keys: Collection[bytes]) -> Iterator[None]:
        """As many keys a call as their answers leave room for: of them all in a small network, of upstream's
        square root in a larger one, where further keys would be asked of nodes far from them."""
        per_call = self._per_call([DHTID.generate(key) for key in keys])
        token = _keys_a_call.set(per_call if self.small else min(per_call, int(len(keys) ** 0.5)))
        try:
            yield
        finally:
            _keys_a_call.reset(token)

    def _per_call(self, keys: Sequence[DHTID]) -> int:
        largest = max(self._sizes.get(key, USUAL_BYTES) for key in keys) + NEIGHBOURS_BYTES
        return max(1, min(ANSWER_BYTES // largest, MAX_KEYS_A_FIND))

    def _note_sizes(self, response: Mapping[DHTID, Any]) -> None:
        """How much is said of each key."""
        for key, (answer, _) in response.items():
            known = self._sizes.pop(key, 0)
            self._sizes[key] = max(known - known // 16, _size(answer))
        _forget_oldest(self._sizes)

    def _portion(self, peer: PeerID, keys: Sequence[DHTID]) -> Sequence[DHTID]:
        """The first of `keys`: as many as the next call to this peer may have."""
        return keys[: self._portions.get(peer, MAX_KEYS_A_FIND)]

    def _note_silence(self, peer: PeerID, asked: int) -> None:
        self._portions.pop(peer, None)
        self._portions[peer] = max(1, min(asked // 2, KEYS_AFTER_SILENCE))
        _forget_oldest(self._portions)
        self._silent_since.setdefault(peer, clock.monotonic())
        _forget_oldest(self._silent_since)

    async def _ask(self, peer: PeerID, keys: Sequence[DHTID]) -> dict[DHTID, Any]:
        """What a peer answers about the keys, in one call or, after a silence, in several until it is silent
        again, or too slow: no call begins when the deadline of one has passed."""
        answers: dict[DHTID, Any] = {}
        end = clock.monotonic() + RPC_TIMEOUT_S
        while keys and peer not in self.blacklist:
            some = self._portion(peer, keys)
            if clock.monotonic() >= end:
                self._note_silence(peer, len(some))
                break
            response = await super()._call_find_with_blacklist(peer, some)
            if not response:
                self._note_silence(peer, len(some))
                break
            self._silent_since.pop(peer, None)
            answers |= response
            keys = keys[len(some) :]
        if not keys:
            self._portions.pop(peer, None)
        self._note_sizes(answers)
        return answers

    async def _call_find_with_blacklist(self, peer_id: PeerID, keys: Collection[DHTID]) -> Any:
        """As upstream, with each answer rebuilt from its checked records and their own expirations."""
        keys = list(keys)
        response, notes = await self._ask(peer_id, keys), watch.get()
        if notes is not None:
            notes.note_heard(peer_id, keys, response)
        if not response:
            return None
        believed = {}
        for key in keys:
            answer, peers = response.get(key, (None, {}))
            found = believe(answer)
            if notes is not None and found is not None:
                notes.note_found(key, found.value)
            believed[key] = (found, genuine(peers, BUCKET_SIZE))
        return believed

    async def store_counting(
        self, records: Sequence[tuple[bytes, bytes, bytes, float]], *, exclude_self: bool
    ) -> list[tuple[bool, Votes]]:
        """Store (key, subkey, value, expiration) records: for each hivemind's verdict, which counts our own
        replica, and what the other nodes said."""
        keys, subkeys, values, expirations = (list(column) for column in zip(*records, strict=True))
        notes = Watch()
        token = watch.set(notes)
        try:
            with self._packing(keys):
                stored = await self.store_many(
                    keys, values, expirations, subkeys=subkeys, exclude_self=exclude_self
                )
        finally:
            watch.reset(token)
        return [
            (bool(stored[key, subkey]), notes.votes.get((DHTID.generate(key), subkey), Votes()))
            for key, subkey in zip(keys, subkeys, strict=True)
        ]

    async def search(self, keys: Sequence[bytes]) -> Search:
        """Start reading distinct keys."""
        uids = [DHTID.generate(key) for key in keys]
        notes = Watch(checks=CHECKS_A_SEARCH, vouched=self.vouched)
        token = watch.set(notes)
        try:
            with self._packing(keys), self.protocol.storage.within(uids, ANSWER_BYTES):
                for uid in uids:
                    if (own := self.protocol.storage.get(uid)) is not None:
                        notes.note_found(uid, own.value)
                futures = await self.get_many(
                    keys,
                    sufficient_expiration_time=float("inf"),  # else the first answer would do
                    return_futures=True,
                    beam_size=BUCKET_SIZE if self.small else READ_BEAM,
                )
        finally:
            watch.reset(token)
        return Search(futures, notes, self._silent)

    async def look_through(
        self, peer: PeerID, uid: DHTID, targets: Sequence[DHTID]
    ) -> tuple[dict[DHTID, dict[DHTID, PeerID]], dict[DHTID, dict[Any, Any]]]:
        """The network as `peer` (of DHT id `uid`) alone leads to it: the nodes nearest to each of the
        targets, nearest first, without us, and the records under them as {subkey: value with expiration}."""
        seen: dict[Any, list[Any]] = {}
        token = watch.set(Watch(found=seen, checks=CHECKS_A_SEARCH, vouched=self.vouched))
        try:
            nearest = await self.find_nearest_nodes(targets, node_to_peer_id={uid: peer}, exclude_self=True)
        finally:
            watch.reset(token)
        records: dict[DHTID, dict[Any, Any]] = {}
        for target in targets:
            latest = records.setdefault(target, {})
            for found in seen.get(target, ()):
                for subkey, item in found.items():
                    held = latest.get(subkey)
                    if held is None or held.expiration_time < item.expiration_time:
                        latest[subkey] = item
        return nearest, records


_OVERRIDDEN = {
    DHTProtocol: (
        "rpc_store",
        "rpc_find",
        "call_store",
        "call_find",
        "update_routing_table",
        "_validate_dictionary",
    ),
    DHTNode: ("_call_find_with_blacklist", "store_many", "get_many", "find_nearest_nodes"),
}
"""What the classes here override, or count on to be called."""


async def create_node(p2p: P2P, *, client_mode: bool, now: Callable[[], float]) -> RecordNode:
    """A node over a running daemon. It has not joined anything yet.

    Its DHT id follows from its peer id, so that it is the same node to others after a restart.
    """
    require_tested(_OVERRIDDEN)
    node: RecordNode = await RecordNode.create(
        p2p=p2p,
        node_id=DHTID.generate(p2p.peer_id.to_bytes()),
        bucket_size=BUCKET_SIZE,
        num_replicas=REPLICAS,
        wait_timeout=RPC_TIMEOUT_S,
        num_workers=SEARCH_WORKERS,
        client_mode=client_mode,
        record_validator=RecordValidator(now),
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        reuse_get_requests=False,  # one search given up would end the others of its key, with what it has
    )
    node.protocol.storage = RecordStorage()
    node.protocol.cache = WriteThrough(node.protocol.storage)
    return node


def prune(validator: RecordValidator, key: bytes, records: Any, most: int = MAX_OWNERS) -> bool:
    """Take out of `records` the invalid ones and those after the first `most`; True, because what is left may
    be stored or believed."""
    with records.freeze():
        items = list(records.items())
    good = [
        (subkey, item)
        for subkey, item in items[:most]
        if validator.validate(
            DHTRecord(key, MSGPackSerializer.dumps(subkey), item.value, item.expiration_time)
        )
    ]
    fresh = dictionary(good)
    records.clear()
    records.maxsize = float("inf")
    records.latest_expiration_time = float("-inf")
    if fresh is not None:
        for subkey, item in fresh.value.items():
            records.store(subkey, item.value, item.expiration_time)
    return True


def count_until(items: Sequence[Any], counts: Callable[[Any], bool], most: int) -> int:
    """How many of the first `items` hold no more than `most` that count."""
    for number, item in enumerate(items):
        most -= counts(item)
        if most < 0:
            return number
    return len(items)


def _forget_oldest(notes: dict[Any, Any]) -> None:
    while len(notes) > MAX_SIZES:
        del notes[next(iter(notes))]


def _size(found: Any) -> int:
    """Bytes of the values in a peer's answer about one key, roughly."""
    if found is None or not isinstance(found.value, DictionaryDHTValue):
        return 0
    return sum(len(item.value) + 64 for _, item in found.value.items())


def believe(found: Any) -> Any:
    """A peer's answer with the expiration that its own records bear out; None for an empty one."""
    if found is None or not isinstance(found.value, DictionaryDHTValue):
        return None
    return dictionary(found.value.items())
