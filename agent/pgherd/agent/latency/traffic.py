"""What the server itself counted during a window: statements, transactions, time spent active. Pure.

Never broken: a counter that was reset, whose databases changed, or that lost entries gives no difference (None with a
reason) instead of a wrong one; what the agent itself caused is taken off.

Source: PostgreSQL docs "pg_stat_statements" (calls, toplevel; pg_stat_statements_info: dealloc, stats_reset) and
"pg_stat_database" (xact_commit, xact_rollback; active_time, 14+: accrued when a statement ends; sessions, 14+: opening
one commits a transaction).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Counters:
    """One reading. `*_key` changes when the counters beside it began anew."""

    transactions: int  # those that only open a session taken off, where the server counts sessions (14+)
    active_s: float | None  # None before PostgreSQL 14
    database_key: str
    statements: int | None  # top-level calls of all roles; None with `statements_reason`
    statements_of_role: int = 0  # those of our own role
    statements_key: str = ""
    statements_evictions: int = 0
    statements_reason: str = ""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What happened between two readings; None is unknown."""

    statements: int | None
    statements_reason: str
    transactions: int | None
    active_s: float | None
    active_slack_s: float = 0.0  # so far off may `active_s` be, for what the agent itself caused isn't known to the second


def counters_of(databases: Mapping[str, Any], statements: Mapping[str, Any] | None, reason: str) -> Counters:
    """From the rows of the two questions in `sampler`."""
    return Counters(
        transactions=int(databases["transactions"]) - int(databases["sessions"] or 0),
        active_s=None if databases["active_ms"] is None else float(databases["active_ms"]) / 1000.0,
        database_key=str(databases["key"]),
        statements=None if statements is None else int(statements["calls"]),
        statements_of_role=0 if statements is None else int(statements["calls_of_role"]),
        statements_key="" if statements is None else str(statements["key"]),
        statements_evictions=0 if statements is None else int(statements["evictions"]),
        statements_reason=reason,
    )


def traffic_between(
    before: Counters | None, after: Counters | None, *, own_looks: int, own_active_s: float, role_is_shared: bool
) -> Traffic:
    """The difference of two readings, without the agent's own.

    Statements under the agent's role are the agent's, unless somebody else was seen working under it: then only the
    looks that were counted here are taken off.
    """
    if before is None or after is None:
        return Traffic(None, "not_read", None, None)
    transactions: int | None = after.transactions - before.transactions
    active_s = None if before.active_s is None or after.active_s is None else after.active_s - before.active_s
    if before.database_key != after.database_key or after.transactions < before.transactions:
        transactions = active_s = None
    if active_s is not None:
        active_s = None if active_s < 0 else max(0.0, active_s - own_active_s)
    statements, reason = _statements_between(before, after)
    own = own_looks  # each a transaction of its own
    if statements is not None:
        of_role = after.statements_of_role - before.statements_of_role
        own = max(own_looks, of_role)
        statements = max(0, statements - (own_looks if role_is_shared else of_role))
    if transactions is not None:
        transactions = max(0, transactions - own)
    return Traffic(statements, reason, transactions, active_s, own_active_s)


def _statements_between(before: Counters, after: Counters) -> tuple[int | None, str]:
    if before.statements is None or after.statements is None:
        return None, after.statements_reason or before.statements_reason
    if before.statements_key != after.statements_key or after.statements < before.statements:
        return None, "statements_reset"
    if before.statements_evictions != after.statements_evictions:
        return None, "statements_evicted"
    return after.statements - before.statements, ""
