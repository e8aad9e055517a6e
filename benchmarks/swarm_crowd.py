"""A crowd of leechers behind home lines, in network namespaces: ours against libtorrent and aria2c.

    python benchmarks/swarm_crowd.py --scenario flash --mib 64 --runs 3

One seeder and eight leechers, each line shaped at both ends. Scenarios: `flash` (all start at once),
`heterogeneous` (half the leechers with a slow uplink), `late` (they join one after the other),
`leecher-killed` (one is killed at half and restarted), `seeder-gone` (killed once the leechers together
hold one copy), `liars` (about 30 % of all peers serve corrupt, late or no data; against the same crowd
without them). Clients take turns within a run. Needs root; prints {"skipped": why} where it cannot run.
The last line is JSON (docs/benchmarks.md says how to read it).

Owns: the scenarios and their figures. Does not own: the clients (`lab.clients`), the lines
(`lab.namespaces`).
"""

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.lab.children import Children, children, end_on_signals, wait_for
from benchmarks.lab.clients import CLIENTS, PYTHON, Client, Node, Ours, Running
from benchmarks.lab.content import MIB, Content, CopyWatch, make_content, sha256_of, work_folder
from benchmarks.lab.namespaces import Link, Star, cannot_run, star
from benchmarks.lab.noise import Load, quiet_second, spread
from paris_p2p import clock

SCENARIOS = ("flash", "heterogeneous", "late", "leecher-killed", "seeder-gone", "liars")
LIES = ("corrupt", "late", "silent", "corrupt")  # 4 of 13 peers: 31 %
BYTES_PER_S = 125_000  # of one Mbit/s
RESTART_S = 2.0
READY_S = 60.0
WATCH_S = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """One scenario. Lines in Mbit/s, `starts` in seconds after the first leecher's."""

    scenario: str
    length: int
    seeder: Link
    leechers: tuple[Link, ...]
    starts: tuple[float, ...]
    lies: tuple[str, ...] = ()

    def bound_s(self) -> float:
        """No distribution from one source is faster: the seeder's uplink, the slowest downlink (of the
        last to join), and all uplinks together."""
        up = self.seeder.up + sum(link.up for link in self.leechers)
        slowest = max(
            start + self.length / (link.down * BYTES_PER_S)
            for start, link in zip(self.starts, self.leechers, strict=True)
        )
        source = self.length / (self.seeder.up * BYTES_PER_S)
        return max(source, slowest, len(self.leechers) * self.length / (up * BYTES_PER_S))


def make_plan(given: argparse.Namespace) -> Plan:
    """The plan that the options describe."""
    length, line, count = given.mib * MIB, Link(given.up, given.down), given.leechers
    slow = Link(given.slow_up, given.down)
    late, half = given.scenario == "late", given.scenario == "heterogeneous"
    gap = length / (given.up * BYTES_PER_S) / 4 if late else 0.0
    return Plan(
        given.scenario,
        length,
        line,
        tuple(slow if half and i % 2 else line for i in range(count)),
        tuple(i * gap for i in range(count)),
        LIES if given.scenario == "liars" else (),
    )


