"""The real lease machine on many simulated nodes over a simulated DHT, in virtual time.

    python benchmarks/claims.py --seeds 200 --nodes 32 --roles 9 --loss 0.05
    python benchmarks/claims.py --seeds 1000 --matrix --jobs 2

`--nodes` and `--loss` take several values, `--matrix` stands for 8, 32 and 128 nodes, loss 0, 5 and 10 %,
with and without a partition: one line of JSON for each combination. The last line is JSON in any case, the
worst of all combinations when there are several. A time is null where nothing was measured, -1 for "never".

- `double_holders`: pairs of nodes that trained under one (role, term), at the same time or not;
- `long_overlaps`: times that two nodes held one role outside a partition for longer than a renewal;
- `settle_*_s`: until as many roles are held as there are roles, or nodes if those are fewer;
- `takeover_*_s`: from the death of a holder to the next one's start, where a spare node was idle;
- `heal_*_s`: from the end of a partition until no role has two holders any more, for good, and as many roles
  are held as there are roles, or nodes awake if those are fewer.

Owns: what is measured, the command line. Does not own: the simulation (`claims_simulator`).
"""

import argparse
import itertools
import json
import math
import multiprocessing
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.claims_simulator import Scenario, Simulation, Tenure, Trace
from paris_p2p.ids import Role

HEAL_LIMIT_S = 60.0
MATRIX_NODES = (8, 32, 128)
MATRIX_LOSS = (0.0, 0.05, 0.10)
PARTITION = (120.0, 270.0)


@dataclass
class Figures:
    """What one run showed. Times in seconds, infinite for "never"."""

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
    return Figures(
        double_holders=_double_holders(trace.tenures),
        long_overlaps=sum(length > scenario.times.renew_s for length in outside),
        longest_overlap_s=max(outside, default=0.0),
        overlaps=len(overlaps),
        settle_s=_settled(scenario, trace.tenures),
        takeover_s=list(_takeovers(scenario, trace)),
        heal_s=_healed(scenario, trace),
    )


