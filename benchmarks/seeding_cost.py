"""How much serving slows a training step on the same machine (bar: 3 %).

    python benchmarks/seeding_cost.py --seconds 5 --rounds 2

A trainer of the tiny recipe (started as a node starts it, with one thread, as a node gives it on two cores)
trains all the time; a seeder beside it serves a leecher at 50 Mbit/s, or one at full speed, and nobody before
and after each: a window counts against the mean of its two idle neighbours, so that slow spells cancel.
`--cores all`: the system places trainer and seeder, as on any machine; the leecher, which stands for another
machine, keeps to the last core. `split`: the trainer has the first core to itself. `one`: trainer and seeder
share it, and every CPU second of serving is taken from training. Needs root for the lines.
The last line is JSON: training steps/s while idle, and what each way of serving takes from them.

Owns: that measurement. Does not own: the trainer (`paris_p2p.diffusion`), the swarm.
"""

import argparse
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import trio

from benchmarks.lab.children import Child, Children, children, cpu_of, end_on_signals
from benchmarks.lab.content import MIB, Content, make_content, work_folder
from benchmarks.lab.local import start_leecher, start_seeder
from benchmarks.lab.namespaces import Link, Star, cannot_run, star
from benchmarks.lab.noise import Load, spread
from paris_p2p import clock
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.manifest import check_manifest
from paris_p2p.workers.spawn import Worker, open_worker

TRAINER = "paris_p2p.diffusion.train_worker"
STEPS = 1_000_000  # never done; a checkpoint every quarter of it, so none either
PREPARE_S = 300.0
SETTLE_S = 1.0
SERVING_S = 30.0
SERVING_BYTES = 1 << 20
IDLE = "idle"
MODES = ("50mbit", "full")
HOME_LINE = 1
FAST_LINE = 2


@dataclass(slots=True)
class Trainer:
    """What the trainer has told: (arrival in monotonic seconds, step)."""

    worker: Worker
    seen: list[tuple[float, int]] = field(default_factory=list)

    async def listen(self) -> None:
        """Until cancelled."""
        while True:
            message = await self.worker.receive()
            if message["type"] == "error":
                raise RuntimeError(f"the trainer failed: {message.get('message')}")
            if message["type"] == "step":
                self.seen.append((clock.monotonic(), int(message["step"])))

    def rate(self, since: float) -> float:
        """Steps a second from the first report after `since` to the last."""
        seen = [(when, step) for when, step in self.seen if when >= since]
        (began, first), (ended, last) = seen[0], seen[-1]
        return (last - first) / (ended - began)


def prepare_run(kids: Children, folder: Path) -> Path:
    """A tiny run of digits, by the command itself; its folder."""
    argv = [sys.executable, "-m", "paris_node", "prepare", "digits", "--clusters", "2"]
    argv += ["--steps", str(STEPS), "--out", str(folder / "run"), "--home", str(folder / "home"), "--json"]
    child = kids.start(argv, folder / "prepare")
    if child.wait(PREPARE_S) != 0:
        raise RuntimeError(f"prepare failed: {child.errors()}")
    return folder / "run"


@asynccontextmanager
async def training(run: Path, out: Path, cores: set[int]) -> AsyncIterator[Trainer]:
    """A trainer of expert 0 on the given cores, started as a node starts it."""
    manifest = check_manifest((run / "manifest.paris").read_bytes()).manifest
    store = ContentStore(run / "store")
    cluster = manifest.clusters[0]
    train, heldout = store.files(cluster.train.info_hash), store.files(cluster.heldout.info_hash)
    shard = {"cluster": cluster.index, "train": str(train), "heldout": str(heldout)}
    start = {"type": "start", "manifest": str(run / "manifest.paris"), "role": "expert-0", "variant": 0}
    rest = {"device": "cpu", "shards": [shard], "resume": None, "out": str(out), "threads": 1}
    async with open_worker(TRAINER) as worker:
        os.sched_setaffinity(worker.pid, cores)  # before it starts threads: they inherit it
        await worker.send({**start, **rest})
        trainer = Trainer(worker)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trainer.listen)
            with trio.fail_after(120):
                while len(trainer.seen) < 4:
                    await trio.sleep(0.1)
            yield trainer
            nursery.cancel_scope.cancel()


@dataclass(slots=True)
class Figure:
    """One window: training steps a second and a CPU second of the trainer's, the share of the time in which
    it waited for a core, MB/s served, share of a core that the seeder used."""

    mode: str
    steps_per_s: float
    steps_per_cpu_s: float
    waited: float
    served_mb_s: float
    seeder_cpu: float


