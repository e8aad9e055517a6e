"""Certificates that carry a node's identity: whose they are, and every way in which they are not."""

import datetime
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.security.tls.certificate import (
    create_cert_template,
    generate_certificate,
    verify_certificate_chain,
)

from paris_p2p.errors import TransportError
from paris_p2p.net.certificates import (
    EXTENSION_OID,
    MAX_CERTIFICATE_BYTES,
    load_into,
    make_certificate,
    owner_of,
)
from paris_p2p.wire.identity import Identity

NOW = 1_800_000_000.0
ALICE = Identity(b"a" * 32)
MALLORY = Identity(b"m" * 32)


def der(pem: bytes | str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode() if isinstance(pem, bytes) else pem)


def extension_of(certificate: bytes) -> bytes:
    found = x509.load_der_x509_certificate(certificate).extensions.get_extension_for_oid(EXTENSION_OID)
    assert isinstance(found.value, x509.UnrecognizedExtension)
    return found.value.value


def certificate_with(extensions: list[tuple[x509.ObjectIdentifier, bytes, bool]]) -> bytes:
    """A self-signed certificate of a new key with just these extensions (id, value, critical)."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(2100, 1, 1))
    )
    for oid, value, critical in extensions:
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical)
    return der(builder.sign(key, SHA256()).public_bytes(Encoding.PEM))


def test_a_certificate_names_its_node() -> None:
    certificate, _ = make_certificate(ALICE)
    assert owner_of(der(certificate), NOW) == ALICE.node_id


def test_every_process_has_another_tls_key() -> None:
    assert make_certificate(ALICE)[1] != make_certificate(ALICE)[1]


def test_another_implementation_of_the_scheme_reads_ours_and_we_read_theirs() -> None:
    certificate, _ = make_certificate(ALICE)
    theirs = verify_certificate_chain([x509.load_pem_x509_certificate(certificate)])
    assert theirs.to_bytes() == ALICE.node_id
    pem, _ = generate_certificate(create_new_key_pair(MALLORY.seed).private_key, create_cert_template())
    now = datetime.datetime.now(datetime.UTC).timestamp()  # noqa: TID251 - that library reads the clock itself
    assert owner_of(der(pem), now) == MALLORY.node_id


def test_no_changed_bit_passes() -> None:
    certificate = der(make_certificate(ALICE)[0])
    for at in range(len(certificate)):
        changed = bytearray(certificate)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(TransportError):
            owner_of(bytes(changed), NOW)


@pytest.mark.parametrize(
    ("begin", "end"),
    [((2000, 1, 1), (2001, 1, 1)), ((2090, 1, 1), (2091, 1, 1))],
    ids=["expired", "not yet valid"],
)
def test_a_certificate_counts_in_its_time_only(
    begin: tuple[int, int, int], end: tuple[int, int, int]
) -> None:
    certificate, _ = make_certificate(ALICE, datetime.datetime(*begin), datetime.datetime(*end))
    with pytest.raises(TransportError, match="not valid now"):
        owner_of(der(certificate), NOW)


def test_an_identity_cannot_be_moved_to_another_tls_key() -> None:
    stolen = extension_of(der(make_certificate(ALICE)[0]))
    with pytest.raises(TransportError, match="not signed by the node"):
        owner_of(certificate_with([(EXTENSION_OID, stolen, False)]), NOW)


def test_a_certificate_without_an_identity_is_nobody_s() -> None:
    with pytest.raises(TransportError, match="names no node"):
        owner_of(certificate_with([]), NOW)


@pytest.mark.parametrize("cut", [0, 1, 8, 40, 105])
def test_a_damaged_identity_is_nobody_s(cut: int) -> None:
    whole = extension_of(der(make_certificate(ALICE)[0]))
    with pytest.raises(TransportError, match="names no node"):
        owner_of(certificate_with([(EXTENSION_OID, whole[:cut] + whole[cut + 1 :], False)]), NOW)


def test_what_is_critical_and_unknown_is_refused() -> None:
    with pytest.raises(TransportError, match="critical"):
        owner_of(certificate_with([(x509.ObjectIdentifier("1.2.3.4"), b"x", True)]), NOW)


@pytest.mark.parametrize("junk", [b"", b"\x30", bytes(500), b"\x30\x82\xff\xff" + bytes(100)])
def test_junk_is_no_certificate(junk: bytes) -> None:
    with pytest.raises(TransportError, match="cannot be read"):
        owner_of(junk, NOW)


def test_an_endless_certificate_is_not_even_read() -> None:
    with pytest.raises(TransportError, match="too long"):
        owner_of(bytes(MAX_CERTIFICATE_BYTES + 1), NOW)


def test_the_key_is_given_to_ssl_and_left_nowhere() -> None:
    load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), *make_certificate(ALICE))
