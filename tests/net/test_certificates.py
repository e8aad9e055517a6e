"""Certificates that carry a node's identity: whose they are, and every way in which they are not."""

import datetime
import ssl
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
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
from paris_p2p.wire.identity import Identity, peer_id_text

NOW = 1_800_000_000.0
ALICE = Identity(b"a" * 32)
MALLORY = Identity(b"m" * 32)
KEY = ec.derive_private_key(2026, ec.SECP256R1())
"""A TLS key of Alice's, for tests that sign with it."""
SERIAL = 1 << 158
NOBODY = x509.Name([])
ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
ECDSA_SHA384 = bytes.fromhex("300a06082a8648ce3d040303")
EC_KEY = bytes.fromhex("06072a8648ce3d0201")
P256 = bytes.fromhex("06082a8648ce3d030107")
P256_SPELLED_OUT = bytes.fromhex(
    "3081e0020101302c06072a8648ce3d0101022100ffffffff00000001000000000000000000000000ffffffffffffffffffffffff"
    "30440420ffffffff00000001000000000000000000000000fffffffffffffffffffffffc04205ac635d8aa3a93e7b3ebbd557698"
    "86bc651d06b0cc53b0f63bce3c3e27d2604b0441046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c2"
    "964fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5022100ffffffff00000000ffffffffffffffff"
    "bce6faada7179e84f3b9cac2fc632551020101"
)
"""The parameters of P-256 themselves instead of its name (SEC 1, C.2)."""
# the first and the last of the test vectors in the libp2p TLS specification, both made by rust-libp2p
SPECIFIED = bytes.fromhex(
    "308201773082011ea003020102020900f5bd0debaa597f52300a06082a8648ce3d04030230003020170d37353031303130303030"
    "30305a180f34303936303130313030303030305a30003059301306072a8648ce3d020106082a8648ce3d030107034200046bf987"
    "1220d71dcb3483ecdfcbfcc7c103f8509d0974b3c18ab1f1be1302d643103a08f7a7722c1b247ba3876fe2c59e26526f479d7718"
    "a85202ddbe47562358a37f307d307b060a2b0601040183a25a01010101ff046a30680424080112207fda21856709c5ae12fd6e84"
    "50623f15f11955d384212b89f56e7e136d2e17280440aaa6bffabe91b6f30c35e3aa4f94b1188fed96b0ffdd393f4c58c1c04785"
    "4120e674ce64c788406d1c2c4b116581fd7411b309881c3c7f20b46e54c7e6fe7f0f300a06082a8648ce3d040302034700304402"
    "207d1a1dbd2bda235ff2ec87daf006f9b04ba076a5a5530180cd9c2e8f6399e09d0220458527178c7e77024601dbb1b256593e9b"
    "96d961b96349d1f560114f61a87595"
)
SPECIFIED_INVALID = bytes.fromhex(
    "308201773082011da003020102020830a73c5d896a1109300a06082a8648ce3d04030230003020170d3735303130313030303030"
    "305a180f34303936303130313030303030305a30003059301306072a8648ce3d020106082a8648ce3d03010703420004bbe62df9"
    "a7c1c46b7f1f21d556deec5382a36df146fb29c7f1240e60d7d5328570e3b71d99602b77a65c9b3655f62837f8d66b59f1763b8c"
    "9beba3be07778043a37f307d307b060a2b0601040183a25a01010101ff046a3068042408011220ec8094573afb9728088860864f"
    "7bcea2d4fd412fef09a8e2d24d482377c20db60440ecabae8354afa2f0af4b8d2ad871e865cb5a7c0c8d3dbdbf42de577f92461a"
    "0ebb0a28703e33581af7d2a4f2270fc37aec6261fcc95f8af08f3f4806581c730a300a06082a8648ce3d04030203480030450220"
    "2dfb17a6fa0f94ee0e2e6a3b9fb6e986f311dee27392058016464bd130930a61022100ba4b937a11c8d3172b81e7cd04aedb79b9"
    "78c4379c2b5b24d565dd5d67d3cb3c"
)


def der(pem: bytes | str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode() if isinstance(pem, bytes) else pem)


def extension_of(certificate: bytes) -> bytes:
    found = x509.load_der_x509_certificate(certificate).extensions.get_extension_for_oid(EXTENSION_OID)
    assert isinstance(found.value, x509.UnrecognizedExtension)
    return found.value.value


def element(tag: int, *parts: bytes) -> bytes:
    """One element of DER."""
    content = b"".join(parts)
    octets = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    head = octets or b"\0" if len(content) < 0x80 else bytes([0x80 | len(octets)]) + octets
    return bytes([tag]) + head + content


