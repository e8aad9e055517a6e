"""Nodes behind routers, in network namespaces with real NAT: what gets through, how, and how fast.

    python benchmarks/nat.py [--mib 16] [--case NAME ...]

Every case starts the real programs: `paris-bootstrap` in public, then `paris-node seed` and `get`, or a run
that is published and joined (the DHT and everything else included). A router masquerades and drops what was
not asked for; `symmetric` ones give each connection another port. Needs root, iproute2, nftables; prints
{"skipped": why} where it cannot run. The last line is JSON.

Owns: the cases. Does not own: the namespaces (`lab.nat`), the programs.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.lab.children import Child, Children, children, end_on_signals, wait_for
from benchmarks.lab.clients import PYTHON
from benchmarks.lab.content import MIB, make_content, sha256_of, work_folder
from benchmarks.lab.nat import Internet, cannot_run, internet
from paris_p2p import clock

START_S = 40.0
FETCH_S = 90.0
PREPARE_S = 240.0
PIECE = MIB // 4
COPIES = 3  # the manifest and the run's two components
NODES = ("public", "public", "nat a", "nat b", "symmetric a", "symmetric b")


@dataclass(frozen=True, slots=True)
class Case:
    """Who has it, who wants it (of `NODES`); `relay`: whether a public node relays; `run`: a whole run."""

    seeder: str
    leecher: str
    relay: bool
    run: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """`route`: `direct`, `punched`, `relayed` or `reversed` (the seeder dialled the leecher)."""

    case: str
    works: bool
    route: str
    seconds: float | None
    mb_per_s: float | None
    why: str = ""


class Lab:
    """The internet, its bootstrap nodes, and a prepared run: made once, for all cases."""

    def __init__(
        self, net: Internet, kids: Children, folder: Path, length: int, prepared: Path | None
    ) -> None:
        self.net, self.kids, self.folder = net, kids, folder
        self._started = 0
        self.content = make_content(folder / "content" / "file.bin", length, PIECE)
        self._bootstraps: dict[bool, tuple[str, str]] = {}
        self._run: Child | None = None
        self._prepared = prepared

    def program(self, kids: Children, enter: list[str], home: str, *argv: str) -> Child:
        """Start one of our programs somewhere, with its own home."""
        self._started += 1
        line = [*enter, PYTHON, "-m", *argv, "--home", str(self.folder / home), "--json"]
        return kids.start(line, self.folder / f"{self._started}-{argv[0]}-{argv[1].strip('-')}")

    def bootstrap(self, *, relay: bool) -> tuple[str, str]:
        """The DHT's address and the relay's: at node 0, one that does not relay at node 1."""
        if relay not in self._bootstraps:
            node = self.net.nodes[0 if relay else 1]
            options = ("--listen", f"/ip4/{node.address}/tcp/31337", "--relay" if relay else "--no-relay")
            child = self.program(self.kids, node.enter, f"boot{relay}", "paris_bootstrap", *options)
            helping = wait_event(child, "helping", START_S)
            listening = child.last_event("listening")
            assert listening is not None
            self._bootstraps[relay] = str(listening["addresses"][0]), str(helping["addresses"][0])
        return self._bootstraps[relay]

    def begin_run(self) -> None:
        """Prepare the run while other cases go on; nobody but its organiser may train in it."""
        argv = ("paris_node", "prepare", "digits", "--out", str(self.folder / "run"), "--restricted")
        self._run = self.program(self.kids, [], "organiser", *argv, "--clusters", "2", "--steps", "8")

    def run(self) -> Path:
        """The prepared run."""
        if self._prepared is not None:
            return self._prepared
        assert self._run is not None
        self._run.wait(PREPARE_S)
        return self.folder / "run"


def wait_event(child: Child, name: str, timeout_s: float) -> dict[str, Any]:
    """The event, once it has been printed. Raises `TimeoutError`."""

    def there() -> bool:
        if child.poll() is not None and child.last_event(name) is None:
            raise TimeoutError(f"a program ended before `{name}`: {child.errors(400)}")
        return child.last_event(name) is not None

    wait_for(there, timeout_s, f"`{name}`: {child.errors(400)}")
    event = child.last_event(name)
    assert event is not None
    return event


def seed_and_get(lab: Lab, kids: Children, case: Case, tag: str) -> tuple[str, float]:
    """One seeds, the other gets: the route and the seconds."""
    seeder_at, leecher_at = (lab.net.nodes[NODES.index(name)] for name in (case.seeder, case.leecher))
    via = ["--via", lab.bootstrap(relay=True)[1]] if case.relay else []
    argv = ("paris_node", "seed", str(lab.content.path), "--piece-length", str(PIECE), *via)
    seeding = wait_event(lab.program(kids, seeder_at.enter, f"s{tag}", *argv), "seeding", START_S)
    peers = [word for address in seeding["addresses"] for word in ("--peer", str(address))]
    argv = ("paris_node", "get", str(seeding["info_hash"]), "--out", str(lab.folder / f"out{tag}"), *peers)
    leecher = lab.program(kids, leecher_at.enter, f"l{tag}", *argv, "--debug")
    fetched = wait_event(leecher, "fetched", FETCH_S)
    if sha256_of(Path(fetched["path"])) != lab.content.sha256:
        raise TimeoutError("what arrived is not what was sent")
    return route_of(leecher, "direct"), float(fetched["seconds"])


def publish_and_join(lab: Lab, kids: Children, case: Case, tag: str) -> tuple[str, float]:
    """One publishes a run, the other takes part in it (it may not train: it copies): the route and the
    seconds from joining to holding a copy."""
    seeder_at, leecher_at = (lab.net.nodes[NODES.index(name)] for name in (case.seeder, case.leecher))
    run, (bootstrap, _) = lab.run(), lab.bootstrap(relay=case.relay)
    argv = ("paris_node", "publish", str(run), "--bootstrap", bootstrap)
    publisher = lab.program(kids, seeder_at.enter, f"s{tag}", *argv)
    wanted = ("relayed", "punched") if case.relay else ("outbound-only",)
    wait_for(lambda: _state(publisher) in wanted, START_S, f"a state of {wanted} of the publisher")
    began = clock.monotonic()
    member = lab.program(
        kids, leecher_at.enter, f"l{tag}", "paris_node", "join", "--bootstrap", bootstrap, "--debug"
    )
    wait_for(lambda: _copies(lab.folder / f"l{tag}") >= COPIES, FETCH_S, "the run's components")
    return route_of(member, "reversed"), clock.monotonic() - began


def route_of(leecher: Child, otherwise: str) -> str:
    """How its sessions came about, as its log tells."""
    said = leecher.log.with_suffix(".err").read_text(errors="replace")
    routes = [word for word in ("punched", "relayed") if f"circuit: {word}" in said]
    return routes[-1] if routes else otherwise


def _state(child: Child) -> str:
    if child.poll() is not None:
        raise TimeoutError(f"a program ended: {child.errors(400)}")
    event = child.last_event("reachability")
    return "" if event is None else str(event["state"])


def _copies(home: Path) -> int:
    """How many items are complete in a home's store."""
    return len(list(home.glob("store/complete/*")))


