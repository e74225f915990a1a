"""A herd's identity side for tests: real CA, real store, real HTTPS and mTLS servers, a clock that can be moved."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pgherd.collector.api.serving import OwnedServer, strangers_server
from pgherd.collector.identity.ca import CertificateAuthority, Issued
from pgherd.collector.identity.enrol import enrolment_app
from pgherd.collector.identity.enrolment import Enrolment
from pgherd.collector.identity.gate import PeerGate
from pgherd.collector.identity.peer import PeerKind
from pgherd.collector.identity.registry import StoredStandings, add_certificate, add_identity
from pgherd.collector.identity.server import ServerCertificate
from pgherd.collector.identity.tokens import create_join_token
from pgherd.proto.enrolment import JoinToken
from pgherd.storage.control.store import ControlStore
from support.waiting import wait_until

DAY_S = 86400.0


class ShiftedClock:
    """The machine's clocks, with a wall clock that a test may move."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def wall_unix_ns(self) -> int:
        return time.time_ns() + int(self.offset_s * 1e9)

    def mono_s(self) -> float:
        return time.monotonic()


@dataclass(frozen=True)
class Member:
    """An agent or client with its key, as PEM."""

    id: str
    issued: Issued
    key_pem: bytes

    @property
    def certificate_pem(self) -> bytes:
        return self.issued.pem.encode()


@dataclass(frozen=True)
class Bare:
    """Any key and certificate, as PEM, to dial with."""

    key_pem: bytes
    certificate_pem: bytes


@dataclass
class Herd:
    """One collector's identity side under `directory`."""

    directory: Path
    clock: ShiftedClock
    store: ControlStore
    ca: CertificateAuthority
    enrolment: Enrolment
    certificate: ServerCertificate

    @classmethod
    def create(cls, directory: Path, *, names: tuple[str, ...] = ("localhost", "127.0.0.1")) -> Herd:
        directory.mkdir(parents=True, exist_ok=True)
        clock = ShiftedClock()
        ca = CertificateAuthority.create(directory / "ca", clock.wall_unix_ns())
        store = ControlStore.open(directory / "control.sqlite")
        enrolment = Enrolment(store, ca, clock, certificate_lifetime_s=DAY_S, renewal_grace_s=14 * DAY_S)
        return cls(directory, clock, store, ca, enrolment, ServerCertificate(ca, directory / "tls", names, clock))

    def close(self) -> None:
        self.store.close()

    def gate(self, *, recheck_s: float = 1.0, blind_s: float = 5.0, cache_s: float = 1.0) -> PeerGate:
        return PeerGate(
            self.ca.certificate_pem,
            self.ca.trust_domain,
            StoredStandings(self.store),
            self.clock,
            recheck_s=recheck_s,
            blind_s=blind_s,
            cache_s=cache_s,
        )

    def token(self, port: int, *, host: str = "localhost", lifetime_s: float = 900.0) -> JoinToken:
        with self.store.begin() as connection:
            return create_join_token(
                connection,
                now_unix_ns=self.clock.wall_unix_ns(),
                lifetime_s=lifetime_s,
                actor="test",
                via="test",
                ca_pin=self.ca.pin,
                host=host,
                port=port,
                labels={"env": "test"},
            )

    def member(
        self,
        kind: PeerKind = PeerKind.AGENT,
        *,
        lifetime_s: float = DAY_S,
        recorded: bool = True,
        subject_id: str | None = None,
    ) -> Member:
        """A certificate without the way through the enrolment port."""
        key = ec.generate_private_key(ec.SECP256R1())
        now_unix_ns, fresh = self.clock.wall_unix_ns(), subject_id is None
        subject_id = subject_id or str(uuid.uuid4())
        issued = self.ca.issue_client(key.public_key(), kind, subject_id, now_unix_ns, lifetime_s)
        if recorded:
            with self.store.begin() as connection:
                if fresh:
                    add_identity(
                        connection,
                        subject_id=subject_id,
                        kind=kind,
                        name=f"test-{kind.value}",
                        labels={},
                        facts={},
                        now_unix_ns=now_unix_ns,
                    )
                add_certificate(connection, subject_id, issued, now_unix_ns)
        return Member(subject_id, issued, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    def channel(self, member: Member | Bare | None, port: int, *, trust: bytes | None = None) -> grpc.aio.Channel:
        """A client channel with the member's certificate (None: without one)."""
        credentials = grpc.ssl_channel_credentials(
            trust or self.ca.certificate_pem,
            member.key_pem if member else None,
            member.certificate_pem if member else None,
        )
        # Channels share connections by their arguments: each of ours is its own.
        return grpc.aio.secure_channel(f"localhost:{port}", credentials, options=[("grpc.use_local_subchannel_pool", 1)])

    @contextmanager
    def enrolment_service(self, certificate: ServerCertificate | None = None) -> Iterator[int]:
        """The real :7434 on some port, in a thread; yields the port."""
        app = enrolment_app(self.enrolment, grpc_address="localhost:7433", clock=self.clock)
        server = strangers_server(app, (certificate or self.certificate).ssl_context())
        with socket.create_server(("127.0.0.1", 0)) as listener, served(server, listener):
            yield int(listener.getsockname()[1])


@contextmanager
def served(server: OwnedServer, *listeners: socket.socket) -> Iterator[None]:
    """Run a uvicorn server in a thread while inside."""
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=list(listeners))), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, 10.0, "the server's start")
        yield
    finally:
        server.should_exit = True
        thread.join(15.0)
        assert not thread.is_alive(), "the server didn't end"


def request_pem(
    key: ec.EllipticCurvePrivateKey | None = None, *, builder: x509.CertificateSigningRequestBuilder | None = None
) -> str:
    """A certificate request as an honest agent makes it, or by a hostile `builder`."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = builder or x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
