"""`pgherd rules`: check rule files and run promtool's unit tests, without a collector."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pgherd.collector.command import require_libraries
from pgherd.proto.codes import Exit
from pgherd.proto.errors import ConfigError, PgherdError
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.render import command_main, emit_json

_files = click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")


@click.group()
def rules() -> None:
    """Check alert rules and run their unit tests, in promtool's formats."""
    require_libraries("pgherd rules")


@rules.command()
@_files
@click.option("--strict", is_flag=True, help="Refuse what is otherwise a warning.")
@_json
@click.pass_obj
def check(context: Any, files: tuple[Path, ...], *, strict: bool, as_json: bool) -> None:
    """Say whether the rule FILES would load: YAML, expressions, templates, repeated rules.

    Warns of series that no agent or collector emits: a rule over those never fires, unless another sender has them.
    With --strict that is a failure, as it is for the shipped rules.
    """
    as_json = as_json or bool(getattr(context, "json", False))

    def body() -> int:
        from pgherd.alerts.lint import emitted_by_pgherd, lint
        from pgherd.alerts.load import load_rules
        from pgherd.collector.alerting.query import metric_names
        from pgherd.promql.parse import parse

        verdicts: list[dict[str, Any]] = []
        for file in files:
            try:
                groups = load_rules([file], builtin=False, interval_s=15, check_expression=parse)
                count = sum(len(group.rules) for group in groups)
                warnings = [str(finding) for finding in lint(groups, metric_names, emitted_by_pgherd())]
                ok = not (strict and warnings)
                verdicts.append({"file": str(file), "ok": ok, "groups": len(groups), "rules": count, "warnings": warnings})
            except ConfigError as error:
                verdicts.append({"file": str(file), "ok": False, "problem": error.message, "hint": error.hint})
        _tell(verdicts, as_json, [_checked(verdict) for verdict in verdicts])
        return Exit.OK if all(verdict["ok"] for verdict in verdicts) else Exit.FAILED

    sys.exit(command_main(body, as_json=as_json))


@rules.command()
@_files
@_json
@click.pass_obj
def test(context: Any, files: tuple[Path, ...], as_json: bool) -> None:
    """Run the unit-test FILES; 0 when every expectation holds."""
    as_json = as_json or bool(getattr(context, "json", False))

    def body() -> int:
        from pgherd.collector.alerting.unittest_run import run_file

        verdicts: list[dict[str, Any]] = []
        for file in files:
            try:
                verdict = run_file(file, SystemClock())
                verdicts.append({"ok": not verdict.failures, **asdict(verdict)})
            except PgherdError as error:
                verdicts.append({"file": str(file), "ok": False, "problem": error.message, "hint": error.hint})
        _tell(verdicts, as_json, [_tested(verdict) for verdict in verdicts])
        return Exit.OK if all(verdict["ok"] for verdict in verdicts) else Exit.FAILED

    sys.exit(command_main(body, as_json=as_json))


def _tell(verdicts: Sequence[dict[str, Any]], as_json: bool, lines: Sequence[str]) -> None:
    if as_json:
        emit_json({"ok": all(verdict["ok"] for verdict in verdicts), "files": verdicts})
        return
    for line in lines:
        click.echo(line)


def _checked(verdict: dict[str, Any]) -> str:
    if "problem" in verdict:
        return _refused(verdict)
    said, kind = ("ok", "warning") if verdict["ok"] else ("refused", "error")
    lines = [f"{verdict['file']}: {said}, {verdict['rules']} rules in {verdict['groups']} groups"]
    return "\n".join([*lines, *(f"  {kind}: {warning}" for warning in verdict["warnings"])])


def _tested(verdict: dict[str, Any]) -> str:
    if "problem" in verdict:
        return _refused(verdict)
    if verdict["ok"]:
        return f"{verdict['file']}: ok, {verdict['tests']} tests"
    lines = [f"{verdict['file']}: failed"]
    for failure in verdict["failures"]:
        lines.append(f"  {failure['test']}: {failure['subject']} at {failure['at']}: {failure['message']}")
        if failure["message"] == "differs":
            lines += [f"    expected {one}" for one in failure["expected"] or ("nothing",)]
            lines += [f"    got      {one}" for one in failure["got"] or ("nothing",)]
    return "\n".join(lines)


def _refused(verdict: dict[str, Any]) -> str:
    return f"{verdict['file']}: {verdict['problem']}" + (f"\n  {verdict['hint']}" if verdict["hint"] else "")
