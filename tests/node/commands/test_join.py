"""Tests of `paris_node.commands.join`."""

import dataclasses
import io
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from paris_node import fitting, signals
from paris_node.commands import join
from paris_node.commands.join import JoinRequest
from paris_node.network import NetworkRequest
from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.programs import Output
from tests.samples import ORGANISER


class Joining:
    """One `paris-node join` in this process, on an in-memory network."""

    def __init__(self, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.network = world.network("alice", seeds=True)
        self._world = world
        self._said = io.StringIO()

        @asynccontextmanager
        async def open_network(*_arguments: Any, **_options: Any) -> AsyncIterator[Any]:
            yield self.network

        monkeypatch.setattr(join, "open_network", open_network)

    async def __call__(
        self, *, role: str | None = None, until_complete: bool = False, device: str = "cpu"
    ) -> int:
        run = self._world.signed.run_id.hex()
        network = NetworkRequest(self.network.home.path, ["/boot"], None, None, run)
        request = JoinRequest(network, role, device, 1, until_complete)
        return await join._join(request, self.network.home, ("/boot",), Output(True, self._said))

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._said.getvalue().splitlines()]

    async def hears(self, kind: str) -> None:
        with trio.fail_after(120):
            while not any(event["event"] == kind for event in self.events()):
                await trio.sleep(0.25)


@pytest.fixture
def joining(world: Any, monkeypatch: pytest.MonkeyPatch) -> Joining:
    return Joining(world, monkeypatch)


async def trains(trainer: Any) -> None:
    """A step a second; stops when told."""
    trainer.ready()
    for step in range(1, 101):
        with trio.move_on_after(1):
            await trainer.stopping.wait()
        trainer.step(step)
        if trainer.stopping.is_set() or step == 100:
            trainer.checkpoint(step)
            trainer.say("stopped" if step < 100 else "finished", step=step)
            return


async def test_joining_until_complete_says_every_stage_and_ends_with_0(
    world: Any, joining: Joining, autojump_clock: Any
) -> None:
    world.scripts = [trains]
    assert await joining(until_complete=True) == 0
    kinds = [event["event"] for event in joining.events()]
    assert kinds[0] == "joined" and kinds[-1] == "left"
    assert {"joined", "claimed", "step", "checkpoint", "finished"} <= set(kinds)
    joined = joining.events()[0]
    assert (joined["run_id"], joined["roles"]) == (world.signed.run_id.hex(), ["expert-0", "router"])
    assert joining.network.home.context()["run_id"] == world.signed.run_id.hex()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_node_checkpoints_leaves_and_ends_with_130(
    world: Any, joining: Joining, autojump_clock: Any, number: signal.Signals
) -> None:
    world.scripts = [trains]
    async with trio.open_nursery() as nursery:

        async def interrupt() -> None:
            await joining.hears("step")
            signal.raise_signal(number)

        nursery.start_soon(interrupt)
        assert await joining() == 130
    kinds = [event["event"] for event in joining.events()]
    assert kinds.index("leaving") < kinds.index("checkpoint") < kinds.index("left") == len(kinds) - 1


