"""Where a server's files are on this host, from what the server says. Pure.

Never broken: a place that isn't known has a reason; a path that the owner of the host stated wins over the
server's word; relative paths are taken from the data directory.

Source: PostgreSQL docs "File Locations", "Error Reporting and Logging", "System Information Functions".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

TABLESPACES_MAX: Final = 64  # more of them are named as unknown, not asked

# One row per fact. Settings that the role may not see are missing (pg_monitor sees them all).
PLACES_SQL: Final = """
SELECT name AS fact, setting AS value FROM pg_settings WHERE name IN ('data_directory', 'log_directory', 'logging_collector')
UNION ALL SELECT 'backend_pid', pg_backend_pid()::text
UNION ALL SELECT 'tablespace:' || spcname, pg_tablespace_location(oid)
FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global')
"""


@dataclass(frozen=True, slots=True)
class Places:
    """Paths by path_kind, and reasons by path_kind for those that aren't known."""

    paths: Mapping[str, Path] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)


def nowhere(reason: str) -> Places:
    """The server's files aren't on this host (or nobody may know)."""
    return Places(unknown={"": reason})


def places_of(
    rows: Iterable[Mapping[str, Any]],
    *,
    data_directory: Path | None = None,
    stated: Mapping[str, Path] | None = None,
    stderr_directory: Path | Literal["none", "hidden"] = "hidden",
) -> Places:
    """Places from the answer to PLACES_SQL.

    `data_directory` and `stated` (by path_kind) are the configuration's and win; `stderr_directory` is
    where the postmaster's stderr goes: the logs' place without a logging collector, if that is a file at all.
    """
    facts = {str(row["fact"]): str(row["value"] or "") for row in rows}
    paths: dict[str, Path] = {}
    unknown: dict[str, str] = {}
    root = data_directory or (Path(facts["data_directory"]) if facts.get("data_directory") else None)
    if root is not None:
        paths["data_directory"], paths["pg_wal"] = root, root / "pg_wal"
    else:
        unknown["data_directory"] = unknown["pg_wal"] = "data_directory_hidden"
    if "logging_collector" not in facts or (facts["logging_collector"] == "on" and "log_directory" not in facts):
        unknown["log_directory"] = "log_directory_hidden"
    elif facts["logging_collector"] == "on":
        _place(paths, unknown, "log_directory", facts["log_directory"], root)
    elif isinstance(stderr_directory, Path):
        paths["log_directory"] = stderr_directory
    elif stderr_directory == "hidden":
        unknown["log_directory"] = "stderr_hidden"
    spaces = sorted(fact for fact in facts if fact.startswith("tablespace:"))
    for kind in spaces[:TABLESPACES_MAX]:
        _place(paths, unknown, kind, facts[kind], root)
    if len(spaces) > TABLESPACES_MAX:
        unknown["tablespace"] = "too_many"
    for kind, path in (stated or {}).items():
        paths[kind] = path
        unknown.pop(kind, None)
    return Places(paths, unknown)


def _place(paths: dict[str, Path], unknown: dict[str, str], kind: str, text: str, root: Path | None) -> None:
    if not text:
        unknown[kind] = "not_found"
    elif Path(text).is_absolute():
        paths[kind] = Path(text)
    elif root is not None:
        paths[kind] = root / text
    else:
        unknown[kind] = "data_directory_hidden"
