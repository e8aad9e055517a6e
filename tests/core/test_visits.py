"""Who may come in, and who makes way."""

from paris_p2p.core.visits import GRACE_S, Visit, Visits
from paris_p2p.ids import NodeId

LATER = GRACE_S + 1.0


def visit(number: int, place: str = "", moved: int = 0, left: list[int] | None = None) -> Visit:
    gone = [] if left is None else left
    return Visit(NodeId(bytes([number]) * 32), place, 0.0, lambda: moved, lambda: gone.append(number))


def test_a_peer_and_a_place_get_no_more_than_their_share() -> None:
    visits = Visits(100, per_peer=2, per_place=3)
    assert [visits.admit(visit(1), 0.0) for _ in range(3)] == [True, True, False]
    assert [visits.admit(visit(n, "a"), 0.0) for n in range(10, 14)] == [True, True, True, False]
    assert all(visits.admit(visit(n), 0.0) for n in range(20, 30))  # this machine itself is no place


def test_who_leaves_makes_room_once() -> None:
    visits = Visits(1, 1, 1)
    first, second = visit(1, "a"), visit(2, "a")
    assert visits.admit(first, 0.0) and not visits.admit(second, 0.0)
    visits.left(first)
    visits.left(first)
    visits.left(second)  # was never admitted
    assert visits.admit(second, 0.0) and len(visits) == 1


def test_when_it_is_full_the_idlest_of_the_most_crowded_place_makes_way() -> None:
    left: list[int] = []
    visits = Visits(4, 9, 9)
    for number, place, moved in ((1, "a", 0), (2, "b", 50), (3, "b", 7), (4, "b", 90)):
        assert visits.admit(visit(number, place, moved, left), 0.0)
    assert not visits.admit(visit(5, "c"), 1.0) and left == []  # all are too young to be judged
    assert visits.admit(visit(5, "c"), LATER) and left == [3] and len(visits) == 4
