"""Real DHT workers that things happen to: each is noticed, named, and recovered from."""

import errno
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from paris_p2p import clock
from paris_p2p.dht import client
from paris_p2p.dht.client import Dht, DhtConfig, open_dht
from paris_p2p.dht.protocol import Notice
from paris_p2p.dht.runtime import make_folder, runtime_place
from paris_p2p.ids import ROUTER, RunId, Term
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import ClaimRecord, SignedRecord, role_scope, sign_record

Configure = Callable[..., DhtConfig]
Provide = Callable[..., SignedRecord]
Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
Runs = Callable[[int], bool]

ITEM = b"i" * 32
SCOPE = role_scope(RunId(b"r" * 32), ROUTER)


class _Hosted:
    """A node that ends when it is told to, before others that began after it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._ending, self._ended = trio.Event(), trio.Event()

    async def start(self, config: DhtConfig) -> Dht:
        dht: Dht = await self._nursery.start(self._run, config)
        return dht

    async def end(self) -> None:
        self._ending.set()
        await self._ended.wait()

    async def _run(self, config: DhtConfig, *, task_status: Any) -> None:
        async with open_dht(config) as dht:
            task_status.started(dht)
            await self._ending.wait()
        self._ended.set()


def claim(owner: int) -> SignedRecord:
    """A claim: of the records by which the parts of a network are compared."""
    now = clock.unix()
    identity = Identity(owner.to_bytes(32, "big"))
    return sign_record(identity, ClaimRecord("hold", Term(1), now), SCOPE, now + 300.0)


async def test_a_node_comes_back_through_the_peers_it_knows(
    configure: Configure, provide: Provide, until: Until, tmp_path: Path, nursery: trio.Nursery
) -> None:
    first = _Hosted(nursery)
    bootstrap = (await first.start(configure("a"))).addresses
    config = configure("c", bootstrap, peers_path=tmp_path / "peers.json")
    async with open_dht(configure("b", bootstrap)) as second:
        async with open_dht(config) as third:

            async def both_are_known() -> bool:
                return (await third.info()).known == 2

            await until(both_are_known)
        await first.end()
        async with open_dht(config) as third:
            assert await third.publish([provide(1, ITEM)]) == [True]
            assert len(await second.read("provide", ITEM)) == 1
            assert [(notice.kind, notice.subject) for notice in third.notices] == [
                ("bootstrap", bootstrap[0])
            ]


async def test_a_node_that_nobody_answers_says_so_and_has_published_nothing(
    configure: Configure, provide: Provide, until: Until, nursery: trio.Nursery
) -> None:
    first = _Hosted(nursery)
    addresses = (await first.start(configure("a"))).addresses
    async with open_dht(configure("b", addresses)) as second:
        assert await second.publish([provide(1, ITEM)]) == [True]
        await first.end()

        async def it_is_said() -> bool:
            return {notice.kind for notice in second.notices} == {"bootstrap", "alone"}

        await until(it_is_said)
        assert await second.publish([provide(2, ITEM)]) == [False]  # the own replica is nobody's
        assert await second.read_some([("provide", ITEM)], patience_s=9.0) == [None]  # nor is it all there is
        async with open_dht(configure("a", listen=(addresses[0].split("/p2p/")[0],))) as again:

            async def all_is_well() -> bool:
                return not second.notices

            await until(all_is_well)
            assert await second.publish([provide(2, ITEM, 400.0)]) == [True]
            assert len(await again.read("provide", ITEM)) >= 1


async def test_two_networks_that_a_node_sees_become_one(configure: Configure, until: Until) -> None:
    async with open_dht(configure("a")) as first, open_dht(configure("b")) as second:
        assert await first.publish([claim(1)]) == await second.publish([claim(2)]) == [True]
        heard: list[Notice] = []
        config = configure("c", [*first.addresses, *second.addresses])
        async with open_dht(config, on_notice=heard.append) as third:

            async def everyone_sees_both() -> bool:
                seen = [len(await dht.read("claim", SCOPE)) for dht in (first, second, third)]
                return seen == [2, 2, 2]

            await until(everyone_sees_both)

            # On a busy machine the two may have met through the third before it compared them: then there is
            # nothing to say. What is a split, and when it is over, is decided in hivemind_cases.
            for notice in heard:
                if notice.kind == "split" and notice.active:
                    assert "start each bootstrap node with --bootstrap" in notice.text


async def test_a_stopped_worker_a_full_disk_and_a_stolen_port_are_survived(
    configure: Configure, provide: Provide, until: Until, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PING_PERIOD_S", 0.2)
    monkeypatch.setattr(client, "HUNG_S", 2.0)
    heard: list[Notice] = []
    async with open_dht(configure("a")) as first:
        config = configure("b", first.addresses)
        async with open_dht(config, on_notice=heard.append) as second:
            await second.publish([provide(1, ITEM)])
            before = await second.info()
            port = int(second.addresses[0].split("/")[4])
            disk = _FullDisk(monkeypatch)
            with _shared_listener(port):  # somebody else will have the port when it comes back
                os.kill(before.worker_pid, signal.SIGSTOP)

                async def it_runs_again() -> bool:
                    return any(not notice.active for notice in heard)

                await until(it_runs_again)
            assert not runs(before.worker_pid) and not runs(before.p2pd_pid)
            said = [notice.text for notice in heard]
            for part in (
                "has not answered for 2 s",
                "killed by SIGKILL",
                "No space left",
                f"port {port} is taken",
            ):
                assert any(part in text for text in said), said
            assert disk.refused == 2 and not second.notices
            assert int(second.addresses[0].split("/")[4]) != port
            assert await _owners(first) == await _owners(second) == 1
            sockets = list(runtime_place(config.runtime_dir).glob("*/*.sock"))
            assert len(sockets) == 4  # two for each worker; none is left of the dead


async def test_a_stopped_daemon_is_noticed_named_and_replaced(
    configure: Configure, provide: Provide, until: Until, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "DAEMON_HUNG_S", 4.0)  # a live one must answer on busy cores, too
    heard: list[Notice] = []
    config = configure("b")
    async with open_dht(config, on_notice=heard.append) as dht:
        await dht.publish([provide(1, ITEM)])
        before, addresses = await dht.info(), dht.addresses
        os.kill(before.p2pd_pid, signal.SIGSTOP)

        async def it_runs_again() -> bool:
            return any(not notice.active for notice in heard)

        await until(it_runs_again)
        after = await dht.info()
        assert "the DHT's libp2p daemon ended, or hung" in heard[0].text and not dht.notices
        assert not runs(before.p2pd_pid) and not runs(before.worker_pid) and runs(after.p2pd_pid)
        assert dht.addresses == addresses and await _owners(dht) == 1


async def _owners(dht: Dht) -> int:
    return len(await dht.read("provide", ITEM))


class _FullDisk:
    """The worker's folder cannot be made twice, as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused = 0
        self._make = make_folder
        monkeypatch.setattr(client, "make_folder", self)

    def __call__(self, folder: Path) -> None:
        if self.refused < 2:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._make(folder)


def _shared_listener(port: int) -> socket.socket:
    """Listens where p2pd does (which shares its port), and still does when p2pd has gone."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    return listener


async def test_one_listen_address_of_several_that_cannot_be_used_is_left_out(configure: Configure) -> None:
    foreign = "/ip6/2001:db8::77/tcp/0"
    config = configure("a", listen=("/ip4/127.0.0.1/tcp/0", foreign))
    async with open_dht(config) as first:
        assert [(notice.kind, notice.subject) for notice in first.notices] == [("listen", foreign)]
        assert all("127.0.0.1" in address for address in first.addresses)
