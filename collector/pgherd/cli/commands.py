"""`pgherd commands`: what was asked of the agents and what became of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from pgherd.cli.main import CliContext
from pgherd.cli.verb import moment, show, verb
from pgherd.proto.errors import TransientError, from_dict
from pgherd.runtime.render import Progress, emit_json, emit_json_line, render_error, table

_LONG_POLL_S = 20.0


@click.group()
def commands() -> None:
    """What was asked of the agents and what became of it."""


@commands.command("ls")
@click.option("--node", help="Only this node's.")
@click.option("--open", "open_only", is_flag=True, help="Only those that haven't ended.")
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many, the newest first."
)
@verb
def list_commands(context: CliContext, node: str | None, open_only: bool, limit: int) -> None:
    """List commands, the newest first."""
    query = {"node": node, "open": "true" if open_only else None, "limit": min(limit, 1000)}
    rows = list(context.client.pages("/api/v1/commands", query, items_max=limit))
    for row in rows:
        row["issued"] = moment(row["issued_unix_ns"])
    columns = [
        ("id", "COMMAND"),
        ("verb", "VERB"),
        ("node", "NODE"),
        ("state", "STATE"),
        ("actor", "ACTOR"),
        ("issued", "ISSUED"),
    ]
    show(context, rows, columns)


@commands.command("show")
@click.argument("command_id")
@verb
def show_command(context: CliContext, command_id: str) -> None:
    """Show one command with its events."""
    document = context.client.get(f"/api/v1/commands/{command_id}")
    document["events"] = context.client.get(f"/api/v1/commands/{command_id}/events")["items"]
    if context.json:
        emit_json(document)
    else:
        _print_command(document)


@commands.command()
@click.argument("command_id")
@verb
def watch(context: CliContext, command_id: str) -> int:
    """Follow a command to its end; the exit status is the command's."""
    return follow(context, context.client.get(f"/api/v1/commands/{command_id}"), ndjson=context.json)


def issue(context: CliContext, node: str, verb_name: str, arguments: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Ask for a command; it is durable at the collector when this returns."""
    body = {"node": node, "verb": verb_name, "arguments": dict(arguments or {})}
    command: dict[str, Any] = context.client.post("/api/v1/commands", body)
    return command


def follow(context: CliContext, command: dict[str, Any], *, ndjson: bool = False) -> int:
    """Wait for a command's end with progress, print it, and return its exit status.

    Survives a collector that goes away meanwhile: the command doesn't depend on this connection.
    """
    progress = Progress()
    shown = None
    try:
        while command["open"]:
            if ndjson and (command["state"], command["progress"]) != shown:
                shown = (command["state"], command["progress"])
                emit_json_line({key: command[key] for key in ("id", "state", "progress")})
            report = command.get("progress") or {}
            progress(
                report.get("phase") or command["state"], report.get("done", 0), report.get("total", 0), report.get("unit", "")
            )
            command = _poll(context, command)
    finally:
        progress.close()
    return finish(context, command, ndjson=ndjson)


def _poll(context: CliContext, command: dict[str, Any]) -> dict[str, Any]:
    wait_s = 1.0 if command["state"] in ("accepted", "running") else _LONG_POLL_S  # running: progress doesn't wake the poll
    try:
        answer: dict[str, Any] = context.client.get(
            f"/api/v1/commands/{command['id']}", {"wait_s": wait_s}, timeout_s=wait_s + 30
        )
    except TransientError as error:
        if error.code not in ("peer.unreachable", "store.unavailable"):
            raise
        time.sleep(1.0)
        return command
    return answer


def finish(context: CliContext, command: dict[str, Any], *, ndjson: bool = False) -> int:
    """Print an ended command and return the exit status that its error, if any, asks for."""
    if ndjson:
        emit_json_line(command)
    elif context.json:
        emit_json(command)
    error = from_dict(command["error"]) if command["error"] else None
    if error is not None:
        if not context.json:
            render_error(error, as_json=False)
        return error.info.exit_status or 1
    if not context.json:
        _print_command(command)
    return 0 if command["state"] == "succeeded" else 1


def _print_command(command: Mapping[str, Any]) -> None:
    rows = [{"key": key, "value": command.get(key)} for key in ("id", "verb", "node", "state", "actor")]
    rows += [{"key": f"{kind}", "value": moment(command.get(f"{kind}_unix_ns"))} for kind in ("issued", "accepted", "finished")]
    result = command.get("result") or {}
    findings = result.get("findings")
    rows += [{"key": key, "value": value} for key, value in result.items() if key != "findings"]
    if command.get("error"):
        rows += [{"key": f"error {key}", "value": command["error"].get(key)} for key in ("code", "message", "hint")]
    table(rows, [("key", "FIELD"), ("value", "VALUE")])
    if findings is not None:
        table(findings, [("severity", "SEVERITY"), ("check", "CHECK"), ("message", "FINDING"), ("remedy", "REMEDY")])
    if command.get("events"):
        events = [{**event, "at": moment(event["unix_ns"])} for event in command["events"]]
        table(events, [("sequence", "#"), ("kind", "EVENT"), ("at", "AT")])
