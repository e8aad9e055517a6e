"""What is wrong with the network side at the moment, as far as was said.

Owns: which notices stand, telling the log and one listener about changes only. Does not own: finding out.
"""

import logging
from collections.abc import Callable

from paris_p2p.dht.protocol import Notice, Trouble

log = logging.getLogger(__name__)

OnNotice = Callable[[Notice], None]
_OF_THE_CLIENT: frozenset[Trouble] = frozenset({"worker", "identity", "peers"})


def notice_events(emit: Callable[..., None]) -> OnNotice:
    """A listener that makes every notice one event of a program's output (`Output.event`)."""

    def tell(notice: Notice) -> None:
        fields = {"kind": notice.kind, "subject": notice.subject, "active": notice.active}
        emit("network", None, **fields, text=notice.text)  # people read it in the log

    return tell


class Notices:
    """The standing notices. `listener` hears of each that begins, changes or ends."""

    def __init__(self, listener: OnNotice | None) -> None:
        self._listener = listener
        self._standing: dict[tuple[Trouble, str], Notice] = {}
        self._inherited: set[tuple[Trouble, str]] = set()  # said by a worker that is dead

    @property
    def standing(self) -> tuple[Notice, ...]:
        """What is wrong now, oldest first."""
        return tuple(self._standing.values())

    def say(self, notice: Notice) -> None:
        """Something is wrong, or (not `active`) no longer; the same again is not repeated."""
        place = (notice.kind, notice.subject)
        self._inherited.discard(place)
        known = self._standing.get(place)
        if notice.active:
            self._standing[place] = notice
        elif self._standing.pop(place, None) is None:
            return
        if notice != known:
            log.log(logging.WARNING if notice.active else logging.INFO, "%s", notice.text)
            if self._listener is not None:
                self._listener(notice)

    def worker_died(self) -> None:
        """What the worker said is now unconfirmed."""
        self._inherited = {place for place in self._standing if place[0] not in _OF_THE_CLIENT}

    def worker_is_up(self) -> None:
        """A new worker is up: what its predecessor complained of and it does not, is over."""
        self.say(Notice("worker", "", "the DHT worker runs again", active=False))
        for kind, subject in list(self._inherited):
            text = self._standing[kind, subject].text
            self.say(Notice(kind, subject, f"no longer: {text}", active=False))
