"""What the DHT worker serves and answers, with hivemind's own code around it and no network. Run by
`test_hivemind_cases.py`, as `hivemind_cases.py` is."""

import asyncio
from types import SimpleNamespace
from typing import Any

import msgpack

from paris_p2p import clock
from paris_p2p.dht.hardened import MAX_RECORDS_A_STORE, RecordNode, RecordProtocol
from paris_p2p.dht.protocol import KEYS_PER_READ, MAX_ROWS_A_KEY
from paris_p2p.dht.record_storage import RecordStorage, WriteThrough, dictionary
from paris_p2p.dht.validator import RecordValidator
from paris_p2p.dht.worker import DhtWorker, Parent, chosen
from paris_p2p.wire.identity import Identity, peer_id_text
from paris_p2p.wire.records import MAX_RECORD_BYTES
from paris_p2p.workers.frames import FrameReader

# isort: split
from hivemind.dht.node import Blacklist
from hivemind.dht.routing import DHTID
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
    asyncio.run(worker._answer({"type": "read", "id": 7, "keys": keys, "patience_s": None}))
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
    some, others = chosen(rows, b"one"), chosen(rows, b"two")
    assert len(some) == len(others) == MAX_ROWS_A_KEY and some != others
    assert set(some) == set(chosen(rows[::-1], b"one")) and set(some) != set(rows[:MAX_ROWS_A_KEY])
    assert chosen(rows[:MAX_ROWS_A_KEY], b"one") == rows[:MAX_ROWS_A_KEY]
    outbox: Any = Outbox()
    nothing: Any = None
    Parent(nothing, outbox).send({"type": "answer", "id": 1, "found": [some] * KEYS_PER_READ})
    assert len(outbox.answers()) == 1
