"""The items that something under way on this node needs at this moment.

Owns: counting who uses an item, and remembering which ones are to go when nobody does any more. Does not own:
removing (`run_node`), or what is kept for longer (`keeping`, `ledger`).
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from paris_p2p.ids import InfoHash


class ItemsInUse:
    """A checkpoint's items between their first byte and the note that they are held: until then nothing else
    pins them, and several statements may name the same ones. Used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: Counter[InfoHash] = Counter()
        self._unwanted: set[InfoHash] = set()

    @contextmanager
    def using(self, *items: InfoHash) -> Iterator[Callable[[InfoHash], None]]:
        """The items stay while the block runs; call what it gives for those that are known later."""
        mine: list[InfoHash] = []

        def use(item: InfoHash) -> None:
            with self._lock:
                self._users[item] += 1
                mine.append(item)

        try:
            for item in items:
                use(item)
            yield use
        finally:
            with self._lock:
                self._users -= Counter(mine)

    def items(self) -> frozenset[InfoHash]:
        """What is in use now."""
        with self._lock:
            return frozenset(self._users)

    def unwanted(self, item: InfoHash) -> None:
        """Remove the item once nobody uses it."""
        with self._lock:
            self._unwanted.add(item)

    def take_unwanted(self) -> frozenset[InfoHash]:
        """The unwanted items that nobody uses; each is given once."""
        with self._lock:
            idle = frozenset(item for item in self._unwanted if item not in self._users)
            self._unwanted -= idle
            return idle
