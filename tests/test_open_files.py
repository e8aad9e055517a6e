"""What a process does about the number of files it may have open, and when it can open no more."""

import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import pytest
import trio

from paris_p2p.errors import TransportError, WorkerError
from paris_p2p.net.addresses import Endpoint, expand
from paris_p2p.net.raw import connect
from paris_p2p.net.tls import CONNECT_S, open_tls_host
from paris_p2p.open_files import SMALL, WANTED, allow_many, fitting
from paris_p2p.wire.identity import Identity
from paris_p2p.workers.spawn import open_worker

LIMITS = resource.getrlimit(resource.RLIMIT_NOFILE)


@contextmanager
def soft_limit(files: int) -> Iterator[None]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(files, LIMITS[1]), LIMITS[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, LIMITS)


def no_more() -> AbstractContextManager[None]:
    """Nothing can be opened: as many files are open as may be."""
    return soft_limit(1)


def test_the_limit_is_raised_and_never_lowered() -> None:
    with soft_limit(256):
        allow_many()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(WANTED, LIMITS[1])
    with soft_limit(WANTED + 100):
        allow_many()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(WANTED + 100, LIMITS[1])


def test_connection_limits_fit_into_what_may_be_opened() -> None:
    with soft_limit(WANTED):
        assert fitting(512) == 512
    with soft_limit(1024):
        assert (fitting(512), fitting(SMALL), fitting(2)) == (128, SMALL, 2)
    with soft_limit(64):
        assert fitting(512) == SMALL


async def test_a_connection_that_cannot_be_opened_fails_like_any_other() -> None:
    with no_more(), pytest.raises(TransportError, match="open files"):
        await connect(Endpoint("127.0.0.1", 9, tls=True), CONNECT_S)


async def test_a_worker_that_cannot_be_started_is_a_worker_error(tmp_path: Path) -> None:
    with no_more(), pytest.raises(WorkerError, match="open files"):
        async with open_worker("nothing"):
            pass


async def test_who_listens_goes_on_when_files_can_be_opened_again() -> None:
    anywhere = Endpoint("127.0.0.1", 0, tls=True)
    async with open_tls_host(Identity(b"a" * 32), [anywhere]) as host:
        with trio.socket.socket() as caller:
            with no_more():
                await caller.connect(("127.0.0.1", host.endpoints[0].port))
                await trio.sleep(0.15)
                assert not host.arrivals.came("127.0.0.1", 0.0)
            with trio.fail_after(10):
                while not host.arrivals.came("127.0.0.1", 0.0):
                    await trio.sleep(0.01)


def test_our_addresses_are_those_last_seen_while_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everywhere = Endpoint("0.0.0.0", 4001, tls=True)
    before = expand(everywhere)

    def fails() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(psutil, "net_if_addrs", fails)
    assert before and expand(everywhere) == before
