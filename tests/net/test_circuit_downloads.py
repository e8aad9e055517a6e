"""Downloads from a node that nobody can dial, through real relays: over many circuits, past relays that die
or cheat. Virtual time."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from paris_p2p.core.relay import RelayBudget
from paris_p2p.errors import TransportError
from paris_p2p.net.addresses import Endpoint
from paris_p2p.net.multi import ReachOptions, open_network
from paris_p2p.net.relay import RelayService
from paris_p2p.net.swarm import Peer, Progress, Swarm, swarm_over
from paris_p2p.net.tls import open_tls_host
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity, peer_id_text
from tests.net.lines import Lines
from tests.net.memory_network import at_once

SEEDER, LEECHER = Identity(b"s" * 32), Identity(b"l" * 32)
PIECE = 65_536
PIECES = 20
LENGTH = PIECE * PIECES - 100
OVERHEAD = 1.1  # TLS, frames, hashes
BUDGET = RelayBudget(bytes_per_s=1e6)


class PublicRelay:
    """A relay and what passed through its circuits."""

    def __init__(self, number: int, budget: RelayBudget) -> None:
        self.identity = Identity(bytes([number]) * 32)
        self.budget = budget
        self.dying = trio.CancelScope()
        self.passed: list[int] = []
        self.endpoint = Endpoint("127.0.0.1", 0, tls=True)

    async def run(self, lines: Lines, started: Callable[[], None]) -> None:
        async def dial_back(node_id: Any, endpoint: Endpoint) -> None:
            await (await host.dial(node_id, endpoint)).aclose()

        with self.dying:
            async with open_tls_host(self.identity, [self.endpoint]) as host, trio.open_nursery() as nursery:
                service = RelayService(self.identity.node_id, dial_back, self.budget)
                join, self.ledger = service._join, service.ledger

                async def counted(*ends: Any) -> None:
                    before = self.ledger.relayed_bytes
                    try:
                        await join(*ends)
                    finally:
                        self.passed.append(self.ledger.relayed_bytes - before)

                service._join = counted  # type: ignore[method-assign, assignment]
                host.divert, self.endpoint = service.serve, host.endpoints[0]
                lines.ports[self.endpoint.port] = lambda sock: nursery.start_soon(host._arrived, sock)
                try:
                    started()
                    await trio.sleep_forever()
                finally:
                    del lines.ports[self.endpoint.port]

    @property
    def peer(self) -> Peer:
        return Peer(self.identity.node_id, (self.endpoint.text(),))

    @property
    def circuit(self) -> str:
        return f"{self.endpoint.text()}/p2p-circuit/p2p/{peer_id_text(SEEDER.node_id)}"


class Lab:
    """A seeder behind a router that lets nobody in, a leecher, relays."""

    def __init__(self, seeder: Swarm, leecher: Swarm, relays: list[PublicRelay], ref: ContentRef) -> None:
        self.seeder, self.leecher, self.relays, self.ref = seeder, leecher, relays, ref
        self.last: Progress | None = None

    async def reserved(self, *wanted: PublicRelay) -> None:
        while set(self.seeder.addresses[: len(wanted)]) != {relay.circuit for relay in wanted}:
            await trio.sleep(0.5)

    async def fetch(
        self,
        *through: PublicRelay,
        watch: Callable[[Progress], None] = lambda _: None,
        stall_timeout_s: float = 60.0,
    ) -> Path:
        def note(progress: Progress) -> None:
            self.last = progress
            watch(progress)

        peer = Peer(SEEDER.node_id, tuple(relay.circuit for relay in through))
        return await self.leecher.fetch(
            self.ref, peers=[peer], on_progress=note, stall_timeout_s=stall_timeout_s
        )

    def check(self, path: Path) -> None:
        """What arrived is what was sent, and little of it was sent twice."""
        assert (path / "file").read_bytes() == content()
        circuits = sum(len(relay.passed) for relay in self.relays)
        assert sum(sum(relay.passed) for relay in self.relays) <= OVERHEAD * LENGTH + circuits * PIECE
        assert self.leecher.rates().down_bytes <= LENGTH + circuits * PIECE
        assert self.last is not None and self.last.wasted_bytes <= circuits * PIECE


def content() -> bytes:
    return random.Random(3).randbytes(LENGTH)


@asynccontextmanager
async def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *budgets: RelayBudget) -> AsyncIterator[Lab]:
    async def inline(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", inline)  # virtual time stands still meanwhile
    lines = Lines(monkeypatch)  # only the relays are reached at a port
    relays = [PublicRelay(number + 1, budget) for number, budget in enumerate(budgets)]

    async def helpers() -> list[Peer]:
        return [relay.peer for relay in relays if not relay.dying.cancel_called]

    async def nobody(_: Any) -> list[Peer]:
        return []

    seeds = ContentStore(tmp_path / "seeds")
    (tmp_path / "item").mkdir()
    (tmp_path / "item" / "file").write_bytes(content())
    ref = seeds.add(tmp_path / "item", piece_length=PIECE, mode="copy")
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        for relay in relays:
            started = trio.Event()
            nursery.start_soon(relay.run, lines, started.set)
            await started.wait()
        swarms = []
        for identity, store, listen, reach in (
            (SEEDER, seeds, ["/ip4/127.0.0.1/tcp/0/tls"], ReachOptions(helpers, None)),
            (LEECHER, ContentStore(tmp_path / "mine"), [], None),
        ):
            network = await stack.enter_async_context(open_network(identity, listen, reach=reach))
            made = swarm_over(network, store, find_peers=nobody, rng=random.Random(1), blocking=at_once)
            swarms.append(await stack.enter_async_context(made))
        with trio.fail_after(3600):
            yield Lab(swarms[0], swarms[1], relays, ref)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "budget",
    [
        RelayBudget(bytes_per_s=1e6, circuit_bytes=5 * PIECE),
        RelayBudget(bytes_per_s=2e5, circuit_s=2.0),
    ],
    ids=["bytes", "time"],
)
async def test_a_download_goes_on_over_the_next_circuit_when_one_has_had_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, budget: RelayBudget
) -> None:
    async with lab(tmp_path, monkeypatch, budget) as it:
        (relay,) = it.relays
        await it.reserved(relay)
        began = trio.current_time()
        it.check(await it.fetch(relay))
        seconds = trio.current_time() - began
        while len(relay.passed) < 3:  # the last circuit ends a little after the fetch
            await trio.sleep(0.1)
        assert max(relay.passed) <= budget.circuit_bytes
        assert sum(relay.passed) <= budget.bytes_per_s * (seconds + 1)
        assert seconds < 2 * LENGTH / budget.bytes_per_s + 10 * len(relay.passed)


async def test_a_relay_that_dies_in_the_middle_is_replaced_at_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with lab(tmp_path, monkeypatch, BUDGET, BUDGET, BUDGET) as it:
        while len(it.seeder.addresses) < 3:  # two circuits, and where it listens
            await trio.sleep(0.5)
        first, second = (r for a in it.seeder.addresses for r in it.relays if r.circuit == a)
        (spare,) = (relay for relay in it.relays if relay not in (first, second))

        def watch(progress: Progress) -> None:
            if progress.pieces_done >= PIECES // 3:
                first.dying.cancel()

        it.check(await it.fetch(first, second, watch=watch))
        assert first.passed and 0 < sum(second.passed or [second.ledger.relayed_bytes]) < LENGTH
        await it.reserved(second, spare)
        assert it.seeder.reachability is not None and it.seeder.reachability.state == "relayed"


async def test_a_relay_that_cuts_every_circuit_short_is_left_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with lab(tmp_path, monkeypatch, RelayBudget(circuit_bytes=20_000), BUDGET) as it:
        miser, honest = it.relays
        while len(it.seeder.addresses) < 3:
            await trio.sleep(0.5)
        it.check(await it.fetch(miser, honest))
        assert len(miser.passed) <= 2 and sum(honest.passed or [honest.ledger.relayed_bytes]) >= LENGTH


async def test_who_finds_every_circuit_refused_fails_in_time_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with lab(tmp_path, monkeypatch, RelayBudget(circuits=0)) as it:
        await it.reserved(*it.relays)
        began = trio.current_time()
        with pytest.raises(TransportError, match="the relay is busy, or the budget is spent"):
            await it.fetch(*it.relays, stall_timeout_s=5.0)
        assert trio.current_time() - began < 10
        assert it.relays[0].ledger.relayed_bytes == 0