def subject_key() -> bytes:
    return KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def identity_over(spki: bytes) -> bytes:
    """The value of the extension in which Alice signs a TLS key."""
    signature = ALICE.sign(b"libp2p-tls-handshake:" + spki)
    key = bytes([0x08, 1, 0x12, 32]) + ALICE.node_id
    return element(0x30, element(0x04, key), element(0x04, signature))


def unsigned(
    key: ec.EllipticCurvePrivateKey = KEY, name: x509.Name = NOBODY, serial: int = SERIAL
) -> x509.CertificateBuilder:
    """A certificate of `key` without extensions, for another library to sign."""
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(2100, 1, 1))
    )


def alices(builder: x509.CertificateBuilder | None = None, key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    """What another library makes of `builder` and Alice's signature over `KEY`, signed with `key`."""
    extension = x509.UnrecognizedExtension(EXTENSION_OID, identity_over(subject_key()))
    made = (builder or unsigned()).add_extension(extension, False)
    return made.sign(key, SHA256(), ecdsa_deterministic=True).public_bytes(Encoding.DER)


def certificate_with(extensions: list[tuple[x509.ObjectIdentifier, bytes, bool]]) -> bytes:
    """A self-signed certificate of `KEY` with just these extensions (id, value, critical)."""
    builder = unsigned()
    for oid, value, critical in extensions:
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical)
    return builder.sign(KEY, SHA256()).public_bytes(Encoding.DER)


def said_in(certificate: bytes) -> bytes:
    """What a certificate's signature is over, without its tag and its length (256 or more)."""
    return x509.load_der_x509_certificate(certificate).tbs_certificate_bytes[4:]


def signed(content: bytes, algorithm: bytes = ECDSA_SHA256) -> bytes:
    """A certificate that says `content`, whatever that is."""
    body = element(0x30, content)
    signature = KEY.sign(body, ec.ECDSA(SHA256(), deterministic_signing=True))
    return element(0x30, body, algorithm, element(0x03, b"\0", signature))


def signed_with(old: bytes, new: bytes) -> bytes:
    """Alice's certificate with something else in it instead of `old`."""
    content = said_in(alices())
    assert old in content
    return signed(content.replace(old, new, 1))


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=3)
"""(where, what is changed there)"""


def changed(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    made = bytearray(data)
    for at, bits in changes:
        made[at % len(made)] ^= bits
    return bytes(made)


def test_a_certificate_names_its_node() -> None:
    certificate, _ = make_certificate(ALICE)
    assert owner_of(der(certificate), NOW) == ALICE.node_id
    assert owner_of(signed(said_in(alices())), NOW) == ALICE.node_id


def test_every_process_has_another_tls_key() -> None:
    assert make_certificate(ALICE)[1] != make_certificate(ALICE)[1]


def test_another_implementation_of_the_scheme_reads_ours_and_we_read_theirs() -> None:
    certificate, _ = make_certificate(ALICE)
    theirs = verify_certificate_chain([x509.load_pem_x509_certificate(certificate)])
    assert theirs.to_bytes() == ALICE.node_id
    pem, _ = generate_certificate(create_new_key_pair(MALLORY.seed).private_key, create_cert_template())
    now = datetime.datetime.now(datetime.UTC).timestamp()  # noqa: TID251 - that library reads the clock itself
    assert owner_of(der(pem), now) == MALLORY.node_id


def test_what_the_specification_gives_as_examples_is_read_as_it_says() -> None:
    assert peer_id_text(owner_of(SPECIFIED, NOW)) == "12D3KooWJRSrypvnpHgc6ZAgyCni4KcSmbV7uGRaMw5LgMKT18fq"
    with pytest.raises(TransportError, match="not signed by the node"):
        owner_of(SPECIFIED_INVALID, NOW)


def test_what_does_not_concern_us_may_stand_in_a_certificate() -> None:
    names = [(NameOID.COMMON_NAME, "Алиса"), (NameOID.COUNTRY_NAME, "FR"), (NameOID.SERIAL_NUMBER, "1")]
    builder = unsigned(name=x509.Name([x509.NameAttribute(kind, text) for kind, text in names]))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("example.org")]), False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), False)
    builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"x"), False)
    assert owner_of(alices(builder), NOW) == ALICE.node_id


