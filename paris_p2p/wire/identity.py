"""Node identities: Ed25519 keys, signatures, and the libp2p PeerID that is a public key's text form.

Owns: signing, verifying, text forms. Does not own: where a key is kept (the programs' home folder).
"""

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from paris_p2p.errors import ConfigError
from paris_p2p.ids import NodeId

SEED_BYTES = 32
NODE_ID_BYTES = 32
SIGNATURE_BYTES = 64

# A PeerID of an Ed25519 key is the identity multihash (0x00, length 0x24) of the protobuf
# {type: Ed25519, data: 32 bytes} (libp2p peer-ids specification).
_PEER_ID_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])


class Identity:
    """A node's key pair, made from its 32-byte Ed25519 seed."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ConfigError(f"an identity is {SEED_BYTES} bytes, this one has {len(seed)}")
        self.seed = seed
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.node_id = NodeId(self._private.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `message`."""
        return self._private.sign(message)

    def __repr__(self) -> str:
        return f"Identity({peer_id_text(self.node_id)})"


def verify(node_id: NodeId, message: bytes, signature: bytes) -> bool:
    """Whether `signature` over `message` was made with the key `node_id`."""
    try:
        Ed25519PublicKey.from_public_bytes(node_id).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def peer_id_text(node_id: NodeId) -> str:
    """The base58 libp2p PeerID of a node (`12D3Koo…`)."""
    return str(base58.b58encode(_PEER_ID_PREFIX + node_id), "ascii")


def node_id_from_peer_id(text: str) -> NodeId:
    """The public key inside a base58 PeerID. Raises `ConfigError` when it holds no Ed25519 key."""
    try:
        raw = base58.b58decode(text)
    except ValueError:
        raw = b""
    if len(raw) != len(_PEER_ID_PREFIX) + NODE_ID_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        raise ConfigError(f"{text!r} is not the peer id of an Ed25519 key (it should start with 12D3Koo)")
    return NodeId(raw[len(_PEER_ID_PREFIX) :])
