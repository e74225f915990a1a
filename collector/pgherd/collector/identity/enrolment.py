"""Joining, renewing and client certificates: each one transaction that signs, records and audits, or does nothing."""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import Connection, select

from pgherd.collector.identity.audit import write_audit
from pgherd.collector.identity.ca import CertificateAuthority, Issued, public_key_sha256, requested_key
from pgherd.collector.identity.peer import Peer, PeerKind, Standing, read_peer
from pgherd.collector.identity.registry import add_certificate, add_identity, forget_certificates, replace_certificate
from pgherd.collector.identity.tokens import consume_join_token
from pgherd.proto.clock import Clock
from pgherd.proto.enrolment import renewal_bytes
from pgherd.proto.errors import ConfigError, DeniedError, PeerError, PgherdError, TransientError
from pgherd.storage.control.schema import agents, certificates
from pgherd.storage.control.store import ControlStore

_FACTS_MAX = 32
_FACT_TEXT_MAX = 256
_CLIENT_LIFETIME_S_MAX = 366 * 86400.0
# Denials are audited, but a stranger who knocks all day must not fill the disk.
_DENIALS_PER_MINUTE_MAX = 60


@dataclass(frozen=True, slots=True)
class Joined:
    """What an agent gets when it joins or renews."""

    agent_id: str
    issued: Issued


@dataclass(slots=True)
class _DenialBudget:
    minute: int = 0
    written: int = 0
    suppressed: int = 0

    def take(self, now_unix_ns: int) -> int | None:
        """How many denials were left out before this one, or None when this one is left out too."""
        minute = now_unix_ns // 60_000_000_000
        if minute != self.minute:
            self.minute, self.written = minute, 0
        if self.written >= _DENIALS_PER_MINUTE_MAX:
            self.suppressed += 1
            return None
        self.written += 1
        suppressed, self.suppressed = self.suppressed, 0
        return suppressed


@dataclass(slots=True)
class Enrolment:
    """The operations behind :7434. Synchronous (call through a thread), thread-safe by the store's transactions."""

    store: ControlStore
    ca: CertificateAuthority
    clock: Clock
    certificate_lifetime_s: float
    renewal_grace_s: float
    _denials: _DenialBudget = field(default_factory=_DenialBudget)

    def join(self, token_id: str, secret: str, request_pem: str, facts: Mapping[str, object], source: str) -> Joined:
        """Use the token up and sign. `source` is the caller's address, for the audit.

        Raises DeniedError join.token_*, PeerError join.csr_invalid, ConfigError usage.invalid (the token stays good),
        TransientError store.unavailable.
        """
        try:
            _, key = requested_key(request_pem)
            facts = bounded_facts(facts)
            now_unix_ns, agent_id = self.clock.wall_unix_ns(), str(uuid.uuid4())
            with self.store.begin() as connection:
                grant = consume_join_token(connection, token_id, secret, now_unix_ns=now_unix_ns, agent_id=agent_id)
                name = grant.name or str(facts.get("hostname") or agent_id)
                add_identity(
                    connection,
                    subject_id=agent_id,
                    kind=PeerKind.AGENT,
                    name=name,
                    labels=grant.labels,
                    facts=facts,
                    now_unix_ns=now_unix_ns,
                )
                issued = self.ca.issue_client(key, PeerKind.AGENT, agent_id, now_unix_ns, self.certificate_lifetime_s)
                add_certificate(connection, agent_id, issued, now_unix_ns)
                write_audit(
                    connection,
                    unix_ns=now_unix_ns,
                    actor=f"join-token:{grant.token_id}",
                    via="enrol",
                    action="agent.joined",
                    subject=agent_id,
                    source=source,
                    serial=issued.serial,
                    name=name,
                    token_actor=grant.actor,
                )
            return Joined(agent_id, issued)
        except (DeniedError, PeerError) as error:
            self._audit_denial("agent.join_denied", token_id, source, error)
            raise

    def renew(self, certificate_pem: str, request_pem: str, signature_base64: str, agent_unix_ns: int, source: str) -> Joined:
        """Sign a new key for the holder of an old certificate, also one that expired within the grace.

        Raises DeniedError peer.untrusted | identity.missing | identity.revoked | renew.grace_over |
        renew.proof_invalid, PeerError join.csr_invalid, TransientError store.unavailable.
        """
        peer: Peer | None = None
        try:
            request, key = requested_key(request_pem)
            peer = read_peer(certificate_pem.encode(), self.ca.certificate_pem, self.ca.trust_domain)
            old = x509.load_pem_x509_certificate(certificate_pem.encode())
            _check_proof(old, request, signature_base64, agent_unix_ns)
            now_unix_ns = self.clock.wall_unix_ns()
            if now_unix_ns > peer.not_after_unix_ns + int(self.renewal_grace_s * 1e9):
                raise DeniedError(
                    "renew.grace_over",
                    "the certificate expired too long ago to be renewed",
                    hint="join again with a new token: `pgherd agents add`",
                    grace_s=self.renewal_grace_s,
                )
            with self.store.begin() as connection:
                _check_renewable(connection, peer, public_key_sha256(key))
                issued = self.ca.issue_client(key, peer.kind, peer.id, now_unix_ns, self._lifetime_s(connection, peer))
                add_certificate(connection, peer.id, issued, now_unix_ns)
                superseded = replace_certificate(connection, peer.serial, issued, now_unix_ns)
                forget_certificates(connection, peer.id, now_unix_ns - int((self.renewal_grace_s + 86400.0) * 1e9))
                write_audit(
                    connection,
                    unix_ns=now_unix_ns,
                    actor=f"{peer.kind.value}:{peer.id}",
                    via="enrol",
                    action="agent.renewed",
                    subject=peer.id,
                    source=source,
                    serial=issued.serial,
                    replaces=peer.serial,
                    superseded=superseded,
                    skew_s=round((now_unix_ns - agent_unix_ns) / 1e9, 1),
                )
            return Joined(peer.id, issued)
        except (DeniedError, PeerError) as error:
            self._audit_denial("agent.renew_denied", peer.id if peer else "unknown", source, error)
            raise

    def issue_client(self, name: str, request_pem: str, lifetime_s: float, *, actor: str, via: str) -> Joined:
        """A certificate for a foreign OTLP client: it may send metrics and nothing else.

        Raises PeerError join.csr_invalid, ConfigError usage.invalid, TransientError store.unavailable.
        """
        if not 0 < lifetime_s <= _CLIENT_LIFETIME_S_MAX or not 0 < len(name) <= 255:
            raise ConfigError("usage.invalid", "a client needs a name and a lifetime of at most a year")
        _, key = requested_key(request_pem)
        now_unix_ns, client_id = self.clock.wall_unix_ns(), str(uuid.uuid4())
        issued = self.ca.issue_client(key, PeerKind.CLIENT, client_id, now_unix_ns, lifetime_s)
        with self.store.begin() as connection:
            add_identity(
                connection, subject_id=client_id, kind=PeerKind.CLIENT, name=name, labels={}, facts={}, now_unix_ns=now_unix_ns
            )
            add_certificate(connection, client_id, issued, now_unix_ns)
            write_audit(
                connection,
                unix_ns=now_unix_ns,
                actor=actor,
                via=via,
                action="client.issued",
                subject=client_id,
                name=name,
                serial=issued.serial,
            )
        return Joined(client_id, issued)

    def _lifetime_s(self, connection: Connection, peer: Peer) -> float:
        """Agents get what the configuration says now, clients the lifetime that an admin chose."""
        if peer.kind is PeerKind.AGENT:
            return self.certificate_lifetime_s
        row = connection.execute(
            select(certificates.c.not_after_unix_ns, certificates.c.issued_unix_ns).where(certificates.c.serial == peer.serial)
        ).one()
        return float(row.not_after_unix_ns - row.issued_unix_ns) / 1e9

    def _audit_denial(self, action: str, subject: str, source: str, error: PgherdError) -> None:
        now_unix_ns = self.clock.wall_unix_ns()
        suppressed = self._denials.take(now_unix_ns)
        if suppressed is None:
            return
        try:
            with self.store.begin() as connection:
                write_audit(
                    connection,
                    unix_ns=now_unix_ns,
                    actor="unknown",
                    via="enrol",
                    action=action,
                    subject=subject,
                    source=source,
                    code=error.code,
                    denials_left_out=suppressed,
                )
        except TransientError:
            return  # the caller is denied all the same, and gets that answer


