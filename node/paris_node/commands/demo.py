"""`paris-node demo`: the whole loop on this machine, in separate processes over real sockets.

A bootstrap node, an organiser and three volunteers train four experts and a router on handwritten
digits; one volunteer is killed while it trains and another goes on from its last announced checkpoint;
then a node with an empty home fetches the model and draws digits. Owns the script and the screen; every
actor is the very program a person would run.
"""

import shutil
from pathlib import Path
from typing import Any

import trio
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from paris_node.actor import Actor, Cast
from paris_node.judging import Met
from paris_node.network import NetworkRequest, open_network
from paris_node.runs import find_run
from paris_node.snapshot import RoleLine, Snapshot, observe, take_snapshot
from paris_node.views import status_view
from paris_p2p import clock
from paris_p2p.errors import ConfigError, NetworkError, TransportError
from paris_p2p.programs import EXIT_DONE, Output
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import peer_id_text

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
VOLUNTEERS = ("alice", "bob", "carol")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SAMPLES = 8
DEADLINE_S = 1200.0
STORY_LINES = 12
MARKER = "this-is-a-paris-demo"


def run(out: Path, steps: int | None, output: Output) -> int:
    """Run the demo under the folder `out` (made anew)."""
    _fresh_folder(out)
    return trio.run(_demo, out.resolve(), steps, output)


