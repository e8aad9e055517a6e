"""Our acceptance rule in the form hivemind's DHT calls: nothing stands in it but owners' signed records.

Owns: undoing hivemind's encodings (key id, msgpack around subkey and value) exactly. Does not own: the rule
itself (`wire.records.check_record`). Imports hivemind: only the DHT worker uses this module.
"""

import hashlib
from collections.abc import Callable

import msgpack

from paris_p2p.dht.hivemind_import import load_hivemind_dht
from paris_p2p.errors import RemoteProtocolError
from paris_p2p.wire.records import MAX_RECORD_BYTES, Record, check_record

load_hivemind_dht()
from hivemind.dht.validation import DHTRecord, RecordValidatorBase  # noqa: E402 - after the light import

_WRAPPED_BYTES = MAX_RECORD_BYTES + 8  # msgpack's header around bytes has at most 5
_REMEMBERED = 32_768  # records, 16 bytes each: more than a node may keep of the keys of a run


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind ships no types
    """Accepts a record for any key only if `check_record` does. `now`: wall clock, unix seconds.

    hivemind writes a plain value as the reserved subkey `msgpack(None)` and a dictionary as one record per
    subkey; the former has no owner and is refused, the latter is judged record by record.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._valid: dict[bytes, None] = {}  # digests of records found valid, the latest last

    def knows(self, record: DHTRecord) -> bool:
        """Whether `record` was found valid before: believing it costs no signature check."""
        return _digest(record) in self._valid

    def validate(self, record: DHTRecord) -> bool:
        """Whether `record` may be stored here, or believed when a peer returned it.

        A search hears the same record from twenty nodes: its signature is checked once. (What was valid stays
        so as time goes on: an expiration only comes nearer.)
        """
        digest = _digest(record)
        if digest in self._valid:
            return True
        try:
            self.check(record)
        except RemoteProtocolError:
            return False
        self._valid[digest] = None
        if len(self._valid) > _REMEMBERED:
            del self._valid[next(iter(self._valid))]
        return True

    def check(self, record: DHTRecord) -> Record:
        """The checked record; raises `RemoteProtocolError` with the reason."""
        if type(record.expiration_time) is not float:
            raise RemoteProtocolError("the expiration is no floating-point number")
        owner, value = _unwrap(record.subkey), _unwrap(record.value)
        return check_record(record.key, owner, value, record.expiration_time, self._now())

    def sign_value(self, record: DHTRecord) -> bytes:
        """The value as it is: records arrive signed by the node, whose key never enters this process."""
        return bytes(record.value)

    def strip_value(self, record: DHTRecord) -> bytes:
        """The value as it is: readers verify the signature again, so it stays."""
        return bytes(record.value)

    @property
    def priority(self) -> int:
        """The only validator there is."""
        return 0

    def merge_with(self, other: RecordValidatorBase) -> bool:
        """Two of the same kind are one; any other must be applied as well."""
        return isinstance(other, RecordValidator)


def _digest(record: DHTRecord) -> bytes:
    """One digest for each (key, subkey, value, expiration), whatever types a peer chose for them."""
    parts = (record.key, record.subkey, record.value, repr(record.expiration_time).encode())
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else b"?" + repr(type(part)).encode()
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()


def _unwrap(data: object) -> bytes:
    """The bytes inside the one msgpack encoding of a byte string. Raises `RemoteProtocolError`."""
    if not isinstance(data, bytes) or len(data) > _WRAPPED_BYTES:
        raise RemoteProtocolError("not bytes, or too many")
    try:
        inner = msgpack.unpackb(data, raw=False, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise RemoteProtocolError(f"not msgpack: {error}") from None
    if type(inner) is not bytes or msgpack.packb(inner, use_bin_type=True) != data:
        raise RemoteProtocolError("not the encoding of a byte string")
    return inner
