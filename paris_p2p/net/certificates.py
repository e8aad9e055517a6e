"""TLS certificates that carry a node's identity (the libp2p TLS specification's scheme).

Owns: making a node's certificate, and finding out whose certificate a peer's is. Does not own: the
connection (`net.tls`).

The TLS key is made anew for each process; a certificate extension holds the node's public key and its
signature over the TLS key, so that who can speak TLS with that key is who the node says it is.
"""

import datetime
import ssl
import tempfile
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import SignatureAlgorithmOID

from paris_p2p.errors import TransportError
from paris_p2p.ids import NodeId
from paris_p2p.wire.identity import NODE_ID_BYTES, SIGNATURE_BYTES, Identity, verify

EXTENSION_OID = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
MAX_CERTIFICATE_BYTES = 4096
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
_NOBODY = x509.Name([])
_OUTER_HEAD_BYTES = 4  # tag and length (with an identity 256 or more) of the whole, before what is signed


def make_certificate(
    identity: Identity,
    valid_from: datetime.datetime = _VALID_FROM,
    valid_until: datetime.datetime = _VALID_UNTIL,
) -> tuple[bytes, bytes]:
    """A new TLS key and its certificate for `identity`: (certificate, private key), both PEM. UTC times."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    signature = identity.sign(_SIGNED_PREFIX + _spki(public))
    value = _EXTENSION_HEAD + identity.node_id + _EXTENSION_MIDDLE + signature
    extension = x509.Extension(EXTENSION_OID, False, x509.UnrecognizedExtension(EXTENSION_OID, value))
    valid = (valid_from, valid_until)
    said = _written(_NOBODY, public, x509.random_serial_number(), valid, [extension])
    certificate = said.sign(key, SHA256())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), private


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    """Named curve, whole point: the only form that the specification knows."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _written(
    name: x509.Name,
    key: ec.EllipticCurvePublicKey,
    serial: int,
    valid: tuple[datetime.datetime, datetime.datetime],
    extensions: Iterable[x509.Extension[x509.ExtensionType]],
) -> x509.CertificateBuilder:
    """What a self-signed certificate says. Raises `ValueError` for what none may say."""
    builder = x509.CertificateBuilder().issuer_name(name).subject_name(name).public_key(key)
    builder = builder.serial_number(serial).not_valid_before(valid[0]).not_valid_after(valid[1])
    for extension in extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder


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
    except TransportError:
        raise
    except InvalidSignature:
        raise TransportError("the peer's certificate is not signed with its own key") from None
    except Exception as error:  # the library has no list of what it raises, and no peer may end this node
        raise TransportError(f"the peer's certificate cannot be read: {error}") from error


def _owner_of(der: bytes, now_unix: float) -> NodeId:
    certificate = x509.load_der_x509_certificate(der)
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        raise TransportError("the peer's certificate is not signed over SHA-256 with a key of P-256")
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TransportError("the peer's certificate has a key that is not of P-256")
    certificate.verify_directly_issued_by(certificate)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin.timestamp() <= now_unix <= end.timestamp():
        raise TransportError("the peer's certificate is not valid now (or this machine's clock is wrong)")
    node_id = _check_extension(_extension(certificate), _spki(key))
    _require_only_form(certificate, key, der)
    return node_id


def _require_only_form(certificate: x509.Certificate, key: ec.EllipticCurvePublicKey, der: bytes) -> None:
    """The library reads more than one encoding of the same: a key's point compressed or its curve spelled
    out, bits at an end that do not count. But what it read must be, byte for byte, what OpenSSL saw in the
    handshake and what the node signed: written anew it must be the same."""
    valid = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    anew = _written(certificate.subject, key, certificate.serial_number, valid, certificate.extensions)
    body = anew.sign(ec.generate_private_key(ec.SECP256R1()), SHA256()).tbs_certificate_bytes
    # no signature can be made twice; what stands before one is how many of its last bits do not count
    if not der.startswith(body, _OUTER_HEAD_BYTES) or not der.endswith(b"\0" + certificate.signature):
        raise TransportError("the peer's certificate is not encoded in the only way that DER has")


def _extension(certificate: x509.Certificate) -> bytes:
    found = None
    for extension in certificate.extensions:
        if extension.oid == EXTENSION_OID and isinstance(extension.value, x509.UnrecognizedExtension):
            found = extension.value.value
        elif extension.critical:
            raise TransportError("the peer's certificate has an unknown critical extension")
    if found is None:
        raise TransportError("the peer's certificate names no node")
    return found


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