@dataclass(slots=True)
class Figures:
    """One run of one client. Seconds count from the first leecher's start.

    `first_s` to `last_s`: when leechers were complete. `up_s`, `ready_s`: when the first, the last leecher
    listened: all start on one machine here, so their start-up competes for its cores. `efficiency` counts
    from the first leecher's start, `efficiency_up` from `up_s`. `own_s`, `own_up_s`: the median time from a
    leecher's own start, from when it listened. `seeder_copies`, `received`: bytes on the wire over F and over
    N F. `wasted`: share of payload received in vain. `cpu_s`: of all nodes. `others`: cores kept busy by
    others meanwhile (the kernel's work for our packets included); `before`: in the second before.
    """

    client: str
    bound_s: float
    first_s: float | None = None
    median_s: float | None = None
    last_s: float | None = None
    own_s: float | None = None
    own_up_s: float | None = None
    up_s: float | None = None
    ready_s: float | None = None
    efficiency: float | None = None
    efficiency_up: float | None = None
    complete: int = 0
    wrong: int = 0
    seeder_copies: float = 0.0
    received: float = 0.0
    wasted: float | None = None
    cpu_s: float = 0.0
    rss_mb: float = 0.0
    others: float = 0.0
    before: float = 0.0
    events: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Crowd:
    """One run of one client through one plan."""

    def __init__(self, client: Client, plan: Plan, net: Star, kids: Children, folder: Path) -> None:
        self.client, self.plan, self.net, self.kids, self.folder = client, plan, net, kids, folder
        self.seeders: list[Running] = []
        self.liars: list[Running] = []
        self.leechers: list[Running] = []
        self.events: dict[str, Any] = {}
        self.nodes = [self._node(i) for i in range(1 + len(plan.leechers) + len(plan.lies))]
        self.crowd = self.nodes[1 : 1 + len(plan.leechers)]
        self.copies: CopyWatch | None = None
        if plan.scenario == "seeder-gone":
            self.copies = CopyWatch(client.content, [node.folder for node in self.crowd])

    def _node(self, index: int) -> Node:
        folder = self.folder / f"node{index}"
        (folder / "out").mkdir(parents=True)
        return Node(index, self.net.ip(index), tuple(self.net.enter(index)), folder)

    def _start(self, node: Node, argv: list[str]) -> Running:
        return Running(node, self.kids.start(argv, node.folder / "log"), clock.monotonic())

    def prepare(self) -> None:
        """Everything but the leechers. Raises `TimeoutError`."""
        self.client.prepare(self.net, self.kids)
        self.seeders = [self._start(self.nodes[0], self.client.seed(self.nodes[0]))]
        for node, lie in zip(self.nodes[1 + len(self.crowd) :], self.plan.lies, strict=True):
            self.liars.append(self._start(node, self._liar(node, lie)))
        for running in (*self.seeders, *self.liars):
            self._await_ready(running)

    def _liar(self, node: Node, lie: str) -> list[str]:
        assert isinstance(self.client, Ours)
        content = self.client.content
        what = [lie, str(content.path), str(content.piece_length), str(node.folder)]
        return [*node.enter, PYTHON, "-m", "benchmarks.lab.liar", *what, *self.client.listen(node)]

    def _await_ready(self, running: Running) -> None:
        def ready() -> bool:
            if running.child.poll() is not None:
                raise RuntimeError(f"a seeder ended with {running.child.rc}: {running.child.errors()}")
            return self.client.ready(running) or running.child.last_event("seeding") is not None

        wait_for(ready, READY_S, "a seeder to listen")

    def fetch(self, timeout_s: float) -> None:
        """From the first leecher's start until all are complete or `timeout_s` has passed."""
        self.began, self.before = clock.monotonic(), self.net.counters()
        waiting = list(zip(self.plan.starts, self.crowd, strict=True))
        watch_at = self.began
        while waiting or any(leecher.finished_at is None for leecher in self.leechers):
            now = clock.monotonic()
            if now - self.began > timeout_s:
                return
            while waiting and now - self.began >= waiting[0][0]:
                self.leechers.append(self._leech(waiting.pop(0)[1]))
            self._look()
            if now >= watch_at:
                self._intervene(now)
                watch_at = now + WATCH_S
            time.sleep(0.02)

    def _leech(self, node: Node) -> Running:
        return self._start(node, self.client.get(node, [*self.seeders, *self.liars], self.crowd))

    def _look(self) -> None:
        for leecher in self.leechers:
            if leecher.finished_at is not None:
                continue
            if leecher.listening_at is None and self.client.listening(leecher):
                leecher.listening_at = clock.monotonic()
            if self.client.finished(leecher):
                leecher.finished_at = clock.monotonic()
            elif leecher.child.poll() is not None and leecher.node.index not in self.events.get("killed", ()):
                raise RuntimeError(f"a leecher ended with {leecher.child.rc}: {leecher.child.errors()}")

    # -- what goes wrong on purpose --------------------------------------------------------------

    def _intervene(self, now: float) -> None:
        if self.plan.scenario == "leecher-killed":
            self._kill_and_restart(now)
        if self.copies is not None and "seeder_gone_s" not in self.events:
            sent = self.net.counters()[0][0] - self.before[0][0]
            if sent >= self.plan.length and self.copies.complete():
                self.seeders[0].child.stop(signal.SIGKILL)
                complete = sum(leecher.finished_at is not None for leecher in self.leechers)
                self.events |= {"seeder_gone_s": now - self.began, "complete_then": complete}

    def _kill_and_restart(self, now: float) -> None:
        victim = self.leechers[0]
        received = self.net.counters()[victim.node.index][1] - self.before[victim.node.index][1]
        if "killed_s" not in self.events and received >= self.plan.length / 2:
            self.events |= {"killed": [victim.node.index], "killed_s": now - self.began}
            victim.child.stop(signal.SIGKILL)
            held = CopyWatch(self.client.content, [victim.node.folder])
            held.complete()
            missing = len(held.missing) * self.client.content.piece_length / MIB
            self.events["missing_then_mib"] = missing
        elif (
            "restarted_s" not in self.events
            and now - self.began > self.events.get("killed_s", now) + RESTART_S
        ):
            self.events["restarted_s"] = now - self.began
            self.events["received_then_mib"] = received / MIB  # with what was still on its way to it
            self.leechers[0] = self._leech(victim.node)
            self.events["killed"] = []

    # -- figures ---------------------------------------------------------------------------------

    def figures(self) -> Figures:
        """What there is to say before the children end."""
        made, bound = Figures(self.client.name, self.plan.bound_s()), self.plan.bound_s()
        done = sorted(x.finished_at - self.began for x in self.leechers if x.finished_at is not None)
        up = [x.listening_at - self.began for x in self.leechers if x.listening_at is not None]
        made.complete = len(done)
        if done:
            made.first_s, made.median_s = done[0], median(done)
            made.own_s = median(x.finished_at - x.began for x in self.leechers if x.finished_at is not None)
        if len(done) == len(self.crowd):
            made.last_s, made.efficiency = done[-1], bound / done[-1]
        if made.last_s is not None and len(up) == len(self.crowd):
            made.up_s, made.ready_s = min(up), max(up)
            made.efficiency_up = bound / (made.last_s - made.up_s)
            made.own_up_s = median((x.finished_at or 0) - (x.listening_at or 0) for x in self.leechers)
        self._count_bytes(made)
        made.events = {k: round(v, 2) if isinstance(v, float) else v for k, v in self.events.items()}
        return made

    def _count_bytes(self, made: Figures) -> None:
        after, count, length = self.net.counters(), len(self.crowd), self.plan.length
        received = [after[node.index][1] - self.before[node.index][1] for node in self.crowd]
        made.seeder_copies = (after[0][0] - self.before[0][0]) / length
        made.received = sum(received) / (count * length)
        wasted = [self.client.wasted_bytes(leecher) for leecher in self.leechers]
        known = [count for count in wasted if count is not None]
        made.wasted = sum(known) / (count * length) if len(known) == count else None
        if "killed_s" in self.events:
            # what the others needed for the same file is what this one would have needed without the kill
            usual = median(received[1:])
            self.events["fetched_again_mib"] = (received[0] - usual) / MIB
            if "received_then_mib" in self.events:
                held = length / MIB - self.events["missing_then_mib"]
                self.events["in_flight_mib"] = self.events["received_then_mib"] - held * usual / length
            second = self.leechers[0].child.last_event("fetched") or {}
            if "received_bytes" in second:
                after_mib = second["received_bytes"] / MIB
                self.events["received_after_mib"] = after_mib
                self.events["duplicates_after_mib"] = after_mib - self.events["missing_then_mib"]
        if self.liars:
            self.events["liars"] = self._named()

    def _named(self) -> list[dict[str, Any]]:
        """For each liar: how many leechers banned it, and how many times at most one of them did."""
        logs = [leecher.child.errors(1 << 24) for leecher in self.leechers]
        found = []
        for liar, lie in zip(self.liars, self.plan.lies, strict=True):
            event = liar.child.last_event("seeding") or {"addresses": ["/p2p/?"]}
            name = str(event["addresses"][0]).rsplit("/", 1)[1]
            bans = [log.count(f"{name} is banned") for log in logs]
            blocks = (liar.child.last_event("lied") or {"blocks": 0})["blocks"]
            found.append(
                {"lie": lie, "blocks": blocks, "banned_by": sum(map(bool, bans)), "most_bans": max(bans)}
            )
        return found

    def wrong(self) -> int:
        """How many outputs differ from the content."""
        wanted = self.client.content.sha256
        done = [leecher for leecher in self.leechers if leecher.finished_at is not None]
        return sum(sha256_of(self.client.output(leecher)) != wanted for leecher in done)


