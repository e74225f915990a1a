"""The quiet parts of identity: token text, pins, schedules, buckets, verdicts, the CA's and the agent's files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from pgherd.agent.identity.files import NewIdentity, load_identity, write_identity
from pgherd.agent.identity.schedule import renewal_due_unix_ns
from pgherd.collector.identity.apitokens import Scope
from pgherd.collector.identity.ca import CertificateAuthority, public_key_sha256
from pgherd.collector.identity.peer import Peer, PeerKind, Standing, current_peer, judge, parse_spiffe_id, spiffe_id
from pgherd.collector.identity.ratelimit import Buckets
from pgherd.collector.identity.server import ServerCertificate
from pgherd.proto.enrolment import JoinToken, base32_text, join_address, split_address
from pgherd.proto.errors import PgherdError
from pgherd.runtime.logging import redact
from pgherd.runtime.tls import spki_sha256
from support.identity import DAY_S, ShiftedClock

NOW_UNIX_NS = 1_900_000_000 * 1_000_000_000
_HOSTS = st.sampled_from(["localhost", "db-1.example.org", "192.0.2.7", "::1", "2001:db8::7", "host_with_underscore"])


def _token(seed: bytes = b"\x01" * 32, host: str = "localhost", port: int = 7434) -> JoinToken:
    return JoinToken(base32_text(seed[:6]), base32_text(seed), "ab" * 32, host, port)


@given(st.binary(min_size=32, max_size=32), _HOSTS, st.integers(1, 65535))
def test_a_token_reads_back_from_its_line(seed: bytes, host: str, port: int) -> None:
    token = _token(seed, host, port)
    assert JoinToken.parse(f"  {token}\n") == token
    assert token.secret not in repr(token)
    assert token.secret not in redact(f"joining with {token} now")


@given(st.text(max_size=120))
def test_other_text_is_malformed_and_not_quoted(text: str) -> None:
    with pytest.raises(PgherdError) as caught:
        JoinToken.parse(text)
    assert caught.value.code == "join.token_malformed"
    assert len(text) < 20 or text not in str(caught.value.as_dict())


@pytest.mark.parametrize("spoil", ["@", "", ":0", ":65536", "\nx"])
def test_a_line_with_a_damaged_end_is_malformed(spoil: str) -> None:
    line = str(_token())
    damaged = {"": line[:-6], "@": line.replace("@", "")}.get(spoil, line.rsplit(":", 1)[0] + spoil)
    with pytest.raises(PgherdError, match="join token"):
        JoinToken.parse(damaged)


@given(_HOSTS, st.integers(0, 65535))
def test_addresses_split_and_join(host: str, port: int) -> None:
    assert split_address(join_address(host, port)) == (host, port)


def test_the_pin_without_cryptography_equals_the_pin_with_it(tmp_path: Path) -> None:
    ca = CertificateAuthority.create(tmp_path / "ca", NOW_UNIX_NS)
    leaf = ca.issue_client(
        ec.generate_private_key(ec.SECP256R1()).public_key(), PeerKind.AGENT, "0" * 36, NOW_UNIX_NS, DAY_S
    ).pem
    for pem in (ca.certificate_pem.decode(), leaf):
        certificate = x509.load_pem_x509_certificate(pem.encode())
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        der = certificate.public_bytes(Encoding.DER)
        assert spki_sha256(pem) == spki_sha256(pem.encode()) == spki_sha256(der) == public_key_sha256(key)


@given(st.binary(max_size=300), st.binary(max_size=12))
def test_the_pin_of_rubbish_is_an_error_by_name(rubbish: bytes, tail: bytes) -> None:
    nested = b"\x30\x82" + (len(tail) + 4).to_bytes(2, "big") + b"\x30\x82" + len(tail).to_bytes(2, "big") + tail
    for candidate in (
        rubbish,
        nested,
        b"-----BEGIN CERTIFICATE-----\n" + rubbish,
        b"\x30\x80",
        b"\x30\x84\xff\xff\xff\xff",
        b"\x30" * 70_000,
    ):
        with pytest.raises(PgherdError) as caught:
            spki_sha256(candidate)
        assert caught.value.code == "peer.protocol"


@given(st.integers(0, 2**60), st.integers(10**9, 10**18), st.text(st.characters(codec="ascii"), min_size=1, max_size=40))
def test_renewal_is_due_shortly_before_two_thirds(not_before: int, life_ns: int, serial: str) -> None:
    due = renewal_due_unix_ns(not_before, not_before + life_ns, serial)
    assert 0.56 * life_ns <= due - not_before <= 0.67 * life_ns
    assert due == renewal_due_unix_ns(not_before, not_before + life_ns, serial)


def test_renewals_of_a_herd_are_spread() -> None:
    dues = {renewal_due_unix_ns(0, 86400 * 10**9, f"{serial:x}") // 60_000_000_000 for serial in range(1000)}
    assert len(dues) > 100  # of 144 minutes


def test_a_bucket_lets_the_burst_through_then_the_rate_and_forgets_the_longest_unseen() -> None:
    buckets = Buckets(rate_per_s=2.0, burst=3.0, keys_max=2)
    assert [buckets.wait_s("a", 0.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert buckets.wait_s("a", 0.0) == 0.5
    assert buckets.wait_s("b", 0.0) == 0.0
    assert buckets.wait_s("a", 0.5) == 0.0
    assert buckets.wait_s("a", 0.5) == 0.5
    assert buckets.wait_s("c", 0.5) == 0.0  # b is forgotten, not a
    assert buckets.wait_s("a", 0.5) == 0.5


_PEER = Peer(PeerKind.AGENT, "11111111-1111-4111-8111-111111111111", "abc", NOW_UNIX_NS)


@pytest.mark.parametrize(
    ("standing", "late_ns", "code"),
    [
        (Standing.ACTIVE, -1, None),
        (Standing.ACTIVE, 0, "identity.expired"),
        (Standing.REVOKED, -1, "identity.revoked"),
        (Standing.QUARANTINED, -1, "identity.revoked"),
        (None, -1, "identity.missing"),
    ],
)
def test_the_verdict(standing: Standing | None, late_ns: int, code: str | None) -> None:
    error = judge(_PEER, standing, NOW_UNIX_NS + late_ns)
    assert (error.code if error else None) == code


def test_a_servicer_without_the_gate_gets_no_peer() -> None:
    with pytest.raises(PgherdError) as caught:
        current_peer(object())
    assert caught.value.code == "invariant.broken"


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://other/agent/11111111-1111-4111-8111-111111111111",
        "spiffe://herd/agent/11111111-1111-4111-8111-11111111111",
        "spiffe://herd/agent/11111111-1111-4111-8111-111111111111/x",
        "spiffe://herd/AGENT/11111111-1111-4111-8111-111111111111",
        "spiffe://herd/agent/11111111-1111-4111-8111-11111111111A",
        "spiffe://herd/collector/11111111-1111-4111-8111-111111111111",
        "spiffe://herdx/agent/11111111-1111-4111-8111-111111111111",
        "agent/11111111-1111-4111-8111-111111111111",
        "https://herd/agent/11111111-1111-4111-8111-111111111111",
        "",
    ],
)
def test_only_exact_identities_of_this_herd_are_read(uri: str) -> None:
    with pytest.raises(PgherdError) as caught:
        parse_spiffe_id(uri, "herd")
    assert caught.value.code == "identity.missing"
    assert parse_spiffe_id(spiffe_id("herd", _PEER.kind, _PEER.id), "herd") == (_PEER.kind, _PEER.id)


@given(st.sampled_from(list(Scope)), st.sampled_from(list(Scope)))
def test_scopes_are_ordered(held: Scope, wanted: Scope) -> None:
    rank = {Scope.VIEWER: 0, Scope.OPERATOR: 1, Scope.ADMIN: 2}
    assert held.covers(wanted) == (rank[held] >= rank[wanted])


def test_the_ca_is_made_once_kept_private_and_loads_as_it_was(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    with pytest.raises(PgherdError) as caught:
        CertificateAuthority.load(directory)
    assert caught.value.code == "ca.missing"
    made = CertificateAuthority.create(directory, NOW_UNIX_NS)
    loaded = CertificateAuthority.load(directory)
    assert (loaded.certificate, loaded.trust_domain, loaded.pin) == (made.certificate, made.trust_domain, made.pin)
    assert (directory / "ca.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(PgherdError) as caught:
        CertificateAuthority.create(directory, NOW_UNIX_NS)
    assert caught.value.code == "ca.exists"
    other = CertificateAuthority.create(tmp_path / "other", NOW_UNIX_NS)
    assert other.trust_domain != made.trust_domain
    (directory / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(PgherdError, match="belong together"):
        CertificateAuthority.load(directory)


def test_the_server_certificate_is_kept_until_two_thirds_or_until_its_names_change(tmp_path: Path) -> None:
    clock = ShiftedClock()
    ca = CertificateAuthority.create(tmp_path / "ca", clock.wall_unix_ns())

    def server(*names: str) -> ServerCertificate:
        return ServerCertificate(ca, tmp_path / "tls", names, clock)

    first = server("localhost", "127.0.0.1").certificate
    again = server("127.0.0.1", "localhost")
    assert again.certificate == first
    clock.offset_s = 19 * DAY_S
    assert not again.renew_if_due()
    clock.offset_s = 20.1 * DAY_S
    assert again.renew_if_due()
    assert not again.renew_if_due()
    assert again.certificate != first
    assert server("localhost", "127.0.0.1").certificate == again.certificate
    assert server("localhost", "db.example.org").certificate != again.certificate
    assert (tmp_path / "tls" / "server.pem").stat().st_mode & 0o777 == 0o600
    clock.offset_s = -400 * DAY_S  # a clock that stood far ahead when it was issued
    assert again.renew_if_due()


def test_an_identity_of_a_newer_format_or_without_its_key_is_refused_by_name(tmp_path: Path) -> None:
    new = NewIdentity(_PEER.id, "herd", "h:1", "h:2", "abc", 1, 2, b"KEY", "CRT", "CA")
    assert "KEY" not in repr(new)
    identity = write_identity(tmp_path, new)
    document = json.loads((tmp_path / "identity.json").read_text())
    for change, code in (
        ({"version": 2}, "format.newer"),
        ({"directory": "../../etc"}, "format.corrupt"),
        ({"agent_id": "me"}, "format.corrupt"),
        ({"format": "x"}, "format.corrupt"),
    ):
        (tmp_path / "identity.json").write_text(json.dumps(document | change))
        with pytest.raises(PgherdError) as caught:
            load_identity(tmp_path)
        assert caught.value.code == code
    (tmp_path / "identity.json").write_text(json.dumps(document))
    assert load_identity(tmp_path) == identity
    identity.key_file.unlink()
    with pytest.raises(PgherdError, match=r"agent\.key"):
        load_identity(tmp_path)


def test_what_the_resident_needs_of_identity_is_light() -> None:
    code = (
        "import sys; import pgherd.agent.identity.files, pgherd.agent.identity.schedule, pgherd.runtime.tls, pgherd.proto.enrolment; "
        "heavy = {'cryptography', 'pydantic', 'click', 'httpx', 'rich'} & {name.split('.')[0] for name in sys.modules}; "
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
