"""The figures of many simulated runs: kept in a file line by line, summed up, held against the bars.

    python -m benchmarks.claims_report FILE...    # the tables of docs/protocol/claims.md

Owns: the lines of a file made with `claims.py --out`, percentiles, the bars. Does not own: what is measured
in one run (`claims`).

One line: the cell (`nodes`, `roles`, `loss`, `partition`, `churn`), the `seed`, `code` (`code_digest`) and
the figures. A time is -1 for "never" (JSON has no infinity), `heal_s` is null without a partition. Runs of
different code are not merged: their figures would be nobody's.
"""

import ast
import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.claims_simulator import TAKEOVER_S, TIMES

ROOT = Path(__file__).resolve().parent.parent
DECIDING = (
    "paris_p2p/core/assignment.py",
    "paris_p2p/core/claim_memory.py",
    "paris_p2p/core/lease.py",
    "paris_p2p/core/lease_table.py",
    "paris_p2p/core/tombstones.py",
    "paris_p2p/wire/terms.py",
    "benchmarks/claims.py",
    "benchmarks/claims_dht.py",
    "benchmarks/claims_simulator.py",
)
SETTLE_BAR_S = 30.0
SETTLE_BAR_LOSS = 0.05
TAKEOVER_BAR_S = TIMES.ttl_s + TAKEOVER_S
HEAL_BAR_S = 60.0

Row = dict[str, float | int | bool | None]


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One combination of the matrix. `loss`: share of RPCs lost."""

    nodes: int
    roles: int
    loss: float
    partition: bool
    churn: bool


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run showed. Times in seconds, infinite for "never"."""

    double_holders: int
    long_overlaps: int
    longest_overlap_s: float
    overlaps: int
    settle_s: float
    takeover_s: tuple[float, ...]
    heal_s: float | None


@dataclass
class Runs:
    """The figures of each (cell, seed)."""

    figures: dict[Cell, dict[int, Figures]] = field(default_factory=dict)

    def has(self, cell: Cell, seed: int) -> bool:
        """Whether that run is here."""
        return seed in self.figures.get(cell, {})

    def add(self, cell: Cell, seed: int, figures: Figures) -> None:
        """Take in one run."""
        self.figures.setdefault(cell, {})[seed] = figures

    def append_to(self, path: Path, cell: Cell, seed: int) -> None:
        """Write one run to the end of a file."""
        figures = {name: _plain(value) for name, value in asdict(self.figures[cell][seed]).items()}
        line = {"code": code_digest(), "seed": seed, **asdict(cell), **figures}
        with path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")


def drop_cut_line(path: Path) -> None:
    """Take a last line that was cut short (the program was killed) out of a file."""
    whole = path.read_bytes().rfind(b"\n") + 1
    with path.open("r+b") as file:
        file.truncate(whole)


@functools.cache
def code_digest() -> str:
    """16 hex digits that change when the machine, the simulation or what is measured does; comments, layout
    and docstrings do not count."""
    digest = hashlib.sha256()
    for name in DECIDING:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                del node.body[0]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def read_runs(paths: Iterable[Path]) -> Runs:
    """The runs in files made with `--out`, without a last line that was cut short. Exits with a message where
    a file is not one, or of other code."""
    runs = Runs()
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
            if text.endswith("\n"):
                _take_line(runs, text, f"{path}, line {number}")
    return runs


