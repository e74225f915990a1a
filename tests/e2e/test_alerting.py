"""The real collector from rule file to webhook: recording, routes, silences by the CLI, and a kill -9 in between."""

from __future__ import annotations

import textwrap

import pytest

from support.collector import collector
from support.waiting import wait_until
from support.webhook import Webhook, webhook

pytestmark = pytest.mark.slow

_RULES = """
groups:
- name: g
  interval: 500ms
  rules:
  - record: always:on
    expr: vector(7)
    labels: {node: a}
  - alert: AlwaysOn
    expr: always:on > 1
    labels: {severity: critical}
    annotations: {summary: "{{ with query `always:on` }}{{ . | first | value }}{{ end }} on {{ $labels.node }}"}
  - alert: Noise
    expr: always:on > 1
    labels: {severity: info}
"""
_CONFIG = """
[alerts]
builtin_rules = false
rule_files = ["{rules}"]
group_interval = "100ms"
default_receivers = ["log"]
[[alerts.receivers]]
name = "log"
kind = "log"
[[alerts.receivers]]
name = "pager"
kind = "webhook"
url = "{url}"
[[alerts.routes]]
receiver = "pager"
matchers = ['severity="critical"']
"""


def test_from_rule_to_pager_through_a_silence_and_a_kill() -> None:
    with webhook() as hook, collector() as herd:
        (herd.directory / "rules.yaml").write_text(_RULES)
        with (herd.directory / "c.toml").open("a") as config:
            config.write(_CONFIG.format(rules=herd.directory / "rules.yaml", url=hook.url))
        herd.start()
        wait_until(lambda: bool(hook.accepted), 20, "the first page")
        (first,) = hook.accepted
        assert first.payload["commonAnnotations"] == {"summary": "7 on a"}
        assert first.payload["groupLabels"] == {"alertname": "AlwaysOn"}

        silence = herd.ask("silences", "add", "--alert", "AlwaysOn", "--for", "1h", "--comment", "known")["id"]
        window = herd.ask("maintenance", "add", "patches", "--node", "b", "--at", "02:00", "--on", "sun", "--for", "2h")["id"]
        herd.kill()
        herd.start()
        wait_until(lambda: bool(herd.ask("query", "ALERTS{alertname='AlwaysOn'} == 1")), 20, "the alert's series")
        (silenced,) = [row for row in herd.ask("alerts", "ls") if row["rule"] == "AlwaysOn"]
        assert (silenced["state"], silenced["silenced_by"]) == ("firing", [silence])
        assert "firing (silenced)" in herd.cli("alerts", "ls").stdout
        assert [(row["id"], row["state"]) for row in herd.ask("silences", "ls")] == [(silence, "active")]
        assert [row["id"] for row in herd.ask("maintenance", "ls")] == [window]
        assert _keys(hook) == {first.key}, "silenced, and known as told through the kill"

        herd.ask("silences", "expire", silence)
        wait_until(lambda: len(_keys(hook)) == 2, 20, "the page after the silence")
        herd.ask("maintenance", "rm", window)
        refused = herd.cli("--json", "silences", "add")
        assert refused.returncode != 0
        assert "mute every alert" in refused.stdout + refused.stderr
        assert {call.payload["commonLabels"]["severity"] for call in hook.accepted} == {"critical"}, "the rest went to the log"
        assert "Noise" in herd.log
        assert herd.stop() == 0, herd.log


def _keys(hook: Webhook) -> set[str]:
    return {call.key for call in hook.accepted}


def test_a_route_to_nobody_is_found_by_config_check() -> None:
    with collector() as herd:
        with (herd.directory / "c.toml").open("a") as config:
            config.write(
                textwrap.dedent("""
                [[alerts.routes]]
                receiver = "nobody"
            """)
            )
        answer = herd.verb("config", "check")
    assert answer.returncode != 0
    assert "no receiver 'nobody'" in answer.stdout + answer.stderr
