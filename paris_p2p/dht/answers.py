"""What other nodes answer to a search: which of it is checked and believed, and whether it is enough.

Owns: the notes of the calls that one request leads to, the budget for checking signatures, when a key counts
as read. Does not own: making the calls (`hardened`), the acceptance rule (`validator`). Imports hivemind:
only the DHT worker uses this module.
"""

import asyncio
import functools
import heapq
from collections.abc import Collection, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from paris_p2p.dht.record_storage import dictionary
from paris_p2p.dht.validator import RecordValidator

# isort: split
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.utils.serializer import MSGPackSerializer

CHECKS_AN_ANSWER = 64
"""The first of every answer about a key, which are checked: more than an honest node tells before a flood's.
Those of several honest answers are mostly the same."""
CHECKS_A_SEARCH = 512
"""Unknown records checked beyond that in one search of however many keys: a tenth of a second of CPU. What
was found valid before costs nothing, so a key with many honest records is known whole after a few reads."""
CHECKED_AT_ONCE = 16
"""Signatures checked in a row before other calls have their turn: their deadlines run meanwhile."""
DECIDING = 5
"""As many nodes nearest to a key as keep its records: at least half of those must answer."""
AWAY_S = 6.0
"""Who has been silent for so long, two deadlines of a call, is away: others keep what it kept, or nobody."""


@dataclass(slots=True)
class Votes:
    """What other nodes answered to the storing of one record."""

    taken: int = 0
    refused: int = 0


@dataclass(slots=True)
class Watch:
    """What is noted of the calls that one request leads to.

    `votes`: by key id and subkey; `heard`: per key id who was asked, and whether it said something or
    "nothing"; `ranks`: per key id the place of each owner in the answer that named it first; `found`: per key
    id what each peer returned, where that is wanted; `checks`: signatures that may still be checked, None
    where nobody asked for records; `vouched`: owners whose records are checked before others'.
    """

    votes: dict[tuple[Any, Any], Votes] = field(default_factory=dict)
    heard: dict[Any, dict[PeerID, bool]] = field(default_factory=dict)
    ranks: dict[Any, dict[Any, int]] = field(default_factory=dict)
    found: dict[Any, list[Any]] | None = None
    checks: int | None = None
    vouched: Collection[Any] = frozenset()

    def note_heard(self, peer: PeerID, asked: Iterable[Any], answered: Collection[Any]) -> None:
        """`peer` was asked about some keys and answered about some of them."""
        for key in asked:
            self.heard.setdefault(key, {})[peer] = key in answered

    def note_found(self, key: Any, found: Any) -> None:
        """An answer about `key`: a dictionary in the answerer's order."""
        if self.found is not None:
            self.found.setdefault(key, []).append(found)
        ranks = self.ranks.setdefault(key, {})
        for rank, (subkey, _) in enumerate(found.items()):
            ranks[subkey] = min(rank, ranks.get(subkey, rank))


watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@functools.lru_cache(maxsize=16_384)
def id_of(peer: PeerID) -> DHTID:
    """The DHT id that a peer must have: nobody chooses a place near a key without a search for it, or invents
    nodes there."""
    return DHTID.generate(peer.to_bytes())


def genuine(nodes: Mapping[DHTID, PeerID], most: int) -> dict[DHTID, PeerID]:
    """The first `most` of the nodes that a peer names, without those that cannot exist."""
    return {uid: peer for uid, peer in list(nodes.items())[:most] if uid == id_of(peer)}


def enough(key: Any, heard: Mapping[PeerID, bool], silent: Collection[PeerID]) -> bool:
    """Whether a search heard enough about `key` to say what is there, and what is not: at least half of the
    `DECIDING` nodes nearest to it answered, of those that were asked. `silent`: nodes that should have
    answered lately, also when they were not asked again."""
    answered = {peer for peer, ok in heard.items() if ok}
    expected = answered.union(silent)
    nearest = heapq.nsmallest(DECIDING, expected, key=lambda peer: key.xor_distance(id_of(peer)))
    told = sum(peer in answered for peer in nearest)
    return told > 0 and 2 * told >= len(nearest)


async def checked(validator: RecordValidator, key: DHTID, found: Any, notes: Watch | None) -> Any:
    """What of a peer's answer about `key` is valid, as a dictionary with the expiration its own records bear
    out; None for nothing. Unknown records beyond the budget of `notes` are left out."""
    if notes is None or notes.checks is None or found is None:
        return None
    if not isinstance(found.value, DictionaryDHTValue):
        return None
    with found.value.freeze():
        rows = list(found.value.items())
    if notes.vouched:
        rows.sort(key=lambda row: row[0] not in notes.vouched)
    good, checks = [], 0
    for rank, (subkey, item) in enumerate(rows):
        record = _record(key, subkey, item)
        if record is None:
            continue
        if not validator.knows(record):
            if rank >= CHECKS_AN_ANSWER:
                if not notes.checks:
                    continue
                notes.checks -= 1
            checks += 1
            if checks % CHECKED_AT_ONCE == 0:
                await asyncio.sleep(0)
            if not validator.validate(record):
                continue
        good.append((subkey, item))
    return dictionary(good)


def _record(key: DHTID, subkey: Any, item: Any) -> DHTRecord | None:
    """A row as the validator wants it; None for what cannot be a record."""
    value, until = item.value, item.expiration_time
    if not isinstance(subkey, bytes) or not isinstance(value, bytes) or not isinstance(until, float):
        return None
    return DHTRecord(key.to_bytes(), MSGPackSerializer.dumps(subkey), value, until)