CASES = {
    "leecher behind NAT": Case("public", "nat a", relay=False),
    "seeder behind NAT": Case("nat a", "public", relay=True),
    "both behind NAT": Case("nat a", "nat b", relay=True),
    "both, one NAT symmetric": Case("nat a", "symmetric b", relay=True),
    "both, both symmetric": Case("symmetric a", "symmetric b", relay=True),
    "run, publisher behind NAT, no relay": Case("nat a", "public", relay=False, run=True),
    "run, both behind symmetric NAT": Case("symmetric a", "symmetric b", relay=True, run=True),
}


def measure(lab: Lab, name: str, tag: str) -> Result:
    """One case; its programs end with it."""
    case = CASES[name]
    with children() as kids:
        try:
            route, seconds = (publish_and_join if case.run else seed_and_get)(lab, kids, case, tag)
        except TimeoutError as error:
            said = "".join(child.errors(600) for child in kids.every[-1:])
            return Result(name, False, "none", None, None, f"{error}; {said}")
    rate = None if case.run else round(lab.content.length / 1e6 / seconds, 1)
    return Result(name, True, route, round(seconds, 2), rate)


def main() -> int:
    """The table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=int, default=16, help="size of the file (default 16)")
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--run", type=Path, help="a prepared run of digits (default: prepares one)")
    given = parser.parse_args()
    why = cannot_run()
    if why is not None:
        print(json.dumps({"skipped": why}))
        return 0
    end_on_signals()
    results = []
    print(f"{'case':38} {'works':6} {'route':10} {'s':>7} {'MB/s':>7}")
    with work_folder() as folder, internet([name.split()[0] for name in NODES]) as net, children() as kids:
        lab = Lab(net, kids, folder, given.mib * MIB, given.run)
        cases = given.case or list(CASES)
        if given.run is None and any(CASES[case].run for case in cases):
            lab.begin_run()
        for number, case in enumerate(cases):
            result = measure(lab, case, str(number))
            results.append(result)
            cells = ["-" if x is None else f"{x:g}" for x in (result.seconds, result.mb_per_s)]
            works = "yes" if result.works else "NO"
            print(f"{case:38} {works:6} {result.route:10} {cells[0]:>7} {cells[1]:>7}", flush=True)
            if result.why:
                print(f"    {result.why}", file=sys.stderr)
    print(json.dumps({"mib": given.mib, "cases": [asdict(result) for result in results]}))
    return 0 if all(result.works for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
