"""`paris-node join`: take part in a run."""

import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from paris_node import fitting
from paris_node.commands.status import run_selector
from paris_node.fitting import Fit
from paris_node.network import NetworkRequest, bootstrap_addresses, open_network
from paris_node.room import check_room
from paris_node.run_node import HAND_OVER_S, RunNode
from paris_node.runs import find_run
from paris_node.signals import the_next_one_ends_all, until_interrupted
from paris_node.standing_by import StandingBy, Why, fetch_model_command
from paris_node.text import printable
from paris_node.torch_cache import keep_torch_cache
from paris_node.volunteer import Volunteer
from paris_p2p import clock
from paris_p2p.core.access import check_own_access
from paris_p2p.diffusion.device_names import check_device_name
from paris_p2p.errors import ConfigError, TransportError
from paris_p2p.ids import ROUTER, Role
from paris_p2p.programs import EXIT_DONE, EXIT_INTERRUPTED, Output
from paris_p2p.store.durable import disk, write_atomic
from paris_p2p.store.home import Home
from paris_p2p.wire.access_pass import parse_pass_text, pass_text
from paris_p2p.wire.identity import peer_id_text
from paris_p2p.wire.manifest import Manifest, SignedManifest
from paris_p2p.workers.nursery import open_inner_nursery

PASS_FILE = "access.pass"
MAX_PASS_CHARS = 4096
_ROLE = re.compile(rf"{ROUTER}|expert-(0|[1-9][0-9]{{0,5}})")


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """The options of `join`, as given."""

    network: NetworkRequest
    role: str | None
    device: str
    threads: int | None
    until_complete: bool
    pass_file: Path | None = None


def run(request: JoinRequest, output: Output) -> int:
    """Join the run and take part until interrupted (or complete)."""
    check_request(request)
    home = Home.resolve(request.network.home)
    bootstrap = bootstrap_addresses(request.network, home)
    keep_torch_cache(home)  # the trainer inherits it
    with home.lock():
        home.store(clean=True)  # what a node that was killed here left half done
        shutil.rmtree(home.path / "work", ignore_errors=True)
        return trio.run(_join, request, home, bootstrap, output)


def check_request(request: JoinRequest) -> None:
    """What is wrong whatever the run is, said before the network is met. Raises `ConfigError`."""
    if request.role is not None and not _ROLE.fullmatch(request.role):
        raise ConfigError(f"--role {request.role}: roles are called expert-0, expert-1, …, and {ROUTER}")
    check_device_name(request.device)
    if request.pass_file is not None:
        read_pass(request.pass_file)


async def _join(request: JoinRequest, home: Home, bootstrap: tuple[str, ...], output: Output) -> int:
    identity = home.identity()
    opened = open_network(request.network, home=home, identity=identity, bootstrap=bootstrap, output=output)
    async with opened as network:
        signed = await find_run(network, run_selector(request.network, home))
        wanted = _wanted_role(signed.manifest, request.role)
        access = load_pass(home, signed, request.pass_file)
        barred = check_own_access(signed, identity.node_id, access, clock.unix())
        fit, roles = None, signed.manifest.roles
        if barred is None:
            check_room(network, signed.manifest, wanted, request.network.max_disk)
            fit, roles = await _fitting_roles(home, signed, wanted, request.device, output)
        home.remember(bootstrap=list(bootstrap), run_id=signed.run_id.hex())
        output.event(
            "joined",
            f"joined run {printable(signed.manifest.name)} ({signed.run_id.hex()[:12]}) as "
            f"{peer_id_text(identity.node_id)}; Ctrl-C checkpoints, releases the role and leaves",
            run_id=signed.run_id.hex(),
            name=signed.manifest.name,
            node=peer_id_text(identity.node_id),
            roles=list(signed.manifest.roles),
        )
        node = RunNode(network, signed, output, mirror=False, access=access)
        network.store.limit(request.network.max_disk, node.pinned)
        node.progress.activity = "seeding"
        fetch_model = fetch_model_command(request.network.home)
        if barred is None:
            rng = random.Random(os.urandom(16))
            part: _Part = Volunteer(
                node,
                wanted=wanted,
                device=request.device,
                threads=request.threads,
                rng=rng,
                roles=roles,
                fit=fit,
                fetch_model=fetch_model,
            )
        else:
            me = peer_id_text(identity.node_id)
            text = f"{barred}. It copies and seeds; the organiser can give {me} a pass"
            output.event("replica", text, reason=barred)
            part = _Replica(node, fetch_model)
        return await _take_part(node, part, request.until_complete, output)


