"""`pgherd-agent backup run|ls|verify|restore`: for people at a shell and for the resident agent alike."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from pgherd.agent.answering import answering
from pgherd.agent.backup.dump import Progress as ProgressPort
from pgherd.agent.backup.outcomes import OutcomeVerb, outcome_directory, recording
from pgherd.agent.backup.repository import Entry, NodeRepository, Unreadable, open_repository
from pgherd.agent.backup.restore import (
    HIDDEN,
    RestoreSettings,
    restore_to_directory,
    restore_to_scratch,
    scratch_parent,
    sweep_leftovers,
)
from pgherd.agent.backup.retain import retain
from pgherd.agent.backup.take import TakeSettings, take
from pgherd.agent.backup.verify import verify as verify_backup
from pgherd.agent.config import AgentConfig, NodeConfig
from pgherd.agent.context import AgentContext
from pgherd.agent.nodes import node_ids
from pgherd.postgres.connection import Target
from pgherd.postgres.os_user import OsUser, server_user
from pgherd.proto.codes import Exit
from pgherd.proto.commands import check_backup_name, check_directory_name
from pgherd.proto.errors import DeniedError, PgherdError
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.durable import private_directory, read_secret
from pgherd.runtime.logging import configure as configure_logging
from pgherd.runtime.render import Progress, command_main, emit_json, human_bytes, table
from pgherd.storage.manifest import summary

Result = Mapping[str, Any]
_PROGRAM_OPTIONS = (
    click.option("--node", "alias", help="The node's alias (may be left out when the configuration has only one)."),
    click.option("--ndjson", is_flag=True, help="Progress and the result as NDJSON on stdout (for programs)."),
    click.option("--result-file", type=click.Path(path_type=Path), help="Also publish the outcome durably in this file."),
    click.option("--json", "as_json", is_flag=True, help="Answer in JSON."),
)


def _for_programs(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_PROGRAM_OPTIONS):
        function = option(function)
    return function


@click.group()
def backup() -> None:
    """Take, list, verify and restore logical backups. Works with the collector away."""
    configure_logging()  # to stderr: stdout belongs to the answer


@backup.command("run")
@_for_programs
@click.pass_obj
def run_(context: AgentContext, alias: str | None, ndjson: bool, result_file: Path | None, as_json: bool) -> None:
    """Back up every database of a node, read the backup back, and apply the retention."""

    def work(node: NodeConfig, progress: Progress) -> Result:
        return take_verify_retain(context.config, node, progress)

    _run_verb("run", context, alias, work, _say_taken, ndjson=ndjson, result_file=result_file, as_json=as_json)


@backup.command("verify")
@click.option("--backup", "name", default="", help="A name from `backup ls`; default: the newest.")
@_for_programs
@click.pass_obj
def verify(context: AgentContext, name: str, alias: str | None, ndjson: bool, result_file: Path | None, as_json: bool) -> None:
    """Read every byte of a backup back and compare its checksums."""

    def work(node: NodeConfig, progress: Progress) -> Result:
        check_backup_name(name)
        return dataclasses.asdict(verify_backup(_repository(context.config, node), name, SystemClock(), progress))

    def say(result: Result) -> None:
        click.echo(f"{result['backup']}: {human_bytes(result['read_bytes'])} read back; grade: {result['grade']}")

    _run_verb("verify", context, alias, work, say, ndjson=ndjson, result_file=result_file, as_json=as_json)


@backup.command("restore")
@click.option("--backup", "name", default="", help="A name from `backup ls`; default: the newest.")
@click.option("--root", default="", help="Name of a restore root (policy.restore_roots); without one: a scratch server.")
@click.option("--name", "directory", default="", help="The new data directory's name under the root.")
@_for_programs
@click.pass_obj
def restore(
    context: AgentContext,
    name: str,
    root: str,
    directory: str,
    alias: str | None,
    ndjson: bool,
    result_file: Path | None,
    as_json: bool,
) -> None:
    """Restore a backup into a scratch server (compare, report, remove) or into a new data directory."""

    def work(node: NodeConfig, progress: Progress) -> Result:
        check_backup_name(name)
        if bool(root) != bool(directory):
            raise click.UsageError("a restore into a new directory needs both --root and --name")
        target = _restore_target(context.config, root, directory) if root else None
        return restore_node(context.config, node, name, target, progress)

    def say(result: Result) -> None:
        where = f" into {result['directory']}" if result["directory"] else ""
        compared = f"{result['tables_compared']} tables, {result['rows_compared']} rows compared"
        click.echo(f"{result['backup']} restored{where} in {result['duration_s']:.1f} s: {compared}; grade: {result['grade']}")

    _run_verb("restore", context, alias, work, say, ndjson=ndjson, result_file=result_file, as_json=as_json)


@backup.command("ls")
@click.option("--node", "alias", help="The node's alias (may be left out when the configuration has only one).")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_obj
def ls(context: AgentContext, alias: str | None, as_json: bool) -> None:
    """List a node's backups with their grade."""
    as_json = as_json or context.json

    def body() -> None:
        rows = [_row(entry) for entry in _repository(context.config, context.node(alias)).entries()]
        if as_json:
            return emit_json(rows)
        columns = [
            ("name", "BACKUP"),
            ("grade", "GRADE"),
            ("complete", "COMPLETE"),
            ("size", "SIZE"),
            ("databases", "DATABASES"),
        ]
        return table(rows, [*columns, ("problems", "PROBLEMS")])

    sys.exit(command_main(body, as_json=as_json))


