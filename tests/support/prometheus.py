"""Debian's Prometheus over blocks of our making, on a free loopback port: the oracle of tests and benches."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from pgherd.collector.api.prometheus_json import format_value
from support.waiting import wait_until

# (metric, labels) → [(ms, value)]
Dataset = Mapping[tuple[str, tuple[tuple[str, str], ...]], Sequence[tuple[int, float]]]


@contextlib.contextmanager
def prometheus(dataset: Dataset, directory: Path) -> Iterator[httpx.Client]:
    """A Prometheus that holds exactly `dataset`; ended by its pid."""
    _write_blocks(dataset, directory)
    config = directory / "prometheus.yml"
    config.write_text("global:\n  scrape_interval: 1h\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        "--storage.tsdb.retention.time=100y",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (directory / "log").open("wb") as log, subprocess.Popen(arguments, stdout=log, stderr=log) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
                wait_until(lambda: _is_ready(client), 30, "Prometheus to be ready")
                yield client
        finally:
            process.terminate()
            process.wait(20)


def _write_blocks(dataset: Dataset, directory: Path) -> None:
    text = directory / "samples.om"
    with text.open("w", encoding="utf-8") as out:
        for metric in sorted({metric for metric, _ in dataset}):
            out.write(f"# TYPE {metric} unknown\n")
            for (name, labels), samples in dataset.items():
                if name == metric:
                    shown = ",".join(f'{label}="{value}"' for label, value in labels)
                    out.writelines(f"{metric}{{{shown}}} {format_value(value)} {ms / 1000:.3f}\n" for ms, value in samples)
        out.write("# EOF\n")
    subprocess.run(
        ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(text), str(directory / "data")],
        check=True,
        capture_output=True,
        timeout=300,
    )
    text.unlink()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
