"""The pass: the organiser's signed leave for one node to claim roles of a restricted run, for a while.

Owns: its bytes (they travel inside records), its file form, signing and checking. Does not own: who needs one
(`core.access`).
"""

import base64
import binascii
import functools
from dataclasses import dataclass

from paris_p2p.errors import ConfigError, RemoteProtocolError
from paris_p2p.ids import NodeId, RunId
from paris_p2p.wire import canonical
from paris_p2p.wire.identity import SIGNATURE_BYTES, Identity, verify

MAX_PASS_BYTES = 80
_CONTEXT = "paris-p2p pass 1"
_EXPIRY_BYTES = 8
PASS_BYTES = _EXPIRY_BYTES + SIGNATURE_BYTES
_PREFIX = "paris-pass-1:"
_LATEST_UNIX = 1 << 40


@dataclass(frozen=True, slots=True)
class Pass:
    """`node` may claim roles of `run_id` until `expires_unix` (whole seconds)."""

    run_id: RunId
    node: NodeId
    expires_unix: int


def _signed_bytes(leave: Pass) -> bytes:
    return canonical.pack([_CONTEXT, leave.run_id, leave.node, leave.expires_unix])


def sign_pass(leave: Pass, organiser: Identity) -> bytes:
    """The pass as it travels: 8 bytes of expiry (big-endian) and the signature. Run and node are known to
    whoever checks it, so they are not repeated."""
    if not 0 < leave.expires_unix < _LATEST_UNIX:
        raise ConfigError("a pass must expire at a time between 1970 and the far future")
    return leave.expires_unix.to_bytes(_EXPIRY_BYTES, "big") + organiser.sign(_signed_bytes(leave))


@functools.lru_cache(maxsize=4096)
def check_pass(data: bytes, run_id: RunId, node: NodeId, organiser: NodeId) -> Pass:
    """The pass in `data`, if the organiser of the run gave it to `node`; else `RemoteProtocolError`.

    Whether it has expired is the caller's to judge.
    """
    if len(data) != PASS_BYTES:
        raise RemoteProtocolError(f"a pass has {PASS_BYTES} bytes, not {len(data)}")
    expires_unix = int.from_bytes(data[:_EXPIRY_BYTES], "big")
    if not 0 < expires_unix < _LATEST_UNIX:
        raise RemoteProtocolError("the pass's expiry is no time")
    leave = Pass(run_id, node, expires_unix)
    if not verify(organiser, _signed_bytes(leave), data[_EXPIRY_BYTES:]):
        raise RemoteProtocolError("the pass is not the organiser's for this node and run")
    return leave


def pass_text(data: bytes) -> str:
    """The one-line form of a pass, for a file or a message."""
    return _PREFIX + base64.urlsafe_b64encode(data).decode()


def parse_pass_text(text: str) -> bytes:
    """The pass's bytes from its one-line form. Raises `ConfigError`; the signature is not checked here."""
    line = text.strip()
    try:
        if not line.startswith(_PREFIX):
            raise ValueError("it does not start like one")
        data = base64.b64decode(line.removeprefix(_PREFIX), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error) as error:
        raise ConfigError(
            f"this is not a pass ({error}): it is the line that `paris-node delegate` printed"
        ) from None
    if len(data) != PASS_BYTES:
        raise ConfigError("the pass is cut off: copy the whole line that `paris-node delegate` printed")
    return data
