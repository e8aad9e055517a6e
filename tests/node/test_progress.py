"""What a member tells of itself, and when."""

from typing import Any

from paris_node.progress import Progress, Telling
from paris_p2p import clock
from paris_p2p.ids import Role
from paris_p2p.net.swarm import Rates


class Listener:
    """An announcer that counts."""

    addresses = ("/ip4/127.0.0.1/tcp/1",)

    def __init__(self) -> None:
        self.said: list[Any] = []

    def say(self, record: Any, _scope: bytes, _ttl_s: float) -> None:
        self.said.append(record)


def test_who_stands_by_says_so_once_in_a_renewal_and_what_changed_at_once(
    world: Any, monkeypatch: Any
) -> None:
    progress, listener, now = Progress(), Listener(), clock.unix()
    telling = Telling(progress, world.signed)
    renew_s = world.signed.manifest.lease.renew_s

    def said_at(seconds: float) -> int:
        monkeypatch.setattr(clock, "unix", lambda: now + seconds)
        before = len(listener.said)
        telling.say(listener, "direct", Rates(0.0, 0.0, 0, 0, 0))  # type: ignore[arg-type]
        return len(listener.said) - before

    assert [said_at(share * renew_s) for share in (0.0, 0.5, 1.0, 1.5, 2.0)] == [1, 0, 1, 0, 1]
    progress.activity = "fetching"
    assert said_at(2.1 * renew_s) == 1
    progress.role = Role("router")
    assert [said_at(share * renew_s) for share in (2.2, 2.3)] == [1, 1]
    progress.role = Role("")
    assert [said_at(share * renew_s) for share in (2.4, 2.5)] == [1, 0]
    assert said_at(-100.0) == 1  # the clock was set
