"""When a checkpoint is safe, who should copy it, and when the next one is announced: pure rules.

Owns: what "held by enough others" means and the placement of copies by rendezvous hash. Does not own:
copying (`node`), or which checkpoint is newest (`core.assignment`).
"""

import hashlib
import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from paris_p2p.core.assignment import Maker, newest_statement, rendezvous
from paris_p2p.ids import NodeId, Role
from paris_p2p.wire.checkpoint import CheckpointStatement

VOLUNTEER_AFTER_S = 15.0
VOLUNTEER_WITHIN_S = 45.0
"""A node that is not among the chosen copies a checkpoint that still lacks holders after 15 to 60 s: the
chosen may be invented, full or gone. The time in between is spread by hash, so that the first is seen by the
rest."""
SPARE_FACTOR = 2
SPARE_AFTER = 2
"""Copies of what enough are said to hold already begin after so many times the time for volunteers: most
checkpoints are replaced before."""
FIRST_CHECKERS = 2
ANNOUNCE_NEXT_S = 60.0
ANNOUNCE_ANYWAY_S = 900.0


@dataclass(frozen=True, slots=True)
class Held:
    """A checkpoint, and the nodes that say they hold it whole."""

    statement: CheckpointStatement
    holders: frozenset[NodeId]


def needed_holders(replicas: int, members: Collection[NodeId], trainer: NodeId) -> int:
    """How many nodes beside the trainer must hold a checkpoint: `replicas`, or all there are if fewer."""
    return min(replicas, len(frozenset(members) - {trainer}))


def holders_of(one: Held, every: Iterable[Held], members: Collection[NodeId]) -> frozenset[NodeId]:
    """The members beside the trainer that hold `one` or a later checkpoint of its lineage (the same holder's
    in the same term): with that, nothing up to `one` can be lost. A node announces only its newest."""
    statement = one.statement
    lineage = (
        held.holders
        for held in every
        if (held.statement.holder, held.statement.term) == (statement.holder, statement.term)
        and held.statement.step >= statement.step
    )
    return frozenset().union(*lineage) & frozenset(members) - {statement.holder}


def witnessed(one: Held, sure: Collection[NodeId]) -> Held:
    """`one` as who made it counts its holders: those of `sure`, who took it from here or whose word cannot be
    made up. Keys are free, and whoever says it holds a checkpoint may hold nothing."""
    return Held(one.statement, one.holders & frozenset(sure))


def is_safe(one: Held, every: Collection[Held], members: Collection[NodeId], replicas: int) -> bool:
    """Whether enough others hold `one`: its trainer's death costs nothing before its step."""
    needed = needed_holders(replicas, members, one.statement.holder)
    return len(holders_of(one, every, members)) >= needed


def safe_checkpoint(
    every: Collection[Held],
    members: Collection[NodeId],
    replicas: int,
    *,
    within_steps: float,
    leader: Maker | None = None,
) -> CheckpointStatement | None:
    """The newest safe one (`newest_statement`) among a role's checkpoints: what a take-over can count on."""
    safe = (one.statement for one in every if is_safe(one, every, members, replicas))
    return newest_statement(safe, within_steps=within_steps, leader=leader)


def copy_now(
    node: NodeId,
    role: Role,
    one: Held,
    members: Collection[NodeId],
    replicas: int,
    waited_s: float,
    sure: Collection[NodeId] = (),
) -> bool:
    """Whether `node`, which does not hold `one`, should copy it, having seen it lack holders for `waited_s`.

    Of the members without it those first in the role's rendezvous order are chosen, as many as are missing;
    every node computes the same. The order depends on the role only, so the same peers follow a role.

    That enough say they hold it may be two keys' lie. Unless one of them is in `sure`, whose word cannot be
    made up, some copy it all the same, later: `SPARE_FACTOR` times `replicas` on average, by a hash that
    nobody can choose keys for in advance.
    """
    having = one.holders | {one.statement.holder}
    missing = replicas - (len(having) - 1)
    if missing <= 0:
        if having & frozenset(sure) or waited_s < SPARE_AFTER * volunteer_after_s(role, node):
            return False
        chance = SPARE_FACTOR * replicas / len(frozenset(members) | {node})
        return _share(b"spare copy" + one.statement.weights.info_hash + node) < chance
    order = sorted((frozenset(members) | {node}) - having, key=lambda member: rendezvous(role, member))
    return node in order[:missing] or waited_s >= volunteer_after_s(role, node)


def first_checkers(node: NodeId, role: Role, members: Collection[NodeId]) -> tuple[NodeId, ...]:
    """Who of `members` and `node` looks first at checkpoints of `role`: one more than needed, as the trainer
    of one does not count. The same for all of them, and not cheap in a large run."""
    everybody = frozenset(members) | {node}
    first = heapq.nsmallest(FIRST_CHECKERS + 1, everybody, key=lambda member: rendezvous(role, member))
    return tuple(first)


def check_now(node: NodeId, role: Role, first: Sequence[NodeId], trainer: NodeId, waited_s: float) -> bool:
    """Whether an idle `node` should look itself at a checkpoint that nobody whose word counts has checked:
    the `first_checkers` at once, the others when those did not for a while."""
    now = [member for member in first if member != trainer][:FIRST_CHECKERS]
    return node in now or waited_s >= volunteer_after_s(role, node)


def examination_order(
    tries: Sequence[tuple[float, int]], slots: int, *, for_oldest: bool
) -> tuple[int | None, list[int]]:
    """Which checkpoints of strangers to look at, as indices into `tries`: for each, since when it is known
    (any clock) and how often looking failed. The one known longest, if the slot `for_oldest` is free, and as
    many as there are other `slots` of those that failed least, of these the oldest.

    So neither fresh fakes nor fakes that cannot be had keep a good one waiting for ever: in the first slot
    whatever comes later comes behind it, and what failed rests.
    """
    left = range(len(tries))
    oldest = min(left, key=lambda n: tries[n], default=None) if for_oldest else None
    rest = [n for n in left if n != oldest]
    return oldest, heapq.nsmallest(slots, rest, key=lambda n: (tries[n][1], tries[n][0]))


def volunteer_after_s(role: Role, node: NodeId) -> float:
    """How long `node` leaves copying or checking to those chosen (seconds)."""
    share = int.from_bytes(rendezvous(role, node)[-4:], "big") / 2**32
    return VOLUNTEER_AFTER_S + VOLUNTEER_WITHIN_S * share


def _share(data: bytes) -> float:
    """A number in [0, 1) that everybody computes alike."""
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big") / 2**32


def may_announce_next(safe: bool, copied: bool, announced_for_s: float) -> bool:
    """Whether a trainer announces its newest checkpoint in the place of the one it announced before.

    A copy takes longer than an interval on slow links, and a checkpoint that is replaced while peers copy it
    is never copied whole. So the announced one stays until it is safe; or somebody has it (`copied`) and the
    others had their time; or nobody seems to come for it.
    """
    patience_s = ANNOUNCE_NEXT_S if copied else ANNOUNCE_ANYWAY_S
    return safe or announced_for_s >= patience_s
