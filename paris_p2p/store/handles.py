"""A bounded cache of open files, safe to use from several threads.

Serving an item reads 16 KiB at a time from files in no particular order: opening one for each block costs
more than the read, and keeping all open runs into the process's limit. A handle in use is never closed.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MAX_IDLE = 64
"""Files kept open while nobody reads them; the usual limit of a process is 1024 in all."""


@dataclass(slots=True)
class _Handle:
    fd: int
    users: int = 0
    forgotten: bool = False


class HandlePool:
    """Open files by (path, writable), the least recently used closed first."""

    def __init__(self, max_idle: int = MAX_IDLE) -> None:
        self._max_idle = max_idle
        self._mutex = threading.Lock()
        self._handles: OrderedDict[tuple[str, bool], _Handle] = OrderedDict()

    @contextmanager
    def use(self, path: Path, *, write: bool = False) -> Iterator[int]:
        """The descriptor of `path` for the length of the block; symbolic links are refused (`OSError`)."""
        handle = self._take((str(path), write))
        try:
            yield handle.fd
        finally:
            self._give_back(handle)

    @contextmanager
    def use_if_open(self, path: Path) -> Iterator[int | None]:
        """As `use` for reading; None when the file would have to be opened."""
        key = (str(path), False)
        handle = self._take(key) if key in self._handles else None
        try:
            yield None if handle is None else handle.fd
        finally:
            if handle is not None:
                self._give_back(handle)

    def _take(self, key: tuple[str, bool]) -> _Handle:
        with self._mutex:
            handle = self._handles.get(key)
            if handle is None:
                flags = os.O_RDWR if key[1] else os.O_RDONLY
                handle = _Handle(os.open(key[0], flags | os.O_CLOEXEC | os.O_NOFOLLOW))
                self._handles[key] = handle
            self._handles.move_to_end(key)
            handle.users += 1
            return handle

    def _give_back(self, handle: _Handle) -> None:
        with self._mutex:
            handle.users -= 1
            if handle.forgotten and handle.users == 0:
                os.close(handle.fd)
            self._close_surplus()

    def _close_surplus(self) -> None:
        surplus = len(self._handles) - self._max_idle
        if surplus <= 0:
            return
        idle = [key for key, handle in self._handles.items() if handle.users == 0]
        for key in idle[:surplus]:
            os.close(self._handles.pop(key).fd)

    def forget(self, folder: Path) -> None:
        """Close what is open below `folder`; what is in use, when its users are done."""
        with self._mutex:
            prefix = f"{folder}{os.sep}"
            for key in [key for key in self._handles if key[0].startswith(prefix)]:
                handle = self._handles.pop(key)
                handle.forgotten = True
                if handle.users == 0:
                    os.close(handle.fd)
