"""What a node costs that has nothing to do: CPU seconds a minute of its processes, by what it is.

    python benchmarks/idle_cost.py --holders 3 --standby 3 --seconds 60 [--poll 10 --ttl 60 --renew 20]

A bootstrap node, an organiser and volunteers: `--holders` hold a role each, their trainers are stopped
(SIGSTOP) once they run, so that only the node's own work is seen; the others stand by. Then the CPU time of
every process over `--seconds` is taken from the system. The last line is JSON: for each kind of node and each
of its processes (`node`, `dht`, `p2pd`) the mean of CPU seconds a minute, and of resident memory in MB.

Owns: the measurement. Does not own: starting programs (`paris_node.actor`).
"""

import argparse
import json
import signal
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import trio

from benchmarks.lab.nodes import LOOPBACK, home_of, kind_of, publish_digits, working_folder
from paris_node.actor import Actor, Cast
from paris_p2p import clock
from paris_p2p.wire.manifest import Manifest

SETTLE_S = 20.0
"""After the last trainer has started: everything has been copied and announced by then."""


def processes(actor: Actor) -> dict[str, psutil.Process]:
    """A program's processes by kind."""
    main = psutil.Process(actor.process.pid)
    processes = (main, *main.children(recursive=True))
    return {kind: one for one in processes if (kind := kind_of(one))}


class Measurement:
    """The programs, and what is measured of them."""

    def __init__(self, options: argparse.Namespace, folder: Path, cast: Cast) -> None:
        self.options, self.folder, self.cast = options, folder, cast
        self.kinds: dict[str, list[Actor]] = defaultdict(list)
        self.claimed: set[str] = set()

    def set_lease(self, manifest: Manifest) -> Manifest:
        """The times asked for."""
        options = self.options
        lease = replace(manifest.lease, ttl_s=options.ttl, renew_s=options.renew, poll_s=options.poll)
        return replace(manifest, lease=lease)

    async def prepare(self) -> list[str]:
        """The run and its publisher; the options every further node needs."""
        clusters = self.options.holders - 1
        published = await publish_digits(
            self.cast, self.folder, "idle", clusters=clusters, steps=100_000, change=self.set_lease
        )
        self.kinds["bootstrap"].append(published.boot)
        self.kinds["publisher"].append(published.publisher)
        listen = ["--listen", LOOPBACK, "--json", "--home"]
        return ["join", "--threads", "1", "--bootstrap", published.bootstrap, *listen]

    async def start(self) -> None:
        """All nodes, the trainers stopped."""
        join = await self.prepare()
        for number in range(self.options.holders + self.options.standby):
            name = f"n{number}"
            actor = self.cast.start(name, [*join, str(home_of(self.folder, name))])
            if number < self.options.holders:
                await actor.event("step")
                processes(actor)["trainer"].send_signal(signal.SIGSTOP)
                self.kinds["holder"].append(actor)
            else:
                self.kinds["standby"].append(actor)
        await trio.sleep(SETTLE_S)

    async def measure(self) -> dict[str, Any]:
        """CPU seconds a minute and megabytes, by kind of node and process."""
        before = self.look()
        started = clock.monotonic()
        await trio.sleep(self.options.seconds)
        minutes = (clock.monotonic() - started) / 60.0
        found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for (kind, name, process), (cpu_s, rss) in self.look().items():
            spent = cpu_s - before[kind, name, process][0]
            found[kind][process].append((spent / minutes, rss / 1e6))
        return {
            kind: {
                process: {
                    "cpu_s_per_min": round(mean(cpu for cpu, _ in some), 2),
                    "rss_mb": round(mean(rss for _, rss in some)),
                }
                for process, some in by_process.items()
            }
            for kind, by_process in found.items()
        }

    def look(self) -> dict[tuple[str, str, str], tuple[float, float]]:
        """CPU seconds so far and resident bytes, by (kind of node, its name, process)."""
        seen = {}
        for kind, actors in self.kinds.items():
            for actor in actors:
                for process, one in processes(actor).items():
                    if process != "trainer":
                        times = one.cpu_times()
                        seen[kind, actor.name, process] = (times.user + times.system, one.memory_info().rss)
        return seen

    def resume(self) -> None:
        """Stopped trainers end by themselves only when they run."""
        for actor in self.kinds["holder"]:
            processes(actor)["trainer"].send_signal(signal.SIGCONT)


async def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything; nothing of it runs any more when this returns."""
    async with Cast(folder / "logs", lambda _actor, _event: None) as cast:
        measurement = Measurement(options, folder, cast)
        await measurement.start()
        figures = await measurement.measure()
        measurement.resume()
        return figures


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--holders", type=int, default=3, help="and as many roles")
    parser.add_argument("--standby", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--poll", type=float, default=10.0)
    parser.add_argument("--ttl", type=float, default=60.0)
    parser.add_argument("--renew", type=float, default=20.0)
    parser.add_argument(
        "--keep", type=Path, help="a new folder for everything, kept (default: a temporary one)"
    )
    options = parser.parse_args()
    with working_folder("idle-", options.keep) as folder:
        figures = trio.run(run, options, folder)
    print(json.dumps({"poll_s": options.poll, "ttl_s": options.ttl, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
