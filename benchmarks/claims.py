"""The real lease machine on many simulated nodes over a simulated DHT, in virtual time.

    python benchmarks/claims.py --seeds 200 --nodes 32 --roles 9 --loss 0.05

The last line is JSON. Modelled: every record lives on a few replicas, chosen by hash among the nodes the
caller believes alive; each RPC is lost with probability `--loss` (its caller waits for the timeout) or
takes 10-300 ms; a store counts as accepted when one replica has it, the caller's own included, as in
hivemind; replicas die with their node and start empty; a dead or cut-off node is contacted for
`FORGET_S` longer; nodes merge `REJOIN_S` after a partition heals; clocks are off by up to +-2 s; nodes
are killed and restarted (same identity), or sleep and wake (`--churn 0` for none). Not modelled:
bandwidth, routing hops, checkpoints (terms come from claims alone).

Owns: the simulation and its measurements. Does not own: the protocol (`paris_p2p.core.lease`).
"""

import argparse
import hashlib
import heapq
import itertools
import json
import math
import multiprocessing
import random
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field

from paris_p2p.core.assignment import SeenClaim, View, rendezvous
from paris_p2p.core.lease import Action, LeaseMachine, Now, Start, Stop, WriteClaim
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
HEAL_LIMIT_S = 60.0


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
    """What happened: tenures, and kills of a holder while another node was idle, as (time, role)."""

    tenures: list[Tenure] = field(default_factory=list)
    orphaned: list[tuple[float, Role]] = field(default_factory=list)


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
    # role -> owner -> (arrival, claim), newest last
    stored: dict[Role, dict[NodeId, list[tuple[float, SeenClaim]]]] = field(default_factory=dict)
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
            view = yield from self._read(node, machine.reads)
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
        self._end_tenure(node)
        yield away
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

    # --- the DHT ---------------------------------------------------------------------------------

    def _cut(self, one: _Node, other: _Node) -> bool:
        part = self.scenario.partition
        return part is not None and one.side != other.side and part[0] <= self.now < part[1] + REJOIN_S

    def _replicas(self, role: Role, caller: _Node) -> list[_Node]:
        part = self.scenario.partition
        noticed = part is not None and self.now >= part[0] + FORGET_S
        known = (
            node
            for node in self._order[role]
            if (node.up or self.now - node.last_change < FORGET_S)
            and not (noticed and self._cut(caller, node))
        )
        return list(itertools.islice(known, REPLICAS))

    def _rpc(self, caller: _Node, replica: _Node) -> float | None:
        """Seconds until the request is there, or None if no answer will come."""
        if replica is caller:
            return 0.0
        gone = not replica.up or self.now < replica.asleep_until or self._cut(caller, replica)
        if gone or self.rng.uniform(0, 1) < self.scenario.loss:
            return None
        return self.rng.uniform(*LATENCY_S) / 2

    def _store(self, node: _Node, write: WriteClaim) -> tuple[float, bool]:
        claim = write.claim
        record = SeenClaim(node.node_id, claim.state, claim.term, claim.since_unix, write.expiration_unix)
        took, ok = 0.0, False
        for replica in self._replicas(write.role, node):
            delay = self._rpc(node, replica)
            took = max(took, RPC_TIMEOUT_S if delay is None else 2 * delay)
            if delay is not None:
                ok = True
                by_owner = replica.stored.setdefault(write.role, {})
                by_owner.setdefault(node.node_id, []).append((self.now + delay, record))
        return took, ok

    def _read(self, node: _Node, roles: Sequence[Role]) -> Generator[float, None, View | None]:
        """The claims on `roles` from every replica that answers; None if none does for some role."""
        sampled: list[tuple[Role, _Node, float]] = []
        took = 0.0
        complete = True
        for role in roles:
            delays = [(replica, self._rpc(node, replica)) for replica in self._replicas(role, node)]
            answers = [(role, replica, self.now + delay) for replica, delay in delays if delay is not None]
            sampled += answers
            complete = complete and bool(answers)
            took = max(took, *(RPC_TIMEOUT_S if delay is None else 2 * delay for _, delay in delays))
        yield from self._sleep(node, took)
        now_unix = self._clock(node).unix
        if not complete:
            return None
        claims: dict[Role, dict[NodeId, SeenClaim]] = {role: {} for role in roles}
        for role, replica, when in sampled:
            _collect(claims[role], replica.stored.get(role, {}), when, now_unix)
        return View(now_unix, {role: list(found.values()) for role, found in claims.items()})


def _collect(
    found: dict[NodeId, SeenClaim],
    stored: dict[NodeId, list[tuple[float, SeenClaim]]],
    when: float,
    now_unix: float,
) -> None:
    """Merge what a replica showed at `when` into `found`: per owner the record that expires last."""
    for owner, arrivals in list(stored.items()):
        if len(arrivals) > 4:
            del arrivals[: len(arrivals) - 4]
        if arrivals[-1][1].expiration_unix < now_unix - 60:
            del stored[owner]
        for arrival, claim in arrivals:
            known = found.get(owner)
            newer = known is None or claim.expiration_unix > known.expiration_unix
            if arrival <= when and claim.expiration_unix > now_unix and newer:
                found[owner] = claim


