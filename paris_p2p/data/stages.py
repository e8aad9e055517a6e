"""Work done once: the finished stages of a `prepare` folder, and what each was made from.

Owns: `prepare-state.json`, `work/<stage>/`, the lock on the folder. A stage's result stands while its inputs
are the same; an interrupted stage leaves nothing behind. Does not own: what the stages do (`prepare`).
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.store.durable import disk, write_atomic
from paris_p2p.store.locks import holder, try_lock

STATE_NAME = "prepare-state.json"
LOCK_NAME = "prepare.lock"
PARTS_NAME = "parts"  # what may stand in a folder before its stages: parts that are to be merged there
FORMAT = 1


class Stages:
    """The stages of one folder. Made by `open_stages`."""

    def __init__(self, root: Path, keys: dict[str, str]) -> None:
        self._root = root
        self._recorded = keys
        self._current: dict[str, str] = {}
        self.reused: list[str] = []

    def run(
        self, name: str, after: tuple[str, ...], inputs: Mapping[str, object], make: Callable[[Path], None]
    ) -> Path:
        """The folder with the result of stage `name`, which `make(folder)` fills unless it is there already.

        It is there already when it was finished with the same `inputs` (JSON values) and after the same
        results of the stages `after`, which must have run before.
        """
        key = _key(name, [self._current[stage] for stage in after], inputs)
        self._current[name] = key
        folder = self._root / "work" / name
        if self._recorded.get(name) == key and folder.is_dir():
            self.reused.append(name)
            return folder
        self._forget(name)
        part = folder.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        self._recorded[name] = key
        self._save()
        return folder

    def _forget(self, name: str) -> None:
        if self._recorded.pop(name, None):
            self._save()

    def _save(self) -> None:
        state = {"format": FORMAT, "stages": self._recorded}
        write_atomic(self._root / STATE_NAME, (json.dumps(state, indent=2) + "\n").encode())


@contextmanager
def open_stages(root: Path) -> Iterator[Stages]:
    """The stages of folder `root`, made if need be and locked meanwhile.

    Raises `ConfigError` when the folder holds something else, `StoreError` when another process prepares in
    it or the disk refuses.
    """
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is not a folder: choose another --out")
    with disk("opening the folder", root):
        others = root.is_dir() and any(path.name != PARTS_NAME for path in root.iterdir())
        foreign = others and not (root / STATE_NAME).exists()
        if foreign and not (root / LOCK_NAME).exists():
            raise ConfigError(f"{root} holds something else than a prepared run: choose an empty folder")
        root.mkdir(parents=True, exist_ok=True)
        lock = try_lock(root / LOCK_NAME)
    if lock is None:
        raise StoreError(f"{root} is being prepared by {holder(root / LOCK_NAME)}")
    try:
        stages = Stages(root, _recorded(root / STATE_NAME))
        with disk("opening the folder", root):
            stages._save()  # from here on the folder is ours
        yield stages
    finally:
        lock.release()


def _recorded(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        state = None
    if (
        not isinstance(state, dict)
        or state.get("format") != FORMAT
        or not isinstance(state.get("stages"), dict)
    ):
        raise ConfigError(
            f"{path} is not of this version, or damaged: choose another --out, or delete its folder"
        )
    return {str(name): str(key) for name, key in state["stages"].items()}


def _key(name: str, after: list[str], inputs: Mapping[str, object]) -> str:
    text = json.dumps([FORMAT, name, after, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
