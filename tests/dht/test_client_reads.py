"""Reads of which nobody answers, against a worker that is played."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from paris_p2p.dht import client
from paris_p2p.errors import TransportError

Configure = Callable[..., client.DhtConfig]
KEYS = [("claim", b"a"), ("claim", b"b")]


class Played:
    """A worker that answers each read with the next of `answers`, then always with the last."""

    pid = 1

    def __init__(self, answers: list[list[Any]]) -> None:
        self.answers, self.asked = answers, list[int]()
        self._up, self._messages = trio.open_memory_channel[dict[str, Any]](100)

    @asynccontextmanager
    async def open(self, *_: object, **__: object) -> AsyncIterator["Played"]:
        yield self

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "start":
            self._up.send_nowait({"type": "ready", "addresses": []})
            return
        answer: dict[str, Any] = {}
        if message["type"] == "read":
            self.asked.append(len(message["keys"]))
            answer = {"found": self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]}
        self._up.send_nowait({"type": "answer", "id": message["id"], **answer})

    async def receive(self) -> dict[str, Any]:
        return await self._messages.receive()

    async def stop(self, grace_s: float) -> None:
        await trio.lowlevel.checkpoint()


async def test_what_nobody_answered_is_asked_for_again_and_nothing_else_is(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    played = Played([[None, []], [None], [[]]])
    monkeypatch.setattr(client, "open_worker", played.open)
    async with client.open_dht(configure("a")) as dht:
        assert await dht.read_many(KEYS) == [[], []]
    assert played.asked == [2, 1, 1]


async def test_a_network_that_stays_silent_is_an_error_and_not_an_empty_one(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    played = Played([[None, []], [None]])
    monkeypatch.setattr(client, "open_worker", played.open)
    async with client.open_dht(configure("a")) as dht:
        assert await dht.read_some(KEYS, patience_s=5.0) == [None, []]
        with pytest.raises(TransportError, match="no other node of the network answered"):
            await dht.read(*KEYS[0])
