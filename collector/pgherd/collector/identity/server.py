"""The collector's own server certificate: 30 days, renewed by itself at two thirds, loaded while running.

Key and certificate share one file, so that a crash can't leave a pair that doesn't match. The gRPC server
asks for the current pair at each handshake; uvicorn's SSL context is told to load the new one.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from pgherd.collector.identity.ca import CertificateAuthority
from pgherd.collector.identity.peer import UNREADABLE
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.runtime.durable import private_directory, publish
from pgherd.runtime.logging import get_logger

SERVER_LIFETIME_S = 30 * 86400.0
_FILE_NAME = "server.pem"

_log = get_logger(__name__)


class ServerCertificate:
    """The pair in use and the file that holds it. Thread-safe: gRPC asks from its own threads."""

    def __init__(
        self,
        ca: CertificateAuthority,
        directory: Path,
        names: Sequence[str],
        clock: Clock,
        lifetime_s: float = SERVER_LIFETIME_S,
    ) -> None:
        self._ca = ca
        self._path = private_directory(directory) / _FILE_NAME
        self._names = tuple(names)
        self._clock = clock
        self._lifetime_s = lifetime_s
        self._contexts: list[ssl.SSLContext] = []
        self._pair = self._stored() or self._issue()

    @property
    def certificate(self) -> x509.Certificate:
        return self._pair[1]

    def renew_if_due(self) -> bool:
        """Issue and load a new certificate once two thirds of the old one's life are over; says whether it did.

        Raises TransientError disk.*; the old one then stays in use.
        """
        now_s = self._clock.wall_unix_ns() / 1e9
        start_s = self.certificate.not_valid_before_utc.timestamp()
        end_s = self.certificate.not_valid_after_utc.timestamp()
        if start_s <= now_s < start_s + (end_s - start_s) * 2 / 3:
            return False
        self._pair = self._issue()
        for context in self._contexts:
            context.load_cert_chain(self._path)
        _log.info("identity.server_certificate_renewed", not_after=str(self.certificate.not_valid_after_utc))
        return True

    async def keep_fresh(self, check_s: float = 600.0) -> None:
        """Renew when due, for ever; run it as a task beside the servers."""
        while True:
            try:
                await asyncio.to_thread(self.renew_if_due)
            except PgherdError as error:
                _log.error("identity.server_certificate_stuck", error=str(error))
            await asyncio.sleep(check_s)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """mTLS credentials for grpc.aio: a certificate of this CA is required, ours follows renewals."""
        served: list[bytes] = []

        def changed() -> grpc.ServerCertificateConfiguration | None:
            certificate_pem = self.certificate.public_bytes(Encoding.PEM)
            if served and served[-1] == certificate_pem:
                return None
            served[:] = [certificate_pem]
            return self._grpc_configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._grpc_configuration(),
            changed,  # type: ignore[arg-type]  # grpc documents None as "no change"
            require_client_authentication=True,
        )

    def ssl_context(self, *, mutual: bool = False) -> ssl.SSLContext:
        """A context for uvicorn's HTTPS (TLS 1.3); it follows renewals. `mutual`: a certificate of this CA is required."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self._path)
        if mutual:
            context.load_verify_locations(cadata=self._ca.certificate_pem.decode("ascii"))
            context.verify_mode = ssl.CERT_REQUIRED
        self._contexts.append(context)
        return context

    def _grpc_configuration(self) -> grpc.ServerCertificateConfiguration:
        key, certificate = self._pair
        return grpc.ssl_server_certificate_configuration(
            [(_key_pem(key), certificate.public_bytes(Encoding.PEM))], root_certificates=self._ca.certificate_pem
        )

    def _issue(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._ca.issue_server(key, self._names, self._clock.wall_unix_ns(), self._lifetime_s)
        publish(self._path, _key_pem(key) + certificate.public_bytes(Encoding.PEM))
        return key, certificate

    def _stored(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None:
        """The pair on disk if it is still of use: this CA's, these names, not expired."""
        try:
            content = self._path.read_bytes()
            key = load_pem_private_key(content, None)
            certificate = x509.load_pem_x509_certificate(content)
            certificate.verify_directly_issued_by(self._ca.certificate)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (FileNotFoundError, *UNREADABLE):
            return None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            return None
        held = {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}
        fresh = certificate.not_valid_after_utc.timestamp() > self._clock.wall_unix_ns() / 1e9
        return (key, certificate) if fresh and held == set(self._names) else None


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
