"""Ending an identity for good: found by name or id, asked about, told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click

from pgherd.cli.main import CliContext
from pgherd.proto.errors import ConfigError, PreconditionError
from pgherd.runtime.render import emit_json


def end_identity(
    context: CliContext, kind: str, rows: Iterable[Mapping[str, Any]], wanted: str, *, reason: str, yes: bool
) -> None:
    """Revoke the one of `rows` that is called `wanted`; asks first, and never without a person to answer.

    Raises PreconditionError agent.not_found, ConfigError usage.invalid without --yes where nobody can be asked.
    """
    matching = [row for row in rows if wanted in (row["id"], row["name"]) and row["status"] != "revoked"]
    if len(matching) != 1:
        what = f"no {kind}" if not matching else f"more than one {kind}"
        raise PreconditionError("agent.not_found", f"{what} is called {wanted!r}", hint=f"take the id from `pgherd {kind}s ls`")
    (found,) = matching
    if not yes:
        if context.json:
            raise ConfigError("usage.invalid", "this can't be undone", hint="state --yes, since --json asks nothing")
        click.confirm(f"Revoke {found['name']} ({found['id']})?", abort=True)
    answer = context.client.post(f"/api/v1/agents/{found['id']}/revoke", {"reason": reason})
    if context.json:
        emit_json(answer)
    else:
        click.echo(f"revoked; {answer['certificates_revoked']} certificates, {answer['calls_cut']} open calls cut")
