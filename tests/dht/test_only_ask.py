"""A node that cannot be dialled has its DHT worker replaced by one that only asks; and back. The worker here
is played by the test."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from paris_p2p.dht import client
from paris_p2p.dht.protocol import Notice
from paris_p2p.errors import WorkerError

START_S = 2.0
Configure = Callable[..., client.DhtConfig]


class Workers:
    """Every worker that was started, and in which mode; `asked`: what the running one was asked for."""

    def __init__(self) -> None:
        self.modes: list[bool] = []
        self.asked: list[str] = []

    @asynccontextmanager
    async def open(self, module: str, **_: Any) -> AsyncIterator["PlayedWorker"]:
        yield PlayedWorker(self)


class PlayedWorker:
    """Starts in `START_S`, answers at once, dies when killed."""

    pid = 1

    def __init__(self, all_workers: Workers) -> None:
        self._all = all_workers
        self._up, self._messages = trio.open_memory_channel[dict[str, Any]](100)

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "start":
            self._all.modes.append(message["client_mode"])
            await trio.sleep(START_S)
            self._say({"type": "ready", "addresses": []})
            return
        self._all.asked.append(message["type"])
        answer = {"peers": 1, "keys": 0, "p2pd_pid": 2} if message["type"] == "info" else {}
        self._say({"type": "answer", "id": message["id"], **answer})

    def _say(self, message: dict[str, Any]) -> None:
        self._up.send_nowait(message)

    async def receive(self) -> dict[str, Any]:
        try:
            return await self._messages.receive()
        except trio.EndOfChannel:
            raise WorkerError("the worker was killed") from None

    def kill(self) -> None:
        self._up.close()

    async def stop(self, grace_s: float) -> None:
        self.kill()
        await trio.sleep(0.1)


@asynccontextmanager
async def opened(
    monkeypatch: pytest.MonkeyPatch, config: client.DhtConfig
) -> AsyncIterator[tuple[client.Dht, Workers, list[Notice]]]:
    workers, said = Workers(), list[Notice]()
    monkeypatch.setattr(client, "open_worker", workers.open)
    monkeypatch.setattr(client, "_STOP_GRACE_S", 0.0)
    async with client.open_dht(config, on_notice=said.append) as dht:
        yield dht, workers, said


async def test_the_worker_is_replaced_once_and_requests_wait_for_the_next(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with opened(monkeypatch, configure("a")) as (dht, workers, said):
        assert (await dht.info()).restarts == 0
        dht.only_ask(True)
        began = trio.current_time()
        assert (await dht.info()).restarts == 1
        assert trio.current_time() - began < START_S + 1
        dht.only_ask(True)
        await trio.sleep(60)
        assert workers.modes == [False, True] and not said  # asked for: nothing went wrong
        dht.only_ask(False)
        await trio.sleep(10)
        assert workers.modes == [False, True, False] and not said


async def test_what_is_wanted_while_a_worker_starts_is_not_forgotten(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with opened(monkeypatch, configure("a")) as (dht, workers, said):
        await dht.info()
        assert dht._link is not None
        dht._link.worker.kill()
        await trio.sleep(1)  # the next one is starting, in the old mode
        assert workers.modes == [False, False]
        dht.only_ask(True)
        await trio.sleep(10)
        assert workers.modes == [False, False, True]
        assert [notice.kind for notice in said if notice.active] == ["worker"]  # the death, not the change


async def test_a_state_that_flaps_ends_in_the_last_mode(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with opened(monkeypatch, configure("a")) as (dht, workers, _):
        for mode in (True, False, True, False, True):
            dht.only_ask(mode)
        await trio.sleep(20)
        assert workers.modes[-1] is True and len(workers.modes) <= 3
