"""The herd's own certificate authority: EC P-256, ten years, in two files of the collector's state directory.

Issuance is by template. Of a certificate request only the public key is used, after the request has
proven that its sender holds the private one; its subject, names and extensions are dropped unread. The
herd's trust domain is random and stands in the CA certificate (URI SAN, as SPIFFE asks), so two herds
never accept each other's identities even when they call their hosts the same.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pgherd.collector.identity.peer import UNREADABLE, PeerKind, serial_text, spiffe_id
from pgherd.proto.enrolment import BODY_BYTES_MAX
from pgherd.proto.errors import IntegrityError, PeerError, PreconditionError
from pgherd.runtime.durable import private_directory, publish, storage_error
from pgherd.runtime.tls import spki_sha256

CA_LIFETIME_S = 10 * 365.25 * 86400.0
# A host whose clock is a little behind must accept what was issued just now.
_BACKDATE_S = 900.0
_KEY_NAME, _CERTIFICATE_NAME = "ca.key", "ca.crt"


@dataclass(frozen=True, slots=True)
class Issued:
    """A signed client certificate and what the control store keeps of it."""

    pem: str
    serial: str
    not_before_unix_ns: int
    not_after_unix_ns: int
    public_key_sha256: str


@dataclass(frozen=True, slots=True)
class CertificateAuthority:
    """The CA, loaded. Has the key; whoever holds this object can make identities."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    trust_domain: str

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def pin(self) -> str:
        """SHA-256 of the CA's SubjectPublicKeyInfo: what join tokens carry."""
        return spki_sha256(self.certificate_pem)

    @classmethod
    def create(cls, directory: Path, now_unix_ns: int) -> CertificateAuthority:
        """Make a new CA in `directory` (0700; key 0600), certificate last.

        Raises PreconditionError ca.exists when there is one: a second CA would orphan every agent.
        """
        private_directory(directory)
        key = ec.generate_private_key(ec.SECP256R1())
        trust_domain = f"herd-{secrets.token_hex(8)}"
        certificate = _self_signed(key, trust_domain, _moment(now_unix_ns))
        if (directory / _CERTIFICATE_NAME).exists():
            raise PreconditionError(
                "ca.exists",
                f"{directory} already holds this herd's CA",
                hint="nothing to do; a new CA would lock out every joined agent",
                path=str(directory),
            )
        publish(directory / _KEY_NAME, _key_pem(key))
        publish(directory / _CERTIFICATE_NAME, certificate.public_bytes(Encoding.PEM), mode=0o644)
        return cls(certificate, key, trust_domain)

    @classmethod
    def load(cls, directory: Path) -> CertificateAuthority:
        """Raises PreconditionError ca.missing, TransientError disk.io, IntegrityError format.corrupt for a pair that isn't one."""
        try:
            certificate = x509.load_pem_x509_certificate((directory / _CERTIFICATE_NAME).read_bytes())
            key = load_pem_private_key((directory / _KEY_NAME).read_bytes(), None)
            trust_domain = _trust_domain(certificate)
        except FileNotFoundError as error:
            raise PreconditionError(
                "ca.missing", f"no CA in {directory}", hint="run `pgherd collector init` first", path=str(directory)
            ) from error
        except OSError as error:
            raise storage_error(error, directory, "reading the CA in") from error
        except UNREADABLE as error:
            raise IntegrityError("format.corrupt", f"the CA in {directory} can't be read", path=str(directory)) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise IntegrityError(
                "format.corrupt", f"ca.key and ca.crt in {directory} don't belong together", path=str(directory)
            )
        return cls(certificate, key, trust_domain)

    def issue_server(
        self, key: ec.EllipticCurvePrivateKey, names: Iterable[str], now_unix_ns: int, lifetime_s: float
    ) -> x509.Certificate:
        """A serverAuth certificate for `names` (DNS names and IP addresses)."""
        entries = [_general_name(name) for name in names]
        builder = self._leaf(key.public_key(), _moment(now_unix_ns), lifetime_s, ExtendedKeyUsageOID.SERVER_AUTH)
        builder = builder.add_extension(x509.SubjectAlternativeName(entries), critical=True)
        return builder.sign(self.key, hashes.SHA256())

    def issue_client(
        self, public_key: ec.EllipticCurvePublicKey, kind: PeerKind, subject_id: str, now_unix_ns: int, lifetime_s: float
    ) -> Issued:
        """A clientAuth certificate that says `kind`/`subject_id` and nothing else."""
        builder = self._leaf(public_key, _moment(now_unix_ns), lifetime_s, ExtendedKeyUsageOID.CLIENT_AUTH)
        uri = x509.UniformResourceIdentifier(spiffe_id(self.trust_domain, kind, subject_id))
        certificate = builder.add_extension(x509.SubjectAlternativeName([uri]), critical=True).sign(self.key, hashes.SHA256())
        return Issued(
            pem=certificate.public_bytes(Encoding.PEM).decode("ascii"),
            serial=serial_text(certificate.serial_number),
            not_before_unix_ns=int(certificate.not_valid_before_utc.timestamp()) * 1_000_000_000,
            not_after_unix_ns=int(certificate.not_valid_after_utc.timestamp()) * 1_000_000_000,
            public_key_sha256=public_key_sha256(public_key),
        )

    def _leaf(
        self, public_key: ec.EllipticCurvePublicKey, now: datetime, lifetime_s: float, purpose: x509.ObjectIdentifier
    ) -> x509.CertificateBuilder:
        backdate_s = min(_BACKDATE_S, lifetime_s / 10)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))  # identity is the SAN's alone
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(seconds=backdate_s))
            .not_valid_after(now + timedelta(seconds=lifetime_s))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )


def requested_key(request_pem: str) -> tuple[x509.CertificateSigningRequest, ec.EllipticCurvePublicKey]:
    """The public key that a certificate request proves to hold: EC P-256 only.

    Raises PeerError join.csr_invalid.
    """
    try:
        if len(request_pem) > BODY_BYTES_MAX:
            raise ValueError("too long")
        request = x509.load_pem_x509_csr(request_pem.encode("ascii"))
        key = request.public_key()
        proven = request.is_signature_valid
    except UNREADABLE as error:
        raise PeerError("join.csr_invalid", "the certificate request can't be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise PeerError("join.csr_invalid", "the certificate request must hold an EC P-256 key", key=type(key).__name__)
    if not proven:
        raise PeerError("join.csr_invalid", "the certificate request isn't signed by its own key")
    return request, key


def public_key_sha256(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a key's SubjectPublicKeyInfo, hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _moment(unix_ns: int) -> datetime:
    return datetime.fromtimestamp(unix_ns // 1_000_000_000, UTC)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _trust_domain(certificate: x509.Certificate) -> str:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1 or not uris[0].startswith("spiffe://"):
        raise ValueError("no trust domain")
    return uris[0].removeprefix("spiffe://")


def _key_usage(*, digital_signature: bool = False, sign_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _self_signed(key: ec.EllipticCurvePrivateKey, trust_domain: str, now: datetime) -> x509.Certificate:
    name = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "pgherd"), x509.NameAttribute(NameOID.COMMON_NAME, trust_domain)]
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(seconds=_BACKDATE_S))
        .not_valid_after(now + timedelta(seconds=CA_LIFETIME_S))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