class Bench:
    """One trainer and one seeder; leechers come and go."""

    def __init__(self, kids: Children, net: Star, content: Content, folder: Path) -> None:
        self.kids, self.net, self.content, self.folder = kids, net, content, folder
        self.fetches = 0

    def seed(self, cores: set[int]) -> None:
        """Start the seeder on the given cores."""
        enter = [*self.net.enter(0), "taskset", "-c", ",".join(map(str, sorted(cores)))]
        started = start_seeder(self.kids, self.content, self.folder, self.net.ip(0), enter)
        self.seeder, self.info_hash, self.addresses = started

    def leech(self, mode: str, core: int) -> Child:
        """A fresh leecher on a core of its own."""
        self.fetches += 1
        folder = self.folder / f"leecher{self.fetches}"
        folder.mkdir()
        node = HOME_LINE if mode == "50mbit" else FAST_LINE
        enter = [*self.net.enter(node), "taskset", "-c", str(core)]
        return start_leecher(self.kids, self.info_hash, self.addresses, folder, self.net.ip(node), enter)

    async def window(self, trainer: Trainer, mode: str, seconds: float, core: int) -> Figure:
        """Train for `seconds` while serving as `mode` says."""
        leecher = self.leech(mode, core) if mode != IDLE else None
        await self.until_served(leecher)
        await trio.sleep(SETTLE_S)
        before = self.look(trainer)
        while clock.monotonic() < before.when + seconds:
            await trio.sleep(0.1)
            if leecher is not None and leecher.poll() is not None:
                if leecher.rc != 0:
                    raise RuntimeError(f"a leecher ended with {leecher.rc}: {leecher.errors()}")
                leecher = self.leech(mode, core)
        figure = before.until(self.look(trainer), mode, trainer.rate(before.when))
        if leecher is not None:
            leecher.stop()
        return figure

    async def until_served(self, leecher: Child | None) -> None:
        """A leecher's start takes CPU seconds that another machine would have."""
        sent = self.net.counters()[0][0]
        with trio.fail_after(SERVING_S):
            while leecher is not None and self.net.counters()[0][0] < sent + SERVING_BYTES:
                await trio.sleep(0.05)

    def look(self, trainer: Trainer) -> "Look":
        """All counters now."""
        pid = trainer.worker.pid
        sent = self.net.counters()[0][0]
        return Look(clock.monotonic(), sent, self.seeder.cpu_now_s(), cpu_of(pid), waited_s(pid))


@dataclass(frozen=True, slots=True)
class Look:
    """Counters at a moment, in seconds and bytes."""

    when: float
    sent: int
    seeder_cpu: float
    trainer_cpu: float
    trainer_waited: float

    def until(self, later: "Look", mode: str, steps_per_s: float) -> Figure:
        """What happened in between."""
        took = later.when - self.when
        return Figure(
            mode,
            steps_per_s,
            steps_per_s * took / (later.trainer_cpu - self.trainer_cpu),
            (later.trainer_waited - self.trainer_waited) / took,
            (later.sent - self.sent) / took / 1e6,
            (later.seeder_cpu - self.seeder_cpu) / took,
        )


def waited_s(pid: int) -> float:
    """Seconds that a process's threads were ready to run and had no core; 0 where the kernel does not say."""
    try:
        found = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    except OSError:
        return 0.0
    return sum(int(fields[1]) for fields in found) / 1e9


async def measure(
    bench: Bench, run: Path, rounds: int, seconds: float, cores: set[int]
) -> list[tuple[Figure, Figure, Figure]]:
    """Each window of serving between its idle neighbours; `cores`: the trainer's."""
    found = []
    core = max(os.sched_getaffinity(0))
    async with training(run, bench.folder / "trainer", cores) as trainer:

        async def window(mode: str) -> Figure:
            figure = await bench.window(trainer, mode, seconds, core)
            print(figure, file=sys.stderr, flush=True)
            return figure

        before = await window(IDLE)
        for number in range(rounds):
            for mode in MODES if number % 2 == 0 else MODES[::-1]:
                serving, after = await window(mode), await window(IDLE)
                found.append((before, serving, after))
                before = after
    return found


def report(windows: Sequence[tuple[Figure, Figure, Figure]]) -> dict[str, object]:
    """Steps/s while idle; for each way of serving: the share of training lost, window by window."""
    made: dict[str, object] = {"idle_steps_per_s": spread([before.steps_per_s for before, _, _ in windows])}
    for mode in MODES:
        mine = [three for three in windows if three[1].mode == mode]
        serving = [one for _, one, _ in mine]
        made[mode] = {
            "training_lost": spread([1 - one.steps_per_s / _idle(b, a, "steps_per_s") for b, one, a in mine]),
            "step_cpu_more": spread(
                [_idle(b, a, "steps_per_cpu_s") / one.steps_per_cpu_s - 1 for b, one, a in mine]
            ),
            "waited_more": spread([one.waited - _idle(b, a, "waited") for b, one, a in mine]),
            "served_mb_s": round(median(f.served_mb_s for f in serving), 2),
            "seeder_cpu": round(median(f.seeder_cpu for f in serving), 3),
        }
    return made


def _idle(before: Figure, after: Figure, name: str) -> float:
    """Of the idle windows on both sides."""
    return (float(getattr(before, name)) + float(getattr(after, name))) / 2


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; the last line on stdout is JSON."""
    parser = argparse.ArgumentParser(description="what serving costs training")
    parser.add_argument("--seconds", type=float, default=4, help="length of one window")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--run", type=Path, help="a run of digits that `prepare` made for 1,000,000 steps")
    parser.add_argument("--cores", choices=("all", "split", "one"), default="all", help="who may use which")
    given = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    reason = cannot_run() or (None if len(cores) > 1 else "two cores are needed: the leecher has one")
    if reason is not None:
        print(json.dumps({"benchmark": "seeding_cost", "skipped": reason}))
        return
    end_on_signals()
    trainers = set(cores) if given.cores == "all" else {cores[0]}
    seeders = {"all": set(cores), "split": set(cores[1:]), "one": {cores[0]}}[given.cores]
    links = [Link(0, 0), Link(50, 50), Link(0, 0)]
    with work_folder() as folder, children() as kids, star(links) as net, Load() as load:
        run = given.run or prepare_run(kids, folder)
        content = make_content(folder / "source" / "content.bin", given.mib * MIB, 1 << 20)
        bench = Bench(kids, net, content, folder)
        bench.seed(seeders)
        figures = trio.run(measure, bench, run, given.rounds, given.seconds, trainers)
    made = {"benchmark": "seeding_cost", "cores": given.cores, "busy_cores": round(load.others(0), 2)}
    print(json.dumps({**made, **report(figures)}))


if __name__ == "__main__":
    main()
