"""`pgherd top`: from what the collector said to what is drawn. Everything here is pure but the one request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgherd.cli.top.facts import Facts
from pgherd.cli.top.fleet import COLUMNS, fleet_page, fleet_row
from pgherd.cli.top.node import node_page
from pgherd.cli.top.page import Cell, Column, Grade, Page, Section, duration, judged, percent, rate, size
from pgherd.cli.top.plain import page_text
from pgherd.cli.top.questions import FLEET, NODE, Row, Subject, rows_of, union
from pgherd.promql.parse import parse
from pgherd.runtime.render import table

NOW_NS = 1_800_000_000_000_000_000


def node(alias: str = "db1", role: str = "primary", condition: str = "up") -> dict[str, Any]:
    return {
        "id": f"id-{alias}", "alias": alias, "cluster": "main", "instance": f"{alias}:5432", "role": role,
        "condition": condition, "server_version_num": 150018,
    }  # fmt: skip


def rows(alias: str = "db1", **values: float | list[tuple[dict[str, str], float]]) -> dict[str, list[Row]]:
    """question=value, or question=[(labels, value) …], all of one node."""
    subject = {"node": alias, "cluster": "main"}
    return {
        question: [Row(subject | labels, one) for labels, one in (value if isinstance(value, list) else [({}, value)])]
        for question, value in values.items()
    }


def facts(
    *nodes: Mapping[str, Any],
    answers: Mapping[str, list[Row]] | None = None,
    alerts: list[dict[str, Any]] | None = None,
    backups: list[dict[str, Any]] | None = None,
    problems: tuple[str, ...] = (),
) -> Facts:
    return Facts(NOW_NS, nodes or (node(),), alerts or (), answers or {}, backups or (), problems)


def alert(name: str, state: str = "firing", severity: str = "critical", **labels: str) -> dict[str, Any]:
    return {
        "state": state,
        "labels": {"alertname": name, "severity": severity, **labels},
        "annotations": {"summary": f"{name}!"},
    }


def section(page: Page, key: str) -> Section:
    return next(one for one in page.sections if one.key == key)


HEALTHY = rows(
    disk=0.41, connections=10, usable=97, p99=0.02, commits=120.0, rollbacks=3.0, backup=NOW_NS / 1e9 - 1800, backup_enabled=1
)  # fmt: skip


@pytest.mark.parametrize("subject", [Subject(), Subject("db1", "main"), Subject('o"dd\\', "ma\nin")])
@pytest.mark.parametrize("questions", [FLEET, NODE])
def test_the_one_expression_is_promql_and_names_its_subject(questions: Mapping[str, str], subject: Subject) -> None:
    text = union(questions, subject)
    parse(text)
    assert "SEL" not in text
    assert "CLUSTER" not in text
    assert text.count('"row"') == len(questions)


def test_answers_come_back_by_question_without_the_labels_everybody_has() -> None:
    result = [{"metric": {"__name__": "pg_up", "row": "up", "node": "db1", "job": "pgherd"}, "value": [1.0, "1"]}]
    assert rows_of(result) == {"up": [Row({"node": "db1"}, 1.0)]}


def test_a_healthy_node_is_ok_and_says_so_in_a_word() -> None:
    line = fleet_row(node(), facts(answers=HEALTHY))
    assert line["state"].shown == "● ok"
    assert (line["disk"].text, line["connections"].text, line["p99"].text) == ("41%", "10%", "20ms")
    assert (line["transactions"].text, line["backup"].text, line["lag"].text) == ("123", "30m", "–")


@pytest.mark.parametrize(
    ("answers", "key", "shown", "word"),
    [
        ({"disk": 0.85}, "disk", "▲85%", "warning"),
        ({"disk": 0.95}, "disk", "■95%", "critical"),
        ({"connections": 91, "usable": 100}, "connections", "■91%", "critical"),
        ({"p99": 1.3}, "p99", "▲1.3s", "warning"),
        ({"backup": NOW_NS / 1e9 - 3 * 3600}, "backup", "▲3h", "warning"),
    ],
)
def test_what_is_worse_than_good_has_a_shape_and_a_word(answers: dict[str, Any], key: str, shown: str, word: str) -> None:
    line = fleet_row(node(), facts(answers=HEALTHY | rows(**answers)))
    assert line[key].shown == shown
    assert word in line["state"].text


def test_a_pending_alert_is_shown_and_makes_nothing_yellow() -> None:
    page = fleet_page(facts(answers=HEALTHY, alerts=[alert("RestoreUntested", "pending", "warning", node="db1")]))
    (line,) = page.sections[0].rows
    assert (line["state"].shown, line["alerts"].text) == ("● ok", "RestoreUntested pending")
    assert page.title == "herd: 1 node, 0 alerts firing"


def test_the_primarys_page_says_how_far_behind_its_standbys_are() -> None:
    others = {
        "cluster_lag": [Row({"node": "db2", "cluster": "main"}, 12.0)],
        "cluster_lag_unknown": [Row({"node": "db3", "cluster": "main"}, 1.0)],
    }
    lines = {row["name"].text: row for row in section(node_page(facts(answers=HEALTHY | others)), "replication").rows}
    assert lines["db2"]["lag"].shown == "▲12s"
    assert lines["db3"]["lag"].grade is Grade.UNKNOWN


@pytest.mark.parametrize(
    ("low", "high", "shown", "grade"),
    [(0.006, 0.015, "<15ms", Grade.GOOD), (1.1, 4.0, "▲>1.1s", Grade.WARNING), (0.5, 2.0, "?", Grade.UNKNOWN)],
)
def test_an_interval_decides_where_there_is_no_number(low: float, high: float, shown: str, grade: Grade) -> None:
    answers = {key: value for key, value in HEALTHY.items() if key != "p99"} | rows(p99_low=low, p99_high=high)
    cell = fleet_row(node(), facts(answers=answers))["p99"]
    assert (cell.shown, cell.grade, cell.value) == (shown, grade, None)


def test_a_standby_whose_lag_nobody_knows_is_not_ok() -> None:
    line = fleet_row(node(role="standby"), facts(answers=HEALTHY))
    assert line["lag"].grade is Grade.UNKNOWN
    assert line["state"].grade is Grade.UNKNOWN
    assert fleet_row(node(role="standby"), facts(answers=HEALTHY | rows(lag=0.0)))["state"].shown == "● ok"


@pytest.mark.parametrize("condition", ["unknown", "down", "hung", "auth_failed"])
def test_the_last_values_of_a_silent_server_are_not_shown_as_news(condition: str) -> None:
    line = fleet_row(node(condition=condition, role="unknown"), facts(answers=HEALTHY))
    assert line["state"].grade > Grade.GOOD
    assert condition in line["state"].text
    assert [line[key].value for key in ("connections", "p99", "transactions", "lag")] == [None] * 4


def test_nothing_known_is_unknown_never_zero_and_never_ok() -> None:
    page = node_page(facts(node(role="standby")))
    for one in page.sections:
        if one.key != "alerts":
            assert one.grade is not Grade.GOOD, one.key
            assert all(cell.value in (None, "standby", "db1", "this node") or cell.grade is not Grade.GOOD
                       for row in one.rows for key, cell in row.items() if key not in ("quantile", "estimator")), one  # fmt: skip
    values = [cell.value for row in section(page, "transactions").rows for cell in row.values()]
    assert values == [None] * len(values)


def test_an_alert_is_shown_at_its_node_and_the_loose_ones_below() -> None:
    alerts = [alert("DiskSpace", node="db1"), alert("AgentSilent", agent="a2"), alert("Old", state="resolved", node="db1")]
    page = fleet_page(facts(node(), node("db2"), answers=HEALTHY, alerts=alerts))
    lines = {row["node"].text: row for row in page.sections[0].rows}
    assert lines["db1"]["alerts"].text == "DiskSpace"
    assert "critical" in lines["db1"]["state"].text
    assert lines["db2"]["alerts"].text == ""
    assert page.sections[0].notes == ("■ firing: AgentSilent!",)


def test_the_worst_node_comes_first_and_a_filter_says_that_it_filters() -> None:
    answers = {key: HEALTHY[key] + rows("db2", disk=0.97).get(key, []) for key in HEALTHY}
    page = fleet_page(facts(node(), node("db2"), node("db3", condition="unknown"), answers=answers))
    assert [row["node"].text for row in page.sections[0].rows] == ["db2", "db3", "db1"]
    filtered = fleet_page(facts(node(), node("db2")), "DB2")
    assert [row["node"].text for row in filtered.sections[0].rows] == ["db2"]
    assert "1 of 2" in filtered.sections[0].notes[0]


def test_the_node_page_answers_what_a_dba_asks() -> None:
    answers = HEALTHY | rows(
        disk_ratio=[({"path_kind": "pg_wal"}, 0.82)], disk_avail=[({"path_kind": "pg_wal"}, 2.0**30)],
        disk_full_in=[({"path_kind": "pg_wal"}, 7200.0)],
        statement_seconds=[({"queryid": "7", "datname": "shop"}, 0.5)], statement_calls=[({"queryid": "7", "datname": "shop"}, 100.0)],
        statement_text=[({"queryid": "7", "query": "SELECT *\n FROM t WHERE id = $1"}, 1.0)],
        blocking=[({"blocker_pid": "11", "blocked_pid": "12", "mode": "ShareLock"}, 45.0)], blocked=1,
        latency=[({"quantile": "0.99", "estimator": "stratified"}, 1.2)],
        latency_low=[({"quantile": "0.99"}, 1.1)], latency_high=[({"quantile": "0.99"}, 1.3)],
        standby=[({"application_name": "s1", "state": "streaming"}, 4096.0)],
        blocks_hit=900.0, blocks_read=100.0,
    )  # fmt: skip
    backup = {
        "name": "b1",
        "started_unix_ns": NOW_NS - 60_000_000_000,
        "stored_bytes": 1 << 20,
        "grade": "content-equal",
        "complete": True,
    }
    page = node_page(facts(answers=answers, backups=[backup]))
    text = page_text(page, 100).plain
    assert "SELECT * FROM t WHERE id = $1" in text  # what is slow
    assert section(page, "slow").rows[0]["mean"].text == "5ms"
    assert section(page, "blocking").rows[0]["waited"].shown == "▲45s"  # who blocks
    assert "4.0K" in text  # how far behind
    assert section(page, "disk").rows[0]["full_in"].shown == "▲2h"  # when is it full
    assert section(page, "backups").rows[0]["grade"].grade is Grade.GOOD  # is the backup good
    assert section(page, "latency").rows[2]["seconds"].shown == "▲1.2s"
    assert section(page, "latency").rows[0]["seconds"].grade is Grade.UNKNOWN
    assert section(page, "transactions").rows[0]["cache_hit"].text == "90%"


def test_why_it_is_unknown_is_said() -> None:
    answers = rows(unknown=[({"probe": "disk", "reason": "remote_server"}, 1.0)])
    assert "remote_server" in " ".join(section(node_page(facts(answers=answers)), "disk").notes)


def test_a_collector_without_answers_is_said_on_both_pages() -> None:
    trouble = ("the collector can't answer queries now: full",)
    assert trouble[0] in page_text(fleet_page(facts(problems=trouble)), 80).plain
    assert trouble[0] in page_text(node_page(facts(problems=trouble)), 80).plain


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=40)


@given(names, names, st.floats(0, 2), st.integers(40, 200))
def test_no_line_is_wider_than_the_terminal(alias: str, other: str, ratio: float, width: int) -> None:
    alerts = [alert(other, node=alias)]
    one = node(alias)
    answers = rows(alias, disk=ratio, disk_ratio=[({"path_kind": other}, ratio)], standby=[({"application_name": other}, 1.0)])
    seen = facts(one, answers=answers, alerts=alerts)
    for page in (fleet_page(seen), node_page(seen)):
        for line in page_text(page, width).split("\n"):
            assert line.cell_len <= width, line.plain


def test_the_fleet_fits_80_columns_with_its_alerts_column() -> None:
    assert sum(column.width + 1 for column in COLUMNS) + len("Disk…") <= 80


@given(st.floats(1e-7, 1e7))
def test_durations_are_short_and_not_far_off(seconds: float) -> None:
    text = duration(seconds)
    assert len(text) <= 6
    number, unit = float(text.rstrip("µmshd")), text.lstrip("0123456789.")
    back = number * {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[unit]
    assert back == pytest.approx(seconds, rel=0.06, abs=1e-7)


def test_numbers_for_people() -> None:
    assert [percent(x) for x in (0.0, 0.999, 1.0, None)] == ["0%", "99%", "100%", "?"]
    assert [rate(x) for x in (0.0, 0.25, 9.94, 123.4, 12_345.0, None)] == ["0", "0.2", "9.9", "123", "12.3k", "?"]
    assert [size(x) for x in (0, 1023, 1536, 5 << 30, None)] == ["0B", "1023B", "1.5K", "5.0G", "?"]
    assert judged(float("nan"), "nan", warning=1).grade is Grade.UNKNOWN
    assert Cell("x", 1, Grade.GOOD).shown == "x"


def test_json_has_every_value_and_every_judgement() -> None:
    page = fleet_page(facts(answers=HEALTHY | rows(disk=0.85)))
    document = json.loads(json.dumps(page.as_json()))
    (line,) = document["sections"]["nodes"]["rows"]
    assert (line["disk"], line["grades"]["disk"], line["lag"]) == (0.85, "warning", None)
    assert document["grade"] == "warning"


def test_nobody_writes_escape_sequences_onto_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Anybody who may connect chooses identifiers and an application name; foreign exporters choose labels."""
    evil = 'SELECT "\x1b]0;owned\x07\x9b2J\u202e"\nFROM t'
    shown = ("SELECT", "FROM t")
    page = Page(evil, (Section("a", "A", (Column("q", "QUERY"),), ({"q": Cell(evil)},), (evil,)),), 0)
    table([{"q": evil, "list": [evil]}], [("q", "QUERY"), ("list", "LIST")])
    for text in (page_text(page, 200).plain, capsys.readouterr().out):
        assert all(char.isprintable() or char == "\n" for char in text)
        assert all(word in text for word in shown)
        assert "\nFROM" not in text
