"""`paris-node fetch-model`: gather a run's model from its peers into a diffusers folder."""

import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from paris_node.bars import Bars, byte_bars
from paris_node.checker import check_weights_item
from paris_node.commands.status import run_selector
from paris_node.judging import Candidate
from paris_node.keeping import announce_for_now
from paris_node.network import Network, NetworkRequest, bootstrap_addresses, open_network
from paris_node.pausing import UntilRoom
from paris_node.runs import find_run
from paris_node.snapshot import Observation, observe
from paris_node.text import counted, printable
from paris_p2p import clock
from paris_p2p.errors import IncompleteError, RemoteProtocolError, TransportError
from paris_p2p.ids import Role
from paris_p2p.net.swarm import Progress as FetchProgress
from paris_p2p.programs import EXIT_DONE, Output
from paris_p2p.store.home import Home
from paris_p2p.store.model_folder import SUMMARY_NAME, refuse_foreign, write_model_folder
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import SignedManifest
from paris_p2p.wire.terms import term_number
from paris_p2p.workers.nursery import open_inner_nursery

STALL_S = 60.0
UNCHECKED_STALL_S = 15.0
"""For checkpoints that are only their signers' word: nobody need serve them."""
SHOWN_PROMPTS = 2
CANDIDATES_PER_ROLE = 16
"""Checked ones come first. Of the others many may have to be tried: each is dropped when nobody serves it, or
its weights are not what the recipe asks for."""


def run(request: NetworkRequest, out: Path | None, allow_partial: bool, output: Output) -> int:
    """Fetch the model and write it to `out` (default: the home's models folder)."""
    home = Home.resolve(request.home)
    bootstrap = bootstrap_addresses(request, home)
    if out is not None:
        refuse_foreign(out)
    return trio.run(_fetch_model, request, home, bootstrap, out, allow_partial, output)


async def _fetch_model(
    request: NetworkRequest,
    home: Home,
    bootstrap: tuple[str, ...],
    out: Path | None,
    allow_partial: bool,
    output: Output,
) -> int:
    started = clock.monotonic()
    async with open_network(request, home=home, identity=None, bootstrap=bootstrap) as network:
        _say_waiting(output, "looking for the run")
        signed = await find_run(network, run_selector(request, home))
        _say_waiting(output, f"looking for the checkpoints of {printable(signed.manifest.name)}")
        folder = out if out is not None else default_folder(home, signed)
        refuse_foreign(folder)  # before anything is downloaded
        observation = await observe(network.dht, signed)
        _refuse_incomplete(signed, observation, allow_partial, output)
        gathering = _Gathering(network, signed, observation, output, UntilRoom(output))
        async with open_inner_nursery() as nursery:
            nursery.start_soon(announce_for_now, network)  # many may be after one model at once
            await gathering.run()
            nursery.cancel_scope.cancel()
    missing = [role for role in signed.manifest.roles if role not in gathering.weights]
    if missing and not allow_partial:
        output.event("incomplete", missing=missing)
        raise IncompleteError(_missing_message(missing) + f"; reasons: {'; '.join(gathering.reasons)}")
    await trio.to_thread.run_sync(
        lambda: write_model_folder(
            folder, signed, gathering.weights, gathering.components, gathering.statements
        )
    )
    home.remember(
        bootstrap=list(bootstrap),
        run_id=signed.run_id.hex(),
        model=str(folder.resolve()),
    )
    _report(output, folder, gathering, missing, clock.monotonic() - started, request.home)
    return EXIT_DONE


def _say_waiting(output: Output, what: str) -> None:
    """On a terminal: what the first minute goes by with, before there are bars."""
    if not output.as_json and sys.stderr.isatty():
        print(f"{what} …", file=sys.stderr, flush=True)


def default_folder(home: Home, signed: SignedManifest) -> Path:
    """The model's folder in the home: named like the run, as far as a stranger's name can be a file's."""
    name = re.sub(r"[^\w .-]", "_", signed.manifest.name).strip(" .") or "model"
    folder = home.models / name
    other = _run_of(folder)
    return (
        folder if other in (None, signed.run_id.hex()) else home.models / f"{name}-{signed.run_id.hex()[:12]}"
    )


