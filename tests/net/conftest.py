"""A world of nodes for the tests here; each fails when the network code logged an error: our own bugs are
logged, not raised."""

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from tests.net.memory_network import Hub, World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(Hub(nursery), tmp_path)
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def nothing_of_ours_failed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    ours = [r for r in caplog.get_records("call") if r.name.startswith("paris_p2p")]
    assert not [record.getMessage() for record in ours if record.levelno >= logging.ERROR]
