"""Which items to give up when a store may not grow: one function over what it holds.

Owns: the order. What was begun and not finished goes first (it serves nobody), then what nobody used for
longest. What is pinned never goes. Does not own: what is pinned (the programs), removing (`store`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from paris_p2p.ids import InfoHash


@dataclass(frozen=True, slots=True)
class Holding:
    """An item a store holds. `bytes_on_disk`: what it takes there; `used_unix`: when it was last read or
    completed (seconds since 1970)."""

    info_hash: InfoHash
    bytes_on_disk: int
    complete: bool
    used_unix: float


def choose_removals(
    holdings: Sequence[Holding], needed_bytes: int, pinned: Collection[InfoHash]
) -> tuple[InfoHash, ...]:
    """The items to remove, in this order, so that `needed_bytes` become free.

    Empty when nothing is needed, and when all that may go would not be enough: then nothing is lost for it.
    """
    free = sorted(
        (holding for holding in holdings if holding.info_hash not in pinned),
        key=lambda holding: (holding.complete, holding.used_unix, holding.info_hash),
    )
    chosen: list[InfoHash] = []
    left = needed_bytes
    for holding in free:
        if left <= 0:
            break
        chosen.append(holding.info_hash)
        left -= holding.bytes_on_disk
    return tuple(chosen) if left <= 0 else ()