def _double_holders(tenures: Iterable[Tenure]) -> int:
    holders: dict[tuple[Role, int], set[int]] = defaultdict(set)
    for tenure in tenures:
        holders[tenure.role, tenure.term].add(tenure.node)
    return sum(len(nodes) * (len(nodes) - 1) // 2 for nodes in holders.values())


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
    """Whether an overlap that begins at `when` is the partition's doing; what it leaves, `_healed` judges."""
    part = scenario.partition
    return part is not None and part[0] <= when < part[1] + HEAL_LIMIT_S


def _settled(scenario: Scenario, tenures: Sequence[Tenure]) -> float:
    """When as many roles were held as there are nodes for."""
    wanted = min(scenario.nodes, scenario.roles)
    starts = (tenure.start for tenure in tenures if _held(tenures, tenure.start) >= wanted)
    return next(starts, math.inf)


def _held(tenures: Sequence[Tenure], when: float) -> int:
    """How many roles have a holder at `when`."""
    return len({tenure.role for tenure in tenures if tenure.start <= when < tenure.end})


def _takeovers(scenario: Scenario, trace: Trace) -> Generator[float, None, None]:
    """Seconds from the death of a holder to the next one's start, where a spare node was idle."""
    for when, role in trace.orphaned:
        if _cut_off(scenario, when) or any(t.role == role and t.start < when < t.end for t in trace.tenures):
            continue
        later = [t.start for t in trace.tenures if t.role == role and t.start > when]
        if later or when + 150 < scenario.duration_s:
            yield min(later, default=math.inf) - when


def _cut_off(scenario: Scenario, when: float) -> bool:
    """Whether the successor of a holder that died at `when` may be on the other side of a partition."""
    part = scenario.partition
    return part is not None and part[0] - 2 * scenario.times.ttl_s <= when < part[1] + HEAL_LIMIT_S


def _healed(scenario: Scenario, trace: Trace) -> float | None:
    """Seconds from the heal until every role has one holder; None without a partition."""
    if scenario.partition is None:
        return None
    healed = scenario.partition[1]
    ends = [start + length for _, _, start, length in _overlaps(trace.tenures, scenario.duration_s)]
    single = max((end for end in ends if end > healed), default=healed)
    if single >= scenario.duration_s:
        return math.inf
    changes = [tenure.start for tenure in trace.tenures] + [when for when, _ in trace.awake]
    for when in sorted({single, *(change for change in changes if change > single)}):
        if _held(trace.tenures, when) >= min(scenario.roles, _awake(trace, when)):
            return when - healed
    return math.inf


def _awake(trace: Trace, when: float) -> int:
    return [number for since, number in trace.awake if since <= when][-1]


def simulate(scenario: Scenario, seed: int) -> Figures:
    """Run one scenario with one seed and measure it."""
    return measure(scenario, Simulation(scenario, seed).run())


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of `values` do not exceed; None of nothing."""
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def summarise(figures: Sequence[Figures]) -> dict[str, float | int | None]:
    """The figures of one combination over all its seeds."""
    takeovers = [seconds for one in figures for seconds in one.takeover_s]
    heals = [one.heal_s for one in figures if one.heal_s is not None]
    settles = [one.settle_s for one in figures]
    return {
        "double_holders": sum(one.double_holders for one in figures),
        "long_overlaps": sum(one.long_overlaps for one in figures),
        "longest_overlap_s": _rounded(max(one.longest_overlap_s for one in figures)),
        "overlaps": sum(one.overlaps for one in figures),
        "settle_p95_s": _rounded(percentile(settles, 0.95)),
        "settle_max_s": _rounded(max(settles)),
        "takeovers": len(takeovers),
        "takeover_p95_s": _rounded(percentile(takeovers, 0.95)),
        "takeover_max_s": _rounded(max(takeovers, default=None)),
        "heal_p95_s": _rounded(percentile(heals, 0.95)),
        "heal_max_s": _rounded(max(heals, default=None)),
    }


SUMMED = ("double_holders", "long_overlaps", "overlaps", "takeovers")


def worst(rows: Sequence[dict[str, float | int | None]]) -> dict[str, float | int | None]:
    """Of several combinations the sums of counts and the worst of times ("never", if any)."""
    found: dict[str, float | int | None] = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        if name in SUMMED:
            found[name] = sum(values)
        else:
            found[name] = -1.0 if -1.0 in values else max(values, default=None)
    return found


def _rounded(value: float | None) -> float | None:
    """One decimal; None for "not measured", -1 for "never" (JSON has no infinity)."""
    if value is None:
        return None
    return round(value, 1) if math.isfinite(value) else -1.0


def _job(job: tuple[Scenario, int]) -> Figures:
    return simulate(*job)


def _scenarios(given: argparse.Namespace) -> list[Scenario]:
    nodes = MATRIX_NODES if given.matrix else given.nodes
    losses = MATRIX_LOSS if given.matrix else given.loss
    parts = (None, PARTITION) if given.matrix else (PARTITION,) if given.partition else (None,)
    return [
        Scenario(count, given.roles, loss, bool(given.churn), part)
        for part, count, loss in itertools.product(parts, nodes, losses)
    ]


def _run(scenario: Scenario, seeds: Iterable[int], processes: int) -> list[Figures]:
    jobs = [(scenario, seed) for seed in seeds]
    if processes == 1:
        return [_job(job) for job in jobs]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(_job, jobs, chunksize=4)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; the last line on stdout is JSON."""
    parser = argparse.ArgumentParser(description="claims over a simulated DHT")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--nodes", type=int, nargs="+", default=[32])
    parser.add_argument("--roles", type=int, default=9)
    parser.add_argument("--loss", type=float, nargs="+", default=[0.0], help="share of RPCs lost")
    parser.add_argument("--partition", action="store_true", help="split in two from 120 s to 270 s")
    parser.add_argument("--churn", type=int, choices=(0, 1), default=1)
    parser.add_argument("--matrix", action="store_true", help="all sizes and losses, whole and partitioned")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    given = parser.parse_args(argv)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    rows = []
    for scenario in _scenarios(given):
        rows.append(summarise(_run(scenario, seeds, given.jobs)))
        shown = {
            "seeds": given.seeds,
            "nodes": scenario.nodes,
            "roles": scenario.roles,
            "loss": scenario.loss,
            "partition": scenario.partition is not None,
            "churn": scenario.churn,
        }
        print(json.dumps({**shown, **rows[-1]}), flush=True)
    if len(rows) > 1:
        print(json.dumps({"seeds": given.seeds, "combinations": len(rows), **worst(rows)}))


if __name__ == "__main__":
    main()
