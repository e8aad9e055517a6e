"""TLS certificates that carry a node's identity (the libp2p TLS specification's scheme).

Owns: making a node's certificate, and finding out whose certificate a peer's is. Does not own: the
connection (`net.tls`).

The TLS key is made anew for each process; a certificate extension holds the node's public key and its
signature over the TLS key, so that who can speak TLS with that key is who the node says it is.

Certificates are written and read here, byte for byte: of X.509 only one algorithm, one curve and one
extension are used, and importing a library for all of it takes a fifth of a program's start.
"""

import base64
import datetime
import os
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from paris_p2p.errors import TransportError
from paris_p2p.ids import NodeId
from paris_p2p.wire.identity import NODE_ID_BYTES, SIGNATURE_BYTES, Identity, verify

EXTENSION_OID = "1.3.6.1.4.1.53594.1.1"
MAX_CERTIFICATE_BYTES = 4096
MAX_SERIAL_BYTES = 20
_SIGNED_PREFIX = b"libp2p-tls-handshake:"
# SEQUENCE { OCTET STRING (protobuf {type: Ed25519, data: 32 bytes}), OCTET STRING (64 bytes) }: for Ed25519
# every length is fixed, and DER has one encoding only.
_EXTENSION_HEAD = bytes([0x30, 0x68, 0x04, 0x24, 0x08, 0x01, 0x12, 0x20])
_EXTENSION_MIDDLE = bytes([0x04, 0x40])
_EXTENSION_BYTES = len(_EXTENSION_HEAD) + NODE_ID_BYTES + len(_EXTENSION_MIDDLE) + SIGNATURE_BYTES
# As rust-libp2p does: the certificate is worth as much as its key, which dies with the process; a period
# would only make nodes with wrong clocks unreachable.
_VALID_FROM = datetime.datetime(1975, 1, 1)
_VALID_UNTIL = datetime.datetime(4096, 1, 1)

_BOOLEAN, _INTEGER, _BITS, _OCTETS, _OID, _SEQUENCE = 0x01, 0x02, 0x03, 0x04, 0x06, 0x30
_UTC_TIME, _TIME = 0x17, 0x18
_VERSION, _EXTENSIONS = 0xA0, 0xA3  # explicit tags 0 and 3 of a certificate
_PARAMETERS, _PUBLIC = 0xA0, 0xA1  # of a private key
_VERSION_3 = bytes([_INTEGER, 1, 2])
_EXTENSION_OID = bytes.fromhex("2b0601040183a25a0101")
_P256_OID = bytes.fromhex("06082a8648ce3d030107")
_ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
_P256_HEAD = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
"""A public key of P-256 up to its point, which is 65 bytes."""
_COORDINATE_BYTES = 32
_EC = ec.ECDSA(SHA256())


def make_certificate(
    identity: Identity,
    valid_from: datetime.datetime = _VALID_FROM,
    valid_until: datetime.datetime = _VALID_UNTIL,
) -> tuple[bytes, bytes]:
    """A new TLS key and its certificate for `identity`: (certificate, private key), both PEM. UTC times."""
    key = ec.generate_private_key(ec.SECP256R1())
    point = _point(key.public_key())
    spki = _P256_HEAD + point
    signature = identity.sign(_SIGNED_PREFIX + spki)
    extension = _EXTENSION_HEAD + identity.node_id + _EXTENSION_MIDDLE + signature
    extensions = _der(_SEQUENCE, _der(_SEQUENCE, _der(_OID, _EXTENSION_OID), _der(_OCTETS, extension)))
    nobody = _der(_SEQUENCE)
    body = _der(
        _SEQUENCE,
        _der(_VERSION, _VERSION_3),
        _der(_INTEGER, bytes([0x40 | os.urandom(1)[0] >> 2]) + os.urandom(MAX_SERIAL_BYTES - 1)),
        _ECDSA_SHA256,
        nobody,
        _der(_SEQUENCE, _time(valid_from), _time(valid_until)),
        nobody,
        spki,
        _der(_EXTENSIONS, extensions),
    )
    certificate = _der(_SEQUENCE, body, _ECDSA_SHA256, _der(_BITS, b"\0", key.sign(body, _EC)))
    return _pem("CERTIFICATE", certificate), _pem("EC PRIVATE KEY", _private(key, point))


