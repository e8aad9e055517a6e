"""Real processes of one run are killed at random: what is lost, and what is left behind?

    python benchmarks/chaos.py                                    # 3 nodes, 2 clusters, 4 kills
    python benchmarks/chaos.py --nodes 8 --clusters 4 --kills 10 --seconds 300 --steps 300

A bootstrap node, an organiser and `--nodes` volunteers (`join --until-complete`) train the digits. `--kills`
times within `--seconds` a node, its DHT worker, its p2pd or its trainer gets SIGKILL. What and when follows
from `--seed`; from eight kills on every kind hits one that holds a role and, but for trainers, one that
stands by. A killed node is started again with the same home after some seconds; every second holder only when
its lease has run out, so that another takes its role over. Everything else is the nodes' own business.
Trainers are slowed down (SIGSTOP) so that no role is finished before the last kill, on whatever machine.

The last line is JSON. `bars`: each demand with its figure, its limit and whether it is met:
- `roles_finished` (as another member sees it), `volunteers_ended_with_0` by themselves;
- `overlap_s`: the longest time that two nodes trained one role;
- `lost_steps`: steps trained again because somebody died; the limit is the median stretch between two safe
  steps for each kill; `lost_safe_steps`: those of them in a checkpoint that the run had called safe;
- `left_behind`: processes that outlived their node by 8 s; at the end processes, sockets and other files in
  temporary or runtime folders, locks still held.
`each`: the kills; `next_s`: until the next claim of a role after its trainer or node died, `trained_again_s`:
until the next step, `again_s`: until a node had another DHT worker, p2pd or trainer.

Exit status 1 when a bar is missed. Owns: the kills. Does not own: the reckoning (`chaos_story`), starting
programs (`paris_node.actor`).
"""

import argparse
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import trio

from benchmarks.chaos_story import KINDS, SETTLED_S, Event, Kill, Story, figures
from benchmarks.lab.nodes import LOOPBACK, home_of, kind_of, publish_digits, working_folder
from paris_node.actor import Actor, Cast
from paris_node.network import NetworkRequest, open_network
from paris_node.runs import find_run
from paris_node.snapshot import observe, take_snapshot
from paris_p2p import clock
from paris_p2p.errors import NetworkError, TransportError
from paris_p2p.store.home import Home
from paris_p2p.store.locks import try_lock
from paris_p2p.wire.manifest import Manifest

FIRST = (*((kind, True) for kind in KINDS), *((kind, kind == "trainer") for kind in KINDS))
"""Kinds of victim and whether it holds a role: these come first into the draw."""
AWAY_S = (3.0, 8.0)
"""How long a killed node stays away; or as long beyond its lease."""
VICTIM_S = 15.0
"""How long one that fits is waited for: then any is taken."""
WATCH_S = 2.0
COUNT_S = 3.0
OVERTIME_S = 600.0
OUTLIVED_S = 8.0
LEFT_GRACE_S = 5.0


