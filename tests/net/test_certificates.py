"""Certificates that carry a node's identity: whose they are, and every way in which they are not."""

import datetime
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.security.tls.certificate import (
    create_cert_template,
    generate_certificate,
    verify_certificate_chain,
)

from paris_p2p.errors import TransportError
from paris_p2p.net import certificates
from paris_p2p.net.certificates import MAX_CERTIFICATE_BYTES, load_into, make_certificate, owner_of
from paris_p2p.wire.identity import Identity

EXTENSION_OID = x509.ObjectIdentifier(certificates.EXTENSION_OID)
NOW = 1_800_000_000.0
ALICE = Identity(b"a" * 32)
MALLORY = Identity(b"m" * 32)


def der(pem: bytes | str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode() if isinstance(pem, bytes) else pem)


def extension_of(certificate: bytes) -> bytes:
    found = x509.load_der_x509_certificate(certificate).extensions.get_extension_for_oid(EXTENSION_OID)
    assert isinstance(found.value, x509.UnrecognizedExtension)
    return found.value.value


def unsigned(key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    """A certificate of `key` without extensions, for another library to sign."""
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(2100, 1, 1))
    )


def certificate_with(extensions: list[tuple[x509.ObjectIdentifier, bytes, bool]]) -> bytes:
    """A self-signed certificate of a new key with just these extensions (id, value, critical)."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = unsigned(key)
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


def test_a_certificate_cut_off_or_with_something_after_it_is_refused() -> None:
    whole = der(make_certificate(ALICE)[0])
    for changed in [whole[:end] for end in range(len(whole))] + [whole + b"\0"]:
        with pytest.raises(TransportError):
            owner_of(changed, NOW)


def test_only_the_shortest_form_of_a_length_is_read() -> None:
    whole = der(make_certificate(ALICE)[0])
    assert whole[:2] == b"\x30\x82"
    with pytest.raises(TransportError, match="cannot be read"):
        owner_of(b"\x30\x83\0" + whole[2:], NOW)


@pytest.mark.parametrize(
    ("curve", "digest"), [(ec.SECP384R1(), SHA256()), (ec.SECP256R1(), SHA384())], ids=["curve", "hash"]
)
def test_one_curve_and_one_hash_are_enough(curve: ec.EllipticCurve, digest: SHA256 | SHA384) -> None:
    key = ec.generate_private_key(curve)
    builder = unsigned(key)
    with pytest.raises(TransportError, match="of P-256"):
        owner_of(der(builder.sign(key, digest).public_bytes(Encoding.PEM)), NOW)


def test_an_identity_given_twice_is_refused() -> None:
    extension = bytes.fromhex("300f060a2b0601040183a25a01010401") + b"x"
    with pytest.raises(ValueError, match="twice"):
        certificates._extension(certificates._Der(extension + extension))


def test_another_library_reads_the_same_in_ours() -> None:
    pem, private = make_certificate(ALICE, datetime.datetime(2049, 12, 31), datetime.datetime(2050, 1, 2))
    read = x509.load_pem_x509_certificate(pem)
    assert read.not_valid_before_utc == datetime.datetime(2049, 12, 31, tzinfo=datetime.UTC)
    assert read.not_valid_after_utc == datetime.datetime(2050, 1, 2, tzinfo=datetime.UTC)
    assert read.serial_number > 0 and not list(read.subject) and not list(read.issuer)
    assert load_pem_private_key(private, None).public_key() == read.public_key()


def test_an_endless_certificate_is_not_even_read() -> None:
    with pytest.raises(TransportError, match="too long"):
        owner_of(bytes(MAX_CERTIFICATE_BYTES + 1), NOW)


def test_the_key_is_given_to_ssl_and_left_nowhere() -> None:
    load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), *make_certificate(ALICE))
