"""What the memory of conduct (`paris_p2p.core.conduct`) costs honest nodes, and what it keeps one key from.

    python benchmarks/claims_conduct.py --seeds 40 --nodes 8 32

Each run of the claims' simulation (`claims`: with its churn, whole and partitioned, at each loss) is played
twice with the same seed: with nodes that hear everybody, and with nodes that hear through a `Conduct` each.
Then one key that takes the next role over every 25 s is let loose on runs without churn, both ways. What is
printed last is one line of JSON:

- `runs`, `same`: runs of honest nodes, and how many came out the same to the last digit; the others' figures
  are in `different`;
- `charged`, `most_charged`: take-overs of held roles that readers counted against honest keys, all together
  and at most by one reader against one key; `left_out`: readings that left an honest key out;
- `double_holders`: pairs of nodes that held one (role, term), with it;
- `flips`, `stopped_without`, `stopped_with`: what the flipping key did, and the holders that it stopped, all
  its runs together; `worst_with`: in one run.

Owns: the nodes that hear through it, the flipping key, the comparison. Does not own: the simulation
(`claims_simulator`), the figures of a run (`claims`).
"""

import argparse
import itertools
import json
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.claims import PARTITION, measure
from benchmarks.claims_dht import EPOCH, Host, Reading, SimulatedDht
from benchmarks.claims_report import Figures
from benchmarks.claims_simulator import Scenario, Simulation
from paris_p2p.core.assignment import MAX_ROLES_PER_NODE, SeenClaim
from paris_p2p.core.conduct import Conduct
from paris_p2p.ids import NodeId, Role, Term
from paris_p2p.wire.terms import make_term, term_number

LOOK_EVERY_S = 10.0  # a node reads the whole run so often, for what there is to copy
FLIP_EVERY_S = 25.0
FLIPS_FROM_S = 60.0


@dataclass(slots=True)
class Noted:
    """What the readers of a run counted against keys: the claims charged for, by reader and key, and how many
    readings left one out."""

    charged: dict[tuple[int, NodeId], set[tuple[Role, Term]]] = field(default_factory=dict)
    left_out: int = 0


class _CountingConduct(Conduct):
    def __init__(self, reader: int, noted: Noted) -> None:
        super().__init__()
        self._reader, self._noted = reader, noted

    def _may(self, role: Role, claim: SeenClaim, now_unix: float, ttl_s: float) -> bool:
        heard = super()._may(role, claim, now_unix, ttl_s)
        if heard:
            self._noted.charged.setdefault((self._reader, claim.owner), set()).add((role, claim.term))
        self._noted.left_out += not heard
        return heard


@dataclass(slots=True)
class _OwnReading(Reading):
    caller: Host


class _HearingDht(SimulatedDht):
    """A simulated DHT whose hosts hear what they read through a `Conduct` each."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.noted = Noted()
        self.ttl_s = 0.0
        self._conducts: dict[int, Conduct] = {}

    def restarted(self, host: Host) -> None:
        """Its process has ended: it remembers nothing."""
        self._conducts.pop(host.index, None)

    def ask(self, caller: Host, roles: Sequence[Role], patience_s: float, now: float) -> Reading:
        reading = super().ask(caller, roles, patience_s, now)
        return _OwnReading(reading.began, reading.took_s, reading.asked, caller)

    def show(self, reading: Reading, now_unix: float) -> dict[Role, list[SeenClaim]]:
        claims = super().show(reading, now_unix)
        assert isinstance(reading, _OwnReading)
        return self._hear(reading.caller, claims, now_unix)

    def look_around(self, caller: Host, roles: Sequence[Role], now: float) -> None:
        """A reading of everything, for other purposes, that costs and loses nothing."""
        answers = {
            role: [(one, now) for one, gone in self._keepers(role, caller, now) if not gone] for role in roles
        }
        unix = EPOCH + now + caller.skew_s
        self._hear(caller, super().show(Reading(now, 0.0, answers), unix), unix)

    def _hear(
        self, caller: Host, claims: dict[Role, list[SeenClaim]], now_unix: float
    ) -> dict[Role, list[SeenClaim]]:
        conduct = self._conducts.setdefault(caller.index, _CountingConduct(caller.index, self.noted))
        heard = conduct.hear(
            claims, now_unix, me=caller.node_id, ttl_s=self.ttl_s, max_roles=MAX_ROLES_PER_NODE
        )
        return {role: list(some) for role, some in heard.claims.items()}


class HearingSimulation(Simulation):
    """A simulation with careful nodes."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        super().__init__(scenario, seed)
        self._dht = self._hearing = _HearingDht(
            self.nodes, self.roles, scenario.loss, scenario.partition, self.rng
        )
        self._hearing.ttl_s = scenario.times.ttl_s
        for node in self.nodes:
            self._spawn(self._look_around(node))

    @property
    def noted(self) -> Noted:
        """What its readers counted."""
        return self._hearing.noted

    def _look_around(self, node: Host) -> Generator[float, None, None]:
        while True:
            yield LOOK_EVERY_S
            if node.up and self.now >= node.asleep_until:
                self._hearing.look_around(node, self.roles, self.now)

    def _changed(self, node: Any, *, up: bool) -> None:
        super()._changed(node, up=up)
        self._hearing.restarted(node)