# --- measurements ------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What one run showed. Times in seconds; `long_overlaps`: two active holders of one role outside a
    partition for longer than one renewal and the read and write that go with it."""

    double_holders: int
    long_overlaps: int
    longest_overlap_s: float
    overlaps: int
    settle_s: float
    takeover_s: list[float]
    heal_s: float | None


def measure(scenario: Scenario, trace: Trace) -> Figures:
    """The figures of one finished run."""
    overlaps = list(_overlaps(trace.tenures, scenario.duration_s))
    outside = [length for _, _, start, length in overlaps if not _in_partition(scenario, start)]
    doubles = [1 for one, other, _, _ in overlaps if one.term == other.term]
    limit = scenario.times.renew_s + 2 * RPC_TIMEOUT_S
    return Figures(
        double_holders=len(doubles),
        long_overlaps=sum(length > limit for length in outside),
        longest_overlap_s=max(outside, default=0.0),
        overlaps=len(overlaps),
        settle_s=_settled(scenario, trace.tenures),
        takeover_s=list(_takeovers(scenario, trace)),
        heal_s=_healed(scenario, trace.tenures),
    )


def _overlaps(
    tenures: Iterable[Tenure], end: float
) -> Generator[tuple[Tenure, Tenure, float, float], None, None]:
    by_role: dict[Role, list[Tenure]] = defaultdict(list)
    for tenure in tenures:
        for other in by_role[tenure.role]:
            length = min(tenure.end, other.end, end) - tenure.start
            if length > 0:
                yield other, tenure, tenure.start, length
        by_role[tenure.role].append(tenure)


def _in_partition(scenario: Scenario, when: float) -> bool:
    """Whether a take-over or overlap that begins at `when` is the partition's doing."""
    part = scenario.partition
    return part is not None and part[0] - 2 * scenario.times.ttl_s <= when < part[1] + HEAL_LIMIT_S


def _settled(scenario: Scenario, tenures: Sequence[Tenure]) -> float:
    """When as many roles were held as there are nodes for; infinite if never."""
    wanted = min(scenario.nodes, scenario.roles)
    for tenure in tenures:
        held = {t.role for t in tenures if t.start <= tenure.start < t.end}
        if len(held) >= wanted:
            return tenure.start
    return math.inf


def _takeovers(scenario: Scenario, trace: Trace) -> Generator[float, None, None]:
    """Seconds from the death of a holder to the next one's start, where a spare node was idle."""
    for when, role in trace.orphaned:
        if _in_partition(scenario, when) or any(
            t.role == role and t.start < when < t.end for t in trace.tenures
        ):
            continue
        later = [t.start for t in trace.tenures if t.role == role and t.start > when]
        if later or when + 150 < scenario.duration_s:
            yield min(later, default=math.inf) - when


def _healed(scenario: Scenario, tenures: Sequence[Tenure]) -> float | None:
    """Seconds from the heal until every role that is held has one holder, for good."""
    if scenario.partition is None:
        return None
    healed = scenario.partition[1]
    ends = [start + length for _, _, start, length in _overlaps(tenures, scenario.duration_s)]
    last = max((end for end in ends if end > healed), default=healed)
    return math.inf if last >= scenario.duration_s else last - healed


def simulate(scenario: Scenario, seed: int) -> Figures:
    """Run one scenario with one seed and measure it."""
    return measure(scenario, Simulation(scenario, seed).run())


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of `values` do not exceed; None of nothing."""
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def summarise(figures: Sequence[Figures]) -> dict[str, float | int | None]:
    """The JSON line's figures over all seeds."""
    takeovers = [seconds for one in figures for seconds in one.takeover_s]
    heals = [one.heal_s for one in figures if one.heal_s is not None]
    return {
        "double_holders": sum(one.double_holders for one in figures),
        "long_overlaps": sum(one.long_overlaps for one in figures),
        "longest_overlap_s": _rounded(max(one.longest_overlap_s for one in figures)),
        "overlaps": sum(one.overlaps for one in figures),
        "settle_p95_s": _rounded(percentile([one.settle_s for one in figures], 0.95)),
        "settle_max_s": _rounded(max(one.settle_s for one in figures)),
        "takeovers": len(takeovers),
        "takeover_p95_s": _rounded(percentile(takeovers, 0.95)),
        "takeover_max_s": _rounded(max(takeovers, default=None)),
        "heal_p95_s": _rounded(percentile(heals, 0.95)),
        "heal_max_s": _rounded(max(heals, default=None)),
    }


def _rounded(value: float | None) -> float | None:
    """One decimal; None for "not measured", -1 for "never" (JSON has no infinity)."""
    if value is None:
        return None
    return round(value, 1) if math.isfinite(value) else -1.0


def _job(job: tuple[Scenario, int]) -> Figures:
    return simulate(*job)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; the last line on stdout is JSON."""
    parser = argparse.ArgumentParser(description="claims over a simulated DHT")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--roles", type=int, default=9)
    parser.add_argument("--loss", type=float, default=0.0, help="share of RPCs lost")
    parser.add_argument("--partition", action="store_true", help="split in two from 120 s to 270 s")
    parser.add_argument("--churn", type=int, choices=(0, 1), default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    given = parser.parse_args(argv)
    part = (120.0, 270.0) if given.partition else None
    scenario = Scenario(given.nodes, given.roles, given.loss, bool(given.churn), part)
    jobs = [(scenario, seed) for seed in range(given.seeds)]
    if given.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
            figures = pool.map(_job, jobs, chunksize=4)
    else:
        figures = [_job(job) for job in jobs]
    print(json.dumps({**vars(given), **summarise(figures)}))


if __name__ == "__main__":
    main()
