"""Fixtures shared by the DHT's tests: configurations on loopback, records, waiting with a deadline."""

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psutil
import pytest
import trio

from paris_p2p import clock
from paris_p2p.dht.client import DhtConfig
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import ProvideRecord, SignedRecord, sign_record

Configure = Callable[..., DhtConfig]
Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Makes configurations of DHT clients on loopback, each with files of its own."""

    def make(name: str, bootstrap: Sequence[str] = (), **changes: object) -> DhtConfig:
        values: dict[str, object] = {
            "listen": ("/ip4/127.0.0.1/tcp/0",),
            "announce": (),
            "bootstrap": tuple(bootstrap),
            "key_path": tmp_path / f"{name}.key",
            "client_mode": False,
            "runtime_dir": tmp_path / "run",
        }
        return DhtConfig(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def provide() -> Callable[..., SignedRecord]:
    """Makes signed `provide` records: number of the owner, item, seconds to live."""

    def make(owner: int, item: bytes, ttl_s: float = 300.0, address: str = "") -> SignedRecord:
        identity = Identity(owner.to_bytes(32, "big"))
        return sign_record(identity, ProvideRecord(True, (address,)), item, clock.unix() + ttl_s)

    return make


@pytest.fixture
def until() -> Until:
    """Polls a condition, at most 240 s: generous, for a machine with other work."""

    async def wait(condition: Callable[[], Awaitable[bool]]) -> None:
        end = clock.monotonic() + 240.0
        while not await condition():
            assert clock.monotonic() < end, "the condition did not come true in time"
            await trio.sleep(0.05)

    return wait


@pytest.fixture
def runs() -> Callable[[int], bool]:
    """Whether a process runs (a dead one nobody has waited for does not)."""

    def check(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    return check


@pytest.fixture
def child_environment() -> dict[str, str]:
    """The environment for programs that tests start."""
    return dict(os.environ)
