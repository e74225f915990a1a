"""TLS of both sides, without `cryptography`: the resident agent may not pay its 9 MiB.

A herd has one CA; whoever talks to it trusts that certificate and nothing else (no system store). The pin
in a join token is the SHA-256 of the CA's SubjectPublicKeyInfo, so it survives a re-issued CA certificate.
"""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

import grpc

from pgherd.proto.errors import ConfigError, PeerError

_PEM_BYTES_MAX = 64 * 1024
_SEQUENCE = 0x30
_EXPLICIT_VERSION = 0xA0


def channel_credentials(*, ca_file: Path, key_file: Path, certificate_file: Path) -> grpc.ChannelCredentials:
    """mTLS credentials of an agent's channel; gRPC checks the collector's host name against `ca_file` alone.

    gRPC-Python can't swap them on a living channel: after a renewal, make a new channel. Raises
    ConfigError config.secret_unreadable.
    """
    try:
        return grpc.ssl_channel_credentials(
            root_certificates=ca_file.read_bytes(),
            private_key=key_file.read_bytes(),
            certificate_chain=certificate_file.read_bytes(),
        )
    except OSError as error:
        raise ConfigError(
            "config.secret_unreadable",
            f"can't read the identity of this agent: {error}",
            hint="run `pgherd-agent join` as the user that the agent runs as",
        ) from error


def pinned_context(ca_pem: str) -> ssl.SSLContext:
    """A client context that trusts `ca_pem` alone and checks the host name. Raises PeerError peer.protocol."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # loads no system store; verifies, checks names
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=ca_pem)
    except (ssl.SSLError, ValueError) as error:
        raise PeerError("peer.protocol", "the collector's CA certificate can't be read") from error
    return context


def unverified_context() -> ssl.SSLContext:
    """For one purpose: asking a stranger for the CA certificate that is then compared with a pin."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def spki_sha256(certificate: bytes | str) -> str:
    """The pin of a certificate (PEM or DER): SHA-256 of its SubjectPublicKeyInfo, hexadecimal.

    Raises PeerError peer.protocol for anything that isn't one certificate.
    """
    try:
        if len(certificate) > _PEM_BYTES_MAX:
            raise ValueError("too long")
        raw = certificate.encode("ascii") if isinstance(certificate, str) else certificate
        is_pem = raw.lstrip().startswith(b"-----BEGIN")
        der = ssl.PEM_cert_to_DER_cert(raw.decode("ascii").strip()) if is_pem else raw
        return hashlib.sha256(_subject_public_key_info(der)).hexdigest()
    except (ValueError, IndexError) as error:
        raise PeerError("peer.protocol", "this isn't an X.509 certificate") from error


def _subject_public_key_info(der: bytes) -> bytes:
    """The DER of the SubjectPublicKeyInfo (RFC 5280, 4.1): the seventh member of a v3 tbsCertificate."""
    start, end = _content(der, 0, _SEQUENCE)
    if end != len(der):
        raise ValueError("bytes after the certificate")
    position, _ = _content(der, start, _SEQUENCE)
    if der[position] == _EXPLICIT_VERSION:
        position = _content(der, position, _EXPLICIT_VERSION)[1]
    for tag in (0x02, _SEQUENCE, _SEQUENCE, _SEQUENCE, _SEQUENCE):  # serial, algorithm, issuer, validity, subject
        position = _content(der, position, tag)[1]
    return der[position : _content(der, position, _SEQUENCE)[1]]


def _content(der: bytes, position: int, tag: int) -> tuple[int, int]:
    """Where the content of the DER element at `position` starts and ends. Raises ValueError, IndexError."""
    if der[position] != tag:
        raise ValueError(f"expected tag {tag:#x}")
    length, start = der[position + 1], position + 2
    if length >= 0x80:
        count = length & 0x7F
        if not 1 <= count <= 3:
            raise ValueError("bad length")
        length, start = int.from_bytes(der[start : start + count], "big"), start + count
    if start + length > len(der):
        raise ValueError("cut short")
    return start, start + length
