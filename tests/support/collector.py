"""The real `pgherd collector run` as a process of its own, with the real CLI beside it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from support.postgres import free_port
from support.waiting import wait_until

_CONFIG = """\
state_directory = "{state}"
[http]
listen = "127.0.0.1:{http}"
[grpc]
listen = "127.0.0.1:{grpc}"
[otlp]
listen = "127.0.0.1:{otlp}"
[enrol]
listen = "127.0.0.1:{enrol}"
"""
_SOFT_DESCRIPTORS = 256  # what the process is started with; it has to help itself to more


@dataclass
class Collector:
    """One herd's directory and, while it runs, its process."""

    directory: Path
    ports: dict[str, int]
    process: subprocess.Popen[bytes] | None = None

    @property
    def state(self) -> Path:
        return self.directory / "s"

    @property
    def socket(self) -> Path:
        return self.state / "collector.sock"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pgherd.cli.main", *arguments]

    def verb(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`pgherd collector …` on this configuration, to its end."""
        argv = self.argv("collector", "--config", str(self.directory / "c.toml"), *arguments)
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, **options)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Any other verb, over the socket."""
        return subprocess.run(self.argv("--socket", str(self.socket), *arguments), capture_output=True, text=True, timeout=60)

    def ask(self, *arguments: str) -> Any:
        """A verb's JSON answer."""
        done = self.cli("--json", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def http(self, **options: Any) -> httpx.Client:
        """Over TCP, where only tokens count."""
        return httpx.Client(base_url=f"http://127.0.0.1:{self.ports['http']}", trust_env=False, timeout=20, **options)

    def token(self, scope: str) -> dict[str, str]:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://collector") as local:
            made = local.post("/api/v1/tokens", json={"name": scope, "scope": scope})
        return {"Authorization": f"Bearer {made.json()['token']}"}

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self.launch()
        wait_until(self.is_ready, 30, "the collector to be ready")

    def launch(self) -> None:
        """Start it, whatever becomes of it."""
        fewer = ["sh", "-c", f'ulimit -S -n {_SOFT_DESCRIPTORS}; exec "$@"', "sh"]
        argv = [*fewer, *self.argv("collector", "--config", str(self.directory / "c.toml"), "run")]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)

    def is_ready(self, path: str = "/readyz") -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        with self.http() as http:
            try:
                return http.get(path).status_code == 200
            except httpx.TransportError:
                return False

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextmanager
def collector(directory: Path | None = None) -> Iterator[Collector]:
    """An initialised collector that isn't started; stopped at the end. A UNIX socket wants a short path: /tmp by default."""
    made = Path(tempfile.mkdtemp(prefix="pgherd-c-", dir="/tmp")) if directory is None else directory
    herd = Collector(made, {name: free_port() for name in ("http", "grpc", "otlp", "enrol")})
    (made / "c.toml").write_text(_CONFIG.format(state=herd.state, **herd.ports))
    try:
        initialised = herd.verb("init")
        assert initialised.returncode == 0, initialised.stderr
        yield herd
    finally:
        if herd.process is not None and herd.process.poll() is None:
            herd.process.kill()
            herd.process.wait(20)
        if directory is None:
            shutil.rmtree(made)
