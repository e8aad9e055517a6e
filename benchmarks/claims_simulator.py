"""Many real lease machines over a simulated DHT, in virtual time.

Modelled: every record lives on a few replicas, chosen by hash among the nodes the caller believes alive; each
RPC is lost with probability `loss` (its caller waits for the timeout) or takes 10-300 ms; a store counts as
accepted when a replica other than the caller has it; a read of a role is complete when
each of its replicas has answered or timed out, and a look at all roles leaves out those that take longer than
the machine's patience; replicas die with their node and start empty; a dead or cut-off node is contacted for
`FORGET_S` longer; nodes merge `REJOIN_S` after a partition heals; clocks are off by up to +-2 s; nodes are
killed and restarted (same identity), or sleep and wake. Not modelled: bandwidth, routing hops, checkpoints
(terms come from claims alone).

Owns: the simulation and its trace. Does not own: the protocol (`paris_p2p.core.lease`), what is measured in
the trace (`claims`).
"""

import hashlib
import heapq
import math
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from paris_p2p.core.assignment import SeenClaim, View, rendezvous
from paris_p2p.core.lease import LeaseMachine
from paris_p2p.core.lease_actions import Action, Now, Start, Stop, WriteClaim
from paris_p2p.ids import ROUTER, NodeId, Role, Term, expert_role
from paris_p2p.wire.manifest import LeaseTimes

TIMES = LeaseTimes(ttl_s=60.0, renew_s=20.0, settle_s=3.0, poll_s=10.0)
EPOCH = 1.75e9  # unix time at virtual second 0
REPLICAS = 5
RPC_TIMEOUT_S = 3.0
LATENCY_S = (0.010, 0.300)
SKEW_S = 2.0
FORGET_S = 15.0  # how long a dead node stays in others' routing tables
REJOIN_S = 6.0  # how long after a heal both sides are one network again
KILL_EVERY_S = 60.0
AWAY_S = (20.0, 90.0)
CALM_S = 60.0  # no churn while the run settles, and none while a healed partition is judged


@dataclass(frozen=True)
class Scenario:
    """One simulated run; `partition` is (start, end) in seconds."""

    nodes: int
    roles: int
    loss: float = 0.0
    churn: bool = True
    partition: tuple[float, float] | None = None
    duration_s: float = 360.0
    times: LeaseTimes = TIMES


@dataclass
class Tenure:
    """From a `Start` to its end, in true seconds; `end` is infinite while it lasts."""

    role: Role
    term: Term
    node: int
    start: float
    end: float = math.inf


@dataclass
class Trace:
    """What happened. `orphaned`: kills of a holder while another node was idle, as (time, role); `awake`: how
    many nodes were up and awake, as (from when, number)."""

    tenures: list[Tenure] = field(default_factory=list)
    orphaned: list[tuple[float, Role]] = field(default_factory=list)
    awake: list[tuple[float, int]] = field(default_factory=list)


# owner -> (arrival, claim), newest last
_Stored = dict[NodeId, list[tuple[float, SeenClaim]]]


@dataclass
class _Node:
    index: int
    node_id: NodeId
    skew_s: float
    side: int
    machine: LeaseMachine | None = None
    life: int = 0  # counts restarts; a process of an earlier life is dead
    asleep_until: float = 0.0
    steady_lag_s: float = 0.0  # its monotonic clock stood still for so long
    last_change: float = -math.inf  # when it last came or went
    stored: dict[Role, _Stored] = field(default_factory=dict)
    tenure: Tenure | None = None

    @property
    def up(self) -> bool:
        return self.machine is not None