def _take_line(runs: Runs, text: str, where: str) -> None:
    try:
        line = json.loads(text)
        code, seed = line.pop("code"), line.pop("seed")
        cell = Cell(**{name: line.pop(name) for name in Cell.__slots__})
        figures = Figures(**{name: _measured(value) for name, value in line.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(f"{where} is not a run written with --out: {error}") from None
    if code != code_digest():
        raise SystemExit(f"{where} is of other code ({code}, this is {code_digest()}): use a new file")
    runs.add(cell, seed, figures)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return (round(value, 3) if math.isfinite(value) else -1.0) if isinstance(value, float) else value


def _measured(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_measured(one) for one in value)
    return math.inf if value == -1.0 else value


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of `values` do not exceed; None of nothing."""
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def summarise(figures: Sequence[Figures]) -> Row:
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
        "heal_late": sum(seconds > HEAL_BAR_S for seconds in heals),
    }


SUMMED = ("double_holders", "long_overlaps", "overlaps", "takeovers", "heal_late")


def worst(rows: Sequence[Row]) -> Row:
    """Of several combinations the sums of counts and the worst of times ("never", if any)."""
    found: Row = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        if name in SUMMED:
            found[name] = sum(values)
        else:
            found[name] = -1.0 if -1.0 in values else max(values, default=None)
    return found


def bars(rows: Mapping[Cell, Row]) -> dict[str, bool | None]:
    """Which bars hold in every combination; None where none measures it."""

    def within(name: str, limit: float, cells: Iterable[Cell]) -> bool | None:
        times = [value for cell in cells if (value := rows[cell][name]) is not None]
        return all(0 <= value <= limit for value in times) if times else None

    calm = [cell for cell in rows if cell.loss <= SETTLE_BAR_LOSS]
    return {
        "no_two_holders_of_a_term": all(row["double_holders"] == 0 for row in rows.values()),
        "no_long_overlap": all(row["long_overlaps"] == 0 for row in rows.values()),
        "settle_p95": within("settle_p95_s", SETTLE_BAR_S, calm),
        "takeover_p95": within("takeover_p95_s", TAKEOVER_BAR_S, rows),
        "heal_p95": within("heal_p95_s", HEAL_BAR_S, rows),
        "heal_every_run": within("heal_max_s", HEAL_BAR_S, rows),
        "no_livelock": within("settle_max_s", math.inf, rows),
    }


def print_report(runs: Runs) -> None:
    """One line of JSON for each combination, then one of all."""
    if not runs.figures:
        raise SystemExit("there is no run to report")
    rows = {cell: summarise(list(by_seed.values())) for cell, by_seed in sorted(runs.figures.items())}
    for cell, row in rows.items():
        print(json.dumps({"seeds": len(runs.figures[cell]), **asdict(cell), **row}), flush=True)
    numbers = [len(by_seed) for by_seed in runs.figures.values()]
    total: dict[str, Any] = {"runs": sum(numbers), "combinations": len(rows), "fewest_seeds": min(numbers)}
    print(json.dumps({**total, **worst(list(rows.values())), "bars": bars(rows)}))


def _rounded(value: float | None) -> float | None:
    """One decimal; None for "not measured", -1 for "never" (JSON has no infinity)."""
    if value is None:
        return None
    return round(value, 1) if math.isfinite(value) else -1.0


def tables(runs: Runs) -> str:
    """Two Markdown tables: the whole network, and what a partition leaves."""
    rows = {cell: summarise(list(by_seed.values())) for cell, by_seed in sorted(runs.figures.items())}
    whole = [
        "| nodes | roles | RPCs lost | seeds | all roles held, p95 (worst) | take-over, p95 (worst; cases) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    parted = [
        "| nodes | roles | RPCs lost | seeds | two holders meanwhile | one each, p95 (worst) | over 60 s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell, row in rows.items():
        start = f"| {cell.nodes} | {cell.roles} | {cell.loss:.0%} | {len(runs.figures[cell])} |"
        if cell.partition:
            healed = _seconds(row["heal_p95_s"], row["heal_max_s"])
            parted.append(f"{start} {row['overlaps']} times | {healed} | {row['heal_late']} |")
        else:
            settled = _seconds(row["settle_p95_s"], row["settle_max_s"])
            taken = _seconds(row["takeover_p95_s"], row["takeover_max_s"], f"; {row['takeovers']}")
            whole.append(f"{start} {settled} | {taken if row['takeovers'] else 'no spare node'} |")
    return "\n".join([*whole, "", *parted])


def _seconds(p95: float | None, most: float | None, more: str = "") -> str:
    shown = ["never" if value == -1.0 else f"{value:.0f} s" for value in (p95 or 0.0, most or 0.0)]
    return f"{shown[0]} ({shown[1]}{more})"


if __name__ == "__main__":
    print(tables(read_runs(Path(name) for name in sys.argv[1:])))
