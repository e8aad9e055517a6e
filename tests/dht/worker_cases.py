"""What the DHT worker serves and answers, with hivemind's own code around it and no network. Run by
`test_hivemind_cases.py`, as `hivemind_cases.py` is."""

import asyncio
from types import SimpleNamespace
from typing import Any

import msgpack

from paris_p2p import clock
from paris_p2p.dht.hardened import (
    ANSWER_BYTES,
    HANDED_OVER,
    MAX_RECORDS_A_STORE,
    RecordNode,
    RecordProtocol,
)
from paris_p2p.dht.protocol import KEYS_PER_READ, MAX_ROWS_A_KEY, ROWS_A_READ
from paris_p2p.dht.record_storage import MAX_OWNERS, RecordStorage, WriteThrough, deliverer, dictionary
from paris_p2p.dht.validator import RecordValidator
from paris_p2p.dht.worker import DhtWorker, Parent, chosen
from paris_p2p.wire.identity import Identity, peer_id_text
from paris_p2p.wire.records import MAX_RECORD_BYTES
from paris_p2p.workers.frames import FrameReader

# isort: split
from hivemind.dht.node import Blacklist
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID, RoutingTable
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration

NOW = 1_800_000_000.0
US, PEER = (PeerID.from_base58(peer_id_text(Identity(seed * 32).node_id)) for seed in (b"u", b"p"))
BOOTSTRAP = f"/ip4/203.0.113.1/tcp/31337/p2p/{PEER.to_base58()}"
VALIDATOR = RecordValidator(lambda: NOW)


def protocol() -> RecordProtocol:
    """What serves requests, without a network."""
    served = RecordProtocol(_initialized_with_create=True)
    served.storage = RecordStorage()
    served.cache = WriteThrough(served.storage)
    served.node_info, served.serializer = dht_pb2.NodeInfo(), MSGPackSerializer
    return served


