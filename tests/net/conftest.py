"""Every test here fails when the network code logged an error: our own bugs are logged, not raised."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def nothing_of_ours_failed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    ours = [r for r in caplog.get_records("call") if r.name.startswith("paris_p2p")]
    assert not [record.getMessage() for record in ours if record.levelno >= logging.ERROR]