def _fresh_folder(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).exists():
            raise ConfigError(f"{out} is not empty and no earlier demo: choose another folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


async def _demo(out: Path, steps: int | None, output: Output) -> int:
    screen = _Screen(output)
    with trio.move_on_after(DEADLINE_S):
        async with Cast(out / "logs", screen.relay) as cast:
            show = _Show(out, steps, cast, screen)
            with screen.live():
                await show.play()
        show.farewell(output)
        return EXIT_DONE
    raise NetworkError(f"the demo took longer than {DEADLINE_S / 60:.0f} minutes; its logs: {out / 'logs'}")


class _Screen:
    """The live view: the run's status, and the story so far."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._console = Console()
        self._live: Live | None = None
        self._story: list[str] = []
        self._started = clock.monotonic()
        self.snapshot: Snapshot | None = None
        self.names: dict[str, str] = {}

    def live(self) -> Live:
        """The context in which the view is drawn; without a terminal, story lines are printed instead."""
        plain = self._output.as_json or not self._console.is_terminal
        self._live = Live(console=Console(quiet=True) if plain else self._console, auto_refresh=False)
        return self._live

    def tell(self, line: str) -> None:
        """Add a line to the story."""
        seconds = clock.monotonic() - self._started
        self._story.append(f"{seconds:5.0f}s  {line}")
        self._output.event("story", None if self._console.is_terminal else self._story[-1], text=line)
        self.draw()

    def relay(self, actor: str, event: dict[str, Any]) -> None:
        """With `--json`, pass on every event of every actor."""
        self._output.event("actor", actor=actor, said=event)

    def draw(self) -> None:
        """Draw the current state."""
        story = Panel(Text("\n".join(self._story[-STORY_LINES:])), title="what happens", title_align="left")
        parts = [story] if self.snapshot is None else [status_view(self.snapshot, self.names), story]
        if self._live is not None:
            self._live.update(Group(*parts), refresh=True)


class _Show:
    """The script of the demo."""

    def __init__(self, out: Path, steps: int | None, cast: Cast, screen: _Screen) -> None:
        self._out = out
        self._steps = steps
        self._cast = cast
        self._screen = screen
        self._killed: Actor | None = None
        self._kill: dict[str, Any] = {}
        self._model: dict[str, Any] = {}
        self.grid = out / "grid.png"

    async def play(self) -> None:
        """From a data set to images."""
        await self._prepare()
        bootstrap = await self._start_bootstrap()
        await self._start_publisher(bootstrap)
        async with trio.open_nursery() as nursery:
            for name in VOLUNTEERS:
                nursery.start_soon(self._start_volunteer, name, bootstrap)
        await self._watch(bootstrap)
        await self._fetch(bootstrap)
        await self._generate()

    async def _prepare(self) -> None:
        self._screen.tell("the organiser prepares the run: embeds, clusters and shards 1,797 digits")
        more = ["--short-lease", *([] if self._steps is None else ["--steps", str(self._steps)])]
        arguments = ["prepare", "digits", "--out", str(self._out / "run"), "--name", "digits", *more]
        organiser = self._cast.start("organiser-prepare", [*arguments, *self._home("organiser")])
        event = await organiser.last_event("prepared")
        sizes = ", ".join(str(cluster["images"]) for cluster in event["clusters"])
        self._screen.tell(f"run {event['run_id'][:12]} is signed; clusters of {sizes} images")

    async def _start_bootstrap(self) -> str:
        arguments = ["--listen", LOOPBACK, *self._home("bootstrap")]
        bootstrap = self._cast.start("bootstrap", arguments, program="paris_bootstrap")
        event = await bootstrap.event("listening")
        self._screen.tell(f"a bootstrap node listens on {event['addresses'][0][:40]}…")
        return str(event["addresses"][0])

    async def _start_publisher(self, bootstrap: str) -> None:
        arguments = ["publish", str(self._out / "run"), *self._net(bootstrap), *self._home("organiser")]
        publisher = self._cast.start("organiser", arguments)
        await publisher.event("published")
        self._name_of("organiser")
        self._screen.tell("the organiser announces the run and seeds its shards")

    async def _start_volunteer(self, name: str, bootstrap: str) -> None:
        arguments = ["join", "--threads", "1", *self._net(bootstrap), *self._home(name)]
        volunteer = self._cast.start(name, arguments)
        await volunteer.event("joined")
        self._name_of(name)
        self._screen.tell(f"{name} joins")

    def _home(self, name: str) -> list[str]:
        return ["--json", "--home", str(self._out / "homes" / name)]

    @staticmethod
    def _net(bootstrap: str) -> list[str]:
        return ["--bootstrap", bootstrap, "--listen", LOOPBACK]

    def _name_of(self, name: str) -> None:
        identity = Home(self._out / "homes" / name).identity()
        self._screen.names[peer_id_text(identity.node_id)] = name

    async def _watch(self, bootstrap: str) -> None:
        """Follow the run until every role is finished; kill one volunteer on the way."""
        request = NetworkRequest(self._out / "homes" / "viewer", [bootstrap], [LOOPBACK], None, None)
        home = Home.resolve(request.home)
        async with open_network(request, home=home, identity=None, bootstrap=(bootstrap,)) as network:
            signed = await find_run(network, None)
            met = Met()
            while True:
                try:
                    observation = await observe(network.dht, signed, met=met)
                except TransportError:
                    await trio.sleep(1.0)
                    continue
                self._screen.snapshot = take_snapshot(observation, signed)
                self._tell_news()
                self._maybe_kill(self._screen.snapshot)
                self._screen.draw()
                self._check_cast()
                if observation.finished(signed.manifest.roles):
                    break
                await trio.sleep(1.0)
        self._screen.tell("every role is finished")

    def _tell_news(self) -> None:
        """Retell what the volunteers' own event lines say."""
        for actor in self._cast.actors:
            if actor.name in VOLUNTEERS:
                for event in actor.news("claimed", "resumed", "finished"):
                    self._screen.tell(f"{actor.name} {_told(event)}")

    def _maybe_kill(self, snapshot: Snapshot) -> None:
        """Kill the first volunteer whose newest checkpoint is announced by others too, mid-training."""
        if self._killed is not None:
            return
        for line in snapshot.roles:
            if _killable(line):
                name = self._screen.names.get(peer_id_text(line.holder), "") if line.holder else ""
                if name in VOLUNTEERS:
                    self._killed = self._cast.named(name)
                    self._killed.kill()
                    self._kill = {
                        "name": name,
                        "role": line.role,
                        "term": line.term,
                        "step": line.step,
                        "announced_step": line.announced_step,
                    }
                    self._screen.tell(
                        f"{name} is killed (SIGKILL) while training {line.role}, at step {line.step}; its "
                        f"last announced checkpoint is step {line.announced_step}"
                    )
                    return

    def _check_cast(self) -> None:
        for actor in self._cast.actors:
            if actor is not self._killed and actor.died_early:
                raise NetworkError(f"{actor.name} ended unexpectedly; its log is {actor.log_path}")

    async def _fetch(self, bootstrap: str) -> None:
        self._screen.tell("dave, with an empty home, fetches the model")
        arguments = ["fetch-model", "--out", str(self._out / "model"), *self._net(bootstrap)]
        dave = self._cast.start("dave", [*arguments, *self._home("dave")])
        self._model = await dave.last_event("model")
        megabytes = self._model["bytes"] / 1e6
        self._screen.tell(f"{megabytes:.1f} MB verified in {self._model['seconds']:.1f} s")

    async def _generate(self) -> None:
        self._screen.tell(f"dave draws {SAMPLES} samples of each digit")
        prompts = [f"a handwritten digit {digit}" for digit in DIGITS]
        arguments = ["generate", *prompts, "--n", str(SAMPLES), "--grid", str(self.grid)]
        arguments += ["--out", str(self._out / "images")]
        dave = self._cast.start("dave-draws", [*arguments, *self._home("dave")])
        event = await dave.last_event("image")
        self._screen.tell(f"{len(event['paths'])} images in {event['seconds']:.1f} s")

    def farewell(self, output: Output) -> None:
        """What was made, and what to try next."""
        model, home = self._out / "model", self._out / "homes" / "dave"
        output.event(
            "demo",
            f"\n  images   {self.grid}\n  model    {model}\n  logs     {self._out / 'logs'}\n\n"
            "Try next:\n"
            f'  .venv/bin/paris-node generate "a handwritten digit seven" --home {home} --n 4 --seed 7\n'
            "  .venv/bin/python -c 'from paris_p2p.diffusion import ParisPipeline; "
            f'ParisPipeline.from_pretrained("{model}")("a handwritten digit three")'
            f'.images[0].save("three.png")\'\n'
            "  .venv/bin/paris-node prepare YOUR_FOLDER_OF_CAPTIONED_IMAGES --out my-run",
            grid=str(self.grid),
            model=str(model),
            killed=self._kill,
            roles=self._model.get("roles"),
        )


def _killable(line: RoleLine) -> bool:
    mid = line.state == "training" and line.announced_step > 0 and line.step < line.total_steps
    return mid and line.role != "router" and line.providers >= 2 and line.announced_step < line.total_steps


def _told(event: dict[str, Any]) -> str:
    if event["event"] == "claimed":
        return f"claims {event['role']} (term {event['term']})"
    if event["event"] == "resumed":
        return f"goes on with {event['role']} from step {event['step']} (term {event['term']})"
    return f"finishes {event['role']}"
