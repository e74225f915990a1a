"""Who is calling: the identity that a client certificate proves, and whether it still holds.

The certificate's one URI SAN is the identity, `spiffe://<trust-domain>/agent/<uuid>` (or `/client/<uuid>`
for a foreign OTLP client); the subject says nothing. gRPC looks at a certificate once, at the handshake,
and never again: with a connection that lives for weeks that's not a check. `judge` is therefore asked for
each RPC and again while a stream lives (gate.py). Servicers call `current_peer(context)`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from pgherd.proto.errors import DeniedError, InvariantError


class PeerKind(StrEnum):
    """What may hold a certificate of the herd."""

    AGENT = "agent"
    CLIENT = "client"  # a foreign OTLP client: may send metrics, nothing else


@dataclass(frozen=True, slots=True)
class Peer:
    """A verified caller. `serial` is the certificate's, lower-case hexadecimal."""

    kind: PeerKind
    id: str  # lower-case UUID
    serial: str
    not_after_unix_ns: int


class Standing(StrEnum):
    """What the control store says about a certificate and its holder; a serial it doesn't know has none."""

    ACTIVE = "active"
    QUARANTINED = "quarantined"
    REVOKED = "revoked"


class StandingSource(Protocol):
    """Where standings come from; synchronous, called in a thread."""

    def standings(self, serials: Sequence[str]) -> Mapping[str, Standing]:
        """The standing of each known serial. Raises TransientError store.unavailable."""
        ...


# All that reading a stranger's certificate or request can raise; half of it has no common root in cryptography.
UNREADABLE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)

_current: ContextVar[Peer] = ContextVar("pgherd_peer")


def current_peer(context: object) -> Peer:
    """The verified caller of the RPC that `context` belongs to; for servicers.

    Raises InvariantError invariant.broken when the RPC didn't pass the gate: a server without the
    interceptor must not serve anybody.
    """
    try:
        return _current.get()
    except LookupError:
        raise InvariantError(
            "invariant.broken", "an RPC reached its servicer without passing the identity gate", context=type(context).__name__
        ) from None


@contextmanager
def acting_as(peer: Peer) -> Iterator[None]:
    """Make `peer` the current one while inside; for the gate."""
    token = _current.set(peer)
    try:
        yield
    finally:
        _current.reset(token)


def spiffe_id(trust_domain: str, kind: PeerKind, subject_id: str) -> str:
    """The URI SAN of a subject."""
    return f"spiffe://{trust_domain}/{kind.value}/{subject_id}"


def parse_spiffe_id(uri: str, trust_domain: str) -> tuple[PeerKind, str]:
    """Kind and UUID out of a URI SAN of this herd. Raises DeniedError identity.missing for any other text."""
    prefix = f"spiffe://{trust_domain}/"
    kind, _, subject_id = uri.removeprefix(prefix).partition("/")
    try:
        if uri.startswith(prefix) and str(uuid.UUID(subject_id)) == subject_id:
            return PeerKind(kind), subject_id
    except ValueError:
        pass
    raise DeniedError("identity.missing", "the client certificate names no identity of this herd", uri=uri[:200])


def serial_text(serial: int) -> str:
    """A serial number as the control store writes it."""
    return f"{serial:x}"


@lru_cache(maxsize=4096)
def read_peer(certificate_pem: bytes, ca_pem: bytes, trust_domain: str) -> Peer:
    """The identity in a client certificate that `ca_pem` issued; its time and standing aren't judged here.

    Raises DeniedError identity.missing | peer.untrusted. Cached: parsing and verifying cost 0.2 ms.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except UNREADABLE as error:
        raise DeniedError("identity.missing", "the client certificate can't be read or names nobody") from error
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem))
    except UNREADABLE as error:
        raise DeniedError("peer.untrusted", "the client certificate isn't signed by this herd's CA") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise DeniedError("identity.missing", "the client certificate must name exactly one identity", uris=len(uris))
    kind, subject_id = parse_spiffe_id(uris[0], trust_domain)
    not_after_unix_ns = int(certificate.not_valid_after_utc.timestamp()) * 1_000_000_000
    return Peer(kind, subject_id, serial_text(certificate.serial_number), not_after_unix_ns)


def judge(peer: Peer, standing: Standing | None, now_unix_ns: int) -> DeniedError | None:
    """Why `peer` may not be served at `now_unix_ns`, or None when it may. Pure."""
    if now_unix_ns >= peer.not_after_unix_ns:
        return DeniedError(
            "identity.expired",
            "the client certificate has expired",
            hint="the agent renews by itself within the grace; else join again with a new token",
            serial=peer.serial,
        )
    if standing is None:
        return DeniedError(
            "identity.missing",
            "the client certificate's serial number isn't known to this collector",
            hint="join again with a new token",
            serial=peer.serial,
        )
    if standing is not Standing.ACTIVE:
        return DeniedError(
            "identity.revoked",
            f"the {peer.kind.value} or its certificate is {standing.value}",
            hint="if that isn't meant, join again with a new token",
            serial=peer.serial,
        )
    return None
