"""Keeps this node's records alive in the DHT: signs them, renews them before they expire.

Owns: what this node currently says (run, membership, provided items, held checkpoints). Claims are not
here: the lease machine times those itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from paris_node.network import Network
from paris_p2p import clock
from paris_p2p.ids import InfoHash, RunId
from paris_p2p.wire.addresses import ACCESS_CHARS, MAX_ANNOUNCED_CHARS, fitting
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.records import (
    KIND_OF,
    AnnounceRecord,
    Payload,
    ProvideRecord,
    role_scope,
    sign_record,
)

PROVIDE_TTL_S = 300.0
RENEW_AT = 0.6
"""A record is written again when less than this share of its life is left."""
OVERDUE_S = 60.0
"""Announcing takes a while: a record is overdue when it should have been written so long ago."""


def is_overdue(expiration_unix: float, ttl_s: float, now_unix: float) -> bool:
    """Whether a record of life `ttl_s` should have been renewed and was not: its owner may be gone."""
    return expiration_unix - now_unix < RENEW_AT * ttl_s - OVERDUE_S


@dataclass(slots=True)
class _Kept:
    payload: Payload
    scope: bytes
    ttl_s: float
    expiration_unix: float = 0.0


class Announcer:
    """The records a node keeps alive: `say` adds, `forget_refused` drops, `flush` writes what is due.
    `provide_ttl_s`: for how long others look for an item here after the last word."""

    def __init__(self, network: Network, *, provide_ttl_s: float = PROVIDE_TTL_S) -> None:
        self._network = network
        self._provide_ttl_s = provide_ttl_s
        self._kept: dict[tuple[str, bytes], _Kept] = {}

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others are told to find this node: as many addresses as a record holds."""
        return fitting(self._network.swarm.addresses)

    def _beside_a_statement(self, access: bytes) -> tuple[str, ...]:
        return fitting(self.addresses, chars=MAX_ANNOUNCED_CHARS - ACCESS_CHARS * bool(access))

    def say(self, payload: Payload, scope: bytes, ttl_s: float) -> None:
        """Keep `payload` alive under `scope`; a changed payload is written at the next `flush`."""
        key = (KIND_OF[type(payload)], scope)
        kept = self._kept.get(key)
        if kept is None or kept.payload != payload:
            self._kept[key] = _Kept(payload, scope, ttl_s)

    def unsay(self, payload: type[Payload], scope: bytes) -> None:
        """Let the record of this kind under `scope`, if any, expire."""
        self._kept.pop((KIND_OF[payload], scope), None)

    def forget_refused(self) -> None:
        """Let the records of items that have left the store, or were served enough, expire, but not of those
        that are being fetched."""
        swarm, store = self._network.swarm, self._network.store
        fetching = swarm.fetching()
        for kind, scope in list(self._kept):
            item = InfoHash(scope)
            if kind == "provide" and item not in fetching and (swarm.refuses(item) or not store.has(item)):
                del self._kept[kind, scope]

    def provide_parts(self, info_hashes: Iterable[InfoHash]) -> None:
        """Say that this node is fetching these items, and serves what it has of them."""
        for info_hash in info_hashes:
            if not self._network.store.has(info_hash):
                self.say(ProvideRecord(False, self.addresses), info_hash, self._provide_ttl_s)

    def overdue(self, now_unix: float) -> int:
        """How many records that were written once should have been renewed long ago."""
        return sum(
            kept.expiration_unix > 0.0 and is_overdue(kept.expiration_unix, kept.ttl_s, now_unix)
            for kept in self._kept.values()
        )

    def provide(self, info_hashes: Iterable[InfoHash]) -> None:
        """Say that this node serves these items whole."""
        for info_hash in info_hashes:
            self.say(ProvideRecord(True, self.addresses), info_hash, self._provide_ttl_s)

    def provided(self) -> list[InfoHash]:
        """The items this node says it serves whole."""
        return [
            InfoHash(scope)
            for (kind, scope), kept in self._kept.items()
            if kind == "provide" and isinstance(kept.payload, ProvideRecord) and kept.payload.complete
        ]

    def readdress(self) -> None:
        """Where this node is found has changed: what names its addresses is said anew at the next flush."""
        for kept in self._kept.values():
            payload = kept.payload
            if isinstance(payload, ProvideRecord | AnnounceRecord):
                addresses = self.addresses
                if isinstance(payload, AnnounceRecord):
                    addresses = self._beside_a_statement(payload.access)
                if payload.addresses != addresses:
                    kept.payload = replace(payload, addresses=addresses)
                    kept.expiration_unix = 0.0

    def provide_checkpoint(
        self, run_id: RunId, data: bytes, statement: CheckpointStatement, access: bytes = b""
    ) -> None:
        """Say that this node holds the checkpoint of `statement` (signed bytes: `data`). `access`: its
        holder's pass; with it there is less room for addresses."""
        self.provide([statement.weights.info_hash, statement.resume.info_hash])
        record = AnnounceRecord(data, self._beside_a_statement(access), access)
        self.say(record, role_scope(run_id, statement.role), PROVIDE_TTL_S)

    async def flush(self) -> int:
        """Write the records that are new, changed or due; the number that could not be stored."""
        now = clock.unix()
        due = [k for k in self._kept.values() if k.expiration_unix - now < RENEW_AT * k.ttl_s]
        if not due:
            return 0
        signed = [sign_record(self._network.identity, k.payload, k.scope, now + k.ttl_s) for k in due]
        stored = await self._network.dht.publish(signed)
        for kept, record, ok in zip(due, signed, stored, strict=True):
            if ok:
                kept.expiration_unix = record.expiration_unix
        return stored.count(False)