class Simulation:
    """One scenario with one seed. `run` returns the trace; the same seed gives the same trace."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.rng = random.Random(f"{seed}/{scenario}")
        self.roles = (*(expert_role(i) for i in range(scenario.roles - 1)), ROUTER)
        self.trace = Trace()
        self.now = 0.0
        self._queue: list[tuple[float, int, Generator[float, None, None]]] = []
        self._count = 0
        self.nodes = [self._make_node(index) for index in range(scenario.nodes)]
        # Which nodes keep a role's records is unrelated to who prefers the role.
        self._order = {
            role: sorted(self.nodes, key=lambda node: rendezvous(role, NodeId(b"replica" + node.node_id)))
            for role in self.roles
        }

    def _make_node(self, index: int) -> _Node:
        digest = hashlib.sha256(self.rng.randbytes(8)).digest()
        return _Node(index, NodeId(digest), self.rng.uniform(-SKEW_S, SKEW_S), index % 2)

    def run(self) -> Trace:
        """Play the scenario to its end."""
        for node in self.nodes:
            self._spawn(self._join(node, self.rng.uniform(0, 2)))
        if self.scenario.churn:
            self._spawn(self._churn())
        while self._queue and self._queue[0][0] <= self.scenario.duration_s:
            self.now, _, process = heapq.heappop(self._queue)
            delay = next(process, None)
            if delay is not None:
                self._push(self.now + delay, process)
        return self.trace

    def _spawn(self, process: Generator[float, None, None]) -> None:
        self._push(self.now, process)

    def _push(self, when: float, process: Generator[float, None, None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (when, self._count, process))

    # --- nodes -----------------------------------------------------------------------------------

    def _clock(self, node: _Node) -> Now:
        steady = self.now + 1000.0 * node.index - node.steady_lag_s
        return Now(steady, EPOCH + self.now + node.skew_s)

    def _join(self, node: _Node, delay: float) -> Generator[float, None, None]:
        yield delay
        rng = random.Random(self.rng.getrandbits(64))
        node.machine = LeaseMachine(node.node_id, self.roles, self.scenario.times, rng=rng)
        node.stored, node.last_change, node.tenure = {}, self.now, None
        node.life += 1
        self._count_awake()
        self._spawn(self._daemon(node, node.machine, node.life))

    def _daemon(self, node: _Node, machine: LeaseMachine, life: int) -> Generator[float, None, None]:
        """The driver's loop of `core.lease`. A sleeping process finishes nothing until it wakes."""
        while True:
            wake = machine.next_wakeup() - self._clock(node).monotonic
            # Whoever has nothing to wait for still looks now and then; 1 ms is the timer's resolution.
            yield from self._sleep(node, min(max(wake, 0.001), 60.0))
            yield from self._perform(node, machine, machine.step(None, self._clock(node)))
            if node.life != life:
                return
            if not machine.wants_view(self._clock(node)):
                continue
            view = yield from self._read(node, machine.reads, machine.patience_s)
            if node.life != life:
                return
            if view is None:
                machine.read_failed(self._clock(node))
            else:
                yield from self._perform(node, machine, machine.step(view, self._clock(node)))
            if node.life != life:
                return

    def _sleep(self, node: _Node, seconds: float) -> Generator[float, None, None]:
        """Wait; whoever is put to sleep meanwhile goes on when woken, first with its trainer."""
        yield seconds
        while self.now < node.asleep_until:
            yield node.asleep_until - self.now

    def _perform(
        self, node: _Node, machine: LeaseMachine, actions: Sequence[Action]
    ) -> Generator[float, None, None]:
        writes: list[tuple[float, WriteClaim, bool]] = []
        for action in actions:
            if isinstance(action, Start):
                self._begin_tenure(node, action.role, action.term)
            elif isinstance(action, Stop):
                self._end_tenure(node)
            else:
                took, ok = self._store(node, action)
                writes.append((took, action, ok))
        began, life = self.now, node.life
        for took, write, ok in sorted(writes, key=lambda item: item[0]):
            yield from self._sleep(node, max(0.0, began + took - self.now))
            if node.life != life:
                return
            machine.stored(write, ok, self.now - began, self._clock(node))

    def _begin_tenure(self, node: _Node, role: Role, term: Term) -> None:
        node.tenure = Tenure(role, term, node.index, self.now)
        self.trace.tenures.append(node.tenure)

    def _end_tenure(self, node: _Node) -> None:
        if node.tenure is not None:
            node.tenure.end = self.now
            node.tenure = None

    # --- churn -----------------------------------------------------------------------------------

    def _churn(self) -> Generator[float, None, None]:
        yield CALM_S
        while True:
            yield self.rng.expovariate(1 / KILL_EVERY_S)
            healed = 0.0 if self.scenario.partition is None else self.scenario.partition[1]
            if self.now >= healed > 0:
                return
            node = self.rng.choice([node for node in self.nodes if node.up])
            away = self.rng.uniform(*AWAY_S)
            if self.rng.uniform(0, 1) < 0.75:
                self._kill(node)
                self._spawn(self._join(node, away))
            else:
                self._spawn(self._suspend(node, away, stopped=self.rng.uniform(0, 1) < 0.5))

    def _suspend(self, node: _Node, away: float, *, stopped: bool) -> Generator[float, None, None]:
        """Node and trainer sleep; with `stopped` the monotonic clock does too (a closed laptop). The
        trainer wakes with the node, and works on until it is told to stop."""
        tenure, life = node.tenure, node.life
        if node.asleep_until > self.now:
            return
        self._disturbed(node)
        node.asleep_until = self.now + away
        self._count_awake()
        self._end_tenure(node)
        yield away
        self._count_awake()
        if node.life == life:
            node.steady_lag_s += away if stopped else 0.0
            if tenure is not None:
                self._begin_tenure(node, tenure.role, tenure.term)

    def _disturbed(self, node: _Node) -> None:
        """A successor that is itself struck down tells nothing about how long a take-over takes."""
        role = None if node.machine is None or node.tenure is not None else node.machine.role
        last = max((t.start for t in self.trace.tenures if t.role == role), default=-math.inf)
        self.trace.orphaned = [o for o in self.trace.orphaned if o[1] != role or o[0] < last]

    def _kill(self, node: _Node) -> None:
        self._disturbed(node)
        if node.tenure is not None:
            awake = [n for n in self.nodes if n.machine and self.now >= n.asleep_until and n is not node]
            idle = sum(n.machine is not None and n.machine.role is None for n in awake)
            held = sum(n.tenure is not None for n in awake)
            if idle > len(self.roles) - 1 - held:  # nobody else's role needs that node
                self.trace.orphaned.append((self.now, node.tenure.role))
        self._end_tenure(node)
        node.machine, node.last_change, node.asleep_until = None, self.now, 0.0
        node.life += 1
        self._count_awake()

    def _count_awake(self) -> None:
        awake = sum(node.up and self.now >= node.asleep_until for node in self.nodes)
        self.trace.awake.append((self.now, awake))

    # --- the DHT ---------------------------------------------------------------------------------

    def _cut(self, one: _Node, other: _Node) -> bool:
        part = self.scenario.partition
        return part is not None and one.side != other.side and part[0] <= self.now < part[1] + REJOIN_S

    def _replicas(self, role: Role, caller: _Node) -> list[_Node]:
        part = self.scenario.partition
        noticed = part is not None and part[0] + FORGET_S <= self.now < part[1] + REJOIN_S
        forgotten = self.now - FORGET_S
        found: list[_Node] = []
        for node in self._order[role]:
            if (node.machine is None and node.last_change <= forgotten) or (
                noticed and node.side != caller.side
            ):
                continue
            found.append(node)
            if len(found) == REPLICAS:
                break
        return found

    def _rpc(self, caller: _Node, replica: _Node) -> float:
        """Seconds until the request is there; infinite if no answer will come."""
        if replica is caller:
            return 0.0
        gone = replica.machine is None or self.now < replica.asleep_until or self._cut(caller, replica)
        if gone or self.rng.random() < self.scenario.loss:
            return math.inf
        return (LATENCY_S[0] + (LATENCY_S[1] - LATENCY_S[0]) * self.rng.random()) / 2

    def _store(self, node: _Node, write: WriteClaim) -> tuple[float, bool]:
        claim = write.claim
        record = SeenClaim(node.node_id, claim.state, claim.term, claim.since_unix, write.expiration_unix)
        took, ok = 0.0, False
        for replica in self._replicas(write.role, node):
            delay = self._rpc(node, replica)
            took = max(took, min(RPC_TIMEOUT_S, 2 * delay))
            if delay < math.inf:
                ok = ok or replica is not node
                by_owner = replica.stored.setdefault(write.role, {})
                arrivals = by_owner.setdefault(node.node_id, [])
                there = [arrival for arrival in arrivals if arrival[0] <= self.now]
                if len(there) > 1:  # what expires last stands
                    last = max(there, key=lambda arrival: arrival[1].expiration_unix)
                    arrivals[:] = [last, *(arrival for arrival in arrivals if arrival[0] > self.now)]
                arrivals.append((self.now + delay, record))
        return took, ok

    def _read(
        self, node: _Node, roles: Sequence[Role], patience_s: float
    ) -> Generator[float, None, View | None]:
        """The claims on `roles` from every replica that answers, without the roles that take longer than
        `patience_s` or that no replica answers for; None if that is all of them."""
        asked: dict[Role, list[tuple[_Node, float]]] = {}
        took = 0.0
        for role in roles:
            delays = [(replica, self._rpc(node, replica)) for replica in self._replicas(role, node)]
            role_took = max((min(RPC_TIMEOUT_S, 2 * delay) for _, delay in delays), default=0.0)
            took = max(took, min(role_took, patience_s))
            answers = [(replica, self.now + delay) for replica, delay in delays if delay < math.inf]
            if answers and role_took <= patience_s:
                asked[role] = answers
        yield from self._sleep(node, took)
        if not asked:
            return None
        now_unix = self._clock(node).unix
        return View(now_unix, {role: _collect(role, answers, now_unix) for role, answers in asked.items()})


def _collect(role: Role, answers: Sequence[tuple[_Node, float]], now_unix: float) -> list[SeenClaim]:
    """What replicas showed of a role, each at its moment: per owner the record that expires last."""
    found: dict[NodeId, SeenClaim] = {}
    for replica, when in answers:
        stored = replica.stored.get(role)
        if stored is None:
            continue
        for owner in [owner for owner, some in stored.items() if some[-1][1].expiration_unix < now_unix - 60]:
            del stored[owner]
        for owner, arrivals in stored.items():
            known = found.get(owner)
            for arrival, claim in arrivals:
                if arrival <= when and (known is None or claim.expiration_unix > known.expiration_unix):
                    known = claim
            if known is not None and known.expiration_unix > now_unix:
                found[owner] = known
    return list(found.values())
