"""The key file of the DHT daemon (p2pd): a persistent peer id, so that printed addresses stay good.

Owns: the file's format, creation, permissions. Does not own: the node's identity, which is another key:
the libp2p stacks of the two processes must not share a peer id.
"""

import os
import secrets
from pathlib import Path

from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.wire.identity import SEED_BYTES, Identity

# protobuf of libp2p's crypto.pb.PrivateKey: field 1 (type) = Ed25519, field 2 (data) = 64 bytes, which
# go-libp2p wants to be seed followed by public key (py-libp2p: the 32 bytes of the seed alone)
_PREFIX = bytes([0x08, 0x01, 0x12, 0x40])


def ensure_key(path: Path) -> Identity:
    """The key in `path`, made first if there is none (mode 0600).

    Raises `ConfigError` when the file is no such key or others may read it, `StoreError` when it cannot
    be read or written.
    """
    try:
        try:
            return _read(path)
        except FileNotFoundError:
            _create(path, Identity(secrets.token_bytes(SEED_BYTES)))
            return _read(path)  # possibly the key of another process that came first
    except OSError as error:
        raise StoreError(f"the DHT key file {path} cannot be used: {error}") from error


def _read(path: Path) -> Identity:
    data = path.read_bytes()
    seed = data[len(_PREFIX) : len(_PREFIX) + SEED_BYTES]
    if len(seed) != SEED_BYTES or data != _encode(identity := Identity(seed)):
        raise ConfigError(f"{path} is damaged: delete it to get a new key (and with it a new address)")
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"others may read the key file {path}: run  chmod 600 {path}")
    return identity


def _encode(identity: Identity) -> bytes:
    return _PREFIX + identity.seed + identity.node_id


def _create(path: Path, identity: Identity) -> None:
    """Complete or not at all: a linked file is never seen half written, and the first of two wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(_encode(identity))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)
        except FileExistsError:
            return
    finally:
        part.unlink(missing_ok=True)
