"""Debian's Prometheus on a free loopback port, with samples of our making: the oracle of tests and benches.

Blocks are quick for many samples; `remote_write` also carries what OpenMetrics text can't: stale markers.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cramjam
import httpx

from pgherd.collector.api.prometheus_json import format_value
from support.waiting import wait_until

# (metric, labels) → [(ms, value)]
Dataset = Mapping[tuple[str, tuple[tuple[str, str], ...]], Sequence[tuple[int, float]]]


@contextlib.contextmanager
def prometheus(dataset: Dataset, directory: Path) -> Iterator[httpx.Client]:
    """A Prometheus that holds exactly `dataset` and takes remote writes; ended by its pid."""
    if dataset:
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
        "--web.enable-remote-write-receiver",
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


def remote_write(client: httpx.Client, dataset: Dataset) -> None:
    """Send all samples, bit for bit. Source: the Prometheus Remote-Write specification, 1.0 (protobuf in snappy blocks)."""
    series = [
        b"".join(_field(1, _field(1, name.encode()) + _field(2, value.encode())) for name, value in _all_labels(metric, labels))
        + b"".join(_field(2, _sample(ms, value)) for ms, value in samples)
        for (metric, labels), samples in dataset.items()
    ]
    body = bytes(cramjam.snappy.compress_raw(b"".join(_field(1, one) for one in series)))
    headers = {
        "content-type": "application/x-protobuf",
        "content-encoding": "snappy",
        "x-prometheus-remote-write-version": "0.1.0",
    }
    client.post("/api/v1/write", content=body, headers=headers).raise_for_status()


def _all_labels(metric: str, labels: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted([("__name__", metric), *labels])


def _sample(ms: int, value: float) -> bytes:
    return b"\x09" + struct.pack("<d", value) + b"\x10" + _varint(ms)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


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
