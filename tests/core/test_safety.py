"""Tests of `paris_p2p.core.safety`."""

from typing import Any

from paris_p2p.core.safety import (
    ANNOUNCE_ANYWAY_S,
    ANNOUNCE_NEXT_S,
    FIRST_CHECKERS,
    VOLUNTEER_AFTER_S,
    VOLUNTEER_WITHIN_S,
    Held,
    check_now,
    copy_now,
    examination_order,
    first_checkers,
    is_safe,
    may_announce_next,
    safe_checkpoint,
    volunteer_after_s,
    witnessed,
)
from paris_p2p.ids import InfoHash, NodeId, Role, RunId, Term
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef

ROLE = Role("expert-0")
TRAINER = NodeId(b"t" * 32)
PEERS = [NodeId(bytes([n]) * 32) for n in range(8)]


def held(step: int, *holders: NodeId, term: int = 1, trainer: NodeId = TRAINER, item: int = 105) -> Held:
    ref = ContentRef(InfoHash(bytes([item]) * 32), 10, 1 << 14)
    statement = CheckpointStatement(
        RunId(b"r" * 32), ROLE, Term(term), trainer, step, 100, 0, ref, ref, b"", 0.5, 1.7e9
    )
    return Held(statement, frozenset(holders))


def is_held_safely(one: Held, members: list[NodeId], replicas: int = 2, beside: Any = ()) -> bool:
    return is_safe(one, [one, *beside], members, replicas)


def test_a_checkpoint_is_safe_when_enough_others_hold_it() -> None:
    members = [TRAINER, *PEERS]
    assert not is_held_safely(held(10, TRAINER), members)
    assert not is_held_safely(held(10, TRAINER, PEERS[0]), members)
    assert is_held_safely(held(10, TRAINER, PEERS[0], PEERS[1]), members)


def test_a_smaller_run_needs_all_there_are() -> None:
    assert is_held_safely(held(10, TRAINER, PEERS[0]), [TRAINER, PEERS[0]])
    assert is_held_safely(held(10, TRAINER), [TRAINER])
    assert is_held_safely(held(10, TRAINER), [TRAINER, *PEERS], replicas=0)


def test_who_has_left_holds_nothing() -> None:
    one = held(10, TRAINER, PEERS[0], PEERS[1])
    assert not is_held_safely(one, [TRAINER, *PEERS[1:4]])


def test_a_later_checkpoint_of_the_lineage_protects_an_earlier_one_and_no_other_does() -> None:
    members = [TRAINER, *PEERS]
    early, late = held(10, PEERS[0]), held(20, PEERS[1])
    assert is_safe(early, [early, late], members, 2) and not is_safe(late, [early, late], members, 2)
    other_term, other_node = held(20, PEERS[1], term=2), held(20, PEERS[1], trainer=PEERS[5])
    assert not is_safe(early, [early, other_term, other_node], members, 2)


def test_the_newest_safe_checkpoint_is_what_counts() -> None:
    members = [TRAINER, *PEERS]
    some = [held(10, *PEERS[:2]), held(20, *PEERS[2:4]), held(30, PEERS[0]), held(5, *PEERS[:3], term=2)]
    assert safe_checkpoint(some, members, 2, within_steps=50) == some[3].statement
    assert safe_checkpoint(some[:3], members, 2, within_steps=50) == some[1].statement
    assert safe_checkpoint(some[2:3], members, 2, within_steps=50) is None


def test_as_many_are_chosen_to_copy_as_are_missing_and_the_rest_wait() -> None:
    members = [TRAINER, *PEERS]
    one = held(10, TRAINER)
    chosen = [peer for peer in PEERS if copy_now(peer, ROLE, one, members, 2, 0.0)]
    assert len(chosen) == 2
    again = held(10, TRAINER, chosen[0])
    assert [peer for peer in PEERS if copy_now(peer, ROLE, again, members, 2, 0.0)] == chosen[1:]
    enough = held(10, TRAINER, *chosen)
    assert not any(copy_now(peer, ROLE, enough, members, 2, 25.0) for peer in PEERS if peer not in chosen)


def test_two_keys_that_say_they_hold_it_do_not_stop_all_copies_unless_one_of_them_cannot_be_made_up() -> None:
    organiser, members = NodeId(b"o" * 32), [TRAINER, *PEERS]
    for number in range(20):
        fakes = [NodeId(bytes([100 + number, n]) * 16) for n in range(2)]
        one = held(number, TRAINER, *fakes, item=number)
        crowd = [*members, *fakes, organiser]
        late = 2 * (VOLUNTEER_AFTER_S + VOLUNTEER_WITHIN_S)
        spare = [p for p in PEERS if copy_now(p, ROLE, one, crowd, 2, late, sure={organiser})]
        assert 1 <= len(spare) <= 6
        known = Held(one.statement, one.holders | {organiser})
        assert not any(copy_now(p, ROLE, known, crowd, 2, 1e6, sure={organiser}) for p in PEERS)


def test_who_made_it_counts_those_that_took_it_from_there() -> None:
    members = [TRAINER, *PEERS]
    one = held(10, TRAINER, *PEERS[:2])
    assert is_held_safely(one, members) and is_held_safely(witnessed(one, PEERS), members)
    assert not is_held_safely(witnessed(one, PEERS[1:]), members)


def test_invented_members_delay_a_copy_and_do_not_prevent_it() -> None:
    crowd = [NodeId(n.to_bytes(32, "big")) for n in range(1000)]
    one, longest = held(10, TRAINER), VOLUNTEER_AFTER_S + VOLUNTEER_WITHIN_S
    assert all(copy_now(peer, ROLE, one, [*crowd, *PEERS], 2, longest) for peer in PEERS)
    waits = sorted(volunteer_after_s(ROLE, peer) for peer in PEERS)
    assert waits[0] >= VOLUNTEER_AFTER_S and waits[-1] - waits[0] > 10  # not all at once


def test_a_few_check_at_once_the_others_later_and_never_the_trainer_first() -> None:
    first = first_checkers(PEERS[0], ROLE, [TRAINER, *PEERS])
    assert all(first_checkers(p, ROLE, [TRAINER, *PEERS]) == first for p in PEERS)
    at_once = [p for p in PEERS if check_now(p, ROLE, first, TRAINER, 0.0)]
    assert len(at_once) == FIRST_CHECKERS
    assert all(check_now(p, ROLE, first, TRAINER, 60.0) for p in PEERS)


def test_a_slot_is_always_for_what_is_known_longest_the_others_for_what_failed_least() -> None:
    old, failed, fresh = (1.0, 3), (2.0, 1), (9.0, 0)
    assert examination_order([fresh, failed, old], 0, for_oldest=True) == (2, [])
    assert examination_order([fresh, failed, old], 1, for_oldest=True) == (2, [0])
    assert examination_order([fresh, failed, old], 9, for_oldest=False) == (None, [0, 1, 2])
    assert examination_order([(1.0, 1), (1.0, 0)], 0, for_oldest=True) == (1, [])
    assert examination_order([], 2, for_oldest=True) == (None, [])


def test_the_announced_checkpoint_stays_while_others_copy_it() -> None:
    assert may_announce_next(True, True, 0.0)
    assert not may_announce_next(False, True, ANNOUNCE_NEXT_S - 1)
    assert may_announce_next(False, True, ANNOUNCE_NEXT_S)
    assert not may_announce_next(False, False, ANNOUNCE_ANYWAY_S - 1)
    assert may_announce_next(False, False, ANNOUNCE_ANYWAY_S)
