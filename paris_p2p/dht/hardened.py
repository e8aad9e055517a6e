"""hivemind's DHT node with the holes closed that a record validator cannot reach.

Owns: what of a peer's request is served and what of its answer is believed, and who else holds what we
store. Does not own: the acceptance rule (`validator`), the storage (`record_storage`). Imports hivemind: only
the DHT worker uses this module.

What the stock node (1.1.12) gets wrong, each with a test in `tests/dht/hivemind_cases.py`:
- a record stored "in cache" shadows the whole key, so one valid record hides everyone else's;
- a replayed older record is refused, yet shortens the life of the newer one to its own;
- an answer's outer expiration is believed: an empty one "until the end of time" ends every search;
- one bad record makes a dictionary's good ones unreadable;
- a search merges peers' answers into the local storage itself;
- nothing bounds the number of keys or owners (a key whose records exceed 4 MiB reads as absent), of records
  or keys a request, of neighbours an answer;
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
from dataclasses import dataclass, field
from typing import Any

from paris_p2p.dht.record_storage import MAX_OWNERS, RecordStorage, WriteThrough, deliverer, dictionary
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
REPLICAS = 5
BUCKET_SIZE = 20
SEARCH_WORKERS = 16
"""Calls of one search at once. Upstream's 4 make as many calls, in three times as many rounds."""
READ_BEAM = 10
"""Nodes nearest to a key that a read asks in a network of more than `SMALL` nodes: twice the replicas. In
a smaller one as many as a bucket holds, so that nearly everyone is asked, wherever a record ended up."""
SMALL = 40
MAX_KEYS_A_FIND = 64
ANSWER_BYTES = 1 << 20
"""So much is asked for in one call, by what its keys held last time: a message may have 4 MiB, and what is
larger reads as absent."""
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


@dataclass(slots=True)
class Votes:
    """What other nodes answered to the storing of one record."""

    taken: int = 0
    refused: int = 0


@dataclass(slots=True)
class _Watch:
    """What is noted of the calls that one request leads to."""

    votes: dict[tuple[Any, Any], Votes] = field(default_factory=dict)  # (key id, subkey)
    answered: set[Any] = field(default_factory=set)  # ids of keys of which a peer said something or "nothing"
    found: dict[Any, list[Any]] | None = None  # key id -> dictionaries that peers returned, where wanted


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)
_checks_left: ContextVar[int] = ContextVar("checks left", default=sys.maxsize)  # in dictionaries stored here
_keys_a_call: ContextVar[int | None] = ContextVar("keys a call", default=None)


@dataclass(frozen=True, slots=True)
class Answered:
    """The keys of which another node answered."""

    ids: set[Any]

    def __contains__(self, key: bytes) -> bool:
        return DHTID.generate(key) in self.ids


class RecordProtocol(DHTProtocol):  # type: ignore[misc]  # hivemind ships no types
    """The remote calls, bounded. Its name on the wire stays upstream's (`__name__` below)."""

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """As upstream, for the first `MAX_RECORDS_A_STORE` records, single ones before those in dictionaries;
        the others are refused."""
        count = len(request.keys)
        fields = ("keys", "subkeys", "values", "expiration_time", "in_cache")
        for name in fields:
            del getattr(request, name)[MAX_RECORDS_A_STORE:]
        token = deliverer.set(context.remote_id.to_bytes())
        single = sum(tag != self.IS_DICTIONARY for tag in request.subkeys)
        checks = _checks_left.set(MAX_RECORDS_A_STORE - single)
        try:
            response = await super().rpc_store(request, context)
        finally:
            _checks_left.reset(checks)
            deliverer.reset(token)
        response.store_ok.extend([False] * (min(count, 1 << 16) - len(response.store_ok)))
        return response

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """As upstream, for the first `MAX_KEYS_A_FIND` keys."""
        del request.keys[MAX_KEYS_A_FIND:]
        return await super().rpc_find(request, context)

    async def call_store(self, peer: PeerID, keys: Sequence[DHTID], *args: Any, **kwargs: Any) -> Any:
        """As upstream; notes the peer's answer where somebody watches."""
        answers = await super().call_store(peer, keys, *args, **kwargs)
        watch = _watch.get()
        subkeys = kwargs.get("subkeys")
        if watch is not None and answers is not None and subkeys is not None:
            for key, subkey, ok in zip(keys, subkeys, answers, strict=False):
                votes = watch.votes.setdefault((key, subkey), Votes())
                votes.taken, votes.refused = votes.taken + bool(ok), votes.refused + (not ok)
        return answers

    def _validate_dictionary(self, key_bytes: bytes, records: Any) -> bool:
        """Keep only valid records of a dictionary a peer sent, of as many as may be checked; in place: the
        caller goes on with it. False when none may be."""
        left = _checks_left.get()
        _checks_left.set(left - min(left, len(records.data)))
        return left > 0 and prune(self.record_validator, key_bytes, records, min(left, MAX_OWNERS))


RecordProtocol.__name__ = DHTProtocol.__name__  # handlers are called `<class name>.rpc_…` on the wire
vars(sys.modules[DHTNode.__module__])["DHTProtocol"] = RecordProtocol  # what `DHTNode.create` makes
# a peer id writes itself in base 58 when made: for the neighbours in every answer that is 40 % of a search
vars(sys.modules[DHTProtocol.__module__])["PeerID"] = functools.lru_cache(maxsize=16_384)(PeerID)
_traverse_dht = vars(sys.modules[DHTNode.__module__])["traverse_dht"]


