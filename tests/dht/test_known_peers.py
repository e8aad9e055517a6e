"""Tests of `paris_p2p.dht.known_peers`."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.dht import known_peers
from paris_p2p.dht.known_peers import MAX_AGE_S, MAX_FAILURES, MAX_PEERS, RESTED_S, KnownPeers
from paris_p2p.wire.identity import Identity, peer_id_text

NOW = 1_800_000_000.0


def name(number: int) -> str:
    return peer_id_text(Identity(number.to_bytes(32, "big")).node_id)


def address(number: int, host: str = "/ip4/203.0.113.5/tcp/4001") -> str:
    return f"{host}/p2p/{name(number)}"


def known(count: int, now: float = NOW) -> KnownPeers:
    peers = KnownPeers()
    for number in range(count):
        peers.answered([address(number)], now)
    return peers


def candidates(peers: KnownPeers, now: float = NOW) -> list[str]:
    return peers.candidates(now, 1000, random.Random(0))


def test_who_answered_is_tried_again() -> None:
    assert sorted(candidates(known(3))) == sorted(address(number) for number in range(3))
    assert len(known(10).candidates(NOW, 4, random.Random(0))) == 4


def test_of_several_addresses_the_one_that_others_can_dial_is_tried() -> None:
    peers = KnownPeers()
    peers.answered([address(1, "/ip4/127.0.0.1/tcp/1"), address(1), "nonsense", address(2)], NOW)
    assert candidates(peers) == [address(1)]


def test_peers_that_fail_come_last_and_are_forgotten_in_the_end() -> None:
    peers = known(2)
    for _ in range(MAX_FAILURES - 1):
        peers.failed(name(0))
    assert candidates(peers) == [address(1), address(0)]
    peers.failed(name(0))
    peers.failed("a stranger")
    assert candidates(peers) == [address(1)]


def test_an_answer_makes_up_for_failures() -> None:
    peers = known(1)
    for _ in range(MAX_FAILURES):
        peers.failed(name(0))
        peers.answered([address(0)], NOW)
    assert candidates(peers) == [address(0)]


def test_the_old_are_forgotten_and_a_clock_set_back_forgets_nobody() -> None:
    assert candidates(known(1), NOW + MAX_AGE_S + 1) == []
    peers = known(1)
    assert candidates(peers, NOW - 2 * MAX_AGE_S) == [address(0)]
    assert candidates(peers, NOW) == []  # its age counts from then


def test_newcomers_do_not_push_out_the_proven() -> None:
    peers = known(MAX_PEERS)
    peers.answered([address(1000)], NOW + 1)
    assert len(peers) == MAX_PEERS and address(1000) not in candidates(peers)
    peers.failed(name(5))
    peers.answered([address(1000)], NOW + 1)
    assert len(peers) == MAX_PEERS and {address(5), address(1000)} & set(candidates(peers)) == {address(1000)}
    peers.answered([address(1001)], NOW + RESTED_S + 2)
    assert len(peers) == MAX_PEERS and address(1001) in candidates(peers)


def test_the_file_says_the_same_again(tmp_path: Path) -> None:
    peers = known(3)
    peers.bootstrap = frozenset({name(7)})
    known_peers.save(tmp_path / "peers.json", peers)
    again = known_peers.load(tmp_path / "peers.json", [address(7), address(8)])
    assert sorted(candidates(again)) == sorted(candidates(peers))
    assert again.bootstrap == {name(7), name(8)}


def test_the_peers_of_another_network_are_not_joined(tmp_path: Path) -> None:
    peers = known(3)
    peers.bootstrap = frozenset({name(7)})
    known_peers.save(tmp_path / "peers.json", peers)
    assert len(known_peers.load(tmp_path / "peers.json", [address(9)])) == 0
    assert len(known_peers.load(tmp_path / "peers.json", [])) == 0
    assert len(known_peers.load(tmp_path / "none.json", [address(7)])) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": 2, "bootstrap": [], "peers": []}',
        '{"format": 1, "bootstrap": [], "peers": {}}',
        '{"format": 1, "bootstrap": [], "peers": [1]}',
        '{"format": 1, "bootstrap": [], "peers": [{"addresses": [], "seen_unix": 1, "failures": 0}]}',
        "9" * (known_peers.MAX_FILE_BYTES + 1),
        "[" * 100_000,
    ],
)
def test_a_damaged_file_costs_the_memory_only(tmp_path: Path, text: str) -> None:
    (tmp_path / "peers.json").write_text(text)
    assert len(known_peers.load(tmp_path / "peers.json", [])) == 0


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.recursive(st.none() | st.integers() | st.text(max_size=5) | st.floats(), st.lists, max_leaves=5))
def test_any_row_is_a_peer_or_refused(value: object) -> None:
    row = {"addresses": [address(1)], "seen_unix": NOW, "failures": 0}
    for field in row:
        text = json.dumps({"format": 1, "bootstrap": [], "peers": [{**row, field: value}]})
        try:
            assert len(KnownPeers.from_json(text)) == 1
        except ValueError:
            continue
