"""What a member tells of itself, and when."""

from typing import Any

from paris_node.progress import Progress, StepReports, Telling
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


def test_training_is_told_of_after_1_2_and_5_minutes_then_every_10() -> None:
    progress = Progress(role=Role("expert-3"), step=10, total_steps=800, loss=0.5, images_per_s=64.0)
    reports = StepReports(16, 100.0)
    told = [second for second in range(3000) if reports.text(progress, 100.0 + second)]
    assert told == [60, 120, 300, 900, 1500, 2100, 2700]


def test_what_is_told_of_training_has_the_time_left_if_that_is_known() -> None:
    progress = Progress(role=Role("expert-3"), step=200, total_steps=800, loss=0.5, images_per_s=64.0)
    text = "expert-3: step 200 of 800, loss 0.500, 64 images/s"
    assert StepReports(16, 0.0).text(progress, 60.0) == text + ", 2m30s left"
    progress.images_per_s = 0.0
    late = StepReports(16, 0.0)
    assert late.text(progress, 4000.0) == text.replace("64 i", "0 i")
    assert late.text(progress, 4001.0) is None  # one line for all that was missed