def run_once(
    name: str, plan: Plan, content: Content, folder: Path, timeout_s: float, quiet_s: float, logs: Path | None
) -> Figures:
    """One client through the plan, in fresh namespaces and folders. A failure is a figure too."""
    links = [plan.seeder, *plan.leechers, *[plan.seeder for _ in plan.lies]]
    work = folder / "run"
    work.mkdir()
    crowd = None
    figures = Figures(name, plan.bound_s())
    try:
        with star(links) as net, children() as kids:
            crowd = Crowd(CLIENTS[name](content, work), plan, net, kids, work)
            crowd.prepare()
            before = quiet_second(quiet_s)
            with Load() as load:
                crowd.fetch(timeout_s)
            figures = crowd.figures()
            kids.stop()
            figures.cpu_s, figures.before = kids.cpu_s, before
            figures.rss_mb = max(running.child.max_rss_bytes for running in crowd.leechers) / 1e6
            figures.others = load.others(kids.cpu_s)
            figures.wrong = crowd.wrong()
    except (TimeoutError, RuntimeError, OSError) as error:
        figures.error = str(error)[-800:]
    finally:
        if logs is not None:
            shutil.copytree(work, logs / f"{name}-{clock.monotonic():.0f}", ignore=_big_files)
        shutil.rmtree(work, ignore_errors=True)
    return figures


