"""`NewType` ids, so that a type checker catches one id passed for another. No behaviour lives here."""

from typing import NewType

NodeId = NewType("NodeId", bytes)
"""A node's Ed25519 public key, 32 bytes. Its text form is the libp2p PeerID (`wire.identity`)."""

RunId = NewType("RunId", bytes)
"""SHA-256 of the canonical manifest body, 32 bytes."""

InfoHash = NewType("InfoHash", bytes)
"""A content item's id: the BitTorrent v2 info-hash, SHA-256, 32 bytes (BEP 52)."""

Role = NewType("Role", str)
"""`expert-0` .. `expert-<K-1>`, or `router`."""

PieceIndex = NewType("PieceIndex", int)
"""A piece's index in a content item: files in order, each starting on a new piece."""

FileIndex = NewType("FileIndex", int)
"""A file's index in a content item, in the order of its file tree."""

Term = NewType("Term", int)
"""Fencing token of a claim on a role, 63 bits: a number, one more at each take-over, shifted left by 32, and
a mark of the claim (`wire.terms`). Terms are only compared; people are shown the number."""

ROUTER = Role("router")


def expert_role(cluster: int) -> Role:
    """The role that trains on `cluster` (0-based)."""
    return Role(f"expert-{cluster}")
