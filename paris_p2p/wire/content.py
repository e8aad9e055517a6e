"""The reference to a content item, as it stands in manifests, records and messages."""

from dataclasses import dataclass
from typing import TypeAlias

from paris_p2p.ids import InfoHash

MAX_ITEM_BYTES = 1 << 40
MIN_PIECE_LENGTH = 1 << 14
MAX_PIECE_LENGTH = 1 << 26


@dataclass(frozen=True, slots=True)
class ContentRef:
    """All a peer must be told to fetch an item safely: its id, its total length, its piece length.

    `info_hash`: the BitTorrent v2 info-hash (32 bytes). `length`: bytes of all files together.
    `piece_length`: bytes, a power of two >= 16 KiB (BEP 52).
    """

    info_hash: InfoHash
    length: int
    piece_length: int

    def __post_init__(self) -> None:
        if len(self.info_hash) != 32:
            raise ValueError("info_hash is not 32 bytes")
        if not 0 <= self.length <= MAX_ITEM_BYTES:
            raise ValueError("length is out of range")
        power_of_two = self.piece_length > 0 and self.piece_length & (self.piece_length - 1) == 0
        if not power_of_two or not MIN_PIECE_LENGTH <= self.piece_length <= MAX_PIECE_LENGTH:
            raise ValueError("piece_length is not a power of two from 16 KiB to 64 MiB")


@dataclass(frozen=True, slots=True)
class MagnetRef:
    """An item known by its id alone, as a magnet link names it (`info_hash`: 32 bytes).

    Its sizes come with its info dictionary, which the id proves; until then nobody knows how much disk it
    needs. Records and manifests always carry a `ContentRef`: this is for ids that a person types.
    """

    info_hash: InfoHash

    def __post_init__(self) -> None:
        if len(self.info_hash) != 32:
            raise ValueError("info_hash is not 32 bytes")


AnyRef: TypeAlias = ContentRef | MagnetRef


def default_piece_length(length: int) -> int:
    """The piece length for `length` bytes: about a thousand pieces, from 16 KiB to 1 MiB."""
    piece = MIN_PIECE_LENGTH
    while piece < (1 << 20) and length > piece * 1024:
        piece *= 2
    return piece
