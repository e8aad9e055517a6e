"""Real processes of one run are killed at random: what is lost, and what is left behind?

    python benchmarks/chaos.py                                    # 3 nodes, 2 clusters, 3 kills
    python benchmarks/chaos.py --nodes 8 --clusters 4 --kills 10 --seconds 300 --steps 2400

A bootstrap node, an organiser and `--nodes` volunteers (`join --until-complete`) train the digits. `--kills`
times within `--seconds` a node, its DHT worker, its p2pd or its trainer gets SIGKILL; which and when follows
from `--seed`, who has the role just then does not. A killed node is started again with the same home after
some seconds; everything else is the node's own business. The last line is JSON:

- `finished`: every role; `exit_codes_ok`: every volunteer ended by itself with 0;
- `lost_steps`, `lost_beyond_safe`: steps trained again because somebody died, and how many of them were in a
  checkpoint that the run had called safe (2 s before); `safe_interval_steps`: the longest stretch between two
  safe steps of one role; `lost_intervals_per_kill`: lost steps by that, over all kills;
- `overlap_s`: the longest time that two nodes trained one role, `lease_s` what it may be;
- `takeover_*_s`: from the death of a training node to the successor's claim, `restart_*_s`: from the death of
  a trainer, DHT worker or p2pd until its node has another;
- `left_behind`: processes, sockets and other files in temporary or runtime folders, locks still held.

Exit status 1 when a bar is missed. Owns: the kills and the reckoning. Does not own: starting programs
(`paris_node.actor`).
"""

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import trio

from paris_node.actor import Actor, Cast
from paris_node.network import NetworkRequest, open_network
from paris_node.runs import find_run
from paris_node.snapshot import observe, take_snapshot
from paris_p2p import clock
from paris_p2p.data.prepare import TINY_LEASE
from paris_p2p.errors import NetworkError, TransportError
from paris_p2p.store.home import Home
from paris_p2p.store.locks import try_lock
from paris_p2p.wire.manifest import check_manifest, sign_manifest

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
KINDS = ("node", "dht", "p2pd", "trainer")
MODULES = {"dht": "paris_p2p.dht.worker", "trainer": "paris_p2p.diffusion.train_worker"}
AWAY_S = (3.0, 8.0)
"""How long a killed node stays away."""
SETTLED_S = 2.0
"""A checkpoint counts as safe when it was seen to be so this long before a kill: observing takes a while."""
WATCH_S = 1.0
OVERTIME_S = 600.0
LEFT_GRACE_S = 5.0


@dataclass(frozen=True)
class Event:
    """One JSON line of one volunteer's life; `at`: when it was read."""

    at: float
    node: str
    life: int
    what: dict[str, Any]


@dataclass
class Stint:
    """One node's training of one role, from its claim on: when and what it said of its steps."""

    role: str
    node: str
    life: int
    term: int
    claimed_at: float
    start_step: int | None = None
    ready_at: float | None = None
    first_at: float | None = None
    last_at: float = 0.0
    last_step: int = 0
    finished: bool = False


@dataclass
class Kill:
    """One SIGKILL. `role`: what the victim's node trained; `safe`: the role's safe step as seen before."""

    at: float
    kind: str
    node: str
    life: int
    role: str | None
    safe: int
    recovered_s: float | None = None


@dataclass
class Story:
    """All that was seen."""

    events: list[Event] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    safe: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    roles: tuple[str, ...] = ()
    exit_codes: dict[str, int | None] = field(default_factory=dict)
    left_behind: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def safe_step(self, role: str, at: float) -> int:
        """The role's safe step as it was seen at a moment."""
        return max((step for seen_at, step in self.safe[role] if seen_at <= at), default=0)


# --- the play --------------------------------------------------------------------------------------


