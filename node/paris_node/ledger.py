"""The checkpoints this node holds whole and vouches for having: kept on disk, announced while held.

Owns: one file a statement under the run's folder, and pruning of the ones that newer checkpoints of the
same role replaced. Does not own: the items' bytes (`store`), or telling others (`announcer`).
"""

import hashlib
import logging
import threading
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from paris_p2p.core.assignment import Maker, newest_statement
from paris_p2p.errors import RemoteProtocolError, StoreError
from paris_p2p.ids import InfoHash, Role
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.durable import disk, write_atomic
from paris_p2p.wire.checkpoint import CheckpointStatement, check_statement

log = logging.getLogger(__name__)

KEPT_PER_ROLE = 2
"""At least: the newest, and the one before it: a peer may be half way through fetching that one. Beside the
newest, the announced one (others copy it) and the last safe one stay, and the one of most steps and the one
that came last, which of an honest role's work are the newest, too: three then, five at most."""


class Ledger:
    """The statements whose weights and resume items are complete in `store`. Several threads may add.

    `keep`: items never removed. A stranger's statement may name any item, the run's shards too.
    `within_steps`: the run's checkpoint interval (`core.assignment.newest_statement`).
    """

    def __init__(
        self, folder: Path, store: ContentStore, *, within_steps: float, keep: Collection[InfoHash] = ()
    ) -> None:
        self._folder = folder
        self._store = store
        self._keep = frozenset(keep)
        self._within_steps = within_steps
        self._held: dict[bytes, CheckpointStatement] = {}  # replaced, never changed: readers hold no lock
        self._passes: dict[bytes, bytes] = {}
        self._safe: dict[Role, bytes] = {}  # signed statements, as the next
        self._announced: dict[Role, bytes] = {}
        self._last: dict[Role, bytes] = {}
        self._adding = threading.Lock()
        with disk("reading the checkpoints held", folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.statement")):
                self._load(path)

    def _load(self, path: Path) -> None:
        try:
            data = path.read_bytes()
            statement = check_statement(data)
        except RemoteProtocolError as error:
            log.warning("%s is damaged and left alone: %s", path, error)
            return
        if self._store.has(statement.weights.info_hash) and self._store.has(statement.resume.info_hash):
            self._held[data] = statement
            with suppress(FileNotFoundError):
                self._passes[data] = self._pass_path(statement.role, data).read_bytes()

    def __contains__(self, data: object) -> bool:
        return data in self._held

    def held(self) -> Iterable[tuple[bytes, CheckpointStatement]]:
        """Signed bytes and statement of everything held."""
        return tuple(self._held.items())

    def newest(self, role: Role, leader: Maker | None = None) -> tuple[bytes, CheckpointStatement] | None:
        """The checkpoint held of `role` that a successor would go on from; `leader`: who holds the role."""
        mine = self._of(role)
        newest = newest_statement(mine, within_steps=self._within_steps, leader=leader)
        return None if newest is None else (mine[newest], newest)

    def _of(self, role: Role) -> dict[CheckpointStatement, bytes]:
        return {statement: data for data, statement in self._held.items() if statement.role == role}

    def access(self, data: bytes) -> bytes:
        """The pass of a held statement's holder, b"" if it has none."""
        return self._passes.get(data, b"")

    def add(self, data: bytes, statement: CheckpointStatement, access: bytes = b"") -> None:
        """Note that both items of `statement` are complete here; forget what it makes superfluous.

        `access`: the pass of the statement's holder, if it has one. Raises `StoreError` when the disk
        refuses, or an item is not here: what is noted is announced, and counts as a copy.
        """
        for ref in (statement.weights, statement.resume):
            if not self._store.has(ref.info_hash):
                raise StoreError(f"item {ref.info_hash.hex()[:16]}… of the checkpoint is no longer here")
        with self._adding:
            with disk("noting a checkpoint", self._folder, len(data)):
                if access:
                    write_atomic(self._pass_path(statement.role, data), access)
                    self._passes[data] = access
                write_atomic(self._path(statement.role, data), data)
            self._held = {**self._held, data: statement}
            self._last[statement.role] = data
            self._prune(statement.role)

    def _path(self, role: Role, data: bytes) -> Path:
        # by the statement, not its items: two holders' statements may name the very same weights
        return self._folder / f"{role}-{hashlib.sha256(data).hexdigest()[:32]}.statement"

    def _pass_path(self, role: Role, data: bytes) -> Path:
        return self._path(role, data).with_suffix(".pass")

    def keep_announced(self, role: Role, data: bytes) -> None:
        """Do not remove this one, instead of the one announced before: others copy it from here."""
        self._announced[role] = data

    def keep_safe(self, role: Role, data: bytes | None) -> None:
        """`data` is the role's last safe checkpoint: if it is held, keep it until another one is. None: it is
        not known which is, and the one that was stays."""
        if data is not None and data in self._held:
            self._safe[role] = data

    def _superfluous(self, role: Role) -> dict[CheckpointStatement, bytes]:
        """What is held of `role` and need not be."""
        mine = self._of(role)
        pinned = {pins.get(role) for pins in (self._safe, self._announced, self._last)}
        rest = {statement: data for statement, data in mine.items() if data not in pinned}
        # Whatever the terms: who signs a checkpoint chooses its term, and training that was done stays done.
        furthest = max(mine, key=lambda one: (one.step, one.term), default=None)
        for kept in (furthest, newest_statement(mine, within_steps=self._within_steps)):
            if kept is not None:
                rest.pop(kept, None)
        while rest and len(mine) - len(rest) < KEPT_PER_ROLE:
            newest = newest_statement(rest, within_steps=self._within_steps)
            assert newest is not None  # `rest` is not empty
            del rest[newest]
        return rest

    def _prune(self, role: Role) -> None:
        mine = self._superfluous(role)
        for old, data in mine.items():
            self._forget(old, data)

    def _forget(self, old: CheckpointStatement, data: bytes) -> None:
        try:
            with disk("removing an old checkpoint", self._folder):
                self._remove_items(old, data)
                self._path(old.role, data).unlink(missing_ok=True)
                self._pass_path(old.role, data).unlink(missing_ok=True)
        except StoreError as error:  # nothing depends on it: the next checkpoint tries again
            log.warning("%s step %d stays for now: %s", old.role, old.step, error)
        else:
            self._held = {held: one for held, one in self._held.items() if held != data}
            self._passes.pop(data, None)

    def drop(self, data: bytes) -> None:
        """Forget a statement that turned out to be false, and its items unless another one names them."""
        with self._adding:
            statement = self._held.get(data)
            if statement is not None:
                self._forget(statement, data)

    def needs(self, info_hash: InfoHash, *, beside: bytes = b"") -> bool:
        """Whether the item is to stay: one of `keep`, or named by a statement held (other than `beside`)."""
        return info_hash in self._keep or any(
            info_hash in (statement.weights.info_hash, statement.resume.info_hash)
            for data, statement in self._held.items()
            if data != beside
        )

    def _remove_items(self, old: CheckpointStatement, data: bytes) -> None:
        for ref in (old.weights, old.resume):
            if not self.needs(ref.info_hash, beside=data):
                self._store.remove(ref.info_hash)
