"""Tests of `paris_p2p.wire.identity`."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.errors import ConfigError
from paris_p2p.ids import NodeId
from paris_p2p.wire.identity import Identity, node_id_from_peer_id, peer_id_text, verify

quick = settings(deadline=None, derandomize=True, max_examples=50)


def test_the_node_id_is_the_public_key_of_rfc_8032() -> None:
    """Test vector 1 of RFC 8032, section 7.1."""
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    assert Identity(seed).node_id.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def test_the_peer_id_is_the_one_of_the_libp2p_specification() -> None:
    """The Ed25519 test vector of libp2p's peer-ids specification."""
    key = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    assert peer_id_text(NodeId(key)) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


@quick
@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_leads_back_to_its_key(key: bytes) -> None:
    assert node_id_from_peer_id(peer_id_text(NodeId(key))) == key


@pytest.mark.parametrize(
    "text", ["", "12D3Koo", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "not base58: 0OIl", "é"]
)
def test_other_peer_ids_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="peer id"):
        node_id_from_peer_id(text)


@quick
@given(st.binary(max_size=64), st.integers(0, 511))
def test_a_changed_bit_breaks_a_signature(message: bytes, bit: int) -> None:
    identity = Identity(bytes(32))
    signature = identity.sign(message)
    assert verify(identity.node_id, message, signature)
    damaged = bytearray(signature)
    damaged[bit // 8] ^= 1 << bit % 8
    assert not verify(identity.node_id, message, bytes(damaged))
    assert not verify(identity.node_id, message + b"!", signature)


def test_a_signature_or_key_of_wrong_length_is_no_error_but_false() -> None:
    assert not verify(NodeId(bytes(31)), b"", bytes(64))
    assert not verify(Identity(bytes(32)).node_id, b"", b"")


def test_a_seed_of_wrong_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 bytes"):
        Identity(bytes(31))


def test_the_seed_does_not_show_in_logs() -> None:
    identity = Identity(b"s" * 32)
    assert "s" * 32 not in repr(identity) and peer_id_text(identity.node_id) in repr(identity)
