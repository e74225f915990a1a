"""`pgherd query`: one PromQL expression, at an instant or over a range."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import click

from pgherd.cli.main import CliContext
from pgherd.cli.verb import duration_s, verb
from pgherd.runtime.render import emit_json, table


@click.command()
@click.argument("expression")
@click.option("--range", "range_text", metavar="DURATION", help="Evaluate over the last DURATION instead of now.")
@click.option("--step", default="15s", show_default=True, help="Distance of the points of a range.")
@verb
def query(context: CliContext, expression: str, range_text: str | None, step: str) -> None:
    """Evaluate a PromQL EXPRESSION; --json prints the Prometheus API's own answer."""
    if range_text is None:
        answer = context.client.get("/prometheus/api/v1/query", {"query": expression})
    else:
        span_s, step_s = duration_s("--range", range_text), duration_s("--step", step)
        now_s = time.time_ns() / 1e9
        parameters = {"query": expression, "start": now_s - span_s, "end": now_s, "step": step_s}
        answer = context.client.get("/prometheus/api/v1/query_range", parameters)
    if context.json:
        emit_json(answer)
        return
    for warning in answer.get("warnings", []):
        click.echo(f"warning: {warning}", err=True)
    data = answer["data"]
    if data["resultType"] in ("scalar", "string"):
        click.echo(data["result"][1])
        return
    table(_rows(data["result"]), [("series", "SERIES"), ("time", "TIME"), ("value", "VALUE")])


def _rows(result: list[dict[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for series in result:
        labels = ", ".join(f'{name}="{value}"' for name, value in series["metric"].items() if name != "__name__")
        name = f"{series['metric'].get('__name__', '')}{{{labels}}}"
        for timestamp, value in series.get("values") or [series["value"]]:
            at = datetime.fromtimestamp(float(timestamp), UTC).strftime("%H:%M:%S")
            rows.append({"series": name, "time": at, "value": value})
            name = ""
    return rows
