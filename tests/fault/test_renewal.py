"""Renewal: a new key by the old one's word, within the grace, never for the revoked; a crash keeps the old identity."""

from __future__ import annotations

import asyncio
import base64
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from sqlalchemy import select

from pgherd.agent.identity.files import Identity, NewIdentity, load_identity, write_identity
from pgherd.agent.identity.join import join_herd
from pgherd.agent.identity.keys import sign_renewal
from pgherd.agent.identity.renew import renew_identity
from pgherd.collector.identity.gate import PeerInterceptor
from pgherd.collector.identity.peer import Peer, PeerKind, Standing, current_peer
from pgherd.collector.identity.registry import StoredStandings, revoke_agent
from pgherd.proto.errors import PgherdError
from pgherd.runtime.keys import new_key
from pgherd.runtime.tls import channel_credentials
from pgherd.storage.control.schema import audit, certificates
from support.identity import DAY_S, Herd, ShiftedClock

pytestmark = pytest.mark.fault

_EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


@pytest.fixture
def herd(tmp_path: Path) -> Iterator[Herd]:
    herd = Herd.create(tmp_path / "herd")
    yield herd
    herd.close()


@pytest.fixture
def port(herd: Herd) -> Iterator[int]:
    with herd.enrolment_service() as port:
        yield port


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def _code(state: Path, clock: ShiftedClock) -> str:
    before = load_identity(state)
    with pytest.raises(PgherdError) as caught:
        renew_identity(state, clock, force=True)
    assert load_identity(state) == before, "a failed renewal must leave the old identity in force"
    return caught.value.code


def _standing(herd: Herd, identity: Identity) -> Standing | None:
    return StoredStandings(herd.store).standings([identity.serial]).get(identity.serial)


def test_renewal_is_not_done_before_it_is_due_and_then_brings_a_new_key(herd: Herd, port: int, state: Path) -> None:
    old = join_herd(state, herd.token(port))
    old_key = old.key_file.read_bytes()
    assert renew_identity(state, herd.clock) is None
    herd.clock.offset_s = DAY_S * 0.67
    new = renew_identity(state, herd.clock)
    assert new is not None
    assert (new.agent_id, new.trust_domain) == (old.agent_id, old.trust_domain)
    assert new.serial != old.serial
    assert new.key_file.read_bytes() != old_key
    assert not old.directory.exists(), "a superseded key is still a key"
    assert _standing(herd, old) is _standing(herd, new) is Standing.ACTIVE  # calls in flight go on
    assert renew_identity(state, herd.clock) is None