def _check_proof(
    old: x509.Certificate, request: x509.CertificateSigningRequest, signature_base64: str, agent_unix_ns: int
) -> None:
    """The old key signed this renewal. Raises DeniedError renew.proof_invalid."""
    old_key = old.public_key()
    try:
        message = renewal_bytes(
            certificate_sha256=old.fingerprint(hashes.SHA256()),
            request_sha256=hashlib.sha256(request.public_bytes(Encoding.DER)).digest(),
            unix_ns=agent_unix_ns,
        )
        if not isinstance(old_key, ec.EllipticCurvePublicKey):
            raise ValueError("not ours")
        old_key.verify(base64.b64decode(signature_base64, validate=True), message, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, OverflowError) as error:
        raise DeniedError("renew.proof_invalid", "the renewal isn't signed by the key of the old certificate") from error


def _check_renewable(connection: Connection, peer: Peer, new_key_sha256: str) -> None:
    row = connection.execute(
        select(agents.c.status, certificates.c.revoked_unix_ns)
        .join(agents, agents.c.id == certificates.c.agent_id)
        .where(certificates.c.serial == peer.serial, certificates.c.agent_id == peer.id)
    ).one_or_none()
    if row is None:
        raise DeniedError(
            "identity.missing", "the certificate isn't known to this collector", hint="join again with a new token"
        )
    if row.status != Standing.ACTIVE.value or row.revoked_unix_ns is not None:
        raise DeniedError("identity.revoked", "the agent or its certificate is revoked", hint="join again with a new token")
    used = select(certificates.c.serial).where(
        certificates.c.agent_id == peer.id, certificates.c.public_key_sha256 == new_key_sha256
    )
    if connection.execute(used.limit(1)).one_or_none() is not None:
        raise DeniedError("renew.proof_invalid", "a renewal needs a new key; this one has a certificate already")


def bounded_facts(facts: Mapping[str, object]) -> dict[str, object]:
    """What a joining host says about itself, if it is small and plain. Raises ConfigError usage.invalid."""
    if len(facts) > _FACTS_MAX:
        raise ConfigError("usage.invalid", f"at most {_FACTS_MAX} facts", facts=len(facts))
    for key, value in facts.items():
        if len(key) > 64 or not isinstance(value, str | int | float | bool) or len(str(value)) > _FACT_TEXT_MAX:
            raise ConfigError("usage.invalid", "a fact is a short text, a number or a boolean")
    return dict(facts)
