"""What the agent proves and checks with keys. For short-lived children: imports `cryptography`."""

from __future__ import annotations

import base64

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from pgherd.proto.enrolment import renewal_bytes
from pgherd.proto.errors import IntegrityError, PeerError
from pgherd.runtime.keys import KeyAndRequest


def check_certificate(certificate_pem: str, ca_pem: str, key: KeyAndRequest, uri: str) -> None:
    """The collector's answer is a certificate for our key and our name, by the CA we pinned.

    Raises PeerError peer.protocol.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem.encode()))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        ours = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if ours != key.public_key_der or names.get_values_for_type(x509.UniformResourceIdentifier) != [uri]:
            raise ValueError("not for this agent")
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        raise PeerError("peer.protocol", "the collector answered with a certificate that isn't ours") from error


def sign_renewal(*, old_key_pem: bytes, old_certificate_pem: bytes, new: KeyAndRequest, unix_ns: int) -> str:
    """The old key's signature over a renewal, base64. Raises IntegrityError format.corrupt."""
    try:
        old_key = load_pem_private_key(old_key_pem, None)
        certificate_sha256 = x509.load_pem_x509_certificate(old_certificate_pem).fingerprint(hashes.SHA256())
    except ValueError as error:
        raise IntegrityError("format.corrupt", "the agent's key or certificate can't be read", hint="join again") from error
    if not isinstance(old_key, ec.EllipticCurvePrivateKey):
        raise IntegrityError("format.corrupt", "the agent's key isn't an EC key", hint="join again")
    message = renewal_bytes(certificate_sha256=certificate_sha256, request_sha256=new.request_sha256, unix_ns=unix_ns)
    return base64.b64encode(old_key.sign(message, ec.ECDSA(hashes.SHA256()))).decode("ascii")
