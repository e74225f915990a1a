"""Whatever a certificate request asks for, the certificate says what the template says, or there is none."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import tempfile
import uuid
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgherd.collector.identity.ca import CertificateAuthority, requested_key
from pgherd.collector.identity.enrol import enrolment_app
from pgherd.collector.identity.peer import PeerKind, read_peer
from pgherd.proto.enrolment import JOIN_PATH, RENEW_PATH
from pgherd.proto.errors import PgherdError
from support.identity import Herd, request_pem

NOW_UNIX_NS = 1_900_000_000 * 1_000_000_000


@functools.cache
def _ca() -> CertificateAuthority:
    with tempfile.TemporaryDirectory() as directory:
        return CertificateAuthority.create(Path(directory) / "ca", NOW_UNIX_NS)


_TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
_NAMES = st.one_of(
    _TEXT.map(lambda text: x509.UniformResourceIdentifier(f"spiffe://{text.replace(':', '')}")),
    st.uuids().map(lambda victim: x509.UniformResourceIdentifier(f"spiffe://{_ca().trust_domain}/agent/{victim}")),
    st.just(x509.DNSName("localhost")),
    st.just(x509.DNSName("*.example.org")),
)
_EXTENSIONS = st.lists(
    st.one_of(
        st.just(x509.BasicConstraints(ca=True, path_length=None)),
        st.lists(_NAMES, min_size=1, max_size=4).map(x509.SubjectAlternativeName),
        st.just(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])),
        st.just(x509.KeyUsage(True, True, True, True, True, True, True, False, False)),
        st.binary(max_size=64).map(lambda raw: x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), raw)),
    ),
    max_size=5,
    unique_by=lambda extension: extension.oid,
)


@settings(max_examples=60, deadline=None)
@given(subject=_TEXT, extensions=_EXTENSIONS, critical=st.booleans())
def test_subject_names_and_extensions_of_a_request_are_ignored(
    subject: str, extensions: list[x509.ExtensionType], critical: bool
) -> None:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=critical)
    _, key = requested_key(request_pem(builder=builder))
    agent_id = str(uuid.uuid4())
    issued = _ca().issue_client(key, PeerKind.AGENT, agent_id, NOW_UNIX_NS, 86400.0)
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())
    assert certificate.subject == x509.Name([])
    assert sorted(extension.oid.dotted_string for extension in certificate.extensions) == sorted(
        oid.dotted_string
        for oid in (
            x509.BasicConstraints.oid,
            x509.KeyUsage.oid,
            x509.ExtendedKeyUsage.oid,
            x509.SubjectKeyIdentifier.oid,
            x509.AuthorityKeyIdentifier.oid,
            x509.SubjectAlternativeName.oid,
        )
    )
    found = certificate.extensions
    assert not found.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(found.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not found.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    names = found.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(f"spiffe://{_ca().trust_domain}/agent/{agent_id}")]
    peer = read_peer(issued.pem.encode(), _ca().certificate_pem, _ca().trust_domain)
    assert (peer.id, peer.kind) == (agent_id, PeerKind.AGENT)
    assert issued.not_after_unix_ns - NOW_UNIX_NS == 86400 * 10**9
    assert issued.not_before_unix_ns < NOW_UNIX_NS


def _signed(key: object) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM).decode()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 1024),
        rsa.generate_private_key(65537, 2048),
        dsa.generate_private_key(1024),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
        ec.generate_private_key(ec.SECP192R1()),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=lambda key: f"{type(key).__name__}-{getattr(key, 'key_size', '')}",
)
def test_other_keys_than_p256_are_refused(key: object) -> None:
    with pytest.raises(PgherdError) as caught:
        requested_key(_signed(key))
    assert caught.value.code == "join.csr_invalid"


_RSA_512 = """\
-----BEGIN CERTIFICATE REQUEST-----
MIHFMHECAQAwDDEKMAgGA1UEAwwBeDBcMA0GCSqGSIb3DQEBAQUAA0sAMEgCQQDH
0BDVekses/cIU6QOXpQTuGr8CKBEaYUeGHlyLnbCxMwaK/y+4prmVG2qzwfv0Q+C
MHXBdijWs7V8ou85fj6fAgMBAAGgADANBgkqhkiG9w0BAQsFAANBAAo8mXHQbg2w
PwU1edtvQZ97hG7f1gQT1yAc0ZP8k7lCrFokSCogriOoFT2t5qPXmRZ3QTkyCJ2J
5fqoQULn5YE=
-----END CERTIFICATE REQUEST-----
"""


def test_a_request_with_a_key_that_today_s_libraries_won_t_even_make_is_refused() -> None:
    with pytest.raises(PgherdError) as caught:
        requested_key(_RSA_512)
    assert caught.value.code == "join.csr_invalid"


def test_a_request_for_somebody_else_s_key_is_refused() -> None:
    """Proof of possession: the signature over the request must be the requested key's own."""
    mine, theirs = request_pem(), request_pem()
    der_mine, der_theirs = (bytearray(_der(pem)) for pem in (mine, theirs))
    key_of = x509.load_pem_x509_csr(theirs.encode()).public_key()
    assert isinstance(key_of, ec.EllipticCurvePublicKey)
    my_key = x509.load_pem_x509_csr(mine.encode()).public_key()
    assert isinstance(my_key, ec.EllipticCurvePublicKey)
    forged = bytes(der_mine).replace(_point(my_key), _point(key_of))
    assert forged != bytes(der_mine) != bytes(der_theirs)
    pem = "-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(forged).decode() + "-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(PgherdError, match="own key") as caught:
        requested_key(pem)
    assert caught.value.code == "join.csr_invalid"


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 400))
def test_a_damaged_request_is_refused_or_still_proves_its_key(position: int, byte: int, cut: int) -> None:
    der = bytearray(_der(_HONEST))
    der[position % len(der)] = byte
    damaged = bytes(der[: max(1, len(der) - cut)] if cut < 40 else der)
    pem = "-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(damaged).decode() + "-----END CERTIFICATE REQUEST-----\n"
    try:
        request, key = requested_key(pem)
    except PgherdError as error:
        assert error.code == "join.csr_invalid"  # noqa: PT017 - either outcome is right
    else:
        assert request.is_signature_valid
        assert isinstance(key.curve, ec.SECP256R1)


