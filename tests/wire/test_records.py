"""Tests of `paris_p2p.wire.records`."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError
from paris_p2p.ids import InfoHash, NodeId, Role, RunId, Term, expert_role
from paris_p2p.wire import canonical
from paris_p2p.wire.access_pass import MAX_PASS_BYTES
from paris_p2p.wire.addresses import ACCESS_CHARS, MAX_ANNOUNCED_CHARS
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import (
    CLOCK_TOLERANCE_S,
    KINDS,
    MAX_ADDRESS_CHARS,
    MAX_RECORD_BYTES,
    AnnounceRecord,
    AttestRecord,
    Check,
    ClaimRecord,
    MemberRecord,
    Payload,
    ProvideRecord,
    Record,
    RelayRecord,
    RunRecord,
    SignedRecord,
    check_record,
    key_id,
    record_key,
    role_scope,
    sign_record,
)

LARGEST_STATEMENT = 501
"""Bytes of a signed checkpoint statement whose fields are all at their longest."""
NOW = 1_700_000_000.0
OWNER = Identity(b"o" * 32)
STRANGER = Identity(b"s" * 32)
RUN = RunId(b"r" * 32)
REF = ContentRef(InfoHash(b"i" * 32), 10, 1 << 14)
ADDRESS = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooW"
MEMBER = MemberRecord((ADDRESS,), "training", expert_role(1), Term(2), 5, 10, 0.5, 30.0, 1, 2, NOW)
SCOPED: dict[str, tuple[Payload, bytes]] = {
    "run": (RunRecord("digits", RUN, REF), b""),
    "member": (MEMBER, RUN),
    "claim": (ClaimRecord("hold", Term(1), NOW), role_scope(RUN, expert_role(0))),
    "announce": (AnnounceRecord(b"statement", (ADDRESS,)), role_scope(RUN, expert_role(0))),
    "attest": (AttestRecord((Check(b"d" * 32, True, 0.5),)), role_scope(RUN, expert_role(0))),
    "provide": (ProvideRecord(True, (ADDRESS,)), REF.info_hash),
    "relay": (RelayRecord((ADDRESS,)), b""),
}


def signed(kind: str = "claim", expiration_unix: float = NOW + 60) -> SignedRecord:
    payload, scope = SCOPED[kind]
    return sign_record(OWNER, payload, scope, expiration_unix)


def check(record: SignedRecord, **change: Any) -> Record:
    """`check_record` of a record with some of what surrounds it changed."""
    arguments: dict[str, Any] = {
        "dht_id": key_id(record.key),
        "subkey": record.subkey,
        "value": record.value,
        "expiration_unix": record.expiration_unix,
        "now_unix": NOW,
    }
    return check_record(**(arguments | change))


@pytest.mark.parametrize("kind", sorted(SCOPED))
def test_a_signed_record_comes_back_as_it_went_in(kind: str) -> None:
    payload, scope = SCOPED[kind]
    assert check(signed(kind)) == Record(kind, scope, OWNER.node_id, payload, NOW + 60)


def test_every_kind_is_tried_here() -> None:
    assert SCOPED.keys() == KINDS.keys()


@pytest.mark.parametrize("subkey", [b"", b"plain", bytes(31), bytes(33)])
def test_an_ownerless_record_is_refused(subkey: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="no owner"):
        check(signed(), subkey=subkey)


def test_a_record_under_a_foreign_subkey_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="signature"):
        check(signed(), subkey=STRANGER.node_id)


@pytest.mark.parametrize(
    "key",
    [
        record_key("claim", role_scope(RUN, expert_role(1))),
        record_key("announce", role_scope(RUN, expert_role(0))),
        record_key("claim", role_scope(RunId(bytes(32)), expert_role(0))),
    ],
)
def test_a_record_moved_to_another_key_is_refused(key: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="another key"):
        check(signed(), dht_id=key_id(key))


@pytest.mark.parametrize("kind", sorted(SCOPED))
def test_a_record_may_expire_as_far_ahead_as_its_kind_allows_and_no_further(kind: str) -> None:
    latest = NOW + KINDS[kind].max_ttl_s + CLOCK_TOLERANCE_S
    assert check(signed(kind, latest)).expiration_unix == latest
    for later in (latest + 0.01, NOW + 100 * 365 * 86_400):
        with pytest.raises(RemoteProtocolError, match="further ahead"):
            check(signed(kind, later))


@pytest.mark.parametrize("expiration", [math.nan, math.inf, -math.inf])
def test_an_expiry_that_is_no_time_is_refused(expiration: float) -> None:
    with pytest.raises(RemoteProtocolError, match="further ahead"):
        check(signed(), expiration_unix=expiration)


def test_an_expiry_other_than_the_signed_one_is_refused() -> None:
    for other in (NOW + 61, NOW - 1, -1e308):
        with pytest.raises(RemoteProtocolError, match="signature"):
            check(signed(), expiration_unix=other)


def test_an_oversized_record_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="at most"):
        check(signed(), value=bytes(MAX_RECORD_BYTES + 1))


def test_an_oversized_record_is_not_made() -> None:
    huge = AnnounceRecord(bytes(MAX_RECORD_BYTES), ())
    with pytest.raises(LocalProtocolError, match="cap"):
        sign_record(OWNER, huge, role_scope(RUN, expert_role(0)), NOW + 60)


@pytest.mark.parametrize("access", [b"", bytes(MAX_PASS_BYTES)])
def test_the_largest_announcement_fits(access: bytes) -> None:
    rest = MAX_ANNOUNCED_CHARS - ACCESS_CHARS * bool(access) - MAX_ADDRESS_CHARS
    addresses = ("x" * MAX_ADDRESS_CHARS, "x" * (rest // 2), "x" * (rest - rest // 2))
    largest = AnnounceRecord(bytes(LARGEST_STATEMENT), addresses, access)
    check(sign_record(OWNER, largest, role_scope(RUN, expert_role(1023)), NOW + 60))


def test_a_changed_byte_is_refused() -> None:
    record = signed()
    for position in range(len(record.value)):
        damaged = bytearray(record.value)
        damaged[position] ^= 1
        with pytest.raises(RemoteProtocolError):
            check(record, value=bytes(damaged))


def envelope_of(payload: object, kind: str = "claim", scope: bytes = SCOPED["claim"][1]) -> SignedRecord:
    """A record with any payload, rightly signed: what a hostile node can make."""
    body = canonical.pack(payload)
    expiration = NOW + 60
    to_sign = canonical.pack(["paris-p2p record 1", kind, scope, OWNER.node_id, body, expiration])
    plain = {"kind": kind, "scope": scope, "payload": body, "signature": OWNER.sign(to_sign)}
    return SignedRecord(record_key(kind, scope), OWNER.node_id, canonical.pack(plain), expiration)


def test_the_hostile_records_here_are_signed_as_real_ones() -> None:
    assert envelope_of(canonical.to_plain(SCOPED["claim"][0])).value == signed().value


@pytest.mark.parametrize(
    "payload",
    [
        {"state": "own", "term": 1, "since_unix": NOW},
        {"state": "hold", "term": 0, "since_unix": NOW},
        {"state": "hold", "term": 1 << 63, "since_unix": NOW},
        {"state": "hold", "term": 1, "since_unix": 1},
        {"state": "hold", "term": 1},
        [],
        None,
    ],
)
def test_a_signed_but_malformed_payload_is_refused(payload: object) -> None:
    with pytest.raises(RemoteProtocolError):
        check(envelope_of(payload))


def test_a_record_of_unknown_kind_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="unknown kind"):
        check(envelope_of({}, kind="gossip"))


def test_a_payload_of_another_kind_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        check(envelope_of(canonical.to_plain(SCOPED["provide"][0])))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProvideRecord(True, (ADDRESS,) * 4),
        lambda: ProvideRecord(True, ("x" * (MAX_ADDRESS_CHARS + 1),)),
        lambda: AnnounceRecord(b"", (ADDRESS,) * 4),
        lambda: RunRecord("", RUN, REF),
        lambda: RunRecord("x" * 65, RUN, REF),
        lambda: RunRecord("x", RunId(b""), REF),
        lambda: MemberRecord((), "x" * 17, Role(""), Term(0), 0, 0, 0.0, 0.0, 0, 0, NOW),
    ],
)
def test_a_payload_out_of_range_cannot_be_made(make: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        make()


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.binary(max_size=200), st.binary(max_size=40), st.floats(), st.binary(max_size=40))
def test_any_bytes_give_a_record_or_a_remote_protocol_error(
    value: bytes, subkey: bytes, expiration: float, dht_id: bytes
) -> None:
    with pytest.raises(RemoteProtocolError):
        check_record(dht_id, NodeId(subkey), value, expiration, NOW)
