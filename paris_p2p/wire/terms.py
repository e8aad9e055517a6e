"""The term of a claim, its fencing token: a number that counts up and a mark of the claim, in one integer.

Two sides of a partition both count on from the number they know. The mark keeps their terms apart, so that no
two claims share a term, and terms stay totally ordered: by number, then by mark. A claim that has seen an
earlier one takes a higher number, so it exceeds it whatever the marks.

Owns: the layout, the mark, the bound that the clock sets to numbers. Does not own: which number a claim takes
(`core.lease`).
"""

import hashlib
import struct

from paris_p2p.ids import NodeId, Role, Term

MARK_BITS = 32
MAX_TERM = (1 << 63) - 1
"""What canonical encoding holds; a number fits in 31 bits."""
MAX_NUMBER = MAX_TERM >> MARK_BITS
NUMBERS_SINCE_UNIX = 1.7e9
"""2023-11-14: from then on one number a second may have been used up, until 2091."""


def make_term(number: int, role: Role, owner: NodeId, since_unix: float) -> Term:
    """The term of `owner`'s claim on `role`, bid for at `since_unix`; `number` from 1 to `MAX_NUMBER`."""
    if not 1 <= number <= MAX_NUMBER:
        raise ValueError(f"a term's number is from 1 to {MAX_NUMBER}")
    return Term(number << MARK_BITS | _mark(role, owner, since_unix))


def term_number(term: Term) -> int:
    """The number people are shown: 1 for the first holder, about one more at each take-over."""
    return term >> MARK_BITS


def belongs(term: Term, role: Role, owner: NodeId, since_unix: float) -> bool:
    """Whether the mark of `term` is that of this claim: nobody may use another one's term."""
    return term_number(term) >= 1 and term & ((1 << MARK_BITS) - 1) == _mark(role, owner, since_unix)


def highest_number(unix: float) -> int:
    """The highest number a claim may carry at `unix` (finite): more than honest claims ever use up.

    It keeps one liar from using up all numbers, and is the same for all readers: whether a claim counts must
    never depend on what a reader happens to have seen before.
    """
    return max(0, min(MAX_NUMBER, int(unix - NUMBERS_SINCE_UNIX)))


def _mark(role: Role, owner: NodeId, since_unix: float) -> int:
    """32 bits by which the claim's term differs from others of its number (two agree once in 4 billion)."""
    data = b"paris-p2p term 1\0" + role.encode() + b"\0" + owner + struct.pack(">d", since_unix)
    return int.from_bytes(hashlib.sha256(data).digest()[: MARK_BITS // 8], "big")
