"""Tests of `paris_p2p.dht.notices`."""

from paris_p2p.dht.notices import Notices, notice_events
from paris_p2p.dht.protocol import Notice

LOST = Notice("bootstrap", "/a", "lost /a")
DIED = Notice("worker", "", "it died")


def test_each_change_is_told_once() -> None:
    heard: list[Notice] = []
    notices = Notices(heard.append)
    for _ in range(3):
        notices.say(LOST)
    worse = Notice("bootstrap", "/a", "lost /a: refused")
    notices.say(worse)
    over = Notice("bootstrap", "/a", "/a answers again", active=False)
    notices.say(over)
    notices.say(over)
    assert heard == [LOST, worse, over] and notices.standing == ()


def test_the_end_of_what_never_began_is_not_told() -> None:
    heard: list[Notice] = []
    Notices(heard.append).say(Notice("split", "", "together again", active=False))
    assert heard == []


def test_what_a_dead_worker_said_is_over_unless_the_next_one_says_it_too() -> None:
    notices = Notices(None)
    alone = Notice("alone", "", "nobody answers")
    for notice in (LOST, alone):
        notices.say(notice)
    notices.say(DIED)
    notices.worker_died()
    notices.say(LOST)  # by the next one, while it starts
    assert set(notices.standing) == {LOST, alone, DIED}
    notices.worker_is_up()
    assert notices.standing == (LOST,)


def test_a_notice_becomes_an_event() -> None:
    events: list[tuple[tuple[object, ...], dict[str, object]]] = []
    notice_events(lambda *values, **fields: events.append((values, fields)))(LOST)
    fields = {"kind": "bootstrap", "subject": "/a", "active": True, "text": "lost /a"}
    assert events == [(("network", None), fields)]