def test_no_changed_bit_passes() -> None:
    certificate = der(make_certificate(ALICE)[0])
    for at in range(len(certificate)):
        with pytest.raises(TransportError):
            owner_of(changed(certificate, [(at, 1 << (at % 8))]), NOW)


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=MAX_CERTIFICATE_BYTES))
def test_bytes_that_are_anything_are_no_certificate(junk: bytes) -> None:
    with pytest.raises(TransportError, match="cannot be read"):
        owner_of(junk, NOW)


@settings(deadline=None, derandomize=True)
@given(CHANGES)
def test_a_changed_certificate_is_nobody_s(changes: list[tuple[int, int]]) -> None:
    whole = alices()
    other = changed(whole, changes)
    if other != whole:
        with pytest.raises(TransportError):
            owner_of(other, NOW)


@settings(deadline=None, derandomize=True)
@given(CHANGES)
def test_a_certificate_changed_and_signed_again_is_its_node_s_or_nobody_s(
    changes: list[tuple[int, int]],
) -> None:
    try:
        owner = owner_of(signed(changed(said_in(alices()), changes)), NOW)
    except TransportError:
        return
    assert owner == ALICE.node_id


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
    stolen = extension_of(der(make_certificate(ALICE)[0]))  # of another key than `KEY`
    with pytest.raises(TransportError, match="not signed by the node"):
        owner_of(certificate_with([(EXTENSION_OID, stolen, False)]), NOW)


def test_a_certificate_without_an_identity_is_nobody_s() -> None:
    with pytest.raises(TransportError, match="names no node"):
        owner_of(certificate_with([]), NOW)


@pytest.mark.parametrize("cut", [0, 1, 8, 40, 105])
def test_a_damaged_identity_is_nobody_s(cut: int) -> None:
    whole = extension_of(alices())
    with pytest.raises(TransportError, match="names no node"):
        owner_of(certificate_with([(EXTENSION_OID, whole[:cut] + whole[cut + 1 :], False)]), NOW)


@pytest.mark.parametrize(
    "form",
    [
        lambda key, signature: element(0x30, key, signature) + b"\0",
        lambda key, signature: element(0x30, key, signature, element(0x04)),
        lambda key, signature: element(0x30, signature, key),
        lambda key, signature: b"\x30\x81" + element(0x30, key, signature)[1:],
        lambda key, signature: element(0x30, key[:2] + b"\x12\x20" + key[6:] + b"\x08\1", signature),
        lambda key, signature: element(0x30, key[:3] + b"\2" + key[4:], signature),
        lambda key, signature: element(0x30, element(0x03, key[2:]), signature),
    ],
    ids=[
        "more after it",
        "more in it",
        "swapped",
        "long length",
        "fields swapped",
        "secp256k1",
        "bit string",
    ],
)
def test_an_identity_has_one_form(form: Callable[[bytes, bytes], bytes]) -> None:
    whole = extension_of(alices())
    assert form(whole[2:40], whole[40:]) != whole == element(0x30, whole[2:40], whole[40:])
    with pytest.raises(TransportError, match="names no node with an Ed25519 key"):
        owner_of(certificate_with([(EXTENSION_OID, form(whole[2:40], whole[40:]), False)]), NOW)


@pytest.mark.parametrize(
    "extension",
    [x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"x"), x509.BasicConstraints(False, None)],
    ids=["unknown", "known elsewhere"],
)
def test_what_is_critical_and_unknown_is_refused(extension: x509.ExtensionType) -> None:
    with pytest.raises(TransportError, match="critical"):
        owner_of(alices(unsigned().add_extension(extension, True)), NOW)


@pytest.mark.parametrize("junk", [b"", b"\x30", bytes(500), b"\x30\x82\xff\xff" + bytes(100)])
def test_junk_is_no_certificate(junk: bytes) -> None:
    with pytest.raises(TransportError, match="cannot be read"):
        owner_of(junk, NOW)


def test_a_certificate_cut_off_or_with_something_after_it_is_refused() -> None:
    whole = der(make_certificate(ALICE)[0])
    for other in [whole[:end] for end in range(len(whole))] + [whole + b"\0"]:
        with pytest.raises(TransportError):
            owner_of(other, NOW)


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


def test_a_point_beside_the_curve_is_no_key() -> None:
    with pytest.raises(TransportError, match="cannot be read"):
        owner_of(signed_with(subject_key(), subject_key()[:-1] + b"\0"), NOW)


