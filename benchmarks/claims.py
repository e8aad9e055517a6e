"""The real lease machine on many simulated nodes over a simulated DHT, in virtual time.

    python benchmarks/claims.py --seeds 200 --nodes 32 --roles 9 --loss 0.05
    python benchmarks/claims.py --matrix --seeds 1000 --out claims.jsonl
    python benchmarks/claims.py --report claims.jsonl more.jsonl

`--nodes` and `--loss` take several values; `--matrix` stands for 8, 32 and 128 nodes with 9 roles, loss 0, 5
and 10 %, with and without a partition, and for 8 nodes with 5 roles (with 9 there is no spare node that could
take over). `--out` appends one line of JSON for each run to a file, and leaves out the runs that are there:
the matrix can be run in several sittings, by several people, each with seeds of their own. It goes seed by
seed, so that the file means something at any time. `--report` merges such files. What is printed is one line
of JSON for each combination, then, last, one of all: counts, the worst times, and which bars are met.

- `double_holders`: pairs of nodes that trained under one (role, term), at the same time or not;
- `long_overlaps`: times that two nodes held one role outside a partition for longer than a renewal;
- `settle_*_s`: until as many roles are held as there are roles, or nodes if those are fewer;
- `takeover_*_s`: from the death of a holder to the next one's start, where a spare node was idle;
- `heal_*_s`: from the end of a partition until no role has two holders any more, for good, and as many roles
  are held as there are roles, or nodes awake for `NEWCOMER_S` if those are fewer.

Owns: what is measured, the command line. Does not own: the simulation (`claims_simulator`), what is made of
the figures of many runs (`claims_report`).
"""

import argparse
import itertools
import math
import multiprocessing
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

from benchmarks.claims_report import Cell, Figures, Runs, drop_cut_line, print_report, read_runs
from benchmarks.claims_simulator import Scenario, Simulation, Tenure, Trace
from paris_p2p.ids import Role

HEAL_LIMIT_S = 60.0
NEWCOMER_S = 30.0  # who has only just come, or woken, need not have a role yet
MATRIX_CROWDS = ((8, 9), (8, 5), (32, 9), (128, 9))  # nodes, roles
MATRIX_LOSS = (0.0, 0.05, 0.10)
LARGE_NODES = 128
PARTITION = (120.0, 270.0)


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
        takeover_s=tuple(_takeovers(scenario, trace)),
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
    for when in sorted({single, *(tenure.start for tenure in trace.tenures if tenure.start > single)}):
        able = _awake(trace, max(healed, when - NEWCOMER_S))  # after the heal nobody leaves any more
        if _held(trace.tenures, when) >= min(scenario.roles, able):
            return when - healed
    return math.inf


def _awake(trace: Trace, when: float) -> int:
    return [number for since, number in trace.awake if since <= when][-1]


def simulate(scenario: Scenario, seed: int) -> Figures:
    """Run one scenario with one seed and measure it."""
    return measure(scenario, Simulation(scenario, seed).run())


def _cell(scenario: Scenario) -> Cell:
    cut = scenario.partition is not None
    return Cell(scenario.nodes, scenario.roles, scenario.loss, cut, scenario.churn)


def _job(job: tuple[Scenario, int]) -> tuple[Cell, int, Figures]:
    scenario, seed = job
    return _cell(scenario), seed, simulate(scenario, seed)


def _scenarios(given: argparse.Namespace) -> list[Scenario]:
    churn = bool(given.churn)
    if not given.matrix:
        part = PARTITION if given.partition else None
        cells = itertools.product(given.nodes, given.loss)
        return [Scenario(nodes, given.roles, loss, churn, part) for nodes, loss in cells]
    matrix = itertools.product((None, PARTITION), MATRIX_CROWDS, MATRIX_LOSS)
    return [Scenario(*crowd, loss, churn, part) for part, crowd, loss in matrix]


def _jobs(given: argparse.Namespace) -> Generator[tuple[Scenario, int], None, None]:
    """Every run asked for, seed by seed."""
    scenarios = _scenarios(given)
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for scenario in scenarios:
            if scenario.nodes < LARGE_NODES or seed % given.large_every == 0:
                yield scenario, seed


def _run(
    jobs: Iterable[tuple[Scenario, int]], processes: int
) -> Generator[tuple[Cell, int, Figures], None, None]:
    if processes == 1:
        yield from map(_job, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_job, jobs, chunksize=4)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="claims over a simulated DHT")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--nodes", type=int, nargs="+", default=[32])
    parser.add_argument("--roles", type=int, default=9)
    parser.add_argument("--loss", type=float, nargs="+", default=[0.0], help="share of RPCs lost")
    parser.add_argument("--partition", action="store_true", help="split in two from 120 s to 270 s")
    parser.add_argument("--churn", type=int, choices=(0, 1), default=1)
    parser.add_argument("--matrix", action="store_true", help="all sizes and losses, whole and partitioned")
    large = f"run {LARGE_NODES} nodes and more with every n-th seed only"
    parser.add_argument("--large-every", type=int, default=1, metavar="N", help=large)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="append each run to this file, leave out those in it")
    parser.add_argument("--report", type=Path, nargs="+", help="merge files made with --out, run nothing")
    given = parser.parse_args(argv)
    if given.seeds < 1 or given.large_every < 1 or given.jobs < 1:
        parser.error("--seeds, --large-every and --jobs are at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; the last line on stdout is JSON."""
    given = _arguments(argv)
    if given.report:
        print_report(read_runs(given.report))
        return
    runs = Runs()
    if given.out and given.out.exists():
        drop_cut_line(given.out)
        runs = read_runs([given.out])
    missing = ((scenario, seed) for scenario, seed in _jobs(given) if not runs.has(_cell(scenario), seed))
    for cell, seed, figures in _run(missing, given.jobs):
        runs.add(cell, seed, figures)
        if given.out:
            runs.append_to(given.out, cell, seed)
    print_report(runs)


if __name__ == "__main__":
    main()
