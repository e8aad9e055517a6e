"""The checkpoints this node holds whole and vouches for having: kept on disk, announced while held.

Owns: one file a statement under the run's folder, and pruning of the ones that newer checkpoints of the
same role replaced. Does not own: the items' bytes (`store`), or telling others (`announcer`).
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from paris_p2p.core.assignment import newest_statement
from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import Role
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.checkpoint import CheckpointStatement, check_statement

log = logging.getLogger(__name__)

KEPT_PER_ROLE = 2
"""The newest, and the one before it: a peer may be half way through fetching that one."""


class Ledger:
    """The statements whose weights and resume items are complete in `store`."""

    def __init__(self, folder: Path, store: ContentStore) -> None:
        self._folder = folder
        self._store = store
        self._held: dict[bytes, CheckpointStatement] = {}
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

    def __contains__(self, data: bytes) -> bool:
        return data in self._held

    def held(self) -> Iterable[tuple[bytes, CheckpointStatement]]:
        """Signed bytes and statement of everything held."""
        return tuple(self._held.items())

    def newest(self, role: Role) -> tuple[bytes, CheckpointStatement] | None:
        """The checkpoint held of `role` that a successor would go on from."""
        mine = self._of(role)
        newest = newest_statement(mine)
        return None if newest is None else (mine[newest], newest)

    def _of(self, role: Role) -> dict[CheckpointStatement, bytes]:
        return {statement: data for data, statement in self._held.items() if statement.role == role}

    def add(self, data: bytes, statement: CheckpointStatement) -> None:
        """Note that both items of `statement` are complete here; forget what it makes superfluous."""
        path = self._path(statement)
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.replace(path)
        self._held[data] = statement
        self._prune(statement.role)

    def _path(self, statement: CheckpointStatement) -> Path:
        return self._folder / f"{statement.role}-{statement.weights.info_hash.hex()[:32]}.statement"

    def _prune(self, role: Role) -> None:
        mine = self._of(role)
        for _ in range(KEPT_PER_ROLE):
            newest = newest_statement(mine)
            if newest is not None:
                del mine[newest]
        for old, data in mine.items():
            del self._held[data]
            self._path(old).unlink(missing_ok=True)
            self._remove_items(old)

    def _remove_items(self, old: CheckpointStatement) -> None:
        still_named = {
            ref.info_hash
            for statement in self._held.values()
            for ref in (statement.weights, statement.resume)
        }
        for ref in (old.weights, old.resume):
            if ref.info_hash not in still_named:
                self._store.remove(ref.info_hash)