@dataclass(frozen=True, slots=True)
class Flipped:
    """What a flipping key did to a run."""

    flips: int
    stopped: int


def flip(simulation: Simulation) -> Flipped:
    """Play a run in which one key writes, every 25 s, a HOLD of the next term on the next role: a holder of
    the role that stops before the next one counts as stopped by it."""
    flips: list[tuple[float, Role]] = []
    key = Host(-1, NodeId(b"f" * 32), 0.0, 0)

    def flipper() -> Generator[float, None, None]:
        yield FLIPS_FROM_S
        for role in itertools.cycle(simulation.roles):
            flips.append((simulation.now, role))
            _take(simulation, key, role)
            yield FLIP_EVERY_S

    simulation._spawn(flipper())
    ended = [(one.end, one.role) for one in simulation.run().tenures]
    stopped = sum(
        any(
            held == role and when < end <= when + len(simulation.roles) * FLIP_EVERY_S for when, role in flips
        )
        for end, held in ended
    )
    return Flipped(len(flips), stopped)


def _take(simulation: Simulation, key: Host, role: Role) -> None:
    """As any key can: one record, no bid, one more than the highest number."""
    now, unix = simulation.now, EPOCH + simulation.now
    claims = [
        one for node in simulation.nodes for some in node.stored.get(role, {}).values() for _, one in some
    ]
    number = 1 + max((term_number(claim.term) for claim in claims), default=0)
    claim = SeenClaim(
        key.node_id,
        "hold",
        make_term(number, role, key.node_id, unix),
        unix,
        unix + simulation.scenario.times.ttl_s,
    )
    simulation._dht.store(key, role, claim, now)


def compare(scenario: Scenario, seed: int) -> tuple[Figures, Figures, Noted]:
    """One run of honest nodes both ways: its figures without and with careful nodes, and what those noted."""
    plain = measure(scenario, Simulation(scenario, seed).run())
    careful = HearingSimulation(scenario, seed)
    return plain, measure(scenario, careful.run()), careful.noted


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; the last line on stdout is JSON."""
    parser = argparse.ArgumentParser(description="claims with and without the memory of conduct")
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--roles", type=int, default=5)
    parser.add_argument("--loss", type=float, nargs="+", default=[0.0, 0.05, 0.10], help="share of RPCs lost")
    parser.add_argument("--flips", type=int, default=10, metavar="SEEDS", help="runs with the flipping key")
    given = parser.parse_args(argv)
    report = _honest(given) | _flipping(given)
    print(json.dumps(report))


def _honest(given: argparse.Namespace) -> dict[str, Any]:
    cells = list(itertools.product(given.nodes, given.loss, (None, PARTITION)))
    same, charged, most, left_out, double, different = 0, 0, 0, 0, 0, []
    for seed, (nodes, loss, part) in itertools.product(range(given.seeds), cells):
        plain, careful, noted = compare(Scenario(nodes, given.roles, loss, partition=part), seed)
        counts = [len(claims) for claims in noted.charged.values()]
        charged, most, left_out = charged + sum(counts), max([most, *counts]), left_out + noted.left_out
        double += careful.double_holders
        same += plain == careful
        if plain != careful:
            cell = {"seed": seed, "nodes": nodes, "loss": loss, "partition": part is not None}
            different.append({**cell, "without": asdict(plain), "with": asdict(careful)})
            print(json.dumps(different[-1]), flush=True)
    return {
        "runs": given.seeds * len(cells),
        "same": same,
        "charged": charged,
        "most_charged": most,
        "left_out": left_out,
        "double_holders": double,
        "different": different,
    }


def _flipping(given: argparse.Namespace) -> dict[str, Any]:
    calm = Scenario(min(given.nodes), given.roles, churn=False, duration_s=3600.0)
    scenarios = [replace(calm, loss=loss) for loss in given.loss]
    runs = list(itertools.product(scenarios, range(given.flips)))
    without = [flip(Simulation(scenario, seed)) for scenario, seed in runs]
    careful = [flip(HearingSimulation(scenario, seed)) for scenario, seed in runs]
    return {
        "flipped_runs": len(runs),
        "flips": sum(one.flips for one in careful),
        "stopped_without": sum(one.stopped for one in without),
        "stopped_with": sum(one.stopped for one in careful),
        "worst_with": max((one.stopped for one in careful), default=0),
    }


if __name__ == "__main__":
    main()