@pytest.mark.parametrize("signs", ["this form", "the usual form"])
@pytest.mark.parametrize(
    ("curve", "form"),
    [(P256, "compressed"), (P256, "hybrid"), (P256_SPELLED_OUT, "whole")],
    ids=["compressed point", "hybrid point", "curve spelled out"],
)
def test_a_key_has_one_form_though_the_library_reads_several(curve: bytes, form: str, signs: str) -> None:
    point = subject_key()[-65:]
    odd = point[-1] & 1
    points = {
        "whole": point,
        "compressed": bytes([2 + odd]) + point[1:33],
        "hybrid": bytes([6 + odd]) + point[1:],
    }
    usual = element(0x30, element(0x30, EC_KEY, P256), element(0x03, b"\0", point))
    spki = element(0x30, element(0x30, EC_KEY, curve), element(0x03, b"\0", points[form]))
    assert usual == subject_key() != spki
    identity = identity_over(spki if signs == "this form" else usual)
    content = said_in(certificate_with([(EXTENSION_OID, identity, False)]))
    certificate = signed(content.replace(usual, spki))
    read = x509.load_der_x509_certificate(certificate)
    read.verify_directly_issued_by(read)
    assert read.public_key() == KEY.public_key()
    with pytest.raises(TransportError, match=r"not signed by the node|only way"):
        owner_of(certificate, NOW)


def test_bits_of_a_signature_that_do_not_count_are_refused() -> None:
    serial = SERIAL
    while (whole := alices(unsigned(serial=serial)))[-1] & 1:
        serial += 1
    length = len(x509.load_der_x509_certificate(whole).signature)
    assert whole[-length - 1] == 0 and owner_of(whole, NOW) == ALICE.node_id
    with pytest.raises(TransportError, match="only way"):
        owner_of(whole[: -length - 1] + b"\1" + whole[-length:], NOW)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # an error only in tests
@pytest.mark.parametrize("serial", [b"\0", b"\xff", b"\0\1", b"\1" * 21], ids=["0", "-1", "padded", "long"])
def test_a_serial_number_is_positive_and_short(serial: bytes) -> None:
    with pytest.raises(TransportError, match="cannot be read"):
        owner_of(signed_with(element(0x02, SERIAL.to_bytes(20, "big")), element(0x02, serial)), NOW)


def test_one_certificate_has_one_algorithm() -> None:
    for certificate in (
        signed(said_in(alices()), ECDSA_SHA384),
        signed(said_in(alices()), element(0x30, ECDSA_SHA256[2:], bytes([5, 0]))),
        signed_with(ECDSA_SHA256, ECDSA_SHA384),
        signed_with(ECDSA_SHA256, element(0x30, ECDSA_SHA256[2:], bytes([5, 0]))),
    ):
        with pytest.raises(TransportError):
            owner_of(certificate, NOW)


def test_a_certificate_is_signed_with_its_own_key_and_says_so() -> None:
    with pytest.raises(TransportError, match="not signed with its own key"):
        owner_of(alices(key=ec.derive_private_key(2027, ec.SECP256R1())), NOW)
    name = element(0x30, element(0x31, element(0x30, bytes.fromhex("0603550403"), element(0x0C, b"CA"))))
    with pytest.raises(TransportError, match="issuer"):
        owner_of(signed_with(ECDSA_SHA256 + element(0x30), ECDSA_SHA256 + name), NOW)


def test_what_the_library_reads_past_is_refused() -> None:
    """A subject's unique id, between the key and the extensions."""
    certificate = signed_with(subject_key(), subject_key() + element(0x82, b"\0x"))
    assert x509.load_der_x509_certificate(certificate).public_key() == KEY.public_key()
    with pytest.raises(TransportError, match="only way"):
        owner_of(certificate, NOW)


@pytest.mark.parametrize("oid", ["2b0601040183a25a0101", "2a0304"], ids=["identity", "unknown"])
def test_an_extension_given_twice_is_refused(oid: str) -> None:
    def extension(oid: str) -> bytes:
        value = identity_over(subject_key())
        return element(0x30, element(0x06, bytes.fromhex(oid)), element(0x04, value))

    content = said_in(alices())
    before = content[: content.index(subject_key())] + subject_key()
    once = [extension("2b0601040183a25a0101"), extension("2a0305")]
    assert owner_of(signed(before + element(0xA3, element(0x30, *once))), NOW) == ALICE.node_id
    with pytest.raises(TransportError, match="cannot be read: Duplicate"):
        owner_of(signed(before + element(0xA3, element(0x30, *once, extension(oid), extension(oid)))), NOW)


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


def test_the_key_is_given_to_ssl_and_left_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    certificate, private = make_certificate(ALICE)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    load_into(server, certificate, private)
    assert list(tmp_path.iterdir()) == []
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    for end in (*ends, ends[0]):
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    assert ends[0].getpeercert(binary_form=True) == der(certificate)
