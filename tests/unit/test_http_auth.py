"""Who may do what over HTTP, on a real uvicorn with a TCP and a UNIX socket."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import pytest
import uvicorn
from fastapi import Depends, FastAPI
from sqlalchemy import event, select, update

from pgherd.collector.api.auth import Actor, Authenticator, require
from pgherd.collector.api.identity import identity_router
from pgherd.collector.api.problems import install_problem_handler
from pgherd.collector.api.serving import OwnedServer
from pgherd.collector.api.socketpeer import PeerCredentialProtocol
from pgherd.collector.identity.apitokens import Scope, create_api_token, list_api_tokens
from pgherd.collector.identity.peer import PeerKind, read_peer
from pgherd.proto.enrolment import JoinToken
from pgherd.proto.errors import TransientError
from pgherd.runtime.keys import new_key
from pgherd.storage.control.schema import api_tokens, audit
from pgherd.storage.control.store import ControlStore, sqlite_engine
from support.identity import Herd, served

Viewer = Annotated[Actor, Depends(require("viewer"))]
Operator = Annotated[Actor, Depends(require("operator"))]
Admin = Annotated[Actor, Depends(require("admin"))]


@dataclass
class Service:
    herd: Herd
    app: FastAPI
    tcp: httpx.Client
    socket_path: Path

    def token(self, scope: Scope, *, lifetime_s: float = 3600.0) -> dict[str, str]:
        with self.herd.store.begin() as connection:
            _, text = create_api_token(
                connection,
                name=f"a-{scope.value}",
                scope=scope,
                lifetime_s=lifetime_s,
                now_unix_ns=self.herd.clock.wall_unix_ns(),
                actor="test",
                via="test",
            )
        return {"Authorization": f"Bearer {text}"}

    def allow(self, *, uids: frozenset[int] = frozenset(), anonymous_read: bool = False) -> None:
        self.app.state.authenticator = Authenticator(
            self.herd.store, self.herd.clock, socket_uids=uids, anonymous_read=anonymous_read
        )


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    herd = Herd.create(tmp_path / "herd")
    app = FastAPI()
    install_problem_handler(app)
    app.include_router(
        identity_router(herd.enrolment, herd.gate(), enrol_host="db.example.org", enrol_port=7434, token_lifetime_s=900.0)
    )

    @app.get("/view")
    async def view(actor: Viewer) -> dict[str, str]:
        return {"name": actor.name, "scope": actor.scope.value, "via": actor.via}

    @app.post("/operate")
    async def operate(actor: Operator) -> dict[str, str]:
        return {"name": actor.name}

    @app.post("/administer")
    async def administer(actor: Admin) -> dict[str, str]:
        return {"name": actor.name}

    server = OwnedServer(uvicorn.Config(app, http=PeerCredentialProtocol, ws="none", lifespan="off", log_config=None))
    # A socket path has 107 bytes at most, and other users must be able to reach this one.
    directory = Path(os.path.realpath(f"/tmp/pgherd-test-{os.getpid()}"))
    directory.mkdir(mode=0o755, exist_ok=True)
    path = directory / "c.sock"
    local = socket.socket(socket.AF_UNIX)
    with local, socket.create_server(("127.0.0.1", 0)) as tcp:
        local.bind(str(path))
        path.chmod(0o666)
        with (
            served(server, tcp, local),
            httpx.Client(base_url=f"http://127.0.0.1:{tcp.getsockname()[1]}", trust_env=False, timeout=20) as client,
        ):
            made = Service(herd, app, client, path)
            made.allow()
            yield made
    path.unlink(missing_ok=True)
    directory.rmdir()
    herd.close()


def _problem(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json"
    assert ("www-authenticate" in response.headers) == (response.status_code == 401)
    body = response.json()
    assert body["status"] == response.status_code
    return response.status_code, body["code"]


def test_each_scope_includes_the_ones_before_it_and_no_other(service: Service) -> None:
    routes = [("GET", "/view"), ("POST", "/operate"), ("POST", "/administer")]
    for rank, scope in enumerate(Scope):
        headers = service.token(scope)
        for needed, (method, path) in enumerate(routes):
            response = service.tcp.request(method, path, headers=headers)
            if rank >= needed:
                assert response.json()["name"] == f"token:a-{scope.value}"
            else:
                assert _problem(response) == (403, "auth.scope")


def test_every_route_of_the_identity_router_is_for_admins(service: Service) -> None:
    operator = service.token(Scope.OPERATOR)
    paths = service.app.openapi()["paths"]
    routes = [(method, path) for path, methods in paths.items() if path.startswith("/api/") for method in methods]
    assert len(routes) >= 8
    service.allow(anonymous_read=True)
    for method, path in routes:
        url = re.sub(r"\{\w+\}", "x", path)
        assert _problem(service.tcp.request(method, url, headers=operator))[0] == 403, path
        assert _problem(service.tcp.request(method, url)) == (401, "auth.required"), path


def test_without_a_token_loopback_gets_nothing_unless_reading_is_anonymous(service: Service) -> None:
    assert _problem(service.tcp.get("/view")) == (401, "auth.required")
    service.allow(anonymous_read=True)
    assert service.tcp.get("/view").json() == {"name": "anonymous", "scope": "viewer", "via": "http"}
    assert _problem(service.tcp.post("/operate")) == (401, "auth.required")
    assert _problem(service.tcp.get("/view", headers={"Authorization": "Bearer nonsense"})) == (401, "auth.invalid")


def test_expired_revoked_tampered_and_odd_credentials_are_refused_alike(service: Service) -> None:
    good = service.token(Scope.ADMIN)["Authorization"]
    (row,) = service.tcp.get("/api/v1/tokens", headers={"Authorization": good}).json()["items"]
    bad = [
        service.token(Scope.ADMIN, lifetime_s=0.000001)["Authorization"],
        good[:-1] + ("a" if good[-1] != "a" else "b"),
        good.replace("pgherd_", "pgherd1_"),
        good + "a",
        good.removeprefix("Bearer "),
        "Basic " + good.removeprefix("Bearer "),
        "Bearer",
        "",
    ]
    answers = [service.tcp.get("/view", headers={"Authorization": value}) for value in bad]
    assert [_problem(answer) for answer in answers] == [(401, "auth.invalid")] * len(bad)
    twice = [("Authorization", good), ("Authorization", good)]
    assert _problem(service.tcp.get("/view", headers=twice)) == (401, "auth.invalid")
    assert service.tcp.delete(f"/api/v1/tokens/{row['id']}", headers={"Authorization": good}).status_code == 204
    assert _problem(service.tcp.get("/view", headers={"Authorization": good})) == (401, "auth.invalid")


def test_a_token_s_text_is_shown_once_and_only_its_hash_is_kept(service: Service) -> None:
    admin = service.token(Scope.ADMIN)
    made = service.tcp.post("/api/v1/tokens", headers=admin, json={"name": "grafana", "scope": "viewer"})
    assert made.status_code == 201
    text = made.json()["token"]
    secret = text.rsplit("_", 1)[1]
    assert service.tcp.get("/view", headers={"Authorization": f"Bearer {text}"}).json()["scope"] == "viewer"
    listed = service.tcp.get("/api/v1/tokens", headers=admin).text
    assert "grafana" in listed
    assert "secret" not in listed
    for path in service.herd.directory.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes()
    with service.herd.store.read() as connection:
        row = next(row for row in list_api_tokens(connection) if row["name"] == "grafana")
    assert row["last_used_from"] == "127.0.0.1"
    assert row["last_used_unix_ns"]


def test_last_used_isn_t_written_at_every_request(service: Service) -> None:
    headers = service.token(Scope.VIEWER)
    service.tcp.get("/view", headers=headers)
    mark = service.herd.clock.wall_unix_ns() - 1_000_000_000
    with service.herd.store.begin() as connection:
        connection.execute(update(api_tokens).values(last_used_unix_ns=mark))
    service.tcp.get("/view", headers=headers)
    service.herd.clock.offset_s = 120.0
    with service.herd.store.read() as connection:
        assert connection.execute(select(api_tokens.c.last_used_unix_ns)).scalar_one() == mark
    service.tcp.get("/view", headers=headers)
    with service.herd.store.read() as connection:
        assert connection.execute(select(api_tokens.c.last_used_unix_ns)).scalar_one() > mark


def test_reading_goes_on_while_the_store_can_t_be_written(service: Service) -> None:
    """A full disk is when dashboards are needed most; noting a token's use mustn't take them away."""
    headers = service.token(Scope.VIEWER)

    def full(connection: object, _record: object) -> None:
        connection.execute("PRAGMA query_only = ON")  # type: ignore[attr-defined]

    engine = sqlite_engine(service.herd.store.path)
    event.listen(engine, "connect", full)
    unwritable = ControlStore(engine, service.herd.store.path)
    with pytest.raises(TransientError), unwritable.begin() as connection:
        connection.execute(update(api_tokens).values(last_used_from="x"))
    service.app.state.authenticator = Authenticator(unwritable, service.herd.clock)
    for _ in range(2):
        assert service.tcp.get("/view", headers=headers).json()["scope"] == "viewer"
    unwritable.close()


_ASK = """
import json, os, socket, sys
path, uid, headers = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if uid != os.geteuid():
    os.setuid(uid)
