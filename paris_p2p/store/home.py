"""A node's home folder: its identity, its content store, what it remembers between commands.

identity.key    the 32-byte Ed25519 seed; readable by its owner only
node.lock       held while a node runs with this identity
peers.json      DHT peers that answered: the way back in when no bootstrap node does
context.json    the last bootstrap addresses, run and model, so that commands need no flags
store/          the content store
seeds/          a store for each path that is seeded where it lies
work/<run>/<role>/   a trainer's folder
models/         assembled models
"""

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict, Unpack

from paris_p2p.errors import ConfigError
from paris_p2p.ids import Role, RunId
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.durable import disk, write_atomic
from paris_p2p.store.locks import holder, try_lock
from paris_p2p.wire.identity import SEED_BYTES, Identity

ENVIRONMENT = "PARIS_HOME"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Context(TypedDict, total=False):
    """What a home remembers; a field nobody has set is not there. `run_id`: hex; `model`: the folder of an
    assembled model."""

    bootstrap: list[str]
    run_id: str
    model: str


class Home:
    """One node's folder; created when first used."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        with disk("creating the home folder", self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def resolve(cls, option: Path | None) -> "Home":
        """The home to use: `option`, else the environment's `PARIS_HOME`, else the platform's data folder."""
        if option is not None:
            return cls(option)
        named = os.environ.get(ENVIRONMENT)
        if named:
            return cls(Path(named))
        import platformdirs  # only here, and only in homes that nobody named

        return cls(platformdirs.user_data_path("paris-p2p"))

    # --- identity --------------------------------------------------------------------------------

    @property
    def identity_path(self) -> Path:
        """Where the identity's seed is kept."""
        return self.path / "identity.key"

    def identity(self) -> Identity:
        """The node's identity, made when there is none.

        Raises `ConfigError` when the file is not 32 bytes, or others may read or change it.
        """
        path = self.identity_path
        with disk("reading the identity", self.path):
            if not path.exists():
                _create_seed(path)
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                seed = file.read(SEED_BYTES + 1)
        if mode & _OTHERS:
            raise ConfigError(f"{path} is open to other users: run chmod 600 {path}")
        if len(seed) != SEED_BYTES:
            raise ConfigError(
                f"{path} is not an identity ({SEED_BYTES} bytes are expected): restore it from a copy, "
                "or remove it and this node becomes a new one"
            )
        return Identity(seed)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Run as this identity's only node for the length of the block. Raises `ConfigError` when another
        node does: two nodes of one identity would undo each other's claims."""
        lock_path = self.path / "node.lock"
        with disk("locking the identity", self.path):
            lock = try_lock(lock_path)
        if lock is None:
            raise ConfigError(
                f"this identity is in use by another node ({holder(lock_path)}): stop it, or give this one "
                f"another home with --home or {ENVIRONMENT}"
            )
        try:
            yield
        finally:
            lock.release()

    # --- folders ---------------------------------------------------------------------------------

    @property
    def has_store(self) -> bool:
        """Whether a node ever stored anything here."""
        return (self.path / "store").is_dir()

    def store(self, *, clean: bool = False) -> ContentStore:
        """The node's content store; `clean`: without what processes that died left half added."""
        return ContentStore(self.path / "store", clean=clean)

    def run_folder(self, run_id: RunId) -> Path:
        """Where what is kept of a run belongs; not created."""
        return self.path / "runs" / run_id.hex()

    def work(self, run_id: RunId, role: Role) -> Path:
        """The folder for training `role`, created."""
        return self._folder(self.path / "work" / run_id.hex() / role)

    @property
    def peers_path(self) -> Path:
        """Where the DHT peers that answered are remembered."""
        return self.path / "peers.json"

    @property
    def models(self) -> Path:
        """The folder of assembled models, created."""
        return self._folder(self.path / "models")

    def _folder(self, path: Path) -> Path:
        with disk("creating a folder", self.path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    # --- context ---------------------------------------------------------------------------------

    @property
    def context_path(self) -> Path:
        """Where the context is kept."""
        return self.path / "context.json"

    def context(self) -> Context:
        """What this home remembers. Raises `ConfigError` when the file is damaged."""
        with disk("reading the context", self.path):
            data = self.context_path.read_bytes() if self.context_path.exists() else b"{}"
        try:
            return _context(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{self.context_path} is damaged ({error}): remove it, and name the bootstrap address "
                "again with --bootstrap"
            ) from None

    def remember(self, **fields: Unpack[Context]) -> Context:
        """Remember the given fields beside those already known; all of them, as they are then.

        Raises `ConfigError` when the file is damaged, `StoreError` when the disk refuses.
        """
        context = _context({**self.context(), **fields})
        text = json.dumps(context, indent=2, ensure_ascii=False) + "\n"
        with disk("writing the context", self.path, len(text)):
            write_atomic(self.context_path, text.encode())
        return context


def _create_seed(path: Path) -> None:
    """Write a new seed. Of several processes at it at once one wins, and all use its seed."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write_atomic(draft, secrets.token_bytes(SEED_BYTES), mode=0o600)
    try:
        os.link(draft, path)  # unlike a rename, never replaces an identity
    except FileExistsError:
        return
    finally:
        draft.unlink()


def _context(plain: object) -> Context:
    """The fields of `plain`, those of other versions left out. Raises `ValueError` naming what is wrong."""
    if not isinstance(plain, dict):
        raise ValueError("it is not a JSON object")
    context = Context()
    for name in ("run_id", "model"):
        if name in plain:
            if not isinstance(plain[name], str):
                raise ValueError(f"{name} is not text")
            context[name] = plain[name]
    bootstrap = plain.get("bootstrap", [])
    if not isinstance(bootstrap, list) or not all(isinstance(address, str) for address in bootstrap):
        raise ValueError("bootstrap is not a list of texts")
    if bootstrap:
        context["bootstrap"] = list(bootstrap)
    if len(bytes.fromhex(context.get("run_id", "00" * 32))) != 32:
        raise ValueError("run_id is not 64 hexadecimal digits")
    return context
