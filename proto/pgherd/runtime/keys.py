"""Making keys and certificate requests (EC P-256). For short-lived processes: imports `cryptography`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


@dataclass(frozen=True, slots=True)
class KeyAndRequest:
    """A new private key and the request that proves it. The repr doesn't show the key."""

    key_pem: bytes
    request_pem: str
    request_sha256: bytes  # of its DER
    public_key_der: bytes

    def __repr__(self) -> str:
        return "KeyAndRequest()"


def new_key() -> KeyAndRequest:
    """A fresh key with its certificate request. The request names nobody: the collector decides who we are."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return KeyAndRequest(
        key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        request_pem=request.public_bytes(Encoding.PEM).decode("ascii"),
        request_sha256=hashlib.sha256(request.public_bytes(Encoding.DER)).digest(),
        public_key_der=key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    )
