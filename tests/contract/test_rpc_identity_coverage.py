"""Every RPC that exists is one of those whose foreign use is tested: a new one fails here until it has its test."""

from __future__ import annotations

from pathlib import Path

from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

from pgherd.collector.identity.gate import SERVICES
from pgherd.proto.control.v1 import control_pb2

# RPC → the test that uses agent A's certificate for agent B on it, over real mTLS or with the verified caller injected.
FOREIGN_USE = {
    "pgherd.control.v1.Control/Session": ("tests/fault/test_control_session.py", "test_a_hello_of_another_agent"),
    "opentelemetry.proto.collector.metrics.v1.MetricsService/Export": (
        "tests/fault/test_otlp_service.py",
        "test_nobody_ships_for_another",
    ),
}
ROOT = Path(__file__).resolve().parents[2]


def test_every_rpc_of_the_descriptors_has_its_foreign_use_tested() -> None:
    descriptors = [*control_pb2.DESCRIPTOR.services_by_name.values(), *metrics_service_pb2.DESCRIPTOR.services_by_name.values()]
    rpcs = {f"{service.full_name}/{method.name}" for service in descriptors for method in service.methods}
    assert rpcs == set(FOREIGN_USE)
    for file, name in FOREIGN_USE.values():
        assert f"def {name}" in (ROOT / file).read_text(), f"{file} lost {name}"


def test_the_gate_is_open_for_no_other_service() -> None:
    assert {rpc.partition("/")[0] for rpc in FOREIGN_USE} == set(SERVICES)
