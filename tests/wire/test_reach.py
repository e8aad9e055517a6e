"""The bytes between a node that cannot be dialled and its helper: read as they were written, or refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import NodeId
from paris_p2p.net.addresses import is_tls, parse_endpoint
from paris_p2p.wire import reach
from paris_p2p.wire.addresses import MAX_ADDRESS_CHARS
from paris_p2p.wire.identity import peer_id_text
from paris_p2p.wire.reach import Answer, Ask, Opening, Status

PEER = peer_id_text(NodeId(b"n" * 32))
openings = st.builds(
    Opening, st.sampled_from(Ask), st.binary(min_size=32, max_size=32), st.integers(0, 65_535)
)
hosts = st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6, network="2000::/3").map(str)
answers = st.builds(Answer, st.sampled_from(Status), hosts, st.integers(0, 65_535))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(openings, answers)
def test_what_is_written_is_what_is_read(opening: Opening, answer: Answer) -> None:
    assert reach.decode_opening(opening.encode()) == opening
    assert reach.decode_answer(answer.encode()) == answer


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.binary(max_size=60) | st.binary(min_size=43, max_size=43).map(lambda b: reach.MAGIC + b[8:]))
def test_any_other_bytes_are_refused(data: bytes) -> None:
    for decode in (reach.decode_opening, reach.decode_answer):
        try:
            value = decode(data)
        except RemoteProtocolError:
            continue
        assert value.encode() == data


def test_no_tls_handshake_begins_like_an_opening() -> None:
    assert not reach.MAGIC.startswith(b"\x16")


@pytest.mark.parametrize("relay", ["/ip4/255.255.255.255/tcp/65535/tls", "/ip6/2001:db8::1/tcp/4001/tls"])
def test_a_circuit_address_names_relay_and_node_and_fits_a_record(relay: str) -> None:
    text = reach.circuit_text(f"{relay}/p2p/{PEER}", PEER)
    assert reach.is_circuit(text) and not reach.is_circuit(relay)
    assert reach.circuit_relay(text) == relay and text.endswith(f"/p2p/{PEER}")
    assert len(text) <= MAX_ADDRESS_CHARS


def test_a_circuit_address_is_never_dialled_as_if_the_relay_were_the_node() -> None:
    text = reach.circuit_text("/ip4/203.0.113.5/tcp/4001/tls", PEER)
    assert parse_endpoint(text) is None and not is_tls(text)
