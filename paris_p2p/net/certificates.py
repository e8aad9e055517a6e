"""TLS certificates that carry a node's identity (the libp2p TLS specification's scheme).

Owns: making a node's certificate, and finding out whose certificate a peer's is. Does not own: the
connection (`net.tls`).

The TLS key is made anew for each process; a certificate extension holds the node's public key and its
signature over the TLS key, so that who can speak TLS with that key is who the node says it is.
"""

import datetime
import ssl
import tempfile
import warnings
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

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
_UNREADABLE = (
    ValueError,
    TypeError,
    Warning,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
# As rust-libp2p does: the certificate is worth as much as its key, which dies with the process; a period
# would only make nodes with wrong clocks unreachable.
_VALID_FROM = datetime.datetime(1975, 1, 1)
_VALID_UNTIL = datetime.datetime(4096, 1, 1)


def make_certificate(
    identity: Identity,
    valid_from: datetime.datetime = _VALID_FROM,
    valid_until: datetime.datetime = _VALID_UNTIL,
) -> tuple[bytes, bytes]:
    """A new TLS key and its certificate for `identity`: (certificate, private key), both PEM. UTC times."""
    key = ec.generate_private_key(ec.SECP256R1())
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    signature = identity.sign(_SIGNED_PREFIX + spki)
    extension = _EXTENSION_HEAD + identity.node_id + _EXTENSION_MIDDLE + signature
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid_from)
        .not_valid_after(valid_until)
        .add_extension(x509.UnrecognizedExtension(EXTENSION_OID, extension), critical=False)
        .sign(key, SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), private


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
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error"
            )  # what is read for old sins' sake (a negative serial number) is not
            return _owner_of(x509.load_der_x509_certificate(certificate), now_unix)
    except InvalidSignature:
        raise TransportError("the peer's certificate is not signed with its own key") from None
    except _UNREADABLE as error:
        raise TransportError(f"the peer's certificate cannot be read: {error}") from None


def _owner_of(certificate: x509.Certificate, now_unix: float) -> NodeId:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TransportError("the peer's certificate has a key that is not of P-256")
    if not isinstance(certificate.signature_hash_algorithm, SHA256):
        raise TransportError("the peer's certificate is not signed over SHA-256")
    key.verify(certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(SHA256()))
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin.timestamp() <= now_unix <= end.timestamp():
        raise TransportError("the peer's certificate is not valid now (or this machine's clock is wrong)")
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return _check_extension(_extension(certificate), spki)


def _extension(certificate: x509.Certificate) -> bytes:
    found = None
    for extension in certificate.extensions:
        if not isinstance(extension.value, x509.UnrecognizedExtension):
            continue
        if extension.oid == EXTENSION_OID:
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
