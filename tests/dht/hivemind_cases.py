"""Tests that import hivemind. `test_hivemind_cases.py` runs them in a process of their own, because hivemind
and py-libp2p register the same protobuf symbol and cannot share one."""

import asyncio
import math
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from paris_p2p import clock
from paris_p2p.dht import hardened, hivemind_import, record_storage
from paris_p2p.dht.answers import (
    AWAY_S,
    CHECKED_AT_ONCE,
    CHECKS_A_SEARCH,
    CHECKS_AN_ANSWER,
    DECIDING,
    Votes,
    Watch,
    checked,
    enough,
    id_of,
)
from paris_p2p.dht.hardened import (
    RPC_TIMEOUT_S,
    SMALL,
    WALK_PAUSE_S,
    RecordNode,
    RecordProtocol,
    believe,
    create_node,
    prune,
)
from paris_p2p.dht.hivemind_import import TESTED_VERSION, replace, require_tested
from paris_p2p.dht.membership import Membership
from paris_p2p.dht.parts import MAX_COMPARED, UNSEEN_ROUNDS
from paris_p2p.dht.record_storage import (
    MAX_OWNERS,
    ROW_BYTES,
    RecordStorage,
    WriteThrough,
    deliverer,
    dictionary,
    displaced,
)
from paris_p2p.dht.validator import RecordValidator
from paris_p2p.errors import ConfigError, RemoteProtocolError
from paris_p2p.wire.identity import Identity, peer_id_text
from paris_p2p.wire.records import (
    KINDS,
    ProvideRecord,
    SignedRecord,
    key_id,
    record_key,
    sign_record,
)

# isort: split
from hivemind.dht.node import Blacklist, DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID, RoutingTable
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer, timed_storage
from hivemind.utils.timed_storage import ValueWithExpiration

NOW = 1_800_000_000.0
OWNER = Identity(b"o" * 32)
PEER, OTHER = (PeerID.from_base58(peer_id_text(one.node_id)) for one in (OWNER, Identity(b"p" * 32)))
VALIDATOR = RecordValidator(lambda: NOW)


def signed(ttl_s: float = 60.0) -> SignedRecord:
    return sign_record(OWNER, ProvideRecord(True, ("a",)), b"i" * 32, NOW + ttl_s)


def wrapped(record: SignedRecord, **changes: object) -> DHTRecord:
    """The record as hivemind shows it to a validator."""
    fields: dict[str, object] = {
        "key": key_id(record.key),
        "subkey": msgpack.packb(record.subkey),
        "value": msgpack.packb(record.value),
        "expiration_time": record.expiration_unix,
    }
    return DHTRecord(**{**fields, **changes})


def test_the_light_import_loads_no_torch_and_our_clock() -> None:
    assert "torch" not in sys.modules and "hivemind.optim" not in sys.modules
    assert timed_storage.get_dht_time is clock.unix
    assert DHTNode.__init__.__globals__["get_dht_time"] is clock.unix