async def _fitting_roles(
    home: Home, signed: SignedManifest, wanted: Role | None, device: str, output: Output
) -> tuple[Fit | None, tuple[Role, ...]]:
    """What this machine has the memory for, if that matters in this run, and the roles that fit. Raises
    `ConfigError` when none does, and for a device that is not here: better before a role is claimed."""
    manifest = signed.manifest
    path = home.run_folder(signed.run_id) / "manifest.paris"
    big, doubtful = fitting.is_big(manifest), device not in ("auto", "cpu")
    fit = await fitting.ask(path, device) if big or doubtful else None
    if fit is None or not big:
        return None, manifest.roles
    roles = fitting.fitting_roles(manifest, fit, wanted)
    left_out = [role for role in manifest.roles if role not in roles]
    if left_out and wanted is None:
        text = f"not claimed, for want of memory ({fit.room / 1e9:.1f} GB on {fit.device}): "
        output.event("unfit", text + ", ".join(left_out), roles=left_out, room=fit.room, device=fit.device)
    return fit, roles


class _Part(Protocol):
    """What a node does in a run beside holding content."""

    async def run(self, *, until_complete: bool) -> None:
        """Until `leave` is called, or the run is complete."""

    def leave(self) -> None:
        """End in order."""

    def leaving_takes(self) -> str:
        """What `leave` waits for, and for how long at most."""


class _Replica:
    """The part of a node that may not claim roles: be there until told to leave, or until all is done."""

    def __init__(self, node: RunNode, fetch_model: str) -> None:
        self._node = node
        self._staying = trio.CancelScope()
        me, roles = node.network.identity.node_id, node.signed.manifest.roles
        self._standing_by = StandingBy(node.output, roles, me, fetch_model=fetch_model, said=Why.HELD)

    def leave(self) -> None:
        """Return from `run`."""
        self._staying.cancel()

    def leaving_takes(self) -> str:
        """What `leave` waits for, and for how long at most."""
        return f"what only this node has is handed over ({HAND_OVER_S:.0f} s at most)"

    async def run(self, *, until_complete: bool) -> None:
        """Watch the run; the loops of the node do the work."""
        self._standing_by.leaves = until_complete
        with self._staying:
            while not (await self._complete() and until_complete):
                await trio.sleep(self._node.signed.manifest.lease.poll_s)
        self._node.progress.activity = "leaving"
        await self._node.hand_over()

    async def _complete(self) -> bool:
        try:
            observation = await self._node.observe()
        except TransportError:
            return False
        complete = observation.finished(self._node.signed.manifest.roles)
        self._standing_by.see(observation, (), sure=complete)
        return complete


async def _take_part(node: RunNode, part: _Part, until_complete: bool, output: Output) -> int:
    interrupted = False
    async with open_inner_nursery() as nursery:

        async def leave_when_interrupted() -> None:
            nonlocal interrupted
            await until_interrupted()
            interrupted = True
            output.event("leaving", f"leaving: {part.leaving_takes()}; Ctrl-C again ends at once")
            part.leave()
            with the_next_one_ends_all():
                await trio.sleep_forever()

        nursery.start_soon(leave_when_interrupted)
        nursery.start_soon(node.announce_loop)
        nursery.start_soon(node.replicate_loop)
        await part.run(until_complete=until_complete)
        nursery.cancel_scope.cancel()
    output.event("left", "left the run")
    return EXIT_INTERRUPTED if interrupted else EXIT_DONE


def load_pass(home: Home, signed: SignedManifest, path: Path | None) -> bytes:
    """The pass in the file `path`, which is then kept in the home; else the one kept there, else b"".

    Raises as `read_pass`.
    """
    kept = home.run_folder(signed.run_id) / PASS_FILE
    if path is None:
        return parse_pass_text(kept.read_text(encoding="utf-8")) if kept.exists() else b""
    data = read_pass(path)
    with disk("keeping the pass", kept.parent):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, (pass_text(data) + "\n").encode())
    return data


def read_pass(path: Path) -> bytes:
    """The pass in the file `path`. Raises `ConfigError` when it holds none."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_PASS_CHARS)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--pass {path} cannot be read ({error}): name the file with the line that `paris-node delegate` "
            "printed"
        ) from None
    try:
        return parse_pass_text(text)
    except ConfigError as error:
        raise ConfigError(f"--pass {path}: {error}") from None


def _wanted_role(manifest: Manifest, role: str | None) -> Role | None:
    if role is None:
        return None
    if role not in manifest.roles:
        raise ConfigError(f"--role {role}: this run has {', '.join(manifest.roles)}")
    return Role(role)