connection = socket.socket(socket.AF_UNIX)
connection.connect(path)
connection.sendall(f"GET /view HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n{headers}\\r\\n".encode())
answer = b""
while chunk := connection.recv(65536):
    answer += chunk
head, _, body = answer.partition(b"\\r\\n\\r\\n")
print(json.dumps({"status": int(head.split()[1]), "body": json.loads(body)}))
"""


def _ask(service: Service, uid: int, headers: str = "") -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", _ASK, str(service.socket_path), str(uid), headers],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    answer = json.loads(done.stdout)
    body = answer["body"]
    return {"status": answer["status"], "name": body.get("name"), "scope": body.get("scope"), "code": body.get("code")}


def test_the_socket_knows_its_own_user_as_admin(service: Service) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(service.socket_path)), base_url="http://x") as local:
        answer = local.get("/view").json()
        assert (answer["scope"], answer["via"]) == ("admin", "socket")
        assert answer["name"].startswith("uid:")
        assert local.post("/administer").status_code == 200
        with_token = local.get("/view", headers=service.token(Scope.VIEWER)).json()
        assert (with_token["name"], with_token["scope"]) == ("token:a-viewer", "viewer")
        assert _problem(local.get("/view", headers={"Authorization": "Bearer no"})) == (401, "auth.invalid")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_other_local_users_are_refused_whatever_they_carry_unless_configured(service: Service) -> None:
    nobody = 65534
    token = f"Authorization: {service.token(Scope.ADMIN)['Authorization']}\r\n"
    refused = {"status": 403, "name": None, "scope": None, "code": "auth.local_user"}
    service.allow(anonymous_read=True)
    assert _ask(service, nobody) == refused
    assert _ask(service, nobody, token) == refused
    assert _ask(service, nobody, "pgherd_peer_uid: 0\r\nX-Forwarded-For: 127.0.0.1\r\n") == refused
    assert _ask(service, 0)["scope"] == "admin"
    service.allow(uids=frozenset({nobody}))
    assert _ask(service, nobody) == {"status": 200, "name": "uid:nobody", "scope": "admin", "code": None}


def test_join_tokens_are_made_listed_without_secrets_and_withdrawn(service: Service) -> None:
    admin = service.token(Scope.ADMIN)
    made = service.tcp.post("/api/v1/join-tokens", headers=admin, json={"name": "db1", "labels": {"env": "prod"}})
    assert made.status_code == 201
    token = JoinToken.parse(made.json()["token"])
    assert (token.host, token.port, token.ca_pin) == ("db.example.org", 7434, service.herd.ca.pin)
    listed = service.tcp.get("/api/v1/join-tokens", headers=admin)
    assert token.id in listed.text
    assert token.secret not in listed.text
    assert "secret" not in listed.text
    assert service.tcp.delete(f"/api/v1/join-tokens/{token.id}", headers=admin).status_code == 204
    assert _problem(service.tcp.delete(f"/api/v1/join-tokens/{token.id}", headers=admin)) == (404, "token.not_found")
    with service.herd.store.read() as connection:
        rows = connection.execute(select(audit.c.action, audit.c.actor).where(audit.c.subject == token.id)).all()
    assert [tuple(row) for row in rows] == [("join_token.created", "token:a-admin"), ("join_token.withdrawn", "token:a-admin")]


def test_revoking_over_http_names_the_actor_and_an_unknown_agent_is_not_found(service: Service) -> None:
    admin, member = service.token(Scope.ADMIN), service.herd.member()
    done = service.tcp.post(f"/api/v1/agents/{member.id}/revoke", headers=admin, json={"reason": "host retired"})
    assert done.json() == {"agent_id": member.id, "certificates_revoked": 1, "calls_cut": 0}
    again = service.tcp.post(f"/api/v1/agents/{member.id}/revoke", headers=admin)
    assert again.json()["certificates_revoked"] == 0
    assert _problem(service.tcp.post("/api/v1/agents/nobody/revoke", headers=admin)) == (404, "agent.not_found")
    with service.herd.store.read() as connection:
        row = connection.execute(select(audit).where(audit.c.action == "agent.revoked").limit(1)).mappings().one()
    assert (row["actor"], row["via"], row["detail"]["reason"]) == ("token:a-admin", "http", "host retired")


def test_a_client_certificate_is_issued_for_a_request_made_elsewhere(service: Service) -> None:
    admin = service.token(Scope.ADMIN)
    done = service.tcp.post("/api/v1/clients", headers=admin, json={"name": "otel", "csr": new_key().request_pem})
    assert done.status_code == 201
    answer = done.json()
    peer = read_peer(answer["certificate"].encode(), answer["ca"].encode(), service.herd.ca.trust_domain)
    assert (peer.kind, peer.id, peer.serial) == (PeerKind.CLIENT, answer["client_id"], answer["serial"])
    bad = service.tcp.post("/api/v1/clients", headers=admin, json={"name": "otel", "csr": "nonsense"})
    assert _problem(bad) == (400, "join.csr_invalid")