async def _traverse_packed(*args: Any, queries_per_call: int, **kwargs: Any) -> Any:
    """As upstream, with as many keys a call as `RecordNode._packing` says."""
    return await _traverse_dht(*args, queries_per_call=_keys_a_call.get() or queries_per_call, **kwargs)


vars(sys.modules[DHTNode.__module__])["traverse_dht"] = _traverse_packed


class RecordNode(DHTNode):  # type: ignore[misc]  # hivemind ships no types
    """A DHT node that holds and believes checked records only. Made by `create_node`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sizes: dict[DHTID, int] = {}  # about the bytes of the largest answer about a key, lately
        self._portions: dict[PeerID, int] = {}  # keys a call to who did not answer the last one

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

    async def _ask(self, peer: PeerID, keys: Sequence[DHTID]) -> dict[DHTID, Any]:
        """What a peer answers about the keys, in one call or, after a silence, in several until it is silent
        again."""
        answers: dict[DHTID, Any] = {}
        while keys and peer not in self.blacklist:
            some = self._portion(peer, keys)
            response = await super()._call_find_with_blacklist(peer, some)
            if not response:
                self._note_silence(peer, len(some))
                break
            answers |= response
            keys = keys[len(some) :]
        if not keys:
            self._portions.pop(peer, None)
        self._note_sizes(answers)
        return answers

    async def _call_find_with_blacklist(self, peer_id: PeerID, keys: Collection[DHTID]) -> Any:
        """As upstream, with each answer rebuilt from its checked records and their own expirations."""
        response = await self._ask(peer_id, list(keys))
        if not response:
            return None
        watch = _watch.get()
        if watch is not None:
            watch.answered.update(response)
        response = {key: response.get(key, (None, {})) for key in keys}
        believed = {}
        for key, (answer, peers) in response.items():
            found = believe(answer)
            if watch is not None and watch.found is not None and found is not None:
                watch.found.setdefault(key, []).append(found.value)
            believed[key] = (found, dict(list(peers.items())[:BUCKET_SIZE]))
        return believed

    async def store_counting(
        self, records: Sequence[tuple[bytes, bytes, bytes, float]], *, exclude_self: bool
    ) -> list[tuple[bool, Votes]]:
        """Store (key, subkey, value, expiration) records: for each hivemind's verdict, which counts our own
        replica, and what the other nodes said."""
        keys, subkeys, values, expirations = (list(column) for column in zip(*records, strict=True))
        watch = _Watch()
        token = _watch.set(watch)
        try:
            with self._packing(keys):
                stored = await self.store_many(
                    keys, values, expirations, subkeys=subkeys, exclude_self=exclude_self
                )
        finally:
            _watch.reset(token)
        return [
            (bool(stored[key, subkey]), watch.votes.get((DHTID.generate(key), subkey), Votes()))
            for key, subkey in zip(keys, subkeys, strict=True)
        ]

    async def search(self, keys: Sequence[bytes]) -> "tuple[dict[bytes, asyncio.Future[Any]], Answered]":
        """Start reading distinct keys: for each the future of {subkey: value with expiration}, with what
        every node that should know it told, or of None. Cancelling one ends the search for that key. Beside
        them the keys of which any other node has answered, up to date at any time."""
        watch = _Watch()
        token = _watch.set(watch)
        try:
            with self._packing(keys):
                searches: dict[bytes, asyncio.Future[Any]] = await self.get_many(
                    keys,
                    sufficient_expiration_time=float("inf"),  # else the first answer would do
                    return_futures=True,
                    beam_size=BUCKET_SIZE if self.small else READ_BEAM,
                )
        finally:
            _watch.reset(token)
        return searches, Answered(watch.answered)

    async def look_through(
        self, peer: PeerID, uid: DHTID, targets: Sequence[DHTID]
    ) -> tuple[dict[DHTID, dict[DHTID, PeerID]], dict[DHTID, dict[Any, Any]]]:
        """The network as `peer` (of DHT id `uid`) alone leads to it: the nodes nearest to each of the
        targets, nearest first, without us, and the records under them as {subkey: value with expiration}."""
        seen: dict[Any, list[Any]] = {}
        token = _watch.set(_Watch(found=seen))
        try:
            nearest = await self.find_nearest_nodes(targets, node_to_peer_id={uid: peer}, exclude_self=True)
        finally:
            _watch.reset(token)
        records: dict[DHTID, dict[Any, Any]] = {}
        for target in targets:
            latest = records.setdefault(target, {})
            for found in seen.get(target, ()):
                for subkey, item in found.items():
                    held = latest.get(subkey)
                    if held is None or held.expiration_time < item.expiration_time:
                        latest[subkey] = item
        return nearest, records


async def create_node(p2p: P2P, *, client_mode: bool, now: Callable[[], float]) -> RecordNode:
    """A node over a running daemon. It has not joined anything yet.

    Its DHT id follows from its peer id, so that it is the same node to others after a restart.
    """
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


def _forget_oldest(notes: dict[Any, int]) -> None:
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
