"""What `check` knows about a node before it judges. None means: couldn't be read, and the judge says unknown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class DatabaseRights:
    """What the role may read in one database; `error` says why nothing is known."""

    name: str
    error: str = ""
    tables_unreadable: int = 0
    tables_with_rls: int = 0
    large_objects_unreadable: int = 0
    subscriptions: int = 0
    sequences_unreadable: int = 0


@dataclass(frozen=True, slots=True)
class Slot:
    name: str
    slot_type: str
    active: bool
    retained_bytes: int | None
    wal_status: str


@dataclass(frozen=True, slots=True)
class Archiver:
    last_archived_age_s: float | None
    last_failed_age_s: float | None
    last_failed_wal: str
    failed_count: int

    @property
    def failing(self) -> bool:
        """Whether the last attempt failed."""
        if self.last_failed_age_s is None:
            return False
        return self.last_archived_age_s is None or self.last_failed_age_s < self.last_archived_age_s


@dataclass(frozen=True, slots=True)
class ServerSide:
    """What the server says. Settings that the role may not see are missing from `settings`."""

    version_num: int
    role: str
    superuser: bool
    bypass_rls: bool
    replication: bool
    memberships: frozenset[str]
    is_standby: bool
    settings: Mapping[str, str]
    role_settings: Mapping[str, str]  # ALTER ROLE/DATABASE … SET that hit this role
    databases_bytes: int | None
    databases: tuple[DatabaseRights, ...]
    databases_closed: tuple[str, ...]  # allow no connections, so no dump
    slots: tuple[Slot, ...] | None
    archiver: Archiver | None
    application_names: frozenset[str]
    may_read_pg_authid: bool
    statements: Literal["", "extension_absent", "not_preloaded"] | None = None  # what keeps pg_stat_statements away

    @property
    def major(self) -> int:
        return self.version_num // 10000


@dataclass(frozen=True, slots=True)
class Disk:
    avail_bytes: int
    path: str


@dataclass(frozen=True, slots=True)
class HostSide:
    """What this host says."""

    client_major: int | None = None  # of the pg_dump that a backup would use
    client_problem: str = ""
    scratch_problem: str | None = None  # why no scratch server of the node's major can run here, "" when it can
    repository: Disk | None = None
    repository_problem: str = ""
    backups_enabled: bool = True
    role_passwords: bool = True
    restore_roots: Mapping[str, str] = field(default_factory=dict)  # name → problem, "" when usable
    foreign_files: tuple[str, ...] = ()  # configuration of other cluster managers found on this host
    volumes: tuple[str, ...] = ()  # path_kinds of the node that this host can measure
    unmeasured: Mapping[str, str] = field(default_factory=dict)  # probe → why this host can't tell (see probes/local.py)


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything; `server` is None when it couldn't be reached, for the reason in the connection fields."""

    node: str
    host: HostSide
    server: ServerSide | None = None
    connection_code: str = ""
    connection_message: str = ""
    connection_hint: str = ""
