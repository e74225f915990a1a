"""Renewal: a new key and certificate at two thirds of the old one's life, also for two weeks after its end.

The resident asks `renewal_due_unix_ns` and starts `pgherd-agent renew` as a child; after it succeeded, the
resident loads the identity again and makes a new gRPC channel (gRPC can't swap certificates on a living one).
"""

from __future__ import annotations

from pathlib import Path

from pgherd.agent.identity.client import post
from pgherd.agent.identity.files import Identity, identity_lock, require_identity, write_identity
from pgherd.agent.identity.join import accepted
from pgherd.agent.identity.keys import sign_renewal
from pgherd.agent.identity.schedule import renewal_due_unix_ns
from pgherd.proto.clock import Clock
from pgherd.proto.enrolment import RENEW_PATH, split_address
from pgherd.proto.errors import PeerError
from pgherd.runtime.keys import new_key


def renew_identity(state_directory: Path, clock: Clock, *, force: bool = False) -> Identity | None:
    """Renew if due (or `force`); returns the identity in force afterwards, None when it wasn't due.

    Raises PreconditionError renew.not_joined | state.locked, DeniedError renew.grace_over | identity.revoked |
    renew.proof_invalid | peer.untrusted, TransientError peer.unreachable | enrol.busy | disk.*. The old
    identity stays in force whenever it raises.
    """
    require_identity(state_directory)
    with identity_lock(state_directory):
        old = require_identity(state_directory)
        now_unix_ns = clock.wall_unix_ns()
        if not force and now_unix_ns < renewal_due_unix_ns(old.not_before_unix_ns, old.not_after_unix_ns, old.serial):
            return None
        ca_pem, certificate_pem = old.ca_file.read_text(), old.certificate_file.read_text()
        key = new_key()
        signature = sign_renewal(
            old_key_pem=old.key_file.read_bytes(), old_certificate_pem=certificate_pem.encode(), new=key, unix_ns=now_unix_ns
        )
        host, port = split_address(old.enrol_address)
        answer = post(
            host,
            port,
            RENEW_PATH,
            {"certificate": certificate_pem, "csr": key.request_pem, "unix_ns": now_unix_ns, "signature": signature},
            ca_pem,
        )
        new = accepted(answer, key, ca_pem, old.enrol_address)
        if new.agent_id != old.agent_id:
            raise PeerError("peer.protocol", "the collector renewed another agent's identity")
        return write_identity(state_directory, new)
