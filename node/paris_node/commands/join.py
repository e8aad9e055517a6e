"""`paris-node join`: take part in a run."""

import os
import random
import shutil
from dataclasses import dataclass

import trio

from paris_node.commands.status import run_selector
from paris_node.network import Network, NetworkRequest, bootstrap_addresses, open_network
from paris_node.room import check_room
from paris_node.run_node import RunNode
from paris_node.runs import find_run
from paris_node.signals import until_interrupted
from paris_node.text import printable
from paris_node.torch_cache import keep_torch_cache
from paris_node.volunteer import Volunteer
from paris_p2p.errors import ConfigError
from paris_p2p.ids import Role
from paris_p2p.programs import EXIT_DONE, EXIT_INTERRUPTED, Output
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import peer_id_text
from paris_p2p.wire.manifest import Manifest, SignedManifest
from paris_p2p.workers.nursery import open_inner_nursery


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """The options of `join`, as given."""

    network: NetworkRequest
    role: str | None
    device: str
    threads: int | None
    until_complete: bool


def run(request: JoinRequest, output: Output) -> int:
    """Join the run and take part until interrupted (or complete)."""
    home = Home.resolve(request.network.home)
    bootstrap = bootstrap_addresses(request.network, home)
    keep_torch_cache(home)  # the trainer inherits it
    with home.lock():
        home.store(clean=True)  # what a node that was killed here left half done
        shutil.rmtree(home.path / "work", ignore_errors=True)
        return trio.run(_join, request, home, bootstrap, output)


async def _join(request: JoinRequest, home: Home, bootstrap: tuple[str, ...], output: Output) -> int:
    identity = home.identity()
    opened = open_network(request.network, home=home, identity=identity, bootstrap=bootstrap)
    async with opened as network:
        signed = await find_run(network, run_selector(request.network, home))
        wanted = _wanted_role(signed.manifest, request.role)
        check_room(network, signed.manifest, wanted)
        home.remember(bootstrap=list(bootstrap), run_id=signed.run_id.hex(), run_name=signed.manifest.name)
        output.event(
            "joined",
            f"joined run {printable(signed.manifest.name)} ({signed.run_id.hex()[:12]}) as "
            f"{peer_id_text(identity.node_id)}; Ctrl-C checkpoints, releases the role and leaves",
            run_id=signed.run_id.hex(),
            name=signed.manifest.name,
            node=peer_id_text(identity.node_id),
            roles=list(signed.manifest.roles),
        )
        return await _take_part(network, signed, request, wanted, output)


async def _take_part(
    network: Network, signed: SignedManifest, request: JoinRequest, wanted: Role | None, output: Output
) -> int:
    node = RunNode(network, signed, output, mirror=False)
    node.progress.activity = "seeding"
    rng = random.Random(os.urandom(16))
    volunteer = Volunteer(node, wanted=wanted, device=request.device, threads=request.threads, rng=rng)
    interrupted = False
    async with open_inner_nursery() as nursery:

        async def leave_when_interrupted() -> None:
            nonlocal interrupted
            await until_interrupted()
            interrupted = True
            output.event("leaving", "leaving: checkpoint, release, hand over (Ctrl-C again: at once)")
            volunteer.leave()

        nursery.start_soon(leave_when_interrupted)
        nursery.start_soon(node.announce_loop)
        nursery.start_soon(node.replicate_loop)
        await volunteer.run(until_complete=request.until_complete)
        nursery.cancel_scope.cancel()
    output.event("left", "left the run")
    return EXIT_INTERRUPTED if interrupted else EXIT_DONE


def _wanted_role(manifest: Manifest, role: str | None) -> Role | None:
    if role is None:
        return None
    if role not in manifest.roles:
        raise ConfigError(f"--role {role}: this run has {', '.join(manifest.roles)}")
    return Role(role)