async def test_a_role_the_run_does_not_have_is_refused_with_those_it_has(
    joining: Joining, autojump_clock: Any
) -> None:
    with pytest.raises(ConfigError, match=r"--role expert-7: this run has expert-0, router"):
        await joining(role="expert-7")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"role": "banana"}, "--role banana: roles are called expert-0, .*router"),
        ({"role": "expert-01"}, "--role expert-01"),
        ({"role": ""}, "--role : roles are called"),
        ({"device": "banana"}, "--device 'banana': there are auto, cpu"),
        ({"device": "cuda:x1"}, "cuda:xN"),
        ({"pass_file": Path("/no/such/pass")}, "--pass /no/such/pass cannot be read .*paris-node delegate"),
        ({"pass_file": Path(__file__)}, "--pass .*: this is not a pass"),
        ({"pass_file": Path(__file__).parent}, "--pass .* cannot be read .*directory"),
    ],
)
def test_what_is_wrong_whatever_the_run_is_refused_before_a_home_is_made_or_a_network_met(
    tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    network = NetworkRequest(tmp_path / "home", ["/boot"], None, None, None)
    request = dataclasses.replace(JoinRequest(network, None, "cpu", 1, False), **wrong)
    with pytest.raises(ConfigError, match=said):
        join.run(request, Output(True))
    assert not (tmp_path / "home").exists()


async def test_a_device_that_is_not_here_is_refused_before_a_role_is_claimed(
    world: Any, joining: Joining, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of small runs too, as soon as somebody names an accelerator."""

    async def has_none(_manifest: Path, device: str) -> fitting.Fit:
        await trio.lowlevel.checkpoint()
        raise ConfigError(f"device {device!r} is not available here")

    monkeypatch.setattr(fitting, "ask", has_none)
    with pytest.raises(ConfigError, match="'cuda' is not available"):
        await joining(device="cuda")
    assert joining.events() == []


async def test_what_memory_cannot_hold_is_said_and_left_to_others(
    world: Any, joining: Joining, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fits(_manifest: Path, device: str) -> fitting.Fit:
        await trio.lowlevel.checkpoint()
        return fitting.Fit(device, 10, router=5, experts=(20,))

    monkeypatch.setattr(fitting, "ASKED_FROM_BYTES", 0)
    monkeypatch.setattr(fitting, "ask", fits)
    world.scripts = [trains]
    async with trio.open_nursery() as nursery:

        async def interrupt() -> None:
            await joining.hears("finished")
            signal.raise_signal(signal.SIGINT)

        nursery.start_soon(interrupt)
        assert await joining() == 130
    said = {event["event"]: event for event in joining.events()}
    assert (said["unfit"]["roles"], said["claimed"]["role"]) == (["expert-0"], "router")
    with pytest.raises(ConfigError, match="training expert-0 takes at least"):
        await joining(role="expert-0")


async def test_a_named_role_whose_checkpoint_is_too_big_ends_the_command_with_what_to_do(
    world: Any, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    async def fits(_manifest: Path, device: str) -> fitting.Fit:
        await trio.lowlevel.checkpoint()
        return fitting.Fit(device, 10, router=5, experts=(20, 5))

    monkeypatch.setattr(fitting, "ASKED_FROM_BYTES", 0)
    monkeypatch.setattr(fitting, "ask", fits)
    recipe = world.signed.manifest.recipe
    world.signed = world.make_run("kinds", recipe=dataclasses.replace(recipe, experts=recipe.experts * 2))
    data, _ = world.checkpoint(ORGANISER, "expert-0", 40)
    world.announces(ORGANISER, data, "expert-0")
    world.attests(ORGANISER, "expert-0", data, loss=0.5)
    joining = Joining(world, monkeypatch)
    said = (
        r"--role expert-0: its newest checkpoint \(step 40\) .*: end other programs, choose another --device"
    )
    with pytest.raises(ConfigError, match=said):
        await joining(role="expert-0")


@pytest.mark.parametrize("restricted", [False, True])
async def test_joining_a_finished_run_says_so_and_how_to_get_the_model(
    world: Any, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any, restricted: bool
) -> None:
    """Also to who may not claim, besides why."""
    world.signed = world.make_run("closed", restricted=restricted)
    for role in world.signed.manifest.roles:
        data, _ = world.checkpoint(ORGANISER, role, 100)
        world.announces(ORGANISER, data, role)
        world.attests(ORGANISER, role, data, loss=0.5)
    joining = Joining(world, monkeypatch)
    async with trio.open_nursery() as nursery:

        async def interrupt() -> None:
            await joining.hears("standing_by")
            await trio.sleep(30)
            signal.raise_signal(signal.SIGINT)

        nursery.start_soon(interrupt)
        assert await joining() == 130
    kinds = [event["event"] for event in joining.events()]
    assert kinds == ["joined", *(["replica"] if restricted else []), "standing_by", "leaving", "left"]
    told = next(event for event in joining.events() if event["event"] == "standing_by")
    assert told["why"] == "finished"
    assert told["fetch_model"] == f"paris-node fetch-model --home {joining.network.home.path}"


async def test_too_small_a_disk_is_said_before_anything_is_remembered(
    joining: Joining, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining.network.store, "free_bytes", lambda: 10)
    with pytest.raises(StoreError, match="GB free"):
        await joining()
    assert joining.events() == [] and joining.network.home.context() == {}


async def test_after_a_first_interruption_a_second_one_acts_at_once(
    world: Any, joining: Joining, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is taken by the node, which leaves in order; the next is what it always is, and what is not
    over soon after it is ended by force."""
    forced: list[float] = []
    monkeypatch.setattr(signals, "end_by_force", forced.append)

    async def never_stops(trainer: Any) -> None:
        trainer.ready()
        trainer.step(1)
        await trio.sleep_forever()

    world.scripts = [never_stops]
    taken: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: taken.append(number))
    try:
        with trio.move_on_after(200):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(joining)
                await joining.hears("step")
                signal.raise_signal(signal.SIGINT)
                await joining.hears("leaving")
                assert taken == []
                signal.raise_signal(signal.SIGINT)
                assert taken == [signal.SIGINT] and forced == [signals.FORCE_AFTER_S]
                nursery.cancel_scope.cancel()
    finally:
        signal.signal(signal.SIGINT, before)