class Chaos:
    """The nodes, and what happens to them."""

    def __init__(self, options: argparse.Namespace, folder: Path, cast: Cast, story: Story) -> None:
        self.options, self.folder, self.cast, self.story = options, folder, cast, story
        self.rng = random.Random(options.seed)
        self.lives: Counter[str] = Counter()
        self.actors: dict[str, Actor] = {}
        self.holding: dict[str, str] = {}  # role by node, as far as its events tell
        self.joined: set[str] = set()
        self.ahead: dict[str, tuple[int, psutil.Process]] = {}  # trainers stopped, and at which step
        self.began = 0.0  # monotonic: the first step
        self.complete = trio.Event()
        self.stays_away = True  # the next holder that is killed
        self.bootstrap = ""

    async def play(self) -> None:
        """From a data set to a finished run."""
        await self._prepare()
        nodes = [f"n{number}" for number in range(self.options.nodes)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            nursery.start_soon(self._count)
            nursery.start_soon(self._let_go_on)
            for node in nodes:
                self.start(node)
            with trio.move_on_after(self.options.seconds + OVERTIME_S):
                await self._kill_now_and_then(nodes, nursery)
                for node in nodes:
                    await self._end_of(node)
            nursery.cancel_scope.cancel()

    async def _prepare(self) -> None:
        clusters, steps = self.options.clusters, self.options.steps
        published = await publish_digits(
            self.cast, self.folder, "chaos", clusters=clusters, steps=steps, change=self._set_times
        )
        self.bootstrap = published.bootstrap

    def _set_times(self, manifest: Manifest) -> Manifest:
        options = self.options
        lease = replace(manifest.lease, ttl_s=options.ttl, renew_s=0.3 * options.ttl, poll_s=options.poll)
        every = max(1, options.steps // options.checkpoints)
        return replace(
            manifest, lease=lease, recipe=replace(manifest.recipe, checkpoint_interval_steps=every)
        )

    def home(self, node: str) -> Path:
        """The home folder of a node."""
        return home_of(self.folder, node)

    def start(self, node: str) -> None:
        """Start a volunteer, for the first time or again."""
        self.lives[node] += 1
        arguments = ["join", "--threads", "1", "--until-complete", "--bootstrap", self.bootstrap]
        arguments += ["--listen", LOOPBACK, "--json", "--home", str(self.home(node))]
        self.actors[node] = self.cast.start(f"{node}.{self.lives[node]}", arguments)

    def hear(self, actor: str, what: dict[str, Any]) -> None:
        """One event of one program."""
        node, _, life = actor.partition(".")
        if not life:
            return
        event = Event(clock.monotonic(), node, int(life), what)
        self.story.events.append(event)
        self._note("events", [node, int(life), what])
        kind = what.get("event")
        if kind == "step":
            self._slow_down(node, what["step"])
        elif kind == "joined":
            self.joined.add(node)
        elif kind == "claimed":
            self.holding[node] = what["role"]
        elif kind in ("finished", "stopped", "failed", "left"):
            self.holding.pop(node, None)

    # --- pace --------------------------------------------------------------------------------------

    def _allowed(self) -> float:
        """The step that a role may have reached by now: the last one after `--seconds`."""
        share = (clock.monotonic() - self.began) / self.options.seconds
        return self.options.steps * share if share < 1.0 else float("inf")

    def _slow_down(self, node: str, step: int) -> None:
        self.began = self.began or clock.monotonic()
        if step <= self._allowed() or node in self.ahead:
            return
        trainer = self._process(node, "trainer")
        if trainer is not None:
            with suppress(psutil.NoSuchProcess):
                trainer.suspend()
                self.ahead[node] = (step, trainer)

    async def _let_go_on(self) -> None:
        """Let trainers that were stopped go on when it is time."""
        while True:
            await trio.sleep(0.3)
            for node, (step, trainer) in list(self.ahead.items()):
                if step <= self._allowed():
                    del self.ahead[node]
                    with suppress(psutil.NoSuchProcess):
                        trainer.resume()

    def _note(self, file: str, what: Any) -> None:
        with (self.folder / f"{file}.jsonl").open("a") as lines:
            lines.write(json.dumps([round(clock.monotonic() - STARTED, 2), what]) + "\n")

    async def _end_of(self, node: str) -> None:
        """Until the node has ended and is not to be started again."""
        while True:
            actor, life = self.actors[node], self.lives[node]
            await actor.ended.wait()
            code = actor.process.returncode
            if self.lives[node] == life and code != -signal.SIGKILL:
                self.story.exit_codes[node] = code
                return
            await trio.sleep(0.1)

    # --- kills -------------------------------------------------------------------------------------

    def _plan(self) -> list[tuple[str, bool]]:
        """Kinds of victim and whether it holds a role, in their order."""
        more = [(self.rng.choice(KINDS), self.rng.random() < 0.7) for _ in range(self.options.kills)]
        plan = [*FIRST, *more][: self.options.kills]
        self.rng.shuffle(plan)
        return plan

    async def _kill_now_and_then(self, nodes: Sequence[str], nursery: trio.Nursery) -> None:
        """Once training has begun: `--kills` moments, evenly spread with some jitter."""
        while not self.began:
            await trio.sleep(0.2)
        began, pause = self.began, self.options.seconds / (self.options.kills + 1)
        for number, (kind, holds) in enumerate(self._plan()):
            at = began + (number + self.rng.uniform(0.6, 1.4)) * pause
            with trio.move_on_after(max(0.0, at - clock.monotonic())):
                await self.complete.wait()
            found = await self._wait_for_victim(kind, holds, nodes)
            if found is None:
                say("the run is complete before all kills: give it more --steps")
                return
            self._kill(kind, *found, nursery)

    async def _wait_for_victim(
        self, kind: str, holds: bool, nodes: Sequence[str]
    ) -> tuple[str, psutil.Process] | None:
        """A node and its process of that kind; any node's, when none that fits comes up in time."""
        late = clock.monotonic() + VICTIM_S
        while not self.complete.is_set():
            patient = clock.monotonic() < late
            wished = [node for node in nodes if node in self.joined and (node in self.holding) == holds]
            for node in self.rng.sample(wished, len(wished)) if patient else [*wished, *nodes]:
                process = self._process(node, kind)
                if process is not None:
                    return node, process
            await trio.sleep(0.3)
        return None

    def _process(self, node: str, kind: str) -> psutil.Process | None:
        actor = self.actors[node]
        if actor.process.poll() is not None:
            return None
        try:
            main = psutil.Process(actor.process.pid)
            if kind == "node":
                return main
            return next((one for one in main.children(recursive=True) if kind_of(one) == kind), None)
        except psutil.NoSuchProcess:
            return None

    def _kill(self, kind: str, node: str, process: psutil.Process, nursery: trio.Nursery) -> None:
        now, role = clock.monotonic(), self.holding.get(node)
        safe = self.story.safe_step(role, now - SETTLED_S) if role else 0
        kill = Kill(now, kind, node, self.lives[node], role, safe)
        self.story.kills.append(kill)
        theirs = process.children(recursive=True)
        if kind in ("node", "trainer"):
            self.ahead.pop(node, None)
        process.kill()
        say(f"kill {kind} of {node}, holding {role}, safe step {safe}")
        nursery.start_soon(self._look_for_orphans, kill, theirs)
        if kind != "node":
            nursery.start_soon(self._await_another, kill, process.pid)
            return
        away_s = self.rng.uniform(*AWAY_S)
        if role is not None:
            kill.gone, self.stays_away = self.stays_away, not self.stays_away
        self.holding.pop(node, None)
        self.joined.discard(node)
        nursery.start_soon(self._return, node, away_s + (self.options.ttl if kill.gone else 0.0))

    async def _return(self, node: str, after_s: float) -> None:
        await self.actors[node].ended.wait()
        await trio.sleep(after_s)
        self.start(node)

    async def _look_for_orphans(self, kill: Kill, theirs: Sequence[psutil.Process]) -> None:
        await trio.sleep(OUTLIVED_S)
        for one in theirs:
            if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                self.story.orphans.append(f"{kill.kind} of {kill.node}: {' '.join(one.cmdline())[:120]}")

    async def _await_another(self, kill: Kill, pid: int) -> None:
        """Note when the node has a new process of that kind."""
        while self.lives[kill.node] == kill.life and not self.complete.is_set():
            process = self._process(kill.node, kill.kind)
            if process is not None and process.pid != pid:
                kill.again_s = clock.monotonic() - kill.at
                return
            await trio.sleep(0.2)

    async def _count(self) -> None:
        """What the processes use."""
        while True:
            resident = 0
            for one in psutil.Process().children(recursive=True):
                try:
                    times, kind = one.cpu_times(), kind_of(one)
                    resident += one.memory_info().rss
                except psutil.Error:
                    continue
                if kind:
                    self.story.cpu[kind, one.pid] = times.user + times.system
            self.story.peak_bytes = max(self.story.peak_bytes, resident)
            await trio.sleep(COUNT_S)

    # --- what the run says of itself ---------------------------------------------------------------

    async def _watch(self) -> None:
        request = NetworkRequest(self.home("viewer"), [self.bootstrap], [LOOPBACK], None, None)
        home = Home.resolve(request.home)
        async with open_network(request, home=home, identity=None, bootstrap=(self.bootstrap,)) as network:
            signed = await find_run(network, None)
            roles = signed.manifest.roles
            self.story.roles = tuple(roles)
            while True:
                try:
                    observation = await observe(network.dht, signed)
                except TransportError as error:
                    say(f"the viewer: {error}")
                else:
                    lines = take_snapshot(observation, signed).roles
                    now = clock.monotonic()
                    for line in lines:
                        if line.safe_step > self.story.safe_step(line.role, now):
                            self.story.safe[line.role].append((now, line.safe_step))
                    self._note(
                        "seen", [[x.role, x.state, x.step, x.announced_step, x.safe_step] for x in lines]
                    )
                    if observation.finished(roles):
                        self.story.complete = True
                        self.complete.set()
                await trio.sleep(WATCH_S)


def say(line: str) -> None:
    """Progress, for people."""
    print(f"{clock.monotonic() - STARTED:6.1f}s  {line}", file=sys.stderr, flush=True)


STARTED = clock.monotonic()


def left_behind(folder: Path) -> list[str]:
    """What still runs of ours, lies in the temporary and runtime folders, or is locked."""
    temporary = str(folder / "tmp")
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        ours = (process.info["environ"] or {}).get("TMPDIR") == temporary
        if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            found.append(f"process {process.pid} {' '.join(process.info['cmdline'] or [])[:120]}")
    kept = ("tmp/*", "homes/*/run/*", "homes/*/work/*/*")
    found += [str(path.relative_to(folder)) for pattern in kept for path in folder.glob(pattern)]
    for path in folder.glob("homes/*/*.lock"):
        lock = try_lock(path)
        if lock is None:
            found.append(f"{path.relative_to(folder)} is held")
        else:
            lock.release()
    return found


async def run(options: argparse.Namespace, folder: Path) -> Story:
    """The whole play; nothing of it runs any more when this returns."""
    story = Story()
    began = clock.monotonic()
    chaos: list[Chaos] = []
    async with Cast(folder / "logs", lambda actor, what: chaos[0].hear(actor, what)) as cast:
        chaos.append(Chaos(options, folder, cast, story))
        try:
            await chaos[0].play()
        except* NetworkError as group:
            say("; ".join(str(error) for error in group.exceptions))
        story.seconds = clock.monotonic() - began
    with trio.move_on_after(LEFT_GRACE_S):
        while left_behind(folder):
            await trio.sleep(0.2)
    story.left_behind = left_behind(folder)
    return story


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--clusters", type=int, default=2, help="roles are these and the router")
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=40.0, help="the kills happen within this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttl", type=float, default=30.0, help="seconds of a lease: more on a busy machine")
    parser.add_argument("--poll", type=float, default=5.0, help="seconds between two looks at the run")
    parser.add_argument("--steps", type=int, default=200, help="of each role")
    parser.add_argument("--checkpoints", type=int, default=5, help="of each role")
    parser.add_argument(
        "--keep", type=Path, help="a new folder for everything, kept (default: a temporary one)"
    )
    options = parser.parse_args()
    with working_folder("chaos-", options.keep) as folder:
        story = trio.run(run, options, folder)
    shown = {name: getattr(options, name) for name in ("nodes", "clusters", "seed", "steps", "ttl", "poll")}
    found = figures(story, nodes=options.nodes, kills=options.kills, lease_s=options.ttl)
    print(json.dumps({**shown, **found}))
    return 0 if all(bar["met"] for bar in found["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
