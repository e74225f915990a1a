"""Rows to samples to OTLP bytes: names, units, unknowns, staleness, a stable layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgherd.agent.config import NodeConfig
from pgherd.agent.probes.catalog import load_catalog
from pgherd.agent.probes.connection import instance_label, session_parameters
from pgherd.agent.probes.rows import samples_of, setting_sample, unknown_reason
from pgherd.agent.telemetry.convert import Source, encode, series_of, vanished
from pgherd.proto.samples import Metric, MetricKind, Sample
from support.sampling import SAMPLING, decode

SOURCE = Source("a", "n", "alias", "cluster", "host:5432")
GAUGE = Metric("g", MetricKind.GAUGE, "a gauge", "By")
COUNTER = Metric("c_total", MetricKind.COUNTER, "a counter")

CATALOG = load_catalog("""
version = 1
[[probe]]
name = "p"
family = "f"
prefix = "pg_p_"
labels = ["datname"]
reset = "reset"
unknown = "why"
sql = "SELECT 1"
[probe.metrics.a]
kind = "counter"
help = "A"
[probe.metrics.b]
aliases = ["other_b"]
help = "B"
[probe.metrics.newer]
help = "only newer majors have this column"
""")
PROBE = CATALOG.for_major(17)[0]


def row(**values: Any) -> dict[str, Any]:
    return {"datname": "d", "reset": None, "why": None, "a": 1, "b": 2, **values}


def test_null_and_nan_are_no_sample() -> None:
    samples = samples_of(PROBE, [row(a=None, b=float("nan"))])
    assert samples == []
    assert [s.metric.name for s in samples_of(PROBE, [row()])] == ["pg_p_a", "pg_p_b", "other_b"]


def test_null_labels_are_empty_and_counters_carry_their_start() -> None:
    counter, gauge, _ = samples_of(PROBE, [row(datname=None, reset=1.5)])
    assert counter.labels == {"datname": ""}
    assert counter.start_unix_ns == 1_500_000_000
    assert gauge.start_unix_ns == 0


def test_the_reason_of_an_unknown_is_told() -> None:
    assert unknown_reason(PROBE, [row()]) == ""
    assert unknown_reason(PROBE, [row(), row(why="cut")]) == "cut"


@pytest.mark.parametrize(
    ("name", "setting", "unit", "vartype", "expected"),
    [
        ("shared_buffers", "2048", "8kB", "integer", ("pg_settings_shared_buffers_bytes", 16777216.0)),
        ("max_wal_size", "1024", "MB", "integer", ("pg_settings_max_wal_size_bytes", 1073741824.0)),
        ("min_wal_size", "5", "16MB", "integer", ("pg_settings_min_wal_size_bytes", 83886080.0)),
        ("wal_segment_size", "16777216", "B", "integer", ("pg_settings_wal_segment_size_bytes", 16777216.0)),
        ("checkpoint_timeout", "300", "s", "integer", ("pg_settings_checkpoint_timeout_seconds", 300.0)),
        ("statement_timeout", "1500", "ms", "integer", ("pg_settings_statement_timeout_seconds", 1.5)),
        ("log_rotation_age", "1440", "min", "integer", ("pg_settings_log_rotation_age_seconds", 86400.0)),
        ("max_slot_wal_keep_size", "-1", "MB", "integer", ("pg_settings_max_slot_wal_keep_size_bytes", -1.0)),
        ("fsync", "on", "", "bool", ("pg_settings_fsync", 1.0)),
        ("jit", "off", "", "bool", ("pg_settings_jit", 0.0)),
        ("pg_stat_statements.max", "5000", "", "integer", ("pg_settings_pg_stat_statements_max", 5000.0)),
        ("my-ext.x", "1", "", "integer", ("pg_settings_my_ext_x", 1.0)),
        ("odd", "5ms/sec", "", "integer", None),
        ("odd", "1", "furlong", "integer", None),
    ],
)
def test_settings_as_postgres_exporter_names_them(
    name: str, setting: str, unit: str, vartype: str, expected: tuple[str, float] | None
) -> None:
    sample = setting_sample("pg_settings_", {"name": name, "setting": setting, "unit": unit, "vartype": vartype})
    assert (None if sample is None else (sample.metric.name, sample.value)) == expected


def test_a_series_that_vanished_gets_one_point_without_a_value() -> None:
    before = series_of([Sample(GAUGE, {"x": "1"}, 1.0), Sample(GAUGE, {"x": "2"}, 2.0)])
    now = series_of([Sample(GAUGE, {"x": "2"}, 3.0)])
    decoded = decode(encode(SOURCE, now, vanished(before, now), 7))
    assert [(p.labels["x"], p.stale, p.value) for p in decoded.points] == [("2", False, 3.0), ("1", True, 0.0)]
    assert {p.unix_ns for p in decoded.points} == {7}
    assert vanished(now, now) == []


def test_of_two_samples_of_one_series_the_first_stays() -> None:
    series = series_of([Sample(GAUGE, {"a": "1", "b": "2"}, 1.0), Sample(GAUGE, {"b": "2", "a": "1"}, 9.0)])
    assert [sample.value for sample in series.values()] == [1.0]


def test_kinds_units_and_resource() -> None:
    decoded = decode(encode(SOURCE, series_of([Sample(COUNTER, {}, 5.0, 3), Sample(GAUGE, {}, 1.0)]), [], 7))
    by_name = {point.name: point for point in decoded.points}
    assert by_name["c_total"].counter
    assert by_name["c_total"].start_unix_ns == 3
    assert not by_name["g"].counter
    assert decoded.resource == {
        "service.name": "pgherd", "service.instance.id": "host:5432", "pgherd.agent.id": "a", "pgherd.node.id": "n",
        "pgherd.node": "alias", "pgherd.cluster": "cluster",
    }  # fmt: skip


numbers = st.floats(allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_an_unchanged_set_of_series_keeps_its_byte_layout(pairs: list[tuple[float, float]]) -> None:
    first = series_of(Sample(GAUGE, {"n": str(n)}, a) for n, (a, _) in enumerate(pairs))
    second = series_of(Sample(GAUGE, {"n": str(n)}, b) for n, (_, b) in enumerate(pairs))
    one, two = encode(SOURCE, first, [], 1 << 60), encode(SOURCE, second, [], (1 << 60) + 1)
    assert len(one) == len(two)
    assert [p.value for p in decode(two).points] == [b for _, b in pairs]
    assert all(not math.isnan(p.value) for p in decode(one).points)


@pytest.mark.parametrize(
    ("conninfo", "environment", "expected"),
    [
        ("host=/run/postgresql port=5433", {}, "db1:5433"),
        ("host=localhost", {}, "db1:5432"),
        ("host=10.0.0.5 port=6000", {}, "10.0.0.5:6000"),
        ("host=fd00::1", {}, "[fd00::1]:5432"),
        ("dbname=x", {"PGHOST": "other", "PGPORT": "7000"}, "other:7000"),
        ("service=main", {}, "db1:5432"),
    ],
)
def test_instance_label(conninfo: str, environment: dict[str, str], expected: str) -> None:
    assert instance_label(NodeConfig("n", "c", conninfo), "db1", environment) == expected
    assert instance_label(NodeConfig("n", "c", conninfo, instance="given:1"), "db1", environment) == "given:1"


def test_session_parameters_bound_every_wait_and_hold_no_password() -> None:
    parameters = session_parameters(NodeConfig("n", "c", "host=h password=x options='-c geqo=off'"), SAMPLING)
    assert "password" not in parameters
    for option in ("-c geqo=off", "-c statement_timeout=2000", "-c lock_timeout=100", "-c default_transaction_read_only=on"):
        assert option in parameters["options"]
    assert parameters["application_name"] == "pgherd-agent"