def _row(entry: Entry | Unreadable) -> dict[str, Any]:
    if isinstance(entry, Unreadable):
        return {"name": entry.name, "grade": None, "complete": None, "problems": [entry.error.message]}
    last = entry.proofs[-1] if entry.proofs else None
    failed = [f"last verification failed: {last.detail}"] if last is not None and last.error else []
    return {
        **summary(entry.manifest, entry.grade),
        "size": human_bytes(entry.manifest.stored_bytes),
        "notes": list(entry.manifest.notes),
        "problems": [*failed, *entry.problems, *entry.manifest.warnings],
    }


# ---- the verbs' work ----------------------------------------------------------------------------


def take_verify_retain(config: AgentConfig, node: NodeConfig, progress: ProgressPort) -> Result:
    """What `backup run` does: the members of a BackupSummary. Raises what take and verify raise."""
    repository, clock = _repository(config, node), SystemClock()
    with contextlib.suppress(PgherdError, OSError):
        user = _scratch_user(config)
        parent = scratch_parent(config.state_directory, config.backup.scratch_directory, user)
        sweep_leftovers([parent, *(root / HIDDEN for root in config.policy.restore_roots.values())])
    with repository.writing():
        manifest = take(repository, _take_settings(config, node), clock, progress)
        if config.backup.verify_after:
            verify_backup(repository, manifest.name, clock, progress)
        retain(repository, config.backup.keep)
    return summary(manifest, repository.entry(manifest.name).grade)


def restore_node(config: AgentConfig, node: NodeConfig, name: str, target: Path | None, progress: ProgressPort) -> Result:
    """What `backup restore` does: the members of a RestoreResult."""
    user = _scratch_user(config)
    settings = RestoreSettings(
        scratch_parent=scratch_parent(config.state_directory, config.backup.scratch_directory, user),
        user=user,
        bin_directory=node.bin_directory,
        timeout_s=config.backup.timeout,
        free_min_bytes=config.backup.free_min,
    )
    repository = _repository(config, node)
    if target is None:
        return dataclasses.asdict(restore_to_scratch(repository, name, settings, SystemClock(), progress))
    return dataclasses.asdict(restore_to_directory(repository, name, target, settings, SystemClock(), progress))


def _scratch_user(config: AgentConfig) -> OsUser:
    return server_user(config.backup.scratch_user, "pgherd-scratch", "nobody", "postgres")


def _outcomes(config: AgentConfig, node: NodeConfig) -> Path:
    private_directory(config.state_directory)
    return outcome_directory(config.state_directory, node_ids(config.state_directory, [node.alias])[node.alias])


def _repository(config: AgentConfig, node: NodeConfig) -> NodeRepository:
    return open_repository(config.backup.repository, node.cluster, node.alias)


def _take_settings(config: AgentConfig, node: NodeConfig) -> TakeSettings:
    private_directory(config.state_directory)
    return TakeSettings(
        target=Target(node.conninfo, read_secret(node.password_file) if node.password_file else None),
        cluster=node.cluster,
        node=node.alias,
        node_id=node_ids(config.state_directory, [node.alias])[node.alias],
        bin_directory=node.bin_directory,
        compression=config.backup.compression,
        level=config.backup.level,
        timeout_s=config.backup.timeout,
        lock_wait_timeout_s=config.backup.lock_wait_timeout,
        give_way_after_s=config.backup.give_way_after,
        free_min_bytes=config.backup.free_min,
        role_passwords=config.backup.role_passwords,
    )


def _restore_target(config: AgentConfig, root: str, directory: str) -> Path:
    """The directory that a restore root and a harmless leaf name. Raises DeniedError restore.outside_roots."""
    path = config.policy.restore_roots.get(root)
    if path is None:
        known = ", ".join(sorted(config.policy.restore_roots)) or "none"
        raise DeniedError(
            "restore.outside_roots", f"no restore root is called {root!r}", hint=f"policy.restore_roots has: {known}"
        )
    return path / check_directory_name(directory)


def _say_taken(result: Result) -> None:
    state = "complete" if result["complete"] else "INCOMPLETE"
    click.echo(
        f"{result['name']}: {state}, {human_bytes(result['stored_bytes'])}, {len(result['databases'])} databases; grade: {result['grade']}"
    )
    for warning in result["warnings"]:
        click.echo(f"  warning: {warning}")


# ---- how a verb answers -------------------------------------------------------------------------


def _run_verb(
    verb: OutcomeVerb,
    context: AgentContext,
    alias: str | None,
    work: Callable[[NodeConfig, Progress], Result],
    say: Callable[[Result], None],
    *,
    ndjson: bool,
    result_file: Path | None,
    as_json: bool,
) -> None:
    as_json = as_json or context.json

    def body() -> int:
        with answering(result_file, ndjson=ndjson) as answer:
            progress = Progress(ndjson=ndjson)
            node = context.node(alias)
            try:
                with recording(_outcomes(context.config, node), verb, SystemClock()) as succeeded:
                    result = work(node, progress)
                    succeeded(result)
            finally:
                progress.close()
            answer(result)
        if as_json and not ndjson:
            emit_json(result)
        elif not ndjson:
            say(result)
        return Exit.PARTIAL if result.get("complete") is False else Exit.OK

    sys.exit(command_main(body, as_json=as_json or ndjson))