def _big_files(folder: str, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if (Path(folder) / name).is_file() and (Path(folder) / name).stat().st_size > 4 * MIB
    ]


# --- all runs ----------------------------------------------------------------------------------------


def summary(name: str, runs: Sequence[Figures]) -> dict[str, Any]:
    """One client's figures over its runs: medians with their spread."""
    fields = (
        "first_s median_s last_s own_s up_s ready_s efficiency efficiency_up seeder_copies received wasted"
    )
    values = {
        key: spread([value for run in runs if (value := getattr(run, key)) is not None])
        for key in (*fields.split(), "cpu_s", "rss_mb", "others", "before")
    }
    return {
        "client": name,
        "runs": len(runs),
        "complete": [run.complete for run in runs],
        "wrong": sum(run.wrong for run in runs),
        **values,
        "events": [run.events for run in runs if run.events],
        "errors": [run.error for run in runs if run.error],
    }


def ratios(
    ones: Sequence[Figures], others: Sequence[Figures], which: str = "last_s"
) -> dict[str, float] | None:
    """Time of the one over time of the other, run by run; less than 1: the one is faster."""
    pairs = [(getattr(a, which), getattr(b, which)) for a, b in zip(ones, others, strict=False)]
    return spread([a / b for a, b in pairs if a is not None and b is not None])


def line(figures: Figures) -> str:
    """One run for people, on stderr."""
    shown = {
        k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(figures).items() if v is not None
    }
    return json.dumps(shown)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="a crowd behind home lines")
    parser.add_argument("--scenario", choices=SCENARIOS, default="flash")
    parser.add_argument("--clients", default="ours,libtorrent,aria2", help=",".join(CLIENTS))
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--piece-kib", type=int, default=256)
    parser.add_argument("--leechers", type=int, default=8)
    parser.add_argument("--up", type=float, default=50, help="Mbit/s")
    parser.add_argument("--down", type=float, default=50, help="Mbit/s")
    parser.add_argument(
        "--slow-up", type=float, default=10, help="Mbit/s of half the leechers (heterogeneous)"
    )
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, help="default: 8 times the bound and 30 s")
    parser.add_argument(
        "--quiet-s", type=float, default=5, help="wait so long for a quiet second before a run"
    )
    parser.add_argument("--logs", type=Path, help="keep every node's small files here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; the last line on stdout is JSON."""
    given = options(argv)
    reason = cannot_run()
    if reason is not None:
        print(json.dumps({"benchmark": "swarm_crowd", "skipped": reason}))
        return
    end_on_signals()
    plan = make_plan(given)
    timeout_s = given.timeout_s or 8 * plan.bound_s() + 30
    names = [name for name in given.clients.split(",") if _available(name)]
    honest = Plan("flash", plan.length, plan.seeder, plan.leechers, plan.starts)
    turns = (
        [("honest", "ours", honest), ("liars", "ours", plan)] if plan.lies else [(n, n, plan) for n in names]
    )
    found: dict[str, list[Figures]] = {label: [] for label, _, _ in turns}
    with work_folder() as folder:
        content = make_content(folder / "source" / "content.bin", plan.length, given.piece_kib << 10)
        for _ in range(given.runs):
            for label, name, each in turns:
                figures = run_once(name, each, content, folder, timeout_s, given.quiet_s, given.logs)
                print(f"{label}: {line(figures)}", file=sys.stderr, flush=True)
                found[label].append(figures)
    print(json.dumps(report(given, plan, found)))


def _available(name: str) -> bool:
    reason = CLIENTS[name].unavailable()
    if reason is not None:
        print(f"{name} left out: {reason}", file=sys.stderr)
    return reason is None


def report(given: argparse.Namespace, plan: Plan, found: dict[str, list[Figures]]) -> dict[str, Any]:
    """The JSON line."""
    asked = ("scenario", "mib", "piece_kib", "leechers", "up", "down", "runs")
    made: dict[str, Any] = {"benchmark": "swarm_crowd", **{key: getattr(given, key) for key in asked}}
    made["bound_s"] = round(plan.bound_s(), 2)
    made["clients"] = {label: summary(label, runs) for label, runs in found.items()}
    if plan.lies:
        made["slowdown"] = ratios(found["liars"], found["honest"])
    elif "ours" in found and "libtorrent" in found:
        made["ratio"] = ratios(found["ours"], found["libtorrent"])
        for which in ("median_s", "own_up_s"):
            made[f"ratio_{which}"] = ratios(found["ours"], found["libtorrent"], which)
    return made


if __name__ == "__main__":
    main()
