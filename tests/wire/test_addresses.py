"""Tests of `paris_p2p.wire.addresses`."""

import pytest

from paris_p2p.dht.hello import MAX_HELLO_BYTES, encode_hello, judge_hello
from paris_p2p.ids import InfoHash, NodeId, Term, expert_role
from paris_p2p.net.addresses import Endpoint
from paris_p2p.wire import messages as m
from paris_p2p.wire.addresses import MAX_ADDRESS_CHARS, MAX_ADDRESSES, fitting
from paris_p2p.wire.identity import Identity, peer_id_text
from paris_p2p.wire.reach import circuit_text
from paris_p2p.wire.records import MAX_RECORD_BYTES, MemberRecord, ProvideRecord, sign_record

OWNER = Identity(b"o" * 32)
PEERS = [peer_id_text(NodeId(bytes([first]) * 32)) for first in range(256)]
HOST = "ffff:eeee:dddd:cccc:bbbb:aaaa:9999:8888"
LONGEST = {
    "libp2p": Endpoint(HOST, 65_535, tls=False).text(max(PEERS, key=len)),
    "tls": Endpoint(HOST, 65_535, tls=True).text(max(PEERS, key=len)),
    "circuit": circuit_text(Endpoint(HOST, 65_535, tls=True).text(PEERS[0]), max(PEERS, key=len)),
}


def test_the_longest_address_of_each_kind_fits_and_not_one_character_is_to_spare() -> None:
    assert {kind: len(text) for kind, text in LONGEST.items()} == {"libp2p": 111, "tls": 115, "circuit": 127}
    assert max(map(len, LONGEST.values())) == MAX_ADDRESS_CHARS <= m.MAX_ADDRESS_CHARS


@pytest.mark.parametrize("kind", list(LONGEST))
def test_records_and_greetings_of_nothing_but_the_longest_keep_to_their_caps(kind: str) -> None:
    addresses = (LONGEST[kind],) * MAX_ADDRESSES
    largest = 2**63 - 1
    role, rates = expert_role(1023), (largest, largest)
    member = MemberRecord(
        addresses, "publishing", role, Term(largest), largest, largest, 0.1, 0.1, *rates, 1e9 + 0.1, "x" * 13
    )
    for payload, scope in ((member, b"r" * 32), (ProvideRecord(False, addresses), InfoHash(b"i" * 32))):
        record = sign_record(OWNER, payload, scope, 1.8e9 + 0.1)
        assert len(record.value) <= MAX_RECORD_BYTES
    greeting = encode_hello(1.8e9 + 0.1, addresses)
    assert len(greeting) <= MAX_HELLO_BYTES
    assert judge_hello(greeting, 1.8e9, 1.8e9).addresses == addresses


def test_what_is_too_long_makes_room_for_what_is_not() -> None:
    assert fitting(["x" * 128, "a", "b", "c", "d"]) == ("a", "b", "c")
    assert fitting(["a" * 60, "b" * 60, "c" * 40], chars=100) == ("a" * 60, "c" * 40)
    assert fitting(["a", "b"], count=1) == ("a",) and fitting([]) == ()