def _run_of(folder: Path) -> str | None:
    """The run (hex) whose model is in `folder`, if one is."""
    try:
        return str(json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_incomplete(
    signed: SignedManifest, observation: Observation, allow_partial: bool, output: Output
) -> None:
    """Before anything is downloaded: say which roles nobody announces."""
    missing = [role for role in signed.manifest.roles if not observation.candidates[role]]
    if missing and (not allow_partial or len(missing) == len(signed.manifest.roles)):
        output.event("incomplete", missing=missing)
        raise IncompleteError(_missing_message(missing))


def _missing_message(missing: list[Role]) -> str:
    return (
        f"no checkpoint can be had of: {', '.join(missing)}. Wait until they are trained (paris-node status "
        "shows how far they are), or pass --allow-partial to use what there is"
    )


def _report(
    output: Output,
    folder: Path,
    gathering: "_Gathering",
    missing: list[Role],
    seconds: float,
    home: Path | None,
) -> None:
    roles = {
        role: {
            "step": s.step,
            "total_steps": s.total_steps,
            "term": term_number(s.term),
            "heldout_loss": s.heldout_loss,
            "checked": role in gathering.vouched,
        }
        for role, s in gathering.statements.items()
    }
    doubtful = sorted(gathering.statements.keys() - gathering.vouched)
    total = sum(gathering.done.values())
    text = f"model in {folder}: {counted(len(roles), 'role')}, {total / 1e6:.1f} MB in {seconds:.1f} s"
    text += _unfinished(gathering.statements.values())
    if missing:
        text += f"; missing: {', '.join(missing)}"
    if doubtful:
        text += (
            f"\nonly their makers vouch for: {', '.join(doubtful)} (the format is right, the quality unknown)"
        )
    output.event(
        "model",
        text + _next(gathering.signed.manifest.example_prompts, home),
        path=str(folder.resolve()),
        bytes=total,
        seconds=round(seconds, 3),
        roles=roles,
        missing=missing,
    )


def _unfinished(statements: Iterable[CheckpointStatement]) -> str:
    """Which roles are still being trained, if any are."""
    some = [f"{s.role} at {s.step} of {s.total_steps}" for s in statements if not s.finished]
    if not some:
        return ""
    return f"\nnot finished yet: {', '.join(sorted(some))}. Run the same command again for a newer one"


def _next(prompts: Sequence[str], home: Path | None) -> str:
    """What to do with the model; `prompts`: the organiser's examples."""
    where = "" if home is None else f" --home {shlex.quote(str(home))}"
    shown = [printable(prompt) for prompt in prompts[:SHOWN_PROMPTS]] or ["your prompt"]
    return f"\nnext: paris-node generate {shlex.quote(shown[0])}{where}" + "".join(
        f"\n  or: paris-node generate {shlex.quote(prompt)}{where}" for prompt in shown[1:]
    )


@dataclass(slots=True)
class _Gathering:
    """The fetches of one model, side by side, with a bar each and one in total."""

    network: Network
    signed: SignedManifest
    observation: Observation
    output: Output
    room: UntilRoom
    weights: dict[Role, Path] = field(default_factory=dict)
    statements: dict[Role, CheckpointStatement] = field(default_factory=dict)
    vouched: set[Role] = field(default_factory=set)
    components: dict[str, Path] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)

    async def run(self) -> None:
        """Fetch components and the best valid checkpoint of every role."""
        with byte_bars(self.output) as bars:
            bars.show("total", 0, self._expected())
            async with open_inner_nursery() as nursery:
                for name, ref in self.signed.manifest.components.items():
                    nursery.start_soon(self._component, bars, name, ref)
                for role in self.signed.manifest.roles:
                    nursery.start_soon(self._role, bars, role)

    def _expected(self) -> int:
        components = sum(ref.length for ref in self.signed.manifest.components.values())
        bests = [self.observation.best(role) for role in self.signed.manifest.roles]
        return components + sum(best.weights.length for best in bests if best is not None)

    async def _component(self, bars: Bars, name: str, ref: ContentRef) -> None:
        self.components[name] = await self._fetch(bars, name, ref)

    async def _role(self, bars: Bars, role: Role) -> None:
        for candidate in self.observation.candidates[role][:CANDIDATES_PER_ROLE]:
            try:
                await self._candidate(bars, role, candidate)
                return
            except (TransportError, RemoteProtocolError) as error:
                self.reasons.append(f"{role} step {candidate.statement.step}: {error}")

    async def _candidate(self, bars: Bars, role: Role, candidate: Candidate) -> None:
        statement = candidate.statement
        stall_s = STALL_S if candidate.credible else UNCHECKED_STALL_S
        folder = await self._fetch(bars, role, statement.weights, stall_s)
        await trio.to_thread.run_sync(check_weights_item, folder, self.signed, statement)
        self.weights[role], self.statements[role] = folder, statement
        if candidate.credible:
            self.vouched.add(role)

    async def _fetch(self, bars: Bars, name: str, ref: ContentRef, stall_s: float = STALL_S) -> Path:
        def show(done: int) -> None:
            self.done[name] = done
            bars.show(name, done, ref.length)
            bars.show("total", sum(self.done.values()), self._expected())

        def follow(state: FetchProgress) -> None:
            show(state.bytes_done)

        fetch = partial(self.network.swarm.fetch, ref, on_progress=follow, stall_timeout_s=stall_s)
        folder = await self.room.run(fetch)
        show(ref.length)
        self.output.event("fetched", item=name, bytes=ref.length)
        return folder