def _point(key: ec.EllipticCurvePublicKey) -> bytes:
    numbers = key.public_numbers()
    return b"\x04" + b"".join(n.to_bytes(_COORDINATE_BYTES, "big") for n in (numbers.x, numbers.y))


def _private(key: ec.EllipticCurvePrivateKey, point: bytes) -> bytes:
    """RFC 5915."""
    secret = key.private_numbers().private_value.to_bytes(_COORDINATE_BYTES, "big")
    public = _der(_PUBLIC, _der(_BITS, b"\0", point))
    return _der(
        _SEQUENCE, bytes([_INTEGER, 1, 1]), _der(_OCTETS, secret), _der(_PARAMETERS, _P256_OID), public
    )


def _der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def _time(when: datetime.datetime) -> bytes:
    # RFC 5280: two digits of the year until 2049, four from then on
    if 1950 <= when.year < 2050:
        return _der(_UTC_TIME, when.strftime("%y%m%d%H%M%SZ").encode())
    return _der(_TIME, f"{when.year:04}{when:%m%d%H%M%S}Z".encode())


def _pem(kind: str, der: bytes) -> bytes:
    text = base64.b64encode(der).decode()
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----", ""]).encode()


def load_into(context: ssl.SSLContext, certificate: bytes, private: bytes) -> None:
    """Gives `context` a certificate and its key (PEM)."""
    # `ssl` reads files only. The folder is this user's alone, and the key is worthless after this process.
    with tempfile.TemporaryDirectory(prefix="paris-tls-") as folder:
        path = Path(folder, "key.pem")
        path.touch(mode=0o600)
        path.write_bytes(private + certificate)
        context.load_cert_chain(path)


def owner_of(certificate: bytes, now_unix: float) -> NodeId:
    """The node that a peer's certificate (DER) belongs to. Whoever completed a TLS handshake with the
    certificate is that node. Raises `TransportError` when it is not a valid one of this scheme."""
    if len(certificate) > MAX_CERTIFICATE_BYTES:
        raise TransportError("the peer's certificate is too long")
    try:
        return _owner_of(certificate, now_unix)
    except InvalidSignature:
        raise TransportError("the peer's certificate is not signed with its own key") from None
    except ValueError as error:
        raise TransportError(f"the peer's certificate cannot be read: {error}") from None


