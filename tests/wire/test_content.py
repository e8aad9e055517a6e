"""Tests of `paris_p2p.wire.content`."""

import pytest

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import InfoHash
from paris_p2p.wire import canonical
from paris_p2p.wire.content import (
    MAX_ITEM_BYTES,
    MAX_PIECE_LENGTH,
    MIN_PIECE_LENGTH,
    ContentRef,
    default_piece_length,
)


@pytest.mark.parametrize(
    ("hash_bytes", "length", "piece_length"),
    [
        (31, 1, 1 << 14),
        (33, 1, 1 << 14),
        (32, -1, 1 << 14),
        (32, MAX_ITEM_BYTES + 1, 1 << 20),
        (32, 1, 0),
        (32, 1, -(1 << 14)),
        (32, 1, 1 << 13),
        (32, 1, (1 << 14) + 1),
        (32, 1, 3 << 14),
        (32, 1, 2 * MAX_PIECE_LENGTH),
    ],
)
def test_a_reference_out_of_range_is_refused(hash_bytes: int, length: int, piece_length: int) -> None:
    plain = {"info_hash": bytes(hash_bytes), "length": length, "piece_length": piece_length}
    with pytest.raises(RemoteProtocolError):
        canonical.from_plain(ContentRef, plain)


def test_a_reference_comes_back_as_it_went_in() -> None:
    ref = ContentRef(InfoHash(bytes(range(32))), 5, 1 << 14)
    assert canonical.decode(ContentRef, canonical.encode(ref), 256) == ref


@pytest.mark.parametrize("length", [0, 1, 1 << 24, (1 << 24) + 1, 1 << 30, MAX_ITEM_BYTES])
def test_the_default_piece_length_is_allowed_and_gives_about_a_thousand_pieces(length: int) -> None:
    piece_length = default_piece_length(length)
    ContentRef(InfoHash(bytes(32)), length, piece_length)
    assert MIN_PIECE_LENGTH <= piece_length <= 1 << 20
    assert length <= 1024 * piece_length or piece_length == 1 << 20