async def test_a_hivemind_that_nobody_tested_starts_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is replaced in it closes holes: in another layout they would be open, and nothing would say so."""
    constraints = Path(__file__).parents[2] / "constraints.txt"
    assert f"hivemind=={TESTED_VERSION}" in constraints.read_text().split()
    require_tested({DHTNode: ("store_many",)})
    with pytest.raises(ConfigError, match=r"lacks DHTNode\.gone\).*pip install hivemind=="):
        require_tested({DHTNode: ("store_many", "gone")})
    with monkeypatch.context() as patch:
        patch.setattr(hivemind_import, "_missing", [])
        assert replace("hivemind.dht.node", "no_such_global", 1) is None
        with pytest.raises(ConfigError, match=r"lacks hivemind\.dht\.node\.no_such_global"):
            require_tested({})
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "1.2.0")
    nothing: Any = None
    with pytest.raises(ConfigError, match=f"hivemind 1.2.0 is installed, .* made for {TESTED_VERSION}"):
        await create_node(nothing, client_mode=True, now=clock.unix)


def test_key_ids_are_hiveminds() -> None:
    record = signed()
    assert DHTID.generate(record.key).to_bytes() == key_id(record.key)


def test_an_owners_record_is_accepted_and_returned_as_it_was_signed() -> None:
    record = wrapped(signed())
    assert VALIDATOR.validate(record)
    assert VALIDATOR.sign_value(record) == VALIDATOR.strip_value(record) == record.value


@pytest.mark.parametrize(
    "changes",
    [
        {"subkey": DHTProtocol.IS_REGULAR_VALUE},
        {"subkey": DHTProtocol.IS_DICTIONARY},
        {"subkey": msgpack.packb(Identity(b"f" * 32).node_id)},
        {"subkey": msgpack.packb("text")},
        {"subkey": msgpack.packb(OWNER.node_id) + b"\0"},
        {"subkey": b"\xc5\x00\x20" + OWNER.node_id},
        {"subkey": None},
        {"value": b""},
        {"value": msgpack.packb(bytes(2000))},
        {"value": bytes(5_000_000)},
        {"value": msgpack.packb([1])},
        {"key": key_id(b"another key")},
        {"expiration_time": NOW + 100 * 365 * 86_400},
        {"expiration_time": NOW + KINDS["provide"].max_ttl_s + 60},
        {"expiration_time": NOW + 61},
        {"expiration_time": math.nan},
        {"expiration_time": math.inf},
        {"expiration_time": int(NOW) + 60},
        {"expiration_time": "later"},
    ],
)
def test_anything_else_is_refused(changes: dict[str, object]) -> None:
    assert not VALIDATOR.validate(wrapped(signed(), **changes))


def test_two_validators_of_ours_are_one() -> None:
    assert VALIDATOR.merge_with(RecordValidator(lambda: 0.0)) and VALIDATOR.priority == 0


def test_the_storage_refuses_values_without_an_owner() -> None:
    assert not RecordStorage().store(1, b"plain", clock.unix() + 60)


def test_a_replayed_older_record_changes_nothing() -> None:
    storage, now = RecordStorage(), clock.unix()
    assert storage.store(1, b"new", now + 60, subkey=b"owner")
    assert not storage.store(1, b"old", now + 0.01, subkey=b"owner")
    owners = timed_storage.TimedStorage.get(storage, 1).value
    assert owners.key_to_heap[b"owner"].expiration_time == now + 60


def test_the_same_record_again_counts_as_stored() -> None:
    storage, now = RecordStorage(), clock.unix()
    assert storage.store(1, b"x", now + 60, subkey=b"owner")
    assert storage.store(1, b"x", now + 60, subkey=b"owner")
    assert not storage.store(1, b"y", now + 60, subkey=b"owner")


@contextmanager
def delivered_by(peer: bytes) -> Iterator[None]:
    """As if a request of that peer were being served."""
    token = deliverer.set(peer)
    try:
        yield
    finally:
        deliverer.reset(token)


def flooded(until: float) -> RecordStorage:
    """A key with every place taken: two by honest peers, the others by one that floods."""
    storage = RecordStorage()
    for peer in (b"honest", b"other"):
        with delivered_by(peer):
            assert storage.store(1, b"x", until - 60, subkey=peer)
    with delivered_by(b"flood"):
        for owner in range(MAX_OWNERS - 2):
            assert storage.store(1, b"x", until + owner / 1000, subkey=b"%d" % owner)
    return storage


def test_who_floods_a_key_displaces_only_itself() -> None:
    until = clock.unix() + 120
    storage = flooded(until)
    with delivered_by(b"flood"):
        assert not storage.store(1, b"x", until + 600, subkey=b"one more")
        assert storage.store(1, b"renewed", until + 90, subkey=b"0")
    for number in range(3):
        with delivered_by(b"newcomer"):
            assert storage.store(1, b"x", until, subkey=b"n%d" % number)
    owners = storage.get(1).value
    assert len(owners) == MAX_OWNERS
    assert {b"honest", b"other", b"n0", b"n1", b"n2"} <= set(owners.data)
    assert b"0" not in owners.data  # of the flood's, the one that would have stayed longest went first


def test_peers_with_equal_shares_do_not_displace_each_other() -> None:
    held = {number: b"ab"[number % 2 : number % 2 + 1] for number in range(100)}
    assert displaced(held, b"a", float) == displaced(held, b"b", float) == []
    assert displaced(held, b"c", float)[0] == 98 and held[98] == b"a"


def test_a_record_counts_for_the_peer_that_stored_it_last() -> None:
    until = clock.unix() + 120
    storage = RecordStorage()
    with delivered_by(b"replicator"):  # a node hands over all it holds when it meets another
        for owner in range(MAX_OWNERS):
            storage.store(1, b"x", until, subkey=b"%d" % owner)
    with delivered_by(b"owner's own"):
        assert storage.store(1, b"renewed", until + 600, subkey=b"5")
    with delivered_by(b"newcomer"):
        assert storage.store(1, b"x", until, subkey=b"new")
    assert storage.get(1).value.get(b"5").value == b"renewed"


def test_who_floods_the_storage_with_keys_displaces_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_storage, "MAX_KEYS", 50)
    storage, until = RecordStorage(), clock.unix() + 120
    with delivered_by(b"honest"):
        assert storage.store(1000, b"x", until + 900, subkey=b"o")
    with delivered_by(b"flood"):
        assert [storage.store(key, b"x", until, subkey=b"f") for key in range(60)].count(True) == 49
    with delivered_by(b"newcomer"):
        assert storage.store(2000, b"x", until, subkey=b"n")
    assert storage.get(1000) is not None and len(storage) <= 50


def test_peers_that_deliver_for_each_other_are_charged_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_storage, "MAX_KEYS", 60)
    monkeypatch.setattr(record_storage, "_WALK_PAUSE_S", 0.0)
    storage, until = RecordStorage(), clock.unix() + 120
    for number in range(30):
        with delivered_by(b"honest %d" % (number % 6)):
            assert storage.store(1000 + number, b"x", until + 900, subkey=b"o")
    for key in range(200):
        for peer in (b"e1", b"e2"):
            with delivered_by(peer):
                storage.store(key, b"x", until, subkey=peer)
    with delivered_by(b"e1"):  # joining honest keys does not make them theirs to lose
        for number in range(30):
            storage.store(1000 + number, b"x", until, subkey=b"e1")
    with delivered_by(b"newcomer"):
        assert storage.store(2000, b"x", until, subkey=b"n")
    assert sum(storage.get(1000 + number) is not None for number in range(30)) == 30
    assert len(storage) <= 60


def test_who_delivered_what_is_forgotten_with_the_records() -> None:
    storage, now = RecordStorage(), clock.unix()
    storage.store(1, b"x", now + 60, subkey=b"stays")
    with delivered_by(b"flood"):
        for number in range(3 * MAX_OWNERS):
            storage.store(1, b"x", now - 1 if number % 2 else now + 0.001, subkey=b"%d" % number)
            storage.store(10 + number, b"x", now + 0.001, subkey=b"o")
    assert len(storage._deliverers[1]) <= 2 * MAX_OWNERS + 1
    assert len(storage._deliverers) <= 2 * len(storage.data) + MAX_OWNERS + 1


def test_a_flood_is_told_after_everybody_else_whatever_its_size() -> None:
    storage = flooded(clock.unix() + 120)
    told = [subkey for subkey, _ in storage.rows(1)]
    assert told[:6] == [b"honest", b"other", b"0", b"1", b"2", b"3"] and len(told) == MAX_OWNERS
    storage.vouched = frozenset({b"900"})
    assert [subkey for subkey, _ in storage.rows(1)][:3] == [b"900", b"honest", b"other"]
    with storage.within([1], 4 * (1 + ROW_BYTES)):
        assert [subkey for subkey, _ in storage.get(1).value.items()] == [b"900", b"honest", b"other", b"0"]


def test_who_is_vouched_for_always_has_a_place() -> None:
    storage, until = RecordStorage(), clock.unix() + 120
    storage.vouched = frozenset({b"organiser", b"claimant"})
    for owner in range(MAX_OWNERS - 1):  # each by a peer of its own: none has more than another
        with delivered_by(b"%d" % owner):
            assert storage.store(1, b"x", until, subkey=b"%d" % owner)
    for named in (b"organiser", b"claimant"):
        with delivered_by(b"anybody"):
            assert storage.store(1, b"x", until + 300, subkey=named)
    with delivered_by(b"stranger"):  # who delivered two has most places, but those are not for the taking
        assert not storage.store(1, b"x", until, subkey=b"stranger")
    owners = storage.get(1).value
    assert len(owners) == MAX_OWNERS and {b"organiser", b"claimant"} <= set(owners.data)


def test_a_dictionary_of_any_size_is_built_from_its_first_records_only() -> None:
    rows = [[b"%d" % n, b"", 1.0] for n in range(3 * MAX_OWNERS)]
    raw = msgpack.packb(msgpack.ExtType(0x50, msgpack.packb([None, 1.0, rows])))
    value = MSGPackSerializer.loads(raw)
    assert isinstance(value, DictionaryDHTValue) and list(value.data) == [row[0] for row in rows[:MAX_OWNERS]]


def test_what_a_search_merges_into_its_find_does_not_reach_the_storage() -> None:
    storage, now = RecordStorage(), clock.unix()
    storage.store(1, b"x", now + 60, subkey=b"owner")
    storage.get(1).value.store(b"other", b"y", now + 60)
    assert storage.get(1).value.get(b"other") is None


def test_a_record_stored_in_the_cache_joins_the_others() -> None:
    storage, now = RecordStorage(), clock.unix()
    cache = WriteThrough(storage)
    storage.store(1, b"x", now + 60, subkey=b"owner")
    assert cache.store_subkey(1, b"other", b"y", now + 600)
    assert cache.get(1) is None and len(storage.get(1).value) == 2


def test_an_empty_answer_for_all_time_is_not_believed() -> None:
    assert believe(ValueWithExpiration(DictionaryDHTValue(), math.inf)) is None
    assert believe(ValueWithExpiration(b"plain", math.inf)) is None
    assert believe(None) is None


def test_an_answer_lasts_as_long_as_its_records_say() -> None:
    records = DictionaryDHTValue()
    records.store(b"owner", b"x", clock.unix() + 60)
    records.latest_expiration_time = math.inf
    found = believe(ValueWithExpiration(records, math.inf))
    assert found.expiration_time < clock.unix() + 61


def test_bad_records_are_taken_out_of_a_dictionary_and_good_ones_stay() -> None:
    now = clock.unix()
    good = sign_record(OWNER, ProvideRecord(True, ("a",)), b"i" * 32, now + 60)
    records = DictionaryDHTValue("nonsense")  # a size limit, which the sender chooses
    with records.freeze():
        records.store(good.subkey, msgpack.packb(good.value), good.expiration_unix)
        records.store(b"foreign", msgpack.packb(good.value), good.expiration_unix)
    assert prune(RecordValidator(clock.unix), key_id(good.key), records)
    assert [subkey for subkey, _ in records.items()] == [good.subkey]


async def test_a_search_asks_peers_through_that_filter() -> None:
    class Liar:
        async def call_find(
            self, peer_id: object, keys: list[int]
        ) -> dict[int, tuple[object, dict[int, int]]]:
            empty = ValueWithExpiration(DictionaryDHTValue(), math.inf)
            return {key: (empty, {}) for key in keys}

    node = RecordNode(_initialized_with_create=True)
    node.protocol, node.blacklist = Liar(), Blacklist(5.0, 2.0)
    assert await node._call_find_with_blacklist("a peer", [1]) == {1: (None, {})}


KEY, LATER = DHTID.generate(b"key"), clock.unix() + 3600


class Counting(RecordValidator):
    """Finds valid what is not forged, and counts."""

    def __init__(self) -> None:
        super().__init__(clock.unix)
        self.checks = 0

    def check(self, record: DHTRecord) -> Any:
        self.checks += 1
        if record.value == b"forged":
            raise RemoteProtocolError("forged")


def answer(owners: Iterable[int], value: bytes = b"v") -> Any:
    """What a peer says: a record of each of the owners."""
    return dictionary([(b"%d" % owner, ValueWithExpiration(value, LATER)) for owner in owners])


def judged(validator: RecordValidator, found: Any, notes: Watch | None) -> Any:
    return asyncio.run(checked(validator, KEY, found, notes))


def test_the_first_of_every_answer_are_checked_and_more_while_there_is_time() -> None:
    validator, notes = Counting(), Watch(checks=10)
    for peer in range(3):
        found = judged(validator, answer(range(1000 * peer, 1000 * peer + 500)), notes)
        assert len(found.value) == CHECKS_AN_ANSWER + (10 if peer == 0 else 0)
    assert validator.checks == 3 * CHECKS_AN_ANSWER + 10
    again = judged(validator, answer(range(500)), notes)
    assert len(again.value) == CHECKS_AN_ANSWER + 10  # what is known costs nothing
    assert judged(validator, answer(range(9), b"forged"), Watch(checks=10)) is None


def test_who_is_vouched_for_is_checked_first_and_nothing_is_where_nobody_asked() -> None:
    validator = Counting()
    found = judged(validator, answer(range(900)), Watch(checks=0, vouched={b"800"}))
    assert next(iter(found.value.data)) == b"800"
    before = validator.checks
    assert judged(validator, answer(range(900, 999)), Watch()) is None
    assert judged(validator, answer(range(900, 999)), None) is None
    assert validator.checks == before


def test_calls_of_others_have_their_turn_while_a_flood_is_checked() -> None:
    async def turns_meanwhile() -> int:
        turns, done = 0, False

        async def others() -> None:
            nonlocal turns
            while not done:
                turns += 1
                await asyncio.sleep(0)

        calling = asyncio.create_task(others())
        await checked(Counting(), KEY, answer(range(512)), Watch(checks=CHECKS_A_SEARCH))
        done = True
        await calling
        return turns

    assert asyncio.run(turns_meanwhile()) >= 512 // CHECKED_AT_ONCE


def test_a_key_is_read_when_half_of_those_that_should_keep_it_answered() -> None:
    """Not when everybody nearer was silent and somebody, who may lie or just not keep it, said nothing."""
    ids = [PeerID.from_base58(peer_id_text(Identity(bytes([n]) * 32).node_id)) for n in range(12)]
    nearest = sorted(ids, key=lambda peer: KEY.xor_distance(id_of(peer)))
    assert not enough(KEY, {}, []) and enough(KEY, {nearest[0]: True}, [])
    for silent in range(DECIDING + 1):
        heard = {peer: rank >= silent for rank, peer in enumerate(nearest)}
        assert enough(KEY, heard, nearest[:silent]) is (2 * (DECIDING - silent) >= DECIDING)
        assert enough(KEY, heard, [])  # who is silent for long is away
    assert enough(KEY, {nearest[1]: True, nearest[0]: False}, nearest[:1])  # one of two
    assert not enough(KEY, {nearest[3]: True}, nearest[:3])  # who was not asked again counts too


def test_who_was_silent_counts_until_it_answers_or_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    node, now, alive = packing(3), [100.0], False
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])

    async def answers(_peer: PeerID, some: list[DHTID]) -> Any:
        return {key: (None, {}) for key in some} if alive else None

    node.protocol.call_find = answers
    node.blacklist = Blacklist(base_time=0, backoff_rate=1)
    asyncio.run(node._call_find_with_blacklist(PEER, [KEY]))
    assert node._silent() == [PEER]
    now[0] += AWAY_S - 1
    asyncio.run(node._call_find_with_blacklist(PEER, [KEY]))
    assert node._silent() == [PEER]
    now[0] += 2
    assert node._silent() == []
    alive = True
    asyncio.run(node._call_find_with_blacklist(PEER, [KEY]))
    assert node._silent_since == {}


async def test_a_slow_peer_has_one_deadline_for_all_its_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    node, now, calls = packing(3), [0.0], []
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])

    async def slow(_peer: PeerID, some: list[DHTID]) -> Any:
        calls.append(len(some))
        now[0] += 0.9 * RPC_TIMEOUT_S
        return {key: (None, {}) for key in some}

    node.protocol.call_find = slow
    node.blacklist = Blacklist(base_time=0, backoff_rate=1)
    node._portions[PEER] = 4
    keys = [DHTID.generate(b"%d" % n) for n in range(28)]
    found = await node._call_find_with_blacklist(PEER, keys)
    assert calls == [4, 4] and len(found) == 28 and node._silent() == [PEER]


def test_who_is_met_makes_a_node_walk_its_storage_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now, walks = [1000.0], 0
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])

    class Walked(RecordStorage):
        def items(self) -> Any:
            nonlocal walks
            walks += 1
            return super().items()

    met = RecordProtocol(_initialized_with_create=True)
    met.routing_table, met.storage = RoutingTable(DHTID.generate(b"us"), 20, 5), Walked()
    met.node_id, met.num_replicas = DHTID.generate(b"us"), 5
    for key in range(1000):
        met.storage.store(DHTID(key), b"v", clock.unix() + 60, subkey=b"o")

    def meet(*names: int) -> None:
        for name in names:
            peer = PeerID.from_base58(peer_id_text(Identity(bytes([name]) * 32).node_id))
            asyncio.run(met.update_routing_table(id_of(peer), peer))

    monkeypatch.setattr(met, "call_store", lambda *_, **__: asyncio.sleep(0))
    meet(1, 2, 3, 1)
    assert walks == 1 and len(met.routing_table.uid_to_peer_id) == 3
    now[0] += 1000 * WALK_PAUSE_S
    meet(4, 5)
    assert walks == 2 and len(met.routing_table.uid_to_peer_id) == 5


async def test_nodes_under_ids_that_are_not_theirs_are_ignored() -> None:
    node, invented = packing(3), DHTID(KEY ^ 1)

    async def names(_peer: PeerID, some: list[DHTID]) -> Any:
        return {key: (None, {invented: OTHER, id_of(OTHER): OTHER}) for key in some}

    node.protocol.call_find = names
    node.blacklist = Blacklist(base_time=0, backoff_rate=1)
    assert await node._call_find_with_blacklist(PEER, [KEY]) == {KEY: (None, {id_of(OTHER): OTHER})}
    table = RoutingTable(DHTID.generate(b"us"), bucket_size=20, depth_modulo=5)
    node.protocol = RecordProtocol(_initialized_with_create=True)
    node.protocol.routing_table, node.protocol.storage = table, RecordStorage()
    await node.protocol.update_routing_table(invented, OTHER)
    assert not table.uid_to_peer_id
    await node.protocol.update_routing_table(id_of(OTHER), OTHER)
    assert list(table.uid_to_peer_id) == [id_of(OTHER)]


A, B = (f"/ip4/203.0.113.{n}/tcp/31337/p2p/{peer_id_text(Identity(bytes([n]) * 32).node_id)}" for n in (1, 2))


def membership(said: list[dict[str, Any]], node: Any = None) -> Membership:
    own = PeerID.from_base58(peer_id_text(Identity(b"m" * 32).node_id))
    p2p: Any = SimpleNamespace(peer_id=own)
    dht: Any = node or SimpleNamespace()
    return Membership(p2p, dht, bootstrap=[A, B], known=[], send=said.append, rng=random.Random(0))


class Seen:
    """The network as each bootstrap node leads to it."""

    def __init__(self) -> None:
        self.nodes: dict[PeerID, set[int]] = {PeerID.from_base58(a.rsplit("/", 1)[1]): set() for a in (A, B)}
        self.node_id = DHTID.generate(b"me")
        self.introduced = 0
        self.found: dict[PeerID, dict[DHTID, dict[bytes, Any]]] = {peer: {} for peer in self.nodes}
        self.stored: list[tuple[PeerID, DHTID, list[bytes]]] = []
        self.num_replicas = 5
        table = SimpleNamespace(peer_id_to_uid={peer: n for n, peer in enumerate(self.nodes)})
        self.protocol = SimpleNamespace(routing_table=table, call_ping=self.pinged, call_store=self.store)

    async def look_through(self, peer: PeerID, uid: int, targets: list[DHTID]) -> tuple[Any, Any]:
        nearest = {target: dict.fromkeys(self.nodes[peer], peer) for target in targets}
        return nearest, {target: self.found[peer].get(target, {}) for target in targets}

    async def store(self, peer: PeerID, keys: list[DHTID], *_columns: Any, subkeys: list[bytes]) -> None:
        self.stored.append((peer, keys[0], sorted(subkeys)))

    async def pinged(self, peer: PeerID) -> None:
        self.introduced += 1

    async def find_nearest_nodes(self, targets: list[DHTID]) -> None:
        """Our own neighbours."""


def test_a_split_is_said_once_mended_and_taken_back_even_when_it_cannot_be_seen_again() -> None:
    said: list[dict[str, Any]] = []
    seen = Seen()
    watching = membership(said, seen)
    both = dict(seen.protocol.routing_table.peer_id_to_uid)
    for peer, others in zip(seen.nodes, ({7}, {8}), strict=True):
        seen.nodes[peer] = others
    asyncio.run(watching._mend())
    asyncio.run(watching._mend())
    assert [notice["active"] for notice in said] == [True] and seen.introduced == 4
    seen.nodes = {peer: {7, 8} for peer in seen.nodes}
    asyncio.run(watching._mend())
    assert [notice["active"] for notice in said] == [True, False]

    seen.nodes = dict(zip(seen.nodes, ({7}, {8}), strict=True))
    asyncio.run(watching._mend())
    seen.protocol.routing_table.peer_id_to_uid = dict(list(both.items())[:1])  # one is gone for good
    for _ in range(UNSEEN_ROUNDS):
        assert said[-1]["active"]
        asyncio.run(watching._mend())
    assert [notice["active"] for notice in said] == [True, False] * 2
    assert "too few bootstrap nodes answer" in said[-1]["text"]


def test_only_what_is_certainly_missing_is_stored_in_our_name_and_nothing_of_a_flooded_key() -> None:
    seen, until = Seen(), ValueWithExpiration(b"v", NOW)
    watching = membership([], seen)
    claim, run = (record_key(kind, b"") for kind in ("claim", "run"))
    watching.watch([claim, run])
    one, two = seen.nodes
    seen.nodes = {one: {7, 8}, two: {8, 9}}  # they have a node in common
    flood = {b"%d" % n: until for n in range(MAX_COMPARED + 1)}
    seen.found[one] = {DHTID.generate(claim): flood, DHTID.generate(run): {b"a": until}}
    asyncio.run(watching._mend())
    assert seen.introduced == 3 and not seen.stored  # just a look that came too early, perhaps
    asyncio.run(watching._mend())
    assert {(key, *owners) for _, key, owners in seen.stored} == {(DHTID.generate(run), b"a")}
    assert {peer for peer, _, _ in seen.stored} == {two}


def test_the_clock_that_most_bootstrap_nodes_disagree_with_is_wrong() -> None:
    said: list[dict[str, Any]] = []
    judging = membership(said)
    judging._skews = {A: 10.0, B: 0.0}
    judging._judge_clock()
    assert [(m["kind"], m["subject"]) for m in said] == [("bootstrap", A)] and "ahead" not in said[0]["text"]
    judging._skews = {A: 10.0, B: 11.0}
    judging._judge_clock()
    assert said[-1]["kind"] == "clock" and "11.0 s ahead of" in said[-1]["text"]
    judging._skews = {A: 0.0, B: 0.0}
    judging._judge_clock()
    assert said[-1]["kind"] == "clock" and not said[-1]["active"]


async def test_what_other_nodes_said_of_a_record_is_counted() -> None:
    node = RecordNode(_initialized_with_create=True)
    answers = iter([[True], [False], None])

    async def store_many(keys: list[bytes], *_columns: Any, **_options: Any) -> dict[Any, bool]:
        protocol = RecordProtocol(_initialized_with_create=True)
        for _ in range(3):
            await protocol.call_store("a peer", [DHTID.generate(keys[0])], [b"v"], subkeys=[b"s"])
        return {(keys[0], b"s"): True}

    async def upstream(*_arguments: Any, **_options: Any) -> Any:
        return next(answers)

    node.protocol = SimpleNamespace(routing_table=SimpleNamespace(uid_to_peer_id={}))
    node.store_many = store_many
    original, DHTProtocol.call_store = DHTProtocol.call_store, upstream
    try:
        assert await node.store_counting([(b"k", b"s", b"v", NOW)], exclude_self=False) == [
            (True, Votes(1, 1))
        ]
    finally:
        DHTProtocol.call_store = original


def packing(neighbours: int, node: RecordNode | None = None) -> RecordNode:
    node = RecordNode(_initialized_with_create=True) if node is None else node
    table = dict.fromkeys(range(neighbours))
    node.protocol = SimpleNamespace(routing_table=SimpleNamespace(uid_to_peer_id=table))
    return node


def keys_a_call(node: RecordNode) -> int:
    with node._packing([b"%d" % n for n in range(16)]):
        return hardened._keys_a_call.get() or 0


def test_a_small_network_is_asked_for_every_key_in_one_call_and_a_large_one_as_upstream_does() -> None:
    assert keys_a_call(packing(SMALL)) >= 16
    assert keys_a_call(packing(SMALL + 1)) == 4
    assert hardened._keys_a_call.get() is None


def test_keys_that_hold_much_are_asked_for_in_smaller_calls() -> None:
    node = packing(3)
    key = DHTID.generate(b"7")
    full = dictionary([(b"%d" % n, ValueWithExpiration(b"v" * 1000, NOW)) for n in range(1000)])
    node._note_sizes({key: (full, {})})
    assert keys_a_call(node) == 1
    for _ in range(100):
        node._note_sizes({key: (None, {})})
    assert keys_a_call(node) >= 16


async def test_who_does_not_answer_is_asked_for_less_at_a_time_and_nobody_else_is() -> None:
    """Its answer may have been too large for a message; most who are silent are away."""
    node, calls = packing(3), []
    keys = [DHTID.generate(b"%d" % n) for n in range(16)]

    async def answers_three_at_most(peer: PeerID, some: list[DHTID]) -> Any:
        calls.append(len(some))
        return {key: (None, {}) for key in some} if peer == OTHER or len(some) <= 3 else None

    node.protocol.call_find = answers_three_at_most
    node.blacklist = Blacklist(base_time=0, backoff_rate=1)
    answered = [await node._call_find_with_blacklist(peer, keys) for peer in (PEER, OTHER, PEER, PEER)]
    assert [answer is not None for answer in answered] == [False, True, False, True]
    assert calls == [16, 16, 4, *[2] * 8] and keys_a_call(node) >= 16
    node.blacklist = Blacklist(base_time=9, backoff_rate=1)
    node.blacklist.register_failure(PEER)
    assert await node._call_find_with_blacklist(PEER, keys) is None
    assert node._portion(PEER, keys) == keys  # who was not asked was not silent


async def test_what_was_answered_before_a_silence_is_believed() -> None:
    node = packing(3)
    keys = [DHTID.generate(b"%d" % n) for n in range(4)]
    good = dictionary([(b"s", ValueWithExpiration(b"v", NOW))])

    async def knows_the_first(_peer: PeerID, some: list[DHTID]) -> Any:
        return {key: (good, {}) for key in some} if some == keys[:2] else None

    node.protocol.call_find = knows_the_first
    node.blacklist = Blacklist(base_time=0, backoff_rate=1)
    node._portions[PEER] = 2
    found = await node._call_find_with_blacklist(PEER, keys)
    assert [found[key][0] is not None for key in keys] == [True, True, False, False]
    assert node._portion(PEER, keys) == keys[:1]
