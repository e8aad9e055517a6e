"""Whole pieces on their way to the disk: what is checked, written, reported; when more may be asked for."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from paris_p2p.ids import PieceIndex
from paris_p2p.net import verifier
from paris_p2p.net.verifier import Verifier
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.item import StoredItem
from paris_p2p.store.partial import PartialItem

PIECE = 32 * 1024
PIECES = 12


@dataclass
class Disk:
    """Runs jobs at once, after `gate` is open."""

    gate: trio.Event = field(default_factory=trio.Event)
    jobs: int = 0

    async def __call__(self, job: Callable[[], Any]) -> Any:
        self.jobs += 1
        await self.gate.wait()
        return job()


@dataclass
class Case:
    source: StoredItem
    partial: PartialItem
    disk: Disk
    verifier: Verifier[str]
    told: list[str] = field(default_factory=list)

    def piece(self, number: int) -> list[bytes]:
        data = self.source.read_block(number, 0, PIECE)
        return [data[:16_384], data[16_384:]]

    def add(self, number: int, *, right: bool = True) -> None:
        data = self.piece(number) if right else [bytes(PIECE)]
        self.verifier.add(PieceIndex(number), data, "peer")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    (tmp_path / "file").write_bytes(random.Random(1).randbytes(PIECE * PIECES))
    seed, mine = ContentStore(tmp_path / "seed"), ContentStore(tmp_path / "mine")
    ref = seed.add(tmp_path / "file", piece_length=PIECE)
    source, partial, disk, told = seed.open(ref.info_hash), mine.begin(ref), Disk(), []
    partial.set_info(source.info)
    partial.set_layer(0, source.layer(0))
    made: Verifier[str] = Verifier(
        partial,
        disk,
        good=lambda arrival: told.append(f"good {arrival.piece} of {arrival.sender}"),
        bad=lambda arrival: told.append(f"bad {arrival.piece}"),
        room=lambda: told.append("room"),
    )
    return Case(source, partial, disk, made, told)


async def running(case: Case, what: Callable[[], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(case.verifier.run)
        await what()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_a_good_piece_is_reported_once_it_is_written(case: Case) -> None:
    async def what() -> None:
        case.add(3)
        await trio.testing.wait_all_tasks_blocked()
        assert not case.told and not case.partial.has_piece(3)
        case.disk.gate.set()

    await running(case, what)
    assert case.told == ["good 3 of peer"]
    assert case.partial.read_block(3, 0, PIECE) == b"".join(case.piece(3))


async def test_a_bad_piece_is_reported_at_once_and_never_written(case: Case) -> None:
    case.add(3, right=False)
    assert case.told == ["bad 3"] and not case.verifier.full
    case.disk.gate.set()
    await running(case, trio.lowlevel.checkpoint)
    assert case.disk.jobs == 0 and not case.partial.has_piece(3)


async def test_what_has_become_ready_meanwhile_is_written_together(case: Case) -> None:
    async def what() -> None:
        case.add(0)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(1, PIECES):
            case.add(number)
        case.disk.gate.set()

    await running(case, what)
    assert case.disk.jobs == 2 and len(case.told) == PIECES
    case.partial.finish()


async def test_a_disk_that_does_not_keep_up_stops_the_asking(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier, "MAX_PENDING_BYTES", 2 * PIECE)

    async def what() -> None:
        for number in range(3):
            assert not case.verifier.full
            case.add(number)
        assert case.verifier.full
        case.disk.gate.set()

    await running(case, what)
    assert case.told.count("room") == 1 and not case.verifier.full


async def test_long_pieces_are_checked_in_steps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "AT_ONCE_BYTES", PIECE - 1)
    case.disk.gate.set()

    async def what() -> None:
        case.add(1, right=False)
        case.add(2)
        assert case.told == []

    await running(case, what)
    assert case.told == ["bad 1", "good 2 of peer"]