class _Der:
    """The elements of some DER, one after the other. Every method raises `ValueError`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._content = 0  # where that of the last element began

    @property
    def left(self) -> bool:
        return self._at < len(self._data)

    def next_is(self, tag: int) -> bool:
        return self.left and self._data[self._at] == tag

    def whole(self, tag: int) -> bytes:
        """The next element with its tag and length. Only the shortest form of a length is DER."""
        begin = self._at
        head = self._data[begin : begin + 4]
        if len(head) < 2 or head[0] != tag:
            raise ValueError(f"no element of type {tag:#x} at byte {begin}")
        size, length = 2, head[1]
        if length >= 0x80:
            size, length = 2 + length - 0x80, int.from_bytes(head[2 : 2 + length - 0x80], "big")
            if size not in (3, 4) or len(head) < size or length < (0x80 if size == 3 else 0x100):
                raise ValueError(f"a wrong length at byte {begin}")
        self._at = begin + size + length
        if self._at > len(self._data):
            raise ValueError(f"the element at byte {begin} is cut off")
        self._content = begin + size
        return self._data[begin : self._at]

    def take(self, tag: int) -> bytes:
        """The content of the next element."""
        self.whole(tag)
        return self._data[self._content : self._at]

    def inside(self, tag: int) -> "_Der":
        return _Der(self.take(tag))

    def exactly(self, expected: bytes) -> bool:
        """Takes `expected` if it comes next."""
        if not self._data.startswith(expected, self._at):
            return False
        self._at += len(expected)
        return True

    def end(self) -> None:
        if self.left:
            raise ValueError(f"something unexpected at byte {self._at}")


def _owner_of(certificate: bytes, now_unix: float) -> NodeId:
    outer = _Der(certificate)
    parts = outer.inside(_SEQUENCE)
    outer.end()
    body = parts.whole(_SEQUENCE)
    _require_algorithm(parts)
    signature = parts.take(_BITS)
    parts.end()
    if signature[:1] != b"\0":
        raise ValueError("a signature that is not of whole bytes")
    point, begin, end, extensions = _read_body(_Der(body).inside(_SEQUENCE))
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    key.verify(signature[1:], body, _EC)
    if not begin <= now_unix <= end:
        raise TransportError("the peer's certificate is not valid now (or this machine's clock is wrong)")
    return _check_extension(_extension(extensions), _P256_HEAD + point)


def _require_algorithm(der: _Der) -> None:
    if not der.exactly(_ECDSA_SHA256):
        der.take(_SEQUENCE)
        raise TransportError("the peer's certificate is not signed over SHA-256 with a key of P-256")


def _read_body(body: _Der) -> tuple[bytes, float, float, _Der]:
    """(point of the public key, valid from, valid until, extensions) of what is signed."""
    if body.take(_VERSION) != _VERSION_3:
        raise ValueError("it is not of version 3")
    serial = body.take(_INTEGER)
    # positive, and in its shortest form
    if (
        not 0 < len(serial) <= MAX_SERIAL_BYTES
        or serial[0] >= 0x80
        or int.from_bytes(serial[:2], "big") < (0x80 if len(serial) > 1 else 1)
    ):
        raise ValueError("a serial number that is none")
    _require_algorithm(body)
    body.take(_SEQUENCE)  # issuer and subject: they say nothing in this scheme
    validity = body.inside(_SEQUENCE)
    begin, end = _read_time(validity), _read_time(validity)
    validity.end()
    body.take(_SEQUENCE)
    spki = body.whole(_SEQUENCE)
    point = spki[len(_P256_HEAD) :]
    if not spki.startswith(_P256_HEAD) or point[:1] != b"\x04":
        raise TransportError("the peer's certificate has a key that is not of P-256")
    if not body.left:
        raise TransportError("the peer's certificate names no node")
    extensions = body.inside(_EXTENSIONS)
    body.end()
    inner = extensions.inside(_SEQUENCE)
    extensions.end()
    return point, begin, end, inner


def _read_time(der: _Der) -> float:
    short = der.next_is(_UTC_TIME)
    digits = der.take(_UTC_TIME if short else _TIME)
    if len(digits) != (13 if short else 15) or digits[-1:] != b"Z" or not digits[:-1].isdigit():
        raise ValueError("a time that is none")
    text = digits[:-1].decode()
    if short:
        text = ("19" if text >= "5" else "20") + text
    fields = [int(text[:4]), *(int(text[at : at + 2]) for at in range(4, 14, 2))]
    return datetime.datetime(*fields, tzinfo=datetime.UTC).timestamp()  # type: ignore[arg-type,misc]


def _read_extensions(der: _Der) -> Iterator[tuple[bytes, bool, bytes]]:
    """(id, critical?, value) of each."""
    while der.left:
        one = der.inside(_SEQUENCE)
        oid = one.take(_OID)
        critical = one.next_is(_BOOLEAN)
        if critical and one.take(_BOOLEAN) != b"\xff":  # false is the default, which DER leaves out
            raise ValueError("a truth value that is none")
        value = one.take(_OCTETS)
        one.end()
        yield oid, critical, value


def _extension(extensions: _Der) -> bytes:
    found: dict[bytes, bytes] = {}
    for oid, critical, value in _read_extensions(extensions):
        if oid in found:
            raise ValueError("an extension that occurs twice")
        found[oid] = value
        if critical and oid != _EXTENSION_OID:
            raise TransportError("the peer's certificate has an unknown critical extension")
    if _EXTENSION_OID not in found:
        raise TransportError("the peer's certificate names no node")
    return found[_EXTENSION_OID]


def _check_extension(value: bytes, spki: bytes) -> NodeId:
    node_at = len(_EXTENSION_HEAD)
    middle_at = node_at + NODE_ID_BYTES
    signature_at = middle_at + len(_EXTENSION_MIDDLE)
    formed = value.startswith(_EXTENSION_HEAD) and value[middle_at:signature_at] == _EXTENSION_MIDDLE
    if len(value) != _EXTENSION_BYTES or not formed:
        raise TransportError("the peer's certificate names no node with an Ed25519 key")
    node_id = NodeId(value[node_at:middle_at])
    if not verify(node_id, _SIGNED_PREFIX + spki, value[signature_at:]):
        raise TransportError("the peer's certificate is not signed by the node it names")
    return node_id
