"""Tests of `paris_p2p.dht.own_records`."""

from paris_p2p.dht.own_records import FORGET_S, OwnRecords
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import ProvideRecord, Record, SignedRecord, sign_record

NOW = 1_800_000_000.0
ME = Identity(b"m" * 32)
ITEM = b"i" * 32


def written(until: float) -> SignedRecord:
    return sign_record(ME, ProvideRecord(True, ()), ITEM, until)


def read(until: float, owner: Identity = ME) -> Record:
    return Record("provide", ITEM, owner.node_id, ProvideRecord(True, ("elsewhere",)), until)


def test_the_latest_record_of_a_place_stays_published_until_it_expires() -> None:
    own = OwnRecords()
    for until in (NOW + 60, NOW + 90, NOW + 30, NOW - 1):
        own.remember(written(until), NOW)
    assert [record.expiration_unix for record in own.live(NOW)] == [NOW + 90]
    assert own.live(NOW + 91) == []


def test_what_an_earlier_process_left_is_not_somebody_else() -> None:
    own = OwnRecords()
    own.remember(written(NOW + 60), NOW)
    assert not any(own.is_strange(read(NOW + 300), NOW + second) for second in range(5))
    assert not own.shared(NOW)


def test_a_record_in_our_name_that_is_renewed_proves_another_process() -> None:
    own = OwnRecords()
    own.remember(written(NOW + 60), NOW)
    assert not own.is_strange(read(NOW + 70), NOW)
    own.remember(written(NOW + 80), NOW + 20)
    assert not own.is_strange(read(NOW + 80), NOW + 20)  # ours
    assert own.is_strange(read(NOW + 90), NOW + 20)
    assert own.shared(NOW + 21) and not own.shared(NOW + 20 + FORGET_S)


def test_others_records_and_places_never_written_prove_nothing() -> None:
    own = OwnRecords()
    assert not any(own.is_strange(read(NOW + second), NOW) for second in (60, 70, 80))
    own.remember(written(NOW + 10), NOW)
    stranger = Identity(b"s" * 32)
    assert not any(own.is_strange(read(NOW + second, stranger), NOW) for second in (60, 70, 80))
