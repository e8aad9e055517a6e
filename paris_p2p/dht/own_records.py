"""The records this node has published: which must stay stored, and whether somebody else writes with its key.

Owns: those two decisions, as values. Does not own: storing, reading, clocks (`now` is an argument).
"""

from paris_p2p.wire.records import Record, SignedRecord, record_key

Place = tuple[bytes, bytes]
"""A record's key and owner."""
FORGET_S = 600.0
"""Somebody else's use of our key is over when nothing of it was seen for this long."""


class OwnRecords:
    """The latest record of ours under each key, and what is read under our name."""

    def __init__(self) -> None:
        self._latest: dict[Place, SignedRecord] = {}
        self._strange: dict[Place, float] = {}  # the latest expiration of a record in our name but not ours
        self._seen_unix = float("-inf")

    def remember(self, record: SignedRecord, now_unix: float) -> None:
        """`record` is about to be stored."""
        place = (record.key, bytes(record.subkey))
        known = self._latest.get(place)
        if record.expiration_unix > now_unix and (
            known is None or known.expiration_unix < record.expiration_unix
        ):
            self._latest[place] = record

    def live(self, now_unix: float) -> list[SignedRecord]:
        """The records that have not expired, to be stored again; the others are forgotten."""
        self._latest = {
            place: record for place, record in self._latest.items() if record.expiration_unix > now_unix
        }
        return list(self._latest.values())

    def is_strange(self, record: Record, now_unix: float) -> bool:
        """Whether a record that was read proves that another process writes with our key *now*.

        One that expires later than all we wrote there may be left from an earlier process of ours. But such a
        one is never renewed: the second, later one proves it.
        """
        place = (record_key(record.kind, record.scope), bytes(record.owner))
        ours = self._latest.get(place)
        if ours is None or record.expiration_unix <= ours.expiration_unix:
            return False
        before = self._strange.get(place)
        if before is not None and record.expiration_unix <= before:
            return False
        self._strange[place] = record.expiration_unix
        if before is not None:
            self._seen_unix = now_unix
        return before is not None

    def shared(self, now_unix: float) -> bool:
        """Whether our key is in use elsewhere, as far as was seen lately."""
        return now_unix < self._seen_unix + FORGET_S


def identity_text(record: Record) -> str:
    """What is wrong when `record`, in our name, is another process's, and what to do."""
    where = ", ".join(getattr(record.payload, "addresses", ())) or "an unknown address"
    return (
        f"this node's identity is in use elsewhere too (its {record.kind} record comes from {where}): two "
        "nodes of one key undo each other's claims. Stop one of them; a copied home becomes a node of its "
        "own when identity.key and dht.key are removed from it"
    )
