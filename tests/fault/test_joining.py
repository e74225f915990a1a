"""Joining fails closed: whatever is wrong with the token or the collector, nothing is written and the code says why."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from pgherd.agent.identity.files import load_identity
from pgherd.agent.identity.join import join_herd
from pgherd.collector.identity.registry import revoke_agent
from pgherd.collector.identity.server import ServerCertificate
from pgherd.collector.identity.tokens import list_join_tokens, withdraw_join_token
from pgherd.proto.enrolment import JoinToken
from pgherd.proto.errors import PgherdError
from pgherd.storage.control.schema import agents, audit, certificates
from support.identity import Herd, request_pem

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    herd = Herd.create(tmp_path_factory.mktemp("herd") / "herd")
    yield herd
    herd.close()


@pytest.fixture(scope="module")
def port(herd: Herd) -> Iterator[int]:
    with herd.enrolment_service() as port:
        yield port


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return directory


def _refused(state: Path, token: JoinToken) -> str:
    """The code a join ends with; nothing may have been written, in the directory or for it."""
    with pytest.raises(PgherdError) as caught:
        join_herd(state, token)
    assert list(state.iterdir()) == []
    with pytest.raises(PgherdError):
        join_herd(state.parent / "absent", token)
    assert not (state.parent / "absent").exists()
    return caught.value.code


def test_joining_gives_an_identity_that_the_collector_knows(herd: Herd, port: int, state: Path) -> None:
    token = herd.token(port)
    identity = join_herd(state, token)
    assert load_identity(state) == identity
    assert identity.grpc_address == "localhost:7433"
    assert identity.enrol_address == f"localhost:{port}"
    assert identity.key_file.stat().st_mode & 0o777 == 0o600
    assert identity.directory.stat().st_mode & 0o777 == 0o700
    with herd.store.read() as connection:
        agent = connection.execute(select(agents).where(agents.c.id == identity.agent_id)).mappings().one()
        certificate = connection.execute(select(certificates).where(certificates.c.serial == identity.serial)).mappings().one()
        deeds = connection.execute(select(audit.c.action).where(audit.c.subject == identity.agent_id)).scalars().all()
    assert (agent["status"], agent["kind"], agent["labels"]) == ("active", "agent", {"env": "test"})
    assert agent["facts"]["hostname"]
    assert certificate["agent_id"] == identity.agent_id
    assert deeds == ["agent.joined"]


def test_a_pin_of_another_ca_is_refused(herd: Herd, port: int, state: Path) -> None:
    token = herd.token(port)
    assert _refused(state, dataclasses.replace(token, ca_pin="0" * 64)) == "peer.untrusted"
    join_herd(state, token)  # the secret was never shown to the impostor: the token is still good


def test_a_collector_with_the_right_ca_but_the_wrong_name_is_refused(herd: Herd, tmp_path: Path, state: Path) -> None:
    elsewhere = ServerCertificate(herd.ca, tmp_path / "tls", ("db.example.org", "127.0.0.9"), herd.clock)
    with herd.enrolment_service(elsewhere) as port:
        for host in ("localhost", "127.0.0.1"):
            token = herd.token(port, host=host)
            assert _refused(state, token) == "peer.name_mismatch"
    with herd.enrolment_service() as port:  # and it hasn't seen the secret
        join_herd(state, dataclasses.replace(token, port=port))


def test_a_man_in_the_middle_that_shows_the_right_ca_is_refused(herd: Herd, tmp_path: Path, state: Path) -> None:
    """He can fetch the real CA certificate and hand it on, but not speak with its name."""
    impostor = Herd.create(tmp_path / "impostor")
    impostor.enrolment.ca = dataclasses.replace(herd.ca, key=impostor.ca.key)  # shows ours, signs with his
    with impostor.enrolment_service() as port:
        assert _refused(state, herd.token(port)) == "peer.untrusted"
    impostor.close()


def test_an_expired_token_is_refused(herd: Herd, port: int, state: Path) -> None:
    token = herd.token(port, lifetime_s=-1.0)
    assert _refused(state, token) == "join.token_expired"


def test_a_used_token_is_refused(herd: Herd, port: int, state: Path, tmp_path: Path) -> None:
    token = herd.token(port)
    join_herd(tmp_path / "first", token)
    assert _refused(state, token) == "join.token_used"


def test_a_withdrawn_token_is_refused(herd: Herd, port: int, state: Path) -> None:
    token = herd.token(port)
    with herd.store.begin() as connection:
        withdraw_join_token(connection, token.id, now_unix_ns=herd.clock.wall_unix_ns(), actor="test", via="test")
    assert _refused(state, token) == "join.token_invalid"


@pytest.mark.parametrize("part", ["id", "secret"])
def test_a_tampered_token_is_refused(herd: Herd, port: int, state: Path, part: str) -> None:
    token = herd.token(port)
    value: str = getattr(token, part)
    value = ("b" if value[0] != "b" else "c") + value[1:]
    tampered = dataclasses.replace(token, id=value) if part == "id" else dataclasses.replace(token, secret=value)
    assert _refused(state, tampered) == "join.token_invalid"
    join_herd(state, token)


def test_a_collector_that_is_away_is_unreachable(herd: Herd, port: int, state: Path) -> None:
    assert _refused(state, herd.token(1)) == "peer.unreachable"


def test_joining_twice_needs_force_and_makes_a_new_agent(herd: Herd, port: int, state: Path) -> None:
    first = join_herd(state, herd.token(port))
    token = herd.token(port)
    with pytest.raises(PgherdError) as caught:
        join_herd(state, token)
    assert caught.value.code == "join.already_joined"
    assert load_identity(state) == first
    second = join_herd(state, token, force=True)
    assert second.agent_id != first.agent_id
    assert [entry.name for entry in state.glob("identity-*")] == [second.directory.name]


def test_of_fifty_joins_with_one_token_exactly_one_gets_in(herd: Herd, tmp_path: Path) -> None:
    codes: list[str] = []
    barrier = threading.Barrier(50)

    def attempt(number: int, token: JoinToken) -> None:
        barrier.wait(20)
        try:
            join_herd(tmp_path / f"agent-{number}", token)
            codes.append("joined")
        except PgherdError as error:
            codes.append(error.code)

    with herd.store.read() as connection:
        before = connection.execute(select(func.count()).select_from(agents)).scalar_one()
    with herd.enrolment_service() as port:
        token = herd.token(port)
        threads = [threading.Thread(target=attempt, args=(number, token)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(codes) == sorted(["joined"] + ["join.token_used"] * 49)
    with herd.store.read() as connection:
        after = connection.execute(select(func.count()).select_from(agents)).scalar_one()
        (row,) = [row for row in list_join_tokens(connection) if row["id"] == token.id]
    assert after == before + 1
    assert row["uses_left"] == 0
    assert len(list(tmp_path.glob("agent-*"))) == 1


def test_a_disk_that_fills_while_writing_leaves_no_half_identity(herd: Herd, port: int, state: Path) -> None:
    """The directory refuses the last file: identity.json is a directory already."""
    (state / "identity.json").mkdir()
    with pytest.raises(PgherdError) as caught:
        join_herd(state, herd.token(port), force=True)
    assert caught.value.code == "disk.io"
    assert [entry.name for entry in state.iterdir()] == ["identity.json"]


# --- the command itself ---------------------------------------------------------------------------


def _command(arguments: list[str], state: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from pgherd.agent.main import main; main()", "--state-directory", str(state), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )


def test_the_command_reads_the_token_from_stdin_or_a_private_file_and_tells_json(
    herd: Herd, port: int, state: Path, tmp_path: Path
) -> None:
    token = herd.token(port)
    file = tmp_path / "token"
    file.write_text(f"{token}\n")
    file.chmod(0o644)
    shown = _command(["join", "--token-file", str(file), "--json"], state)
    assert shown.returncode == 2
    assert json.loads(shown.stderr)["error"]["code"] == "config.secret_unreadable"
    file.chmod(0o600)
    joined = _command(["join", "--token-file", str(file), "--json"], state)
    assert joined.returncode == 0, joined.stderr
    answer = json.loads(joined.stdout)
    assert answer["outcome"] == "joined"
    again = _command(["join", "--token-file", "-", "--json", "--force"], state, f"{token}\n")
    assert again.returncode == 4
    assert json.loads(again.stderr)["error"]["code"] == "join.token_used"
    malformed = _command(["join", "--json", "--force"], state, "pgherd1_nonsense\n")
    assert malformed.returncode == 2
    assert json.loads(malformed.stderr)["error"]["code"] == "join.token_malformed"
    renewed = _command(["renew", "--json"], state)
    assert (renewed.returncode, json.loads(renewed.stdout)["outcome"]) == (0, "not due")
    revoke_agent(herd.store, answer["agent_id"], now_unix_ns=1, actor="test", via="test")
    revoked = _command(["renew", "--force"], state)
    assert revoked.returncode == 4
    assert "identity.revoked" in revoked.stderr
    assert "try: join again" in revoked.stderr


def test_a_secret_is_nowhere_but_in_the_token(herd: Herd, port: int, state: Path, tmp_path: Path) -> None:
    """Not in the store, the state directories, nor in what the agent's command says, good or bad."""
    token, spoiled = herd.token(port), herd.token(port, lifetime_s=-1.0)
    outputs = [
        _command(["join", "--json"], state, f"{token}\n"),
        _command(["join", "--json", "--force"], state, f"{spoiled}\n"),
        _command(["join", "--force"], state, f"{token}x\n"),
        _command(["join", "--json", "--force"], state, str(token).partition("@")[0]),
    ]
    assert [output.returncode for output in outputs] == [0, 4, 2, 2]
    texts = [(output.stdout + output.stderr).encode() for output in outputs]
    for directory in (state, herd.directory):
        texts += [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    assert any(token.id.encode() in text for text in texts), "the search must be able to find something"
    for secret in (token.secret, spoiled.secret):
        assert not [text for text in texts if secret.encode() in text or secret.upper().encode() in text]


def test_the_collector_s_log_of_a_whole_enrolment_has_no_secret(
    herd: Herd, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with herd.enrolment_service() as port:
        token = herd.token(port)
        join_herd(tmp_path / "joined", token)
        with pytest.raises(PgherdError):
            join_herd(tmp_path / "again", token)
    log = "".join(capfd.readouterr())
    assert "enrol.joined" in log
    assert "join.token_used" in log
    assert token.secret not in log


def test_denials_are_audited_but_a_stranger_can_t_fill_the_disk(tmp_path: Path) -> None:
    herd = Herd.create(tmp_path / "herd")
    request = request_pem()
    for _ in range(200):
        with pytest.raises(PgherdError):
            herd.enrolment.join("aaaaaaaaaa", "b" * 52, request, {}, "192.0.2.1")
    with herd.store.read() as connection:
        rows = connection.execute(select(audit).where(audit.c.action == "agent.join_denied")).mappings().all()
    assert 60 <= len(rows) <= 120  # a minute may have turned
    assert rows[0]["detail"]["code"] == "join.token_invalid"
    assert rows[0]["detail"]["source"] == "192.0.2.1"
    herd.close()