def test_records_inside_of_dictionaries_count_as_records_of_a_request() -> None:
    served, checked = protocol(), list[bytes]()

    class Counting:
        def validate(self, record: DHTRecord) -> bool:
            checked.append(record.subkey)
            return True

    served.record_validator = Counting()
    request, until = dht_pb2.StoreRequest(), clock.unix() + 60
    for number in range(4):
        many = dictionary(
            [(b"%d" % n, ValueWithExpiration(b"v", until)) for n in range(MAX_RECORDS_A_STORE // 2)]
        )
        request.keys.append(DHTID.generate(b"%d" % number).to_bytes())
        request.subkeys.append(served.IS_DICTIONARY)
        request.values.append(MSGPackSerializer.dumps(many.value))
        request.expiration_time.append(until)
        request.in_cache.append(False)
    request.keys.append(DHTID.generate(b"single").to_bytes())
    request.subkeys.append(MSGPackSerializer.dumps(b"owner"))
    request.values.append(b"v")
    request.expiration_time.append(until)
    request.in_cache.append(False)
    for _ in range(2):  # each request has the same room
        checked.clear()
        response = asyncio.run(served.rpc_store(request, SimpleNamespace(remote_id=PEER)))
        assert list(response.store_ok) == [True, True, False, False, True]
        assert len(checked) == MAX_RECORDS_A_STORE


def asked_for(served: RecordProtocol, keys: list[bytes]) -> list[Any]:
    """What is told of the keys."""
    request = dht_pb2.FindRequest(keys=[DHTID.generate(key).to_bytes() for key in keys])
    context: Any = SimpleNamespace(remote_id=PEER)
    told = list[Any]()

    async def ask() -> None:  # `asyncio.run` writes out what it returns: seconds for a megabyte
        told.extend((await served.rpc_find(request, context)).results)

    asyncio.run(ask())
    return told


def test_an_answer_is_bounded_and_tells_what_one_flood_did_not_bring_first() -> None:
    """Who asks for all keys of a flooded run at once would have had nothing of an answer of 16 MiB."""
    served, until = protocol(), clock.unix() + 60
    served.routing_table, served.bucket_size = RoutingTable(DHTID.generate(b"us"), 20, 5), 20
    keys = [b"%d" % number for number in range(16)]
    for key in keys[1:]:
        for peer, owners in ((b"flood", range(128)), (b"honest", range(128, 129))):
            token = deliverer.set(peer)
            for owner in owners:
                served.storage.store(DHTID.generate(key), bytes(8000), until, subkey=b"%d" % owner)
            deliverer.reset(token)
    served.storage.store(DHTID.generate(keys[0]), bytes(8000), until, subkey=b"lone")
    told = asked_for(served, keys)
    lengths = [len(one.value) for one in told]
    lone, *found = [list(MSGPackSerializer.loads(one.value).data) for one in told]
    first, counts = {tuple(some[:2]) for some in found}, {len(some) for some in found}
    assert sum(lengths) <= ANSWER_BYTES
    assert (lone, first) == ([b"lone"], {(b"0", b"128")})
    assert min(counts) >= 7
    (alone,) = asked_for(served, keys[1:2])
    count = len(MSGPackSerializer.loads(alone.value).data)
    assert count == 129  # fewer keys a call: more of each


def test_one_peer_gets_a_bounded_share_of_a_nodes_time() -> None:
    served, until = protocol(), clock.unix() + 60
    served.record_validator = SimpleNamespace(validate=lambda _record: True)

    def store(peer: PeerID, count: int) -> int:
        request = dht_pb2.StoreRequest()
        for number in range(count):
            request.keys.append(DHTID.generate(b"%d" % number).to_bytes())
            request.subkeys.append(MSGPackSerializer.dumps(b"owner"))
            request.values.append(b"v")
            request.expiration_time.append(until)
            request.in_cache.append(False)
        answer = asyncio.run(served.rpc_store(request, SimpleNamespace(remote_id=peer)))
        assert len(answer.store_ok) == count
        return sum(answer.store_ok)

    taken = [store(PEER, MAX_RECORDS_A_STORE) for _ in range(4)]
    assert taken[:2] == [MAX_RECORDS_A_STORE] * 2 and sum(taken[2:]) < MAX_RECORDS_A_STORE
    assert store(US, 20) == 20


def test_who_is_met_is_given_a_bounded_part_of_what_it_is_nearer_to() -> None:
    served, sent = protocol(), list[tuple[int, int]]()
    until = clock.unix() + 60
    for key, count in ((b"flooded", MAX_OWNERS), (b"small", 3)):
        for owner in range(count):
            served.storage.store(DHTID.generate(key), b"v", until, subkey=b"%d" % owner)

    async def upstream(_self: Any, _peer: Any, keys: list[Any], values: list[Any], _until: Any) -> list[bool]:
        sent.extend((key, len(value)) for key, value in zip(keys, values, strict=True))
        return [True] * len(keys)

    original, DHTProtocol.call_store = DHTProtocol.call_store, upstream
    try:
        whole = [(key, item.value, item.expiration_time) for key, item in served.storage.items()]
        asyncio.run(served.call_store(PEER, *zip(*whole, strict=True), in_cache=False))
    finally:
        DHTProtocol.call_store = original
    assert dict(sent) == {DHTID.generate(b"flooded"): HANDED_OVER - 3, DHTID.generate(b"small"): 3}


class Outbox:
    """The parent's end: the answers it gets."""

    def __init__(self) -> None:
        self._frames = FrameReader()

    def write(self, data: bytes) -> None:
        self._frames.feed(data)

    def answers(self) -> list[dict[str, Any]]:
        return list(iter(self._frames.next, None))


def serving(node: RecordNode, bootstrap: list[str]) -> tuple[DhtWorker, Outbox]:
    """A worker around `node`, and what it sends to its parent."""
    outbox: Any = Outbox()
    start: Any = SimpleNamespace(bootstrap=bootstrap, known=[], client_mode=False)
    nothing: Any = None
    p2p: Any = SimpleNamespace(peer_id=US)
    return DhtWorker(start, Parent(nothing, outbox), nothing, p2p, node), outbox


def reading(node: RecordNode, bootstrap: list[str], keys: list[bytes]) -> Any:
    worker, outbox = serving(node, bootstrap)
    asyncio.run(worker._answer({"type": "read", "id": 7, "keys": keys, "patience_s": None, "vouched": []}))
    (answer,) = outbox.answers()
    assert answer["id"] == 7
    return answer.get("found", answer)


def asking(answers: Any, *, known: bool) -> RecordNode:
    """A node that holds one record under the key "own", and what the only other node says, if it is known."""
    node = RecordNode(_initialized_with_create=True)
    node.node_id, node.blacklist = DHTID.generate(b"us"), Blacklist(base_time=0, backoff_rate=1)
    node.num_workers, node.chunk_size, node.reuse_get_requests = 4, 16, False
    node.cache_refresh_before_expiry, node.cache_locally, node.cache_nearest = 0, False, 0
    storage = RecordStorage()
    storage.store(DHTID.generate(b"own"), msgpack.packb(b"v"), clock.unix() + 60, subkey=b"us")
    table = {DHTID.generate(b"them"): PEER} if known else {}
    node.protocol = SimpleNamespace(
        routing_table=SimpleNamespace(
            uid_to_peer_id=table, get_nearest_neighbors=lambda *_, **__: list(table.items())
        ),
        storage=storage,
        cache=WriteThrough(storage),
        serializer=MSGPackSerializer,
        record_validator=VALIDATOR,
        bucket_size=20,
        call_find=answers,
    )
    return node


def test_a_key_of_which_nobody_else_answered_was_not_read() -> None:
    keys = [b"own", b"other"]

    async def silence(_peer: PeerID, _some: list[DHTID]) -> Any:
        return None

    async def nothing(_peer: PeerID, some: list[DHTID]) -> Any:
        return {key: (None, {}) for key in some}

    async def nothing_of_other(_peer: PeerID, some: list[DHTID]) -> Any:
        return {key: (None, {}) for key in some if key == DHTID.generate(b"other")}

    assert reading(asking(silence, known=True), [], keys) == [None, None]
    assert reading(asking(silence, known=False), [BOOTSTRAP], keys) == [None, None]
    own, other = reading(asking(nothing, known=True), [BOOTSTRAP], keys)
    assert [row[0] for row in own] == [b"us"] and other == []
    assert reading(asking(nothing_of_other, known=True), [BOOTSTRAP], keys) == [None, []]
    own, other = reading(asking(silence, known=False), [], keys)  # the first node of a network
    assert [row[0] for row in own] == [b"us"] and other == []


def test_every_request_is_answered_also_one_whose_answer_is_too_large() -> None:
    class Enormous(DhtWorker):
        async def _handle(self, message: Any) -> Any:
            return {"found": bytes(33 << 20)}

    worker, outbox = serving(RecordNode(_initialized_with_create=True), [])
    worker.__class__ = Enormous
    asyncio.run(worker._answer({"type": "read", "id": 3}))
    (answer,) = outbox.answers()
    assert answer["id"] == 3 and "LocalProtocolError" in answer["error"]


def test_a_flood_does_not_choose_who_is_seen_and_the_answer_fits_a_frame() -> None:
    rows = [(b"%032d" % n, bytes(MAX_RECORD_BYTES), NOW) for n in range(3 * MAX_ROWS_A_KEY)]

    def choose(rows: list[Any], salt: bytes, most: int = MAX_ROWS_A_KEY) -> list[Any]:
        return chosen(rows, most, {rows[7][0]: 0}, {b"%032d" % 9}, salt)

    some, others = choose(rows, b"one"), choose(rows, b"two")
    assert len(some) == len(others) == MAX_ROWS_A_KEY and some != others
    assert set(some) != set(rows[:MAX_ROWS_A_KEY])
    assert choose(rows[:MAX_ROWS_A_KEY], b"one") == rows[:MAX_ROWS_A_KEY]
    assert choose(rows, b"one", 2) == choose(rows, b"two", 2) == [rows[9], rows[7]]
    outbox: Any = Outbox()
    nothing: Any = None
    found = [rows[: ROWS_A_READ // KEYS_PER_READ]] * KEYS_PER_READ
    Parent(nothing, outbox).send({"type": "answer", "id": 1, "found": found})
    assert len(outbox.answers()) == 1


def test_the_keys_of_a_read_share_what_it_hands_on() -> None:
    until = clock.unix() + 60

    rows = [(b"%d" % n, ValueWithExpiration(msgpack.packb(b"v"), until)) for n in range(600)]

    async def floods(_peer: PeerID, some: list[DHTID]) -> Any:
        small = DHTID.generate(b"small")
        return {key: (dictionary(rows[:2] if key == small else rows), {}) for key in some}

    keys = [b"small", *(b"%d" % n for n in range(KEYS_PER_READ - 1))]
    small, *found = reading(asking(floods, known=True), [BOOTSTRAP], keys)
    assert len(small) == 2 and sum(map(len, found)) == ROWS_A_READ - 2
