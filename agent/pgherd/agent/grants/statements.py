"""SQL for the agent's role, by purpose and server major. Pure.

Never broken: no statement makes a superuser, a CREATEROLE or a CREATEDB; every statement says why.
`check` prints the same statements as remedies, so the two can't drift apart.

Sources: PostgreSQL docs "Predefined Roles", "Row Security Policies", "pg_rewind" (Notes), "Large Objects".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Purpose = Literal["monitor", "backup", "failover"]
PURPOSES: Final[tuple[Purpose, ...]] = ("monitor", "backup", "failover")

DEFAULT_ROLE: Final = "pgherd"

_SAFE_IDENTIFIER_RE = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement; `optional` ones are printed as comments: run them only when the reason applies to you."""

    sql: str
    why: str
    optional: bool = False
    each_database: bool = False  # grants on functions and tables count in one database only


def quoted(name: str) -> str:
    """An identifier as SQL, quoted when it has to be."""
    return name if _SAFE_IDENTIFIER_RE.fullmatch(name) else '"' + name.replace('"', '""') + '"'


def create_role(role: str) -> Statement:
    """The role itself, without a password: set one with \\password, it stays out of logs and history."""
    return Statement(
        f"CREATE ROLE {quoted(role)} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE",
        r"the agent's role; give it a password with \password, or peer authentication in pg_hba.conf",
    )


def grants(role: str, major: int, purposes: Iterable[Purpose]) -> tuple[Statement, ...]:
    """The statements for these purposes on a server of this major, in order."""
    wanted = set(purposes)
    found: list[Statement] = []
    if "monitor" in wanted:
        found += monitor_grants(role, major)
    if "backup" in wanted:
        found += backup_grants(role, major)
    if "failover" in wanted:
        found += failover_grants(role, major)
    return tuple(found)


def monitor_grants(role: str, major: int) -> list[Statement]:
    name = quoted(role)
    found = [Statement(f"GRANT pg_monitor TO {name}", "reads all statistics and settings, and lists pg_wal")]
    if major >= 16:
        found.append(
            Statement(
                f"GRANT pg_use_reserved_connections TO {name}",
                "keeps seeing the server when max_connections is used up; set reserved_connections to 3 or more",
            )
        )
    found.append(statements_extension())
    if major >= 14:
        found.append(
            Statement(
                f"GRANT pg_read_all_data TO {name}",
                "lets it see how full sequences are; pg_monitor doesn't, and a purpose of backup brings it anyway",
                optional=True,
            )
        )
    return found


def statements_extension() -> Statement:
    """The extension behind the statements' figures, in the database that the agent connects to."""
    return Statement(
        "CREATE EXTENSION IF NOT EXISTS pg_stat_statements",
        "figures of statements; needs shared_preload_libraries = 'pg_stat_statements' and a restart first",
        optional=True,
        each_database=True,
    )


def backup_grants(role: str, major: int) -> list[Statement]:
    name = quoted(role)
    found = []
    if major >= 14:
        found.append(Statement(f"GRANT pg_read_all_data TO {name}", "pg_dump reads every table and sequence"))
    else:
        found += [read_schema_13(role, "public")]
    found += [
        Statement(f"ALTER ROLE {name} BYPASSRLS", "pg_dump refuses tables with row level security without it"),
        Statement(
            f"ALTER ROLE {name} SET lo_compat_privileges = on",
            "large objects of other owners are unreadable otherwise; only if you have some",
            optional=True,
        ),
        Statement(
            f"GRANT SELECT ON pg_catalog.pg_authid TO {name}",
            "puts password hashes into the globals; pg_read_all_data brings it on 14+, else say backup.role_passwords = false",
            optional=True,
            each_database=True,
        ),
    ]
    return found


def read_schema_13(role: str, schema: str) -> Statement:
    """PostgreSQL 13 has no pg_read_all_data: the same by schema, for tables of today and of tomorrow."""
    name, where = quoted(role), quoted(schema)
    return Statement(
        f"GRANT USAGE ON SCHEMA {where} TO {name};\n"
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {where} TO {name};\n"
        f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA {where} TO {name};\n"
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA {where} GRANT SELECT ON TABLES TO {name};\n"
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA {where} GRANT SELECT ON SEQUENCES TO {name}",
        "13 has no pg_read_all_data: repeat for every schema; default privileges cover only objects of the role that runs this",
        each_database=True,
    )


_REWIND_FUNCTIONS: Final = (
    "pg_catalog.pg_ls_dir(text, boolean, boolean)",
    "pg_catalog.pg_stat_file(text, boolean)",
    "pg_catalog.pg_read_binary_file(text)",
    "pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean)",
)


def failover_grants(role: str, major: int) -> list[Statement]:
    name = quoted(role)
    found = [
        Statement(f"ALTER ROLE {name} REPLICATION", "streams WAL and base backups when a standby is built or rejoined"),
        Statement(
            f"GRANT EXECUTE ON FUNCTION pg_catalog.pg_promote(boolean, integer) TO {name}",
            "promotes a standby",
            each_database=True,
        ),
    ]
    if major >= 15:
        found.append(Statement(f"GRANT pg_checkpoint TO {name}", "a checkpoint before pg_rewind makes its source certain"))
    found += [
        Statement(
            f"GRANT EXECUTE ON FUNCTION {function} TO {name}", "pg_rewind reads the source through it", each_database=True
        )
        for function in _REWIND_FUNCTIONS
    ]
    return found


def script(role: str, major: int, purposes: Iterable[Purpose], *, create: bool = True) -> str:
    """A psql script, commented; statements that don't apply to everybody are commented out."""
    chosen = sorted(set(purposes), key=PURPOSES.index)
    lines = [
        f"-- pgherd: rights of role {quoted(role)} for {', '.join(chosen)} on PostgreSQL {major}.",
        "-- Run as a superuser on the primary; role memberships reach the standbys by replication.",
        "-- Statements marked [each database] count only in the database you are connected to:",
        "-- run them in the one that the agent's conninfo names (default: postgres).",
    ]
    statements = ([create_role(role)] if create else []) + list(grants(role, major, chosen))
    for statement in statements:
        mark = " [each database]" if statement.each_database else ""
        lines.append("")
        if statement.optional:
            lines.append(f"-- optional: {statement.why}{mark}")
            lines.append(f"-- {statement.sql};")
        else:
            lines.append(f"-- {statement.why}{mark}")
            lines.append(f"{statement.sql};")
    return "\n".join(lines) + "\n"
