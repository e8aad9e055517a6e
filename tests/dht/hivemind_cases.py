"""Tests that import hivemind. `test_hivemind_cases.py` runs them in a process of their own, because hivemind
and py-libp2p register the same protobuf symbol and cannot share one."""

import math
import sys

import msgpack
import pytest

from paris_p2p import clock
from paris_p2p.dht.hardened import MAX_OWNERS, RecordNode, RecordStorage, WriteThrough, _believed, _prune
from paris_p2p.dht.validator import RecordValidator
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import KINDS, ProvideRecord, SignedRecord, key_id, sign_record

# isort: split
from hivemind.dht.node import Blacklist, DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.utils import timed_storage
from hivemind.utils.timed_storage import ValueWithExpiration

NOW = 1_800_000_000.0
OWNER = Identity(b"o" * 32)
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


def test_a_full_key_refuses_newcomers_and_keeps_its_holders() -> None:
    storage, now = RecordStorage(), clock.unix()
    for owner in range(MAX_OWNERS):
        assert storage.store(1, b"x", now + 60, subkey=owner)
    assert not storage.store(1, b"x", now + 600, subkey=b"one more")
    assert storage.store(1, b"renewed", now + 90, subkey=0)
    assert storage.get(1).value.get(0).value == b"renewed"


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
    assert _believed(ValueWithExpiration(DictionaryDHTValue(), math.inf)) is None
    assert _believed(ValueWithExpiration(b"plain", math.inf)) is None
    assert _believed(None) is None


def test_an_answer_lasts_as_long_as_its_records_say() -> None:
    records = DictionaryDHTValue()
    records.store(b"owner", b"x", clock.unix() + 60)
    records.latest_expiration_time = math.inf
    found = _believed(ValueWithExpiration(records, math.inf))
    assert found.expiration_time < clock.unix() + 61


def test_bad_records_are_taken_out_of_a_dictionary_and_good_ones_stay() -> None:
    now = clock.unix()
    good = sign_record(OWNER, ProvideRecord(True, ("a",)), b"i" * 32, now + 60)
    records = DictionaryDHTValue("nonsense")  # a size limit, which the sender chooses
    with records.freeze():
        records.store(good.subkey, msgpack.packb(good.value), good.expiration_unix)
        records.store(b"foreign", msgpack.packb(good.value), good.expiration_unix)
    assert _prune(RecordValidator(clock.unix), key_id(good.key), records)
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