def test_versions_that_nobody_issues_are_refused() -> None:
    """cryptography raises an exception of no family for these; a random byte found it."""
    der = bytearray(_der(_HONEST))
    der[der.index(b"\x02\x01\x00") + 2] = 1
    with pytest.raises(PgherdError) as request:
        requested_key(_pem("CERTIFICATE REQUEST", bytes(der)))
    assert request.value.code == "join.csr_invalid"
    der = bytearray(_certificate_der())
    der[der.index(b"\x02\x01\x02") + 2] = 7
    with pytest.raises(PgherdError) as certificate:
        read_peer(_pem("CERTIFICATE", bytes(der)).encode(), _ca().certificate_pem, _ca().trust_domain)
    assert certificate.value.code == "identity.missing"


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # a damaged serial number
@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_damaged_certificate_names_nobody(position: int, byte: int) -> None:
    whole = _certificate_der()
    der = bytearray(whole)
    der[position % len(der)] = byte
    if der == whole:
        return
    with pytest.raises(PgherdError) as caught:
        read_peer(_pem("CERTIFICATE", bytes(der)).encode(), _ca().certificate_pem, _ca().trust_domain)
    assert caught.value.code in {"identity.missing", "peer.untrusted"}


@functools.cache
def _certificate_der() -> bytes:
    _, key = requested_key(request_pem())
    issued = _ca().issue_client(key, PeerKind.AGENT, str(uuid.uuid4()), NOW_UNIX_NS, 86400.0)
    return x509.load_pem_x509_certificate(issued.pem.encode()).public_bytes(Encoding.DER)


def _pem(kind: str, der: bytes) -> str:
    return f"-----BEGIN {kind}-----\n{base64.encodebytes(der).decode()}-----END {kind}-----\n"


@given(st.text(max_size=200))
def test_any_text_is_refused_by_name(text: str) -> None:
    with pytest.raises(PgherdError) as caught:
        requested_key(text)
    assert caught.value.code == "join.csr_invalid"


_HONEST = request_pem()


def _der(pem: str) -> bytes:
    return x509.load_pem_x509_csr(pem.encode()).public_bytes(Encoding.DER)


def _point(key: ec.EllipticCurvePublicKey) -> bytes:
    numbers = key.public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(st.characters(exclude_categories=()), max_size=60),  # halves of surrogate pairs too
        st.just(request_pem()),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
_MEMBERS = ("token_id", "token_secret", "csr", "facts", "certificate", "signature", "unix_ns")
_BODIES = st.one_of(
    st.binary(max_size=60),
    st.dictionaries(st.sampled_from(_MEMBERS), _VALUES).map(lambda body: json.dumps(body).encode()),
    st.fixed_dictionaries(dict.fromkeys(_MEMBERS, _VALUES)).map(lambda body: json.dumps(body).encode()),
    st.fixed_dictionaries(
        {name: st.text(st.characters(exclude_categories=()), min_size=1, max_size=9) for name in _MEMBERS}
        | {"csr": st.just(request_pem()), "unix_ns": st.integers()}
    ).map(lambda body: json.dumps(body).encode()),
)


def test_no_body_of_a_stranger_gives_a_500(tmp_path: Path) -> None:
    herd = Herd.create(tmp_path / "herd")
    app = enrolment_app(herd.enrolment, grpc_address="localhost:1", clock=herd.clock)

    async def status(path: str, body: bytes) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://x") as client:
            return (await client.post(path, content=body)).status_code  # an exception of the application comes through

    @settings(max_examples=60, deadline=None)
    @given(path=st.sampled_from([JOIN_PATH, RENEW_PATH]), body=_BODIES)
    @example(
        path=JOIN_PATH, body=b'{"token_id": "\\ud800", "token_secret": "x", "csr": ' + json.dumps(request_pem()).encode() + b"}"
    )
    @example(
        path=JOIN_PATH, body=b'{"token_id": "x", "token_secret": "\\udfff", "csr": ' + json.dumps(request_pem()).encode() + b"}"
    )
    def check(path: str, body: bytes) -> None:
        assert asyncio.run(status(path, body)) in {400, 401, 403, 429, 503}

    check()
    herd.close()
