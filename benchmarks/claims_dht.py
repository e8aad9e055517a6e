"""The simulated DHT under `claims_simulator`: who keeps records, what a store or a read costs and shows.

Every record lives on a few replicas, chosen by hash among the nodes the caller believes alive; each RPC is
lost with probability `loss` (its caller waits for the timeout) or takes 10-300 ms; a store counts as accepted
when a replica other than the caller has it; a read of a role is complete when each of its replicas has
answered or timed out, and a look at all roles leaves out those that take longer than the caller's patience;
replicas die with their node and start empty; a dead or cut-off node is contacted for `FORGET_S` longer; nodes
merge `REJOIN_S` after a partition heals.

Owns: hosts, replicas, RPCs, what is stored where. Does not own: time and who is up (`claims_simulator`).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from paris_p2p.core.assignment import SeenClaim, rendezvous
from paris_p2p.ids import NodeId, Role

EPOCH = 1.75e9  # unix time at virtual second 0
REPLICAS = 5
RPC_TIMEOUT_S = 3.0
LATENCY_S = (0.010, 0.300)
_FASTEST_S, _LATENCY_SPAN_S = LATENCY_S[0], LATENCY_S[1] - LATENCY_S[0]
FORGET_S = 15.0  # how long a dead node stays in others' routing tables
REJOIN_S = 6.0  # how long after a heal both sides are one network again
KEEP_S = 60.0  # how long a replica keeps what has expired

# owner -> (arrival, claim), newest last
_Stored = dict[NodeId, list[tuple[float, SeenClaim]]]


@dataclass(eq=False)
class Host:
    """A node as the DHT sees it. `last_change`: when it last came or went."""

    index: int
    node_id: NodeId
    skew_s: float
    side: int
    up: bool = False
    asleep_until: float = 0.0
    last_change: float = -math.inf
    stored: dict[Role, _Stored] = field(default_factory=dict)


@dataclass(slots=True)
class Reading:
    """Requests under way: for each role the replicas that will answer and when each was asked; `took_s`:
    until the last answer or timeout."""

    began: float
    took_s: float
    asked: dict[Role, list[tuple[Host, float]]]


class SimulatedDht:
    """The records of `hosts` on `roles`. `partition`: (start, end) in seconds, between the two sides."""

    def __init__(
        self,
        hosts: Sequence[Host],
        roles: Sequence[Role],
        loss: float,
        partition: tuple[float, float] | None,
        rng: random.Random,
    ) -> None:
        self._loss = loss
        self._hosts = hosts
        self._partition = partition or (math.inf, math.inf)
        self._random = rng.random
        # Which nodes keep a role's records is unrelated to who prefers the role.
        self._order = {
            role: sorted(hosts, key=lambda host: rendezvous(role, NodeId(b"replica" + host.node_id)))
            for role in roles
        }
        self._known_keepers: dict[tuple[Role, int], list[tuple[Host, bool]]] = {}
        self._keepers_until = -math.inf  # how long those are right
        self._last_arrival = dict.fromkeys(roles, -math.inf)
        self._merged: dict[Role, dict[tuple[Host, ...], list[SeenClaim]]] = {role: {} for role in roles}

    def changed(self) -> None:
        """A host came or went, or fell asleep."""
        self._keepers_until = -math.inf
        for merged in self._merged.values():
            merged.clear()

    def store(self, caller: Host, role: Role, record: SeenClaim, now: float) -> tuple[float, bool]:
        """Store `record` of `caller`: how many seconds it takes, and whether it counts as accepted."""
        took, answers = self._request(caller, role, now)
        for replica, arrives in answers:
            by_owner = replica.stored.setdefault(role, {})
            for owner in [
                o for o, some in by_owner.items() if some[-1][1].expiration_unix < EPOCH + now - KEEP_S
            ]:
                del by_owner[owner]
            arrivals = by_owner.setdefault(caller.node_id, [])
            there = [arrival for arrival in arrivals if arrival[0] <= now]
            if len(there) > 1:  # what expires last stands
                last = max(there, key=lambda arrival: arrival[1].expiration_unix)
                arrivals[:] = [last, *(arrival for arrival in arrivals if arrival[0] > now)]
            arrivals.append((arrives, record))
            self._last_arrival[role] = max(self._last_arrival[role], arrives)
        self._merged[role].clear()
        return took, any(replica is not caller for replica, _ in answers)

    def ask(self, caller: Host, roles: Sequence[Role], patience_s: float, now: float) -> Reading:
        """Read `roles` from every replica that answers, without the roles that take longer than `patience_s`
        or that no replica answers for."""
        asked: dict[Role, list[tuple[Host, float]]] = {}
        longest = 0.0
        for role in roles:
            took, answers = self._request(caller, role, now)
            if took > patience_s:
                longest = max(longest, patience_s)
                continue
            longest = max(longest, took)
            if answers:
                asked[role] = answers
        return Reading(now, longest, asked)

    def show(self, reading: Reading, now_unix: float) -> dict[Role, list[SeenClaim]]:
        """What a finished reading shows to a reader whose clock says `now_unix`."""
        return {
            role: [claim for claim in self._merge(role, answers, reading) if claim.expiration_unix > now_unix]
            for role, answers in reading.asked.items()
        }

    def _request(self, caller: Host, role: Role, now: float) -> tuple[float, list[tuple[Host, float]]]:
        """One RPC to each replica: seconds until all have answered or timed out, and when the request gets to
        each that will answer."""
        loss, draw = self._loss, self._random
        took = 0.0
        answers: list[tuple[Host, float]] = []
        for replica, gone in self._keepers(role, caller, now):
            if replica is caller:
                answers.append((replica, now))
            elif gone or draw() < loss:
                took = RPC_TIMEOUT_S
            else:
                delay = (_FASTEST_S + _LATENCY_SPAN_S * draw()) / 2
                answers.append((replica, now + delay))
                if 2 * delay > took:
                    took = 2 * delay
        return took, answers

    def _keepers(self, role: Role, caller: Host, now: float) -> list[tuple[Host, bool]]:
        """The replicas of `role` as `caller` knows the network, and which of them are out of its reach."""
        if now >= self._keepers_until:
            self._known_keepers.clear()
            self._keepers_until = self._next_change(now)
        found = self._known_keepers.get((role, caller.side))
        if found is None:
            found = self._known_keepers[role, caller.side] = self._find_keepers(role, caller.side, now)
        return found

    def _find_keepers(self, role: Role, side: int, now: float) -> list[tuple[Host, bool]]:
        start, end = self._partition
        cut = start <= now < end + REJOIN_S
        noticed = start + FORGET_S <= now < end + REJOIN_S
        found: list[tuple[Host, bool]] = []
        for host in self._order[role]:
            forgotten = not host.up and host.last_change + FORGET_S <= now
            if not forgotten and not (noticed and host.side != side):
                away = not host.up or now < host.asleep_until
                found.append((host, away or (cut and host.side != side)))
                if len(found) == REPLICAS:
                    break
        return found

    def _next_change(self, now: float) -> float:
        """Until when what `_find_keepers` says stays true, unless a host comes or goes (`changed`)."""
        start, end = self._partition
        gone = [host.last_change + FORGET_S for host in self._hosts if not host.up]
        asleep = [host.asleep_until for host in self._hosts]
        times = (start, start + FORGET_S, end + REJOIN_S, *gone, *asleep)
        return min((when for when in times if when > now), default=math.inf)

    def _merge(self, role: Role, answers: list[tuple[Host, float]], reading: Reading) -> list[SeenClaim]:
        """Per owner the record that expires last, of what the replicas had when asked, expired ones too.
        While nothing new arrives that is the same for everybody who asks the same replicas."""
        if self._last_arrival[role] > reading.began:
            return _merge(role, answers)
        key = tuple([replica for replica, _ in answers])
        merged = self._merged[role].get(key)
        if merged is None:
            merged = self._merged[role][key] = _merge(role, answers)
        return merged


def _merge(role: Role, answers: Sequence[tuple[Host, float]]) -> list[SeenClaim]:
    found: dict[NodeId, SeenClaim] = {}
    for replica, when in answers:
        for owner, arrivals in replica.stored.get(role, {}).items():
            known = found.get(owner)
            for arrival, claim in arrivals:
                if arrival <= when and (known is None or claim.expiration_unix > known.expiration_unix):
                    known = found[owner] = claim
    return list(found.values())
