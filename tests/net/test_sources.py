"""Known sources of one item: backoff, and who is due."""

import random

from paris_p2p.ids import NodeId
from paris_p2p.net.sources import FIRST_BACKOFF_S, GIVE_WAY_S, MAX_BACKOFF_S, MAX_SOURCES, Sources
from paris_p2p.net.transport import Peer


def peer(number: int) -> Peer:
    return Peer(NodeId(number.to_bytes(32, "big")), (f"/ip4/127.0.0.1/tcp/{number}",))


def known_by(own: Peer) -> Sources:
    return Sources(own.node_id, random.Random(1))


def nobody_banned(node_id: NodeId, alone: bool) -> bool:
    return False


def test_we_are_no_source_of_ours_nor_is_who_cannot_be_dialled() -> None:
    sources = known_by(peer(1))
    assert not sources.add([peer(1), Peer(peer(2).node_id, ())])
    assert sources.due(0.0, set(), nobody_banned) == []


def test_a_newer_address_comes_before_the_older_and_does_not_hide_it() -> None:
    sources = known_by(peer(1))
    assert sources.add([peer(2)])
    said = Peer(peer(2).node_id, ("/ip4/127.0.0.1/tcp/9/tls",))
    assert not sources.add([said])
    both = Peer(peer(2).node_id, said.addresses + peer(2).addresses)
    assert sources.due(0.0, set(), nobody_banned) == [both]


def test_addresses_of_long_ago_are_forgotten() -> None:
    sources = known_by(peer(1))
    for number in range(2, 10):
        sources.add([Peer(peer(2).node_id, peer(number).addresses)])
    newest = peer(9).addresses + peer(8).addresses + peer(7).addresses
    assert sources.due(0.0, set(), nobody_banned) == [Peer(peer(2).node_id, newest)]


def test_failures_back_off_each_time_longer_up_to_a_limit() -> None:
    sources = known_by(peer(1))
    sources.add([peer(2)])
    now = 0.0
    waits = []
    for _ in range(8):
        sources.failed(peer(2).node_id, "no answer", now)
        wait = FIRST_BACKOFF_S
        while not sources.due(now + wait, set(), nobody_banned):
            wait *= 1.1
        waits.append(wait)
        now += wait
    assert waits == sorted(waits) and waits[0] == FIRST_BACKOFF_S and waits[-1] < MAX_BACKOFF_S * 1.2
    assert sources.reasons() == ["no answer"]


def test_a_good_piece_forgives_earlier_failures() -> None:
    sources = known_by(peer(1))
    sources.add([peer(2), peer(3)])
    sources.failed(peer(2).node_id, "", 0.0)
    assert sources.due(100.0, set(), nobody_banned) == [peer(3), peer(2)]
    sources.delivered(peer(2).node_id)
    assert sources.due(100.0, set(), nobody_banned) == [peer(2), peer(3)]


def test_a_banned_peer_counts_as_the_last_holder_only_when_nobody_else_is_left() -> None:
    sources = known_by(peer(1))
    sources.add([peer(2), peer(3)])

    def two_is_banned(node_id: NodeId, alone: bool) -> bool:
        return node_id == peer(2).node_id and not alone

    assert sources.due(0.0, set(), two_is_banned) == [peer(3)]
    only = known_by(peer(1))
    only.add([peer(2)])
    assert only.due(0.0, set(), two_is_banned) == [peer(2)]


def test_strangers_cannot_fill_the_memory_with_sources() -> None:
    sources = known_by(peer(1))
    sources.add([peer(number) for number in range(2, MAX_SOURCES + 100)])
    assert len(sources) == MAX_SOURCES


def test_peer_exchange_never_changes_a_known_address() -> None:
    sources = known_by(peer(1))
    sources.add([peer(2)])
    assert not sources.add([Peer(peer(2).node_id, ("/ip4/127.0.0.1/tcp/9",))], exchanged=True)
    assert sources.due(0.0, set(), nobody_banned) == [peer(2)]


def test_made_up_peers_make_way_for_found_ones_and_are_tried_after_them() -> None:
    sources = known_by(peer(1))
    sources.add([peer(number) for number in range(2, MAX_SOURCES + 100)], exchanged=True)
    sources.connected(peer(2).node_id)
    found = [peer(number) for number in range(5000, 5000 + MAX_SOURCES)]
    assert sources.add(found) and len(sources) == MAX_SOURCES
    due = sources.due(0.0, set(), nobody_banned)
    assert set(due) == {peer(2), *found[: MAX_SOURCES - 1]}  # a connected one stays


def test_a_new_exchanged_peer_replaces_only_one_that_failed() -> None:
    sources = known_by(peer(1))
    sources.add([peer(number) for number in range(2, MAX_SOURCES + 2)], exchanged=True)
    assert not sources.add([peer(9000)], exchanged=True)
    sources.failed(peer(7).node_id, "nobody there", 0.0)
    assert sources.add([peer(9000)], exchanged=True)
    due = sources.due(100.0, set(), nobody_banned)
    assert peer(9000) in due and peer(7) not in due


def test_of_two_that_hear_of_each_other_the_greater_waits_for_the_call() -> None:
    low, high = peer(1), peer(2)
    lower, higher = known_by(low), known_by(high)
    lower.add([high], exchanged=True, now=5.0)
    higher.add([low], exchanged=True, now=5.0)
    assert lower.due(5.0, set(), nobody_banned) == [high]
    assert higher.due(5.0, set(), nobody_banned) == []
    assert higher.due(5.0 + GIVE_WAY_S, set(), nobody_banned) == [low]
    higher = known_by(high)
    higher.add([low], now=5.0)  # found, not told: who knows whether the other has heard of us
    assert higher.due(5.0, set(), nobody_banned) == [low]


def at(number: int, place: int) -> Peer:
    return Peer(NodeId(number.to_bytes(32, "big")), (f"/ip4/198.51.{place}.9/tcp/{number}/tls",))


def test_of_each_place_one_comes_before_the_second_of_any() -> None:
    sources = known_by(peer(1))
    crowd, lone = [at(number, 1) for number in range(2, 100)], at(500, 2)
    sources.add([*crowd, lone])
    assert lone in sources.due(0.0, set(), nobody_banned)[:2]
    first = next(p for p in sources.due(0.0, set(), nobody_banned) if p != lone)
    assert sources.due(0.0, {first.node_id}, nobody_banned)[0] == lone  # the crowd has had its turn


def test_who_delivered_or_was_chosen_comes_before_those_who_did_neither() -> None:
    good = peer(77)
    sources = Sources(peer(1).node_id, random.Random(1), lambda: {good.node_id})
    sources.add([at(number, number % 250) for number in range(2, 70)] + [good])
    sources.add([peer(88)], chosen=True)
    assert set(sources.due(0.0, set(), nobody_banned)[:2]) == {good, peer(88)}


def test_found_sources_that_failed_make_room_and_good_ones_do_not() -> None:
    sources = known_by(peer(1))
    sources.add([peer(number) for number in range(2, MAX_SOURCES + 2)])
    assert not sources.add([peer(9000)])
    sources.failed(peer(7).node_id, "nobody there", 0.0)
    sources.failed(peer(8).node_id, "nobody there", 0.0)
    sources.delivered(peer(8).node_id)
    sources.failed(peer(8).node_id, "gone", 0.0)
    assert sources.add([peer(9000), peer(9001)]) and len(sources) == MAX_SOURCES
    due = sources.due(100.0, set(), nobody_banned)
    assert peer(9000) in due and peer(8) in due
    assert peer(7) not in due and peer(9001) not in due
