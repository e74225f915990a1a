"""Joining: prove who the collector is, then ask to be let in. Fails closed: nothing is written before all is well."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import socket
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from pgherd.agent.identity.client import fetch_pinned_ca, int_member, post, text_member
from pgherd.agent.identity.files import Identity, NewIdentity, identity_lock, load_identity, write_identity
from pgherd.agent.identity.keys import check_certificate
from pgherd.proto.enrolment import JOIN_PATH, JoinToken, join_address
from pgherd.proto.errors import IntegrityError, PreconditionError
from pgherd.runtime.durable import private_directory
from pgherd.runtime.keys import KeyAndRequest, new_key


def join_herd(state_directory: Path, token: JoinToken, *, force: bool = False) -> Identity:
    """Join with `token` and put the identity in force.

    Order: refuse if joined; CA against the pin; reconnect trusting only that CA, host name checked; key and
    request; POST; check the answer; write. The token's secret is sent once, to the proven collector.
    Raises PreconditionError join.already_joined | state.locked, DeniedError peer.untrusted |
    peer.name_mismatch | join.token_*, TransientError peer.unreachable | enrol.busy | disk.*, PeerError.
    """
    _refuse_if_joined(state_directory, force)
    ca_pem = fetch_pinned_ca(token.host, token.port, token.ca_pin)
    key = new_key()
    body = {
        "method": "token",
        "token_id": token.id,
        "token_secret": token.secret,
        "csr": key.request_pem,
        "facts": host_facts(),
    }
    existed = state_directory.exists()
    private_directory(state_directory)  # a directory that can't be used is found out before the token is used up
    try:
        with identity_lock(state_directory):
            _refuse_if_joined(state_directory, force)
            answer = post(token.host, token.port, JOIN_PATH, body, ca_pem)
            return write_identity(state_directory, accepted(answer, key, ca_pem, join_address(token.host, token.port)))
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                state_directory.rmdir()
        raise


def accepted(answer: Mapping[str, object], key: KeyAndRequest, ca_pem: str, enrol_address: str) -> NewIdentity:
    """The collector's answer to a join or renewal, checked. Raises PeerError peer.protocol."""
    agent_id, trust_domain = text_member(answer, "agent_id"), text_member(answer, "trust_domain")
    certificate_pem = text_member(answer, "certificate")
    check_certificate(certificate_pem, ca_pem, key, f"spiffe://{trust_domain}/agent/{agent_id}")
    return NewIdentity(
        agent_id=agent_id,
        trust_domain=trust_domain,
        grpc_address=text_member(answer, "grpc_address"),
        enrol_address=enrol_address,
        serial=text_member(answer, "serial"),
        not_before_unix_ns=int_member(answer, "not_before_unix_ns"),
        not_after_unix_ns=int_member(answer, "not_after_unix_ns"),
        key_pem=key.key_pem,
        certificate_pem=certificate_pem,
        ca_pem=ca_pem,
    )


def host_facts() -> dict[str, object]:
    """What the collector may know about this host. The machine id is hashed, as machine-id(5) asks."""
    facts: dict[str, object] = {
        "hostname": socket.gethostname()[:255],
        "system": f"{platform.system()} {platform.release()}"[:255],
        "machine": platform.machine(),
        "software_version": version("pgherd"),
    }
    try:
        machine_id = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        return facts
    return facts | {"machine_id_sha256": hashlib.sha256(b"pgherd\x00" + machine_id).hexdigest()}


def _refuse_if_joined(state_directory: Path, force: bool) -> None:
    if force:
        return
    try:
        identity = load_identity(state_directory)
    except IntegrityError as error:
        raise PreconditionError(
            "join.already_joined",
            f"{state_directory} holds an identity that can't be read: {error}",
            hint="look, then use --force",
        ) from error
    if identity is not None:
        raise PreconditionError(
            "join.already_joined",
            f"this agent has joined already, as {identity.agent_id}",
            hint="revoke that one and use --force to join as a new agent",
            agent=identity.agent_id,
        )
