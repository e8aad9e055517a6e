"""A lying peer: announces the whole item and serves corrupt, late or no data. For benchmarks only.

`python -m benchmarks.lab.liar corrupt|late|silent FILE PIECE_LENGTH FOLDER MULTIADDR…`

Prints {"event":"seeding","addresses":[…]} when it can be reached, then {"event":"lied","blocks":N}.

Owns: the lie, made where blocks are read; everything else is the real swarm. Does not own: the honest side.
"""

import json
import random
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import trio

from paris_p2p.ids import InfoHash
from paris_p2p.net.swarm import Peer, open_swarm
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.item import StoredItem
from paris_p2p.wire.identity import Identity

LATE_S = 20.0  # beyond any sensible request deadline
NEVER_S = 3600.0
REPORT_S = 0.5


def say(event: str, **fields: object) -> None:
    """One event line."""
    print(json.dumps({"event": event, **fields}), flush=True)


class LyingItem:
    """A `StoredItem` whose blocks are not what they seem; the rest is the real item's."""

    def __init__(self, real: StoredItem, lie: str) -> None:
        self._real = real
        self._lie = lie
        self.blocks = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def read_now(self, piece: int, offset: int, length: int) -> bytes | None:
        """Never: each block is asked for with `read_block`."""
        del piece, offset, length
        return None

    def read_block(self, piece: int, offset: int, length: int) -> bytes:
        """The real block, late, never, or with one bit changed."""
        self.blocks += 1
        if self._lie == "corrupt":
            data = bytearray(self._real.read_block(piece, offset, length))
            data[length // 2] ^= 1
            return bytes(data)
        time.sleep(LATE_S if self._lie == "late" else NEVER_S)
        return self._real.read_block(piece, offset, length)


class LyingStore(ContentStore):
    """A store whose complete items lie."""

    def __init__(self, root: Path, lie: str) -> None:
        super().__init__(root)
        self._lie = lie
        self.opened: list[LyingItem] = []

    def open(self, info_hash: InfoHash) -> StoredItem:
        """The item in disguise."""
        lying = LyingItem(super().open(info_hash), self._lie)
        self.opened.append(lying)
        return cast(StoredItem, lying)  # it is one in everything but its word


async def nobody(info_hash: InfoHash) -> Sequence[Peer]:
    """A liar looks for no one."""
    del info_hash
    return ()


async def lie_for_ever(lie: str, file: Path, piece_length: int, folder: Path, listen: list[str]) -> None:
    """Until killed."""
    store = LyingStore(folder / "store", lie)
    store.add(file, piece_length=piece_length)
    identity = Identity(secrets.token_bytes(32))
    async with open_swarm(identity, store, listen=listen, find_peers=nobody, rng=random.Random(0)) as swarm:
        say("seeding", addresses=list(swarm.addresses))
        while True:
            await trio.sleep(REPORT_S)
            say("lied", blocks=sum(item.blocks for item in store.opened))


if __name__ == "__main__":
    trio.run(lie_for_ever, sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