class Chaos:
    """The nodes, and what happens to them."""

    def __init__(self, options: argparse.Namespace, folder: Path, cast: Cast, story: Story) -> None:
        self.options, self.folder, self.cast, self.story = options, folder, cast, story
        self.rng = random.Random(options.seed)
        self.lives: Counter[str] = Counter()
        self.actors: dict[str, Actor] = {}
        self.training: dict[str, str] = {}  # role by node, as far as its events tell
        self.complete = trio.Event()
        self.bootstrap = ""

    async def play(self) -> None:
        """From a data set to a finished run."""
        await self._prepare()
        nodes = [f"n{number}" for number in range(self.options.nodes)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            for node in nodes:
                self.start(node)
            with trio.move_on_after(self.options.seconds + OVERTIME_S):
                await self._kill_now_and_then(nodes, nursery)
                for node in nodes:
                    await self._end_of(node)
            nursery.cancel_scope.cancel()

    async def _prepare(self) -> None:
        out = self.folder / "run"
        arguments = ["prepare", "digits", "--out", str(out), "--name", "chaos", "--json"]
        arguments += ["--clusters", str(self.options.clusters), "--steps", str(self.options.steps)]
        arguments += ["--home", str(self.home("organiser"))]
        await self.cast.start("prepare", arguments).last_event("prepared")
        self._set_lease(out / "manifest.paris")
        listen = ["--listen", LOOPBACK, "--json", "--home"]
        boot = self.cast.start("boot", [*listen, str(self.home("boot"))], program="paris_bootstrap")
        self.bootstrap = str((await boot.event("listening"))["addresses"][0])
        publish = ["publish", str(out), "--bootstrap", self.bootstrap, *listen, str(self.home("organiser"))]
        await self.cast.start("publisher", publish).event("published")

    def _set_lease(self, path: Path) -> None:
        """The lease times are the organiser's to choose, though no option of `prepare` is."""
        manifest = check_manifest(path.read_bytes()).manifest
        lease = replace(manifest.lease, ttl_s=self.options.ttl, renew_s=0.3 * self.options.ttl)
        identity = Home.resolve(self.home("organiser")).identity()
        path.write_bytes(sign_manifest(replace(manifest, lease=lease), identity).data)

    def home(self, node: str) -> Path:
        """The home folder of a node."""
        return self.folder / "homes" / node

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
            self.training[node] = what["role"]
        elif kind in ("finished", "stopped", "failed", "left"):
            self.training.pop(node, None)

    def _note(self, file: str, what: Any) -> None:
        with (self.folder / f"{file}.jsonl").open("a") as lines:
            lines.write(json.dumps([round(clock.monotonic() - STARTED, 2), what]) + "\n")

    async def _end_of(self, node: str) -> None:
        while True:
            actor, life = self.actors[node], self.lives[node]
            await actor.ended.wait()
            code = actor.process.returncode
            if code != -signal.SIGKILL or self.lives[node] == life:
                self.story.exit_codes[node] = code
            if self.lives[node] == life and code != -signal.SIGKILL:
                return
            await trio.sleep(0.1)

    # --- kills -------------------------------------------------------------------------------------

    async def _kill_now_and_then(self, nodes: Sequence[str], nursery: trio.Nursery) -> None:
        """Once training has begun: `--kills` moments, evenly spread with some jitter."""
        while not self.training:
            await trio.sleep(0.2)
        began, pause = clock.monotonic(), self.options.seconds / (self.options.kills + 1)
        for number in range(self.options.kills):
            at = began + (number + self.rng.uniform(0.6, 1.4)) * pause
            kind, dice = self.rng.choice(KINDS), self.rng.random()
            with trio.move_on_after(max(0.0, at - clock.monotonic())):
                await self.complete.wait()
            victim = self._victim(kind, nodes, dice)
            if victim is None or self.complete.is_set():
                return
            self._kill(*victim, kind, nursery)

    def _victim(self, kind: str, nodes: Sequence[str], dice: float) -> tuple[str, psutil.Process] | None:
        """A node that is there, those that train four times as likely, and its process of that kind."""
        found = [(node, process) for node in nodes if (process := self._process(node, kind)) is not None]
        odds = [4 if node in self.training else 1 for node, _ in found]
        return random.Random(dice).choices(found, odds)[0] if found else None

    def _process(self, node: str, kind: str) -> psutil.Process | None:
        actor = self.actors[node]
        if actor.process.poll() is not None:
            return None
        try:
            main = psutil.Process(actor.process.pid)
            if kind == "node":
                return main
            return next((one for one in main.children(recursive=True) if _is(one, kind)), None)
        except psutil.NoSuchProcess:
            return None

    def _kill(self, node: str, process: psutil.Process, kind: str, nursery: trio.Nursery) -> None:
        now, role = clock.monotonic(), self.training.get(node)
        safe = self.story.safe_step(role, now - SETTLED_S) if role else 0
        kill = Kill(now, kind, node, self.lives[node], role, safe)
        self.story.kills.append(kill)
        process.kill()
        say(f"kill {kind} of {node}, training {role}, safe step {safe}")
        if kind == "node":
            self.training.pop(node, None)
            nursery.start_soon(self._return, node, self.rng.uniform(*AWAY_S))
        else:
            nursery.start_soon(self._await_another, kill, process.pid)

    async def _return(self, node: str, after_s: float) -> None:
        await self.actors[node].ended.wait()
        await trio.sleep(after_s)
        self.start(node)

    async def _await_another(self, kill: Kill, pid: int) -> None:
        """Note when the node has a new process of that kind."""
        while self.lives[kill.node] == kill.life and not self.complete.is_set():
            process = self._process(kill.node, kill.kind)
            if process is not None and process.pid != pid:
                kill.recovered_s = clock.monotonic() - kill.at
                return
            await trio.sleep(0.2)

    # --- what the run says of itself ---------------------------------------------------------------

    async def _watch(self) -> None:
        request = NetworkRequest(self.home("viewer"), [self.bootstrap], [LOOPBACK], None, None)
        home = Home.resolve(request.home)
        async with open_network(request, home=home, identity=None, bootstrap=(self.bootstrap,)) as network:
            signed = await find_run(network, None)
            self.story.roles = tuple(signed.manifest.roles)
            while True:
                try:
                    observation = await observe(network.dht, signed)
                except TransportError as error:
                    say(f"the viewer: {error}")
                else:
                    now = clock.monotonic()
                    lines = take_snapshot(observation, signed).roles
                    for line in lines:
                        self.story.safe[line.role].append((now, line.safe_step))
                    self._note(
                        "seen", [[o.role, o.state, o.announced_step, o.providers, o.safe_step] for o in lines]
                    )
                    if observation.finished(signed.manifest.roles):
                        self.complete.set()
                await trio.sleep(WATCH_S)


def _is(process: psutil.Process, kind: str) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    if process.status() == psutil.STATUS_ZOMBIE or not words:
        return False
    return Path(words[0]).name == "p2pd" if kind == "p2pd" else MODULES[kind] in words


def say(line: str) -> None:
    """Progress, for people."""
    print(f"{clock.monotonic() - STARTED:6.1f}s  {line}", file=sys.stderr, flush=True)


STARTED = clock.monotonic()


# --- the reckoning ---------------------------------------------------------------------------------


def stints(events: Iterable[Event]) -> list[Stint]:
    """Who trained what and how far, in the order of the claims."""
    made: list[Stint] = []
    current: dict[str, Stint] = {}
    for event in events:
        kind, stint = event.what.get("event"), current.get(event.node)
        if kind == "claimed":
            role, term = event.what["role"], event.what["term"]
            stint = current[event.node] = Stint(role, event.node, event.life, term, event.at)
            made.append(stint)
        elif stint is None or stint.life != event.life or stint.role != event.what.get("role"):
            continue
        elif kind in ("resumed", "rolled_back"):
            if stint.first_at is not None:  # the trainer died and another goes on under the same lease
                stint = current[event.node] = Stint(stint.role, event.node, event.life, stint.term, event.at)
                made.append(stint)
            stint.start_step, stint.ready_at = int(event.what["step"]), event.at
        elif kind == "step":
            stint.first_at = stint.first_at or event.at
            stint.last_at, stint.last_step = event.at, max(stint.last_step, int(event.what["step"]))
        elif kind == "finished":
            stint.finished = True
    return made


def losses(story: Story, every: Sequence[Stint]) -> tuple[int, int, list[dict[str, Any]]]:
    """Steps trained again, those of them that had been safe, and each case."""
    lost = beyond = 0
    cases = []
    for role in story.roles:
        reached = 0
        for stint in (one for one in every if one.role == role and one.first_at is not None):
            began, first_at = stint.start_step or 0, stint.first_at or 0.0
            if reached > began:
                safe = story.safe_step(role, first_at - SETTLED_S - TINY_LEASE.poll_s)
                cases.append({"role": role, "reached": reached, "resumed": began, "safe": safe})
                lost, beyond = lost + reached - began, beyond + max(0, safe - began)
            reached = max(began, stint.last_step)
    return lost, beyond, cases


def longest_overlap(every: Sequence[Stint]) -> float:
    """Seconds that two nodes stepped one role at once, at most."""
    spans = [(one, one.first_at, one.last_at) for one in every if one.first_at is not None]
    shared = [
        min(end, other_end) - max(begin, other_begin)
        for place, (one, begin, end) in enumerate(spans)
        for other, other_begin, other_end in spans[place + 1 :]
        if one.role == other.role and one.node != other.node
    ]
    return max([0.0, *shared])


def safe_interval(story: Story) -> int:
    """The longest stretch, in steps, between two safe steps seen of one role."""
    longest = 0
    for seen in story.safe.values():
        steps = [0, *(step for _, step in seen)]
        longest = max([longest, *(later - sooner for sooner, later in itertools.pairwise(steps))])
    return longest


def takeovers(story: Story, every: Sequence[Stint]) -> list[float]:
    """Seconds from the death of a training node to the next claim of its role."""
    times = []
    for kill in story.kills:
        if kill.kind == "node" and kill.role is not None:
            later = [one.claimed_at for one in every if one.role == kill.role and one.claimed_at > kill.at]
            times += [min(later) - kill.at] if later else []
    return times


def figures(story: Story, options: argparse.Namespace) -> dict[str, Any]:
    """What the run showed."""
    every = stints(story.events)
    lost, beyond, cases = losses(story, every)
    interval = safe_interval(story)
    took = sorted(takeovers(story, every))
    again = sorted(kill.recovered_s for kill in story.kills if kill.recovered_s is not None)
    done = {one.role for one in every if one.finished}
    return {
        "nodes": options.nodes,
        "roles": len(story.roles),
        "seed": options.seed,
        "steps": options.steps,
        "seconds": round(story.seconds, 1),
        "kills": dict(Counter(kill.kind for kill in story.kills)),
        "finished": sorted(done) == sorted(story.roles),
        "exit_codes_ok": len(story.exit_codes) == options.nodes and not any(story.exit_codes.values()),
        "lost_steps": lost,
        "lost_beyond_safe": beyond,
        "safe_interval_steps": interval,
        "lost_intervals_per_kill": round(lost / max(1, interval) / max(1, len(story.kills)), 2),
        "losses": cases,
        "overlap_s": round(longest_overlap(every), 1),
        "lease_s": options.ttl,
        "takeover_median_s": round(took[len(took) // 2], 1) if took else None,
        "takeover_max_s": round(took[-1], 1) if took else None,
        "restart_median_s": round(again[len(again) // 2], 1) if again else None,
        "restart_max_s": round(again[-1], 1) if again else None,
        "gave_up": sum(event.what.get("event") == "stopped" for event in story.events),
        "failed": sum(event.what.get("event") == "failed" for event in story.events),
        "left_behind": story.left_behind,
    }


def holds(result: dict[str, Any]) -> bool:
    """Whether every bar is met."""
    return bool(
        result["finished"]
        and result["exit_codes_ok"]
        and result["lost_beyond_safe"] == 0
        and result["lost_intervals_per_kill"] <= 1.0
        and result["overlap_s"] <= result["lease_s"]
        and not result["left_behind"]
    )


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
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="the kills happen within this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttl", type=float, default=30.0, help="seconds of a lease: more on a busy machine")
    parser.add_argument("--steps", type=int, default=300, help="of each role: the run must outlast the kills")
    parser.add_argument(
        "--keep", type=Path, help="a new folder for everything, kept (default: a temporary one)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as made:
        folder = (options.keep or Path(made)).resolve()
        (folder / "tmp").mkdir(parents=True)
        os.environ["TMPDIR"] = str(folder / "tmp")
        tempfile.tempdir = None
        story = trio.run(run, options, folder)
    result = figures(story, options)
    print(json.dumps(result))
    return 0 if holds(result) else 1


if __name__ == "__main__":
    sys.exit(main())