def test_the_files_of_a_joined_and_of_a_renewed_agent_open_the_mtls_port(herd: Herd, port: int, state: Path) -> None:
    seen: list[Peer] = []

    async def export(_request: bytes, context: object) -> bytes:
        seen.append(current_peer(context))
        return b""

    async def call(identity: Identity, grpc_port: int) -> None:
        credentials = channel_credentials(
            ca_file=identity.ca_file, key_file=identity.key_file, certificate_file=identity.certificate_file
        )
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(f"localhost:{grpc_port}", credentials, options=options) as channel:
            await channel.unary_unary(_EXPORT, None, None)(b"", timeout=10)

    async def test() -> None:
        server = grpc.aio.server(interceptors=[PeerInterceptor(herd.gate())])
        service, method = _EXPORT.strip("/").split("/")
        handlers: dict[str, Any] = {method: grpc.unary_unary_rpc_method_handler(export)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        grpc_port = server.add_secure_port("localhost:0", herd.certificate.grpc_credentials())
        await server.start()
        try:
            joined = await asyncio.to_thread(join_herd, state, herd.token(port))
            await call(joined, grpc_port)
            renewed = await asyncio.to_thread(renew_identity, state, herd.clock, force=True)
            assert renewed is not None
            await call(renewed, grpc_port)
        finally:
            await server.stop(None)
        assert [(peer.id, peer.serial) for peer in seen] == [
            (joined.agent_id, joined.serial),
            (joined.agent_id, renewed.serial),
        ]

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("days_after_expiry", [0.5, 13.9])
def test_an_agent_that_slept_past_its_expiry_comes_back_within_the_grace(
    herd: Herd, port: int, state: Path, days_after_expiry: float
) -> None:
    join_herd(state, herd.token(port))
    herd.clock.offset_s = (1 + days_after_expiry) * DAY_S
    new = renew_identity(state, herd.clock)
    assert new is not None
    assert new.not_after_unix_ns > herd.clock.wall_unix_ns()


def test_the_grace_ends(herd: Herd, port: int, state: Path) -> None:
    join_herd(state, herd.token(port))
    herd.clock.offset_s = 15.1 * DAY_S
    assert _code(state, herd.clock) == "renew.grace_over"


def test_the_revoked_can_t_renew_neither_before_nor_after_expiry(herd: Herd, port: int, state: Path) -> None:
    identity = join_herd(state, herd.token(port))
    assert revoke_agent(herd.store, identity.agent_id, now_unix_ns=1, actor="test", via="test") == 1
    assert _code(state, herd.clock) == "identity.revoked"
    herd.clock.offset_s = 2 * DAY_S
    assert _code(state, herd.clock) == "identity.revoked"
    with herd.store.read() as connection:
        deeds = connection.execute(select(audit.c.action).where(audit.c.subject == identity.agent_id).order_by(audit.c.id))
        assert list(deeds.scalars()) == ["agent.joined", "agent.revoked", "agent.renew_denied", "agent.renew_denied"]


def test_a_wrong_clock_on_the_host_doesn_t_lock_it_out(herd: Herd, port: int, state: Path) -> None:
    join_herd(state, herd.token(port))
    wrong = ShiftedClock()
    wrong.offset_s = -400 * DAY_S
    assert renew_identity(state, wrong, force=True) is not None


def test_renewing_without_an_identity_says_so(herd: Herd, state: Path) -> None:
    state.mkdir(mode=0o700)
    with pytest.raises(PgherdError) as caught:
        renew_identity(state, herd.clock)
    assert caught.value.code == "renew.not_joined"


def test_a_second_renewal_of_the_same_certificate_ends_the_first_one_s_line(herd: Herd) -> None:
    """The agent died before it stored the first answer, or somebody has a copy of its key: one line goes on."""
    member = herd.member()

    def renew() -> str:
        key = new_key()
        signature = sign_renewal(old_key_pem=member.key_pem, old_certificate_pem=member.certificate_pem, new=key, unix_ns=1)
        return herd.enrolment.renew(member.issued.pem, key.request_pem, signature, 1, "test").issued.serial

    first, second = renew(), renew()
    standings = StoredStandings(herd.store).standings([first, second])
    assert standings == {first: Standing.REVOKED, second: Standing.ACTIVE}


def test_a_renewal_needs_the_old_key_s_word_for_this_very_request(herd: Herd) -> None:
    member, other = herd.member(), herd.member()
    key, another = new_key(), new_key()

    def sign(with_key: bytes, *, certificate: bytes = member.certificate_pem, unix_ns: int = 7) -> str:
        return sign_renewal(old_key_pem=with_key, old_certificate_pem=certificate, new=key, unix_ns=unix_ns)

    good = sign(member.key_pem)
    unbound = load_pem_private_key(member.key_pem, None)
    assert isinstance(unbound, ec.EllipticCurvePrivateKey)
    bare = base64.b64encode(unbound.sign(b"pgherd-renew-v1\x00", ec.ECDSA(hashes.SHA256()))).decode()
    attempts = {
        "another's key": (member.issued.pem, key.request_pem, sign(other.key_pem), 7),
        "the new key itself": (member.issued.pem, key.request_pem, sign(key.key_pem), 7),
        "for another request": (member.issued.pem, another.request_pem, good, 7),
        "for another time": (member.issued.pem, key.request_pem, good, 8),
        "for another certificate": (other.issued.pem, key.request_pem, good, 7),
        "over nothing": (member.issued.pem, key.request_pem, bare, 7),
        "not base64": (member.issued.pem, key.request_pem, "*", 7),
        "time out of range": (member.issued.pem, key.request_pem, good, 2**70),
    }
    for what, (certificate, request, signature, unix_ns) in attempts.items():
        with pytest.raises(PgherdError) as caught:
            herd.enrolment.renew(certificate, request, signature, unix_ns, "test")
        assert caught.value.code == "renew.proof_invalid", what
    herd.enrolment.renew(member.issued.pem, key.request_pem, good, 7, "test")
    with pytest.raises(PgherdError) as caught:  # a replay
        herd.enrolment.renew(member.issued.pem, key.request_pem, good, 7, "test")
    assert caught.value.code == "renew.proof_invalid"


def test_only_this_herd_s_known_client_certificates_can_be_renewed(herd: Herd, tmp_path: Path) -> None:
    foreign = Herd.create(tmp_path / "foreign")
    unknown, alien = herd.member(recorded=False), foreign.member()
    for member, code in ((unknown, "identity.missing"), (alien, "peer.untrusted")):
        key = new_key()
        signature = sign_renewal(old_key_pem=member.key_pem, old_certificate_pem=member.certificate_pem, new=key, unix_ns=1)
        with pytest.raises(PgherdError) as caught:
            herd.enrolment.renew(member.issued.pem, key.request_pem, signature, 1, "test")
        assert caught.value.code == code
    server_pem = (tmp_path / "herd" / "tls" / "server.pem").read_bytes()
    key = new_key()
    key_pem, mark, certificate = server_pem.partition(b"-----BEGIN CERTIFICATE-----")
    signature = sign_renewal(old_key_pem=key_pem, old_certificate_pem=mark + certificate, new=key, unix_ns=1)
    with pytest.raises(PgherdError) as caught:
        herd.enrolment.renew((mark + certificate).decode(), key.request_pem, signature, 1, "test")
    assert caught.value.code == "identity.missing"
    foreign.close()


def test_a_client_keeps_its_kind_and_lifetime_when_it_renews(herd: Herd) -> None:
    client = herd.member(PeerKind.CLIENT, lifetime_s=30 * DAY_S)
    key = new_key()
    signature = sign_renewal(old_key_pem=client.key_pem, old_certificate_pem=client.certificate_pem, new=key, unix_ns=1)
    issued = herd.enrolment.renew(client.issued.pem, key.request_pem, signature, 1, "test").issued
    assert issued.not_after_unix_ns - herd.clock.wall_unix_ns() > 29 * DAY_S * 1e9


def test_rows_of_long_dead_certificates_are_dropped(herd: Herd) -> None:
    member = herd.member()
    for day in range(0, 60, 10):
        herd.clock.offset_s = day * DAY_S
        member_now = herd.member(subject_id=member.id)
        key = new_key()
        signature = sign_renewal(
            old_key_pem=member_now.key_pem, old_certificate_pem=member_now.certificate_pem, new=key, unix_ns=1
        )
        herd.enrolment.renew(member_now.issued.pem, key.request_pem, signature, 1, "test")
    with herd.store.read() as connection:
        assert len(connection.execute(select(certificates.c.serial)).all()) <= 4


_WRITER = """
import os, signal, sys
from pathlib import Path
from pgherd.agent.identity import files
stop_at = int(sys.argv[2])
step = 0
def counted(real):
    def call(*args, **kwargs):
        global step
        step += 1
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for module, names in ((os, ("open", "write", "fsync", "close", "rename", "mkdir", "unlink", "rmdir")),):
    for name in names:
        setattr(module, name, counted(getattr(module, name)))
new = files.NewIdentity("11111111-1111-4111-8111-111111111111", "herd-x", "h:1", "h:2", "abc", 1, 2, b"KEY", "CRT", "CA")
files.write_identity(Path(sys.argv[1]), new)
print(step)
"""


def test_a_kill_at_any_step_of_writing_leaves_the_old_identity_or_the_new_one(state: Path) -> None:
    state.mkdir(mode=0o700)
    old = write_identity(
        state, NewIdentity("22222222-2222-4222-8222-222222222222", "herd-x", "h:1", "h:2", "abd", 1, 2, b"OLD", "CRT", "CA")
    )
    killed, stop_at = 0, 0
    while True:
        stop_at += 1
        ended = subprocess.run([sys.executable, "-c", _WRITER, str(state), str(stop_at)], capture_output=True, timeout=30)
        found = load_identity(state)
        assert found is not None
        assert found.key_file.read_bytes() == (b"OLD" if found.agent_id == old.agent_id else b"KEY")
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        killed += 1
        if found.agent_id != old.agent_id:  # published: from here on only sweeping is left
            write_identity(state, NewIdentity(old.agent_id, "herd-x", "h:1", "h:2", "abd", 1, 2, b"OLD", "CRT", "CA"))
    assert killed > 15
    assert len(list(state.glob("identity-*"))) == 1
