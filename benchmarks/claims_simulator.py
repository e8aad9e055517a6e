"""Many real lease machines over a simulated DHT, in virtual time.

Modelled: a DHT that loses RPCs and records and splits (`claims_dht`); clocks are off by up to +-2 s; nodes
are killed and restarted (same identity), or sleep and wake. Not modelled: bandwidth, routing hops,
checkpoints (terms come from claims alone).

Owns: the simulation and its trace. Does not own: the protocol (`paris_p2p.core.lease`), what is measured in
the trace (`claims`).
"""

import hashlib
import heapq
import math
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from benchmarks.claims_dht import EPOCH, Host, SimulatedDht
from paris_p2p.core.assignment import SeenClaim, View
from paris_p2p.core.lease import LeaseMachine
from paris_p2p.core.lease_actions import Action, Now, Start, Stop, WriteClaim
from paris_p2p.ids import ROUTER, NodeId, Role, Term, expert_role
from paris_p2p.wire.manifest import LeaseTimes

TIMES = LeaseTimes(ttl_s=60.0, renew_s=20.0, settle_s=3.0, poll_s=10.0)
SKEW_S = 2.0
KILL_EVERY_S = 60.0
AWAY_S = (20.0, 90.0)
TAKEOVER_S = 25.0  # within this, the lease having run out, a role has another holder
CALM_S = 60.0  # no churn while the run settles


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


@dataclass(eq=False)
class _Node(Host):
    machine: LeaseMachine | None = None
    life: int = 0  # counts restarts; a process of an earlier life is dead
    steady_lag_s: float = 0.0  # its monotonic clock stood still for so long
    slept: bool = False  # since the machine last compared its clocks
    tenure: Tenure | None = None


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
        self._dht = SimulatedDht(self.nodes, self.roles, scenario.loss, scenario.partition, self.rng)

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
        node.stored, node.tenure = {}, None
        self._changed(node, up=True)
        self._spawn(self._daemon(node, node.machine, node.life))

    def _daemon(self, node: _Node, machine: LeaseMachine, life: int) -> Generator[float, None, None]:
        """The driver's loop of `core.lease`. A sleeping process finishes nothing until it wakes."""
        while node.life == life:
            wake = machine.next_wakeup(even_clocks=not node.slept) - self._clock(node).monotonic
            # Whoever has nothing to wait for still looks now and then; 1 ms is the timer's resolution.
            yield min(max(wake, 0.001), 60.0)
            while self.now < node.asleep_until:
                yield node.asleep_until - self.now
            if node.life != life:
                return
            now, node.slept = self._clock(node), False
            actions = machine.step(None, now)
            if actions:
                yield from self._perform(node, machine, actions)
                now = self._clock(node)
            if node.life == life and machine.wants_view(now):
                yield from self._show(node, machine, life)

    def _show(self, node: _Node, machine: LeaseMachine, life: int) -> Generator[float, None, None]:
        """Read what the machine wants to see, and do what it says then."""
        reading = self._dht.ask(node, machine.reads, machine.patience_s, self.now)
        yield from self._sleep(node, reading.took_s)
        if node.life != life:
            return
        now = self._clock(node)
        if reading.asked:
            view = View(now.unix, self._dht.show(reading, now.unix))
            yield from self._perform(node, machine, machine.step(view, now))
        else:
            machine.read_failed(now)

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
                claim, expires = action.claim, action.expiration_unix
                record = SeenClaim(node.node_id, claim.state, claim.term, claim.since_unix, expires)
                took, ok = self._dht.store(node, action.role, record, self.now)
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

    @property
    def _calm_from(self) -> float:
        """When churn ends: with a partition so long before it heals that the roles whose holders died have
        been taken over. How long that takes is measured elsewhere."""
        part = self.scenario.partition
        return math.inf if part is None else part[1] - self.scenario.times.ttl_s - TAKEOVER_S

    def _churn(self) -> Generator[float, None, None]:
        yield CALM_S
        while True:
            yield self.rng.expovariate(1 / KILL_EVERY_S)
            if self.now >= self._calm_from:
                return
            node = self._victim()
            away = self.rng.uniform(*AWAY_S)
            if self.rng.uniform(0, 1) < 0.75:
                self._kill(node)
                self._spawn(self._join(node, away))
            else:
                self._spawn(self._suspend(node, away, stopped=self.rng.uniform(0, 1) < 0.5))

    def _victim(self) -> _Node:
        """Half of the time a holder: in a large run hardly anybody else's end matters."""
        up = [node for node in self.nodes if node.up]
        holders = [node for node in up if node.tenure is not None]
        return self.rng.choice(holders if holders and self.rng.uniform(0, 1) < 0.5 else up)

    def _suspend(self, node: _Node, away: float, *, stopped: bool) -> Generator[float, None, None]:
        """Node and trainer sleep; with `stopped` the monotonic clock does too (a closed laptop). The
        trainer wakes with the node, and works on until it is told to stop."""
        tenure, life = node.tenure, node.life
        if node.asleep_until > self.now:
            return
        self._disturbed(node)
        node.asleep_until, node.slept = self.now + away, True
        self._dht.changed()
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
        node.machine, node.asleep_until = None, 0.0
        self._changed(node, up=False)

    def _changed(self, node: _Node, *, up: bool) -> None:
        node.up, node.last_change = up, self.now
        node.life += 1
        self._dht.changed()
        self._count_awake()

    def _count_awake(self) -> None:
        awake = sum(node.up and self.now >= node.asleep_until for node in self.nodes)
        self.trace.awake.append((self.now, awake))
