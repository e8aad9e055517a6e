"""One piece's blocks, shared by peers."""

from paris_p2p.core.blocks import OpenPiece


def asked(piece: OpenPiece[str], peer: str, count: int) -> list[int]:
    offsets = [offset for offset, _ in piece.spans()][:count]
    for offset in offsets:
        piece.ask(peer, offset)
    return offsets


def test_blocks_are_asked_for_in_order_and_come_out_in_order() -> None:
    piece: OpenPiece[str] = OpenPiece(10, 4)
    assert list(piece.spans()) == [(0, 4), (4, 4), (8, 2)]
    assert asked(piece, "a", 3) == [0, 4, 8] and piece.todo == 0
    for offset, data in ((8, b"ij"), (0, b"abcd"), (4, b"efgh")):
        assert piece.put("a", offset, data) == []
    assert piece.complete and b"".join(map(bytes, piece.data())) == b"abcdefghij"


def test_what_a_peer_gives_back_is_asked_for_next() -> None:
    piece: OpenPiece[str] = OpenPiece(12, 4)
    asked(piece, "a", 2)
    piece.give_back("a", 0)
    piece.give_back("b", 4)  # who was not asked gives nothing back
    assert list(piece.spans()) == [(0, 4), (8, 4)]


def test_the_second_of_two_is_named_when_the_first_delivers() -> None:
    piece: OpenPiece[str] = OpenPiece(4, 4)
    piece.ask("a", 0)
    piece.ask("b", 0)
    piece.give_back("c", 0)
    assert piece.put("b", 0, b"abcd") == ["a"]


def test_a_block_that_came_after_it_was_given_back_is_not_asked_for_again() -> None:
    piece: OpenPiece[str] = OpenPiece(8, 4)
    asked(piece, "a", 1)
    piece.give_back("a", 0)
    piece.put("a", 0, b"abcd")
    assert list(piece.spans()) == [(4, 4)]


def test_what_a_liar_sent_is_forgotten_and_the_rest_is_kept() -> None:
    piece: OpenPiece[str] = OpenPiece(8, 4)
    asked(piece, "a", 1)
    asked(piece, "b", 1)
    piece.put("a", 0, b"abcd")
    piece.put("b", 4, b"efgh")
    assert piece.drop_from("a") == 4 and not piece.complete
    assert list(piece.spans()) == [(0, 4)] and piece.senders == {4: "b"}


def test_smaller_blocks_keep_what_is_here() -> None:
    piece: OpenPiece[str] = OpenPiece(14, 8)
    asked(piece, "a", 1)
    piece.put("a", 0, b"abcdefgh")
    piece.regrid(4)
    assert list(piece.spans()) == [(8, 4), (12, 2)]
    for offset, data in ((8, b"ijkl"), (12, b"mn")):
        piece.ask("b", offset)
        piece.put("b", offset, data)
    assert piece.complete and b"".join(map(bytes, piece.data())) == b"abcdefghijklmn"
    assert piece.senders == {0: "a", 4: "a", 8: "b", 12: "b"}
