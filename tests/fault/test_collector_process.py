"""The collector as it is started on a host: who gets in, what it refuses to start on, how it ends, a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import grpc
import psutil
import pytest
from sqlalchemy import insert

from pgherd.agent.identity.join import join_herd
from pgherd.collector.config import CollectorConfig
from pgherd.collector.service import run
from pgherd.proto.codes import REGISTRY, Exit
from pgherd.proto.enrolment import JoinToken
from pgherd.runtime.config import load
from pgherd.runtime.render import command_main
from pgherd.storage.control.schema import agents, nodes
from pgherd.storage.control.store import ControlStore
from support.collector import Collector, collector
from support.disk import fill
from support.otlp import simple
from support.waiting import wait_until

pytestmark = pytest.mark.fault

_EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
# Without a token, by design: does the process turn, can it serve.
_OPEN = {"/healthz", "/readyz"}


@pytest.fixture(scope="module")
def running() -> Iterator[Collector]:
    with collector() as made:
        made.start()
        yield made
        assert made.stop() == 0, made.log


def test_every_route_needs_its_scope(running: Collector) -> None:
    """The routes as the application itself lists them: nothing without a token, no writing and no secrets for viewers."""
    viewer, operator = running.token("viewer"), running.token("operator")
    with running.http() as http:
        paths = http.get("/api/v1/openapi.json", headers=viewer).json()["paths"]
        routes = [(method.upper(), path) for path, methods in paths.items() for method in methods]
        routes += [("GET", "/metrics"), ("GET", "/api/v1/openapi.json")]
        assert len(routes) > 30
        for method, path in routes:
            url = re.sub(r"\{[^}]+\}", "x", path)
            assert http.request(method, url).status_code == 401, path
            assert http.request(method, url, headers={"Authorization": "Bearer x"}).status_code == 401, path
            is_identity = path.startswith(("/api/v1/join-tokens", "/api/v1/tokens", "/api/v1/clients", "/api/v1/agents/"))
            is_read = method == "GET" or path.startswith("/prometheus/")  # Prometheus' queries come as forms too
            seen = http.request(method, url, headers=viewer).status_code
            assert (seen == 403) == (is_identity or not is_read), (method, path, seen)
            assert (http.request(method, url, headers=operator).status_code == 403) == is_identity, (method, path)
            assert seen < 500, (method, path)
        for path in _OPEN:
            assert http.get(path).status_code == 200


def test_it_helps_itself_to_descriptors(running: Collector) -> None:
    assert running.process is not None
    soft, hard = psutil.Process(running.process.pid).rlimit(psutil.RLIMIT_NOFILE)
    assert soft == min(hard, 65_536) or hard == -1


def test_an_otlp_client_is_listed_and_its_certificate_ended(running: Collector, tmp_path: Path) -> None:
    issued = running.ask("clients", "issue", "otel", "--directory", str(tmp_path / "client"))
    (listed,) = running.ask("clients", "ls")
    assert (listed["id"], listed["name"], listed["status"]) == (issued["client_id"], "otel", "active")
    assert listed["not_after_unix_ns"] == issued["not_after_unix_ns"]
    parts = [(tmp_path / "client" / name).read_bytes() for name in ("ca.crt", "client.key", "client.crt")]

    def export() -> grpc.StatusCode:
        target, credentials = f"localhost:{running.ports['grpc']}", grpc.ssl_channel_credentials(*parts)
        with grpc.secure_channel(target, credentials, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                channel.unary_unary(_EXPORT, None, None)(b"", timeout=20)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
            return grpc.StatusCode.OK

    assert export() is grpc.StatusCode.OK
    unsure = running.cli("--json", "clients", "revoke", "otel")
    assert unsure.returncode == Exit.USAGE
    assert json.loads(unsure.stderr)["error"]["code"] == "usage.invalid"
    assert running.ask("clients", "revoke", "otel", "--yes", "--reason", "laptop lost")["certificates_revoked"] == 1
    assert export() is grpc.StatusCode.UNAUTHENTICATED
    (listed,) = running.ask("clients", "ls")
    assert (listed["status"], listed["not_after_unix_ns"]) == ("revoked", None)
    assert running.cli("clients", "revoke", "otel", "--yes").returncode == Exit.FAILED


def test_a_second_collector_on_the_same_state_is_refused_and_the_first_goes_on(running: Collector) -> None:
    second = running.verb("run")
    assert second.returncode == Exit.FAILED
    assert "state.locked" in second.stderr
    assert "Traceback" not in second.stderr
    assert running.ask("nodes", "ls") == []  # its socket is still there


def _queued_command(herd: Collector, *, accept_within: str) -> str:
    """A command for a node whose agent never comes."""
    agent_id, node_id = str(uuid.uuid4()), str(uuid.uuid4())
    store = ControlStore.open(herd.state / "control.db")
    with store.begin() as connection:
        values: dict[str, Any] = {"id": agent_id, "name": "a", "status": "active", "labels": {}, "facts": {}}
        connection.execute(insert(agents).values(joined_unix_ns=1, **values))
        where = {"id": node_id, "agent_id": agent_id, "alias": "n1", "cluster": "c1"}
        connection.execute(insert(nodes).values(first_seen_unix_ns=1, **where))
    store.close()
    with herd.http(headers=herd.token("operator")) as http:
        answer = http.post("/api/v1/commands", json={"node": "n1", "verb": "ping", "accept_within": accept_within})
    assert answer.status_code == 202, answer.text
    command_id: str = answer.json()["id"]
    return command_id


def test_watching_a_command_survives_kill_9_of_the_collector() -> None:
    with collector() as herd:
        herd.start()
        command = _queued_command(herd, accept_within="4s")
        argv = herd.argv("--socket", str(herd.socket), "--json", "commands", "watch", command)
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            assert json.loads(watching.stdout.readline())["state"] == "queued"
            herd.kill()
            assert herd.socket.exists()  # what the next one has to clear away
            herd.start()
            out, err = watching.communicate(timeout=40)
        last = json.loads(out.splitlines()[-1])
        assert (last["id"], last["state"], last["actor"]) == (command, "expired", "token:operator")
        assert watching.returncode == Exit.FAILED, err
        assert herd.stop() == 0


def test_sigterm_ends_it_soon_whatever_is_open() -> None:
    """A long poll, half a request, strangers without TLS: none of them holds it."""
    with collector() as herd, contextlib.ExitStack() as held:
        herd.start()
        command = _queued_command(herd, accept_within="10m")
        for port in herd.ports.values():
            for _ in range(3):
                held.enter_context(socket.create_connection(("127.0.0.1", port)))
        half = held.enter_context(socket.create_connection(("127.0.0.1", herd.ports["http"])))
        half.sendall(b"POST /api/v1/commands HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        polling = held.enter_context(socket.socket(socket.AF_UNIX))
        polling.connect(str(herd.socket))
        polling.sendall(f"GET /api/v1/commands/{command}?wait_s=60 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert herd.process is not None
        assert herd.ask("commands", "show", command)["state"] == "queued"  # so it has read the poll's request too
        assert herd.stop(10) == 0, herd.log
        assert not herd.socket.exists()


def _overwrite(path: Path, content: bytes) -> None:
    for beside in path.parent.glob(f"{path.name}?*"):
        beside.unlink()
    path.write_bytes(content)


def _newer_control(state: Path) -> None:
    with sqlite3.connect(state / "control.db") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.close()


def _newer_series(state: Path) -> None:
    duckdb.connect(str(state / "series.duckdb")).execute("UPDATE meta SET value = '99' WHERE key = 'version'").close()


def _directory_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no CA": ("ca.missing", lambda state: shutil.rmtree(state / "ca")),
    "CA key of somebody else": ("format.corrupt", lambda state: (state / "ca" / "ca.key").write_text("x")),
    "CA key is a directory": ("disk.io", lambda state: _directory_instead(state / "ca" / "ca.key")),
    "control store isn't one": ("format.corrupt", lambda state: _overwrite(state / "control.db", os.urandom(9000))),
    "control store of tomorrow": ("format.newer", _newer_control),
    "control store is empty": ("format.corrupt", lambda state: _overwrite(state / "control.db", b"")),
    "control store is gone": ("store.missing", lambda state: (state / "control.db").unlink()),
    "series store of tomorrow": ("format.newer", _newer_series),
    "lock is a directory": ("disk.io", lambda state: _directory_instead(state / "lock")),
    "anybody may write": ("config.invalid", lambda state: state.chmod(0o777)),
    "socket is a file": ("config.invalid", lambda state: (state / "collector.sock").write_text("x")),
}


@pytest.fixture(scope="module")
def healthy() -> Iterator[Collector]:
    """Started once, so that both stores exist."""
    with collector() as made:
        made.start()
        assert made.stop() == 0
        shutil.copytree(made.state, made.directory / "healthy")
        yield made


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_it_can_t_start_on_is_named(healthy: Collector, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, break_it = DAMAGE[damage]
    shutil.rmtree(healthy.state)
    shutil.copytree(healthy.directory / "healthy", healthy.state)
    break_it(healthy.state)
    config = load(CollectorConfig, file=healthy.directory / "c.toml", environment_prefix="UNSET__").value
    status = command_main(lambda: run(config), as_json=False)  # the body of `collector run`
    told = capfd.readouterr().err
    assert f"code: {code}" in told, told
    assert status == REGISTRY[code].exit_status
    assert "Traceback" not in told


def test_on_a_full_disk_ingest_refuses_queries_go_on_and_it_comes_back_alone() -> None:
    """The whole collector on 32 MiB; needs the right to mount a tmpfs (root), skipped elsewhere."""
    with collector() as herd:
        shutil.rmtree(herd.state)
        herd.state.mkdir(mode=0o700)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "tmpfs", str(herd.state)], capture_output=True, text=True
        )
        if mounted.returncode:
            pytest.skip(f"can't mount a tmpfs: {mounted.stderr.strip()}")
        try:
            assert herd.verb("init").returncode == 0
            herd.start()
            _full_disk_story(herd)
            assert herd.stop() == 0
        finally:
            if herd.process is not None and herd.process.poll() is None:
                herd.kill()
            subprocess.run(["umount", "-l", str(herd.state)], check=True)


def _full_disk_story(herd: Collector) -> None:
    identity = join_herd(herd.directory / "agent", JoinToken.parse(herd.ask("agents", "add")["token"]))
    headers = herd.token("viewer")
    parts = [path.read_bytes() for path in (identity.ca_file, identity.key_file, identity.certificate_file)]
    incarnation = str(uuid.uuid4())
    with (
        grpc.secure_channel(f"localhost:{herd.ports['grpc']}", grpc.ssl_channel_credentials(*parts)) as channel,
        herd.http(headers=headers) as http,
    ):
        export: Any = channel.unary_unary(_EXPORT, None, None)

        def ship(sequence: int) -> grpc.StatusCode:
            body = simple([float(sequence)] * 50, time.time_ns(), agent=identity.agent_id, node="")
            metadata = (("pgherd-incarnation", incarnation), ("pgherd-sequence", str(sequence)))
            try:
                export(body, timeout=30, metadata=metadata)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
            return grpc.StatusCode.OK

        def count() -> int:
            answer = http.get("/prometheus/api/v1/query", params={"query": "count(pg_stat_x)"})
            assert answer.status_code == 200, answer.text
            result = answer.json()["data"]["result"]
            return int(result[0]["value"][1]) if result else 0

        assert ship(1) is grpc.StatusCode.OK
        assert count() == 50
        ballast = herd.state / "ballast"
        sequence, refused = 2, 0
        while refused < 3:
            fill(ballast)
            if ship(sequence) is grpc.StatusCode.OK:
                sequence += 1
            else:
                refused += 1
        assert ship(sequence) is grpc.StatusCode.UNAVAILABLE  # retryable: the agent keeps it
        assert count() == 50
        assert http.get("/readyz").status_code == 503
        assert http.get("/api/v1/agents").status_code == 200
        assert http.get("/metrics").status_code == 200
        # Writes of the control store are refused by name, if they can't be done.
        refusal = herd.cli("--json", "tokens", "create", "late")
        assert refusal.returncode == 0 or json.loads(refusal.stderr)["error"]["code"] == "store.unavailable"
        # It can even be started again while there is no room.
        herd.kill()
        fill(ballast)
        herd.launch()
        wait_until(lambda: herd.is_ready("/healthz"), 30, "a start on a full disk")
        wait_until(lambda: count() == 50, 30, "an answer after a start on a full disk")
        ballast.unlink()
        wait_until(lambda: ship(sequence) is grpc.StatusCode.OK, 30, "ingest to go on")
        assert count() == 50
        assert http.get("/readyz").status_code == 200
        (books,) = http.get("/api/v1/shipments").json()["items"]
        assert (books["last_sequence"], books["gaps"], books["stored_points"]) == (sequence, 0, sequence * 50)
        assert "Traceback" not in herd.log
