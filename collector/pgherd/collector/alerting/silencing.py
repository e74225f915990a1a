"""Silences and maintenance windows in the control store, and which alert they mute now.

Held in memory for the notifier; every change is durable, audited and in force before it is answered.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from sqlalchemy import Connection, delete, insert, select, update

from pgherd.alerts.matchers import matches, parse_matchers
from pgherd.alerts.silence import Maintenance, Silence, weekly
from pgherd.collector.identity.audit import write_audit
from pgherd.proto.clock import Clock
from pgherd.proto.errors import ConfigError, PreconditionError
from pgherd.runtime.logging import get_logger
from pgherd.storage.control.schema import maintenance_windows, silences
from pgherd.storage.control.store import ControlStore
from pgherd.storage.series.patterns import full_matches

_log = get_logger(__name__)

_SILENCE_MAX_S = 366 * 86_400.0
_KEPT_NS = 5 * 86_400 * 1_000_000_000  # an ended silence stays visible this long
_COUNT_MAX = 10_000
_CACHE_MAX = 100_000
_UNIX_NS_MAX = 1 << 62  # the year 2116; the store holds 63 bits


def full_match(pattern: str, text: str) -> bool:
    """RE2 over the whole text. Raises ConfigError promql.parse."""
    return bool(full_matches(pattern, [text])[0])


def zone_of(name: str) -> tzinfo:
    """An IANA time zone. Raises ConfigError usage.invalid."""
    if name == "UTC":
        return UTC  # known also where no time zone database is installed
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ConfigError(
            "usage.invalid", f"{name[:64]!r} isn't a time zone known here", hint="write it like Europe/Zurich, or UTC"
        ) from error


@dataclass(frozen=True, slots=True)
class Author:
    """Who changes something."""

    name: str
    via: str


class Silencer:
    """See the module. Thread-safe."""

    def __init__(self, store: ControlStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._silences: tuple[Silence, ...] = ()
        self._windows: tuple[Maintenance, ...] = ()
        self._matched: dict[tuple[str, str], bool] = {}  # silence, alert's fingerprint → whether it matches

    def load(self) -> None:
        """Take up what is stored, and forget what ended long ago. Raises TransientError store.unavailable."""
        with self._changing() as connection:
            connection.execute(delete(silences).where(silences.c.ends_unix_ns < self._clock.wall_unix_ns() - _KEPT_NS))

    def silenced_by(self, fingerprint: str, labels: Mapping[str, str], now_unix_ns: int) -> tuple[str, ...]:
        """Ids of the silences and windows that mute an alert now."""
        muting: list[Silence | Maintenance] = [*self._silences, *self._windows]
        return tuple(one.id for one in muting if one.is_active(now_unix_ns) and self._matches(one, fingerprint, labels))

    def silences(self) -> list[dict[str, Any]]:
        """All silences, the newest first, each with its state."""
        with self._store.read() as connection:
            rows = connection.execute(select(silences).order_by(silences.c.created_unix_ns.desc())).mappings().all()
        now = self._clock.wall_unix_ns()
        return [{**row, "state": _state(row["starts_unix_ns"], row["ends_unix_ns"], now)} for row in rows]

    def windows(self) -> list[dict[str, Any]]:
        """All maintenance windows with their state (active, waiting, or unusable here) and next start."""
        now = self._clock.wall_unix_ns()
        with self._store.read() as connection:
            rows = connection.execute(select(maintenance_windows).order_by(maintenance_windows.c.name)).mappings().all()
        return [{**row, **_outlook(_window(row), now)} for row in rows]

    def add(
        self,
        matchers: Sequence[str],
        *,
        starts_unix_ns: int | None = None,
        ends_unix_ns: int | None = None,
        duration_s: float | None = None,
        comment: str = "",
        author: Author,
    ) -> str:
        """A new silence, from now unless it says when; returns its id. Raises ConfigError usage.invalid."""
        now = self._clock.wall_unix_ns()
        start = now if starts_unix_ns is None else starts_unix_ns
        if (ends_unix_ns is None) == (duration_s is None):
            raise ConfigError("usage.invalid", "a silence has either an end or a duration")
        end = ends_unix_ns if ends_unix_ns is not None else start + int((duration_s or 0.0) * 1e9)
        if not 0 <= start < end < _UNIX_NS_MAX or end <= now or end - start > int(_SILENCE_MAX_S * 1e9):
            raise ConfigError("usage.invalid", "a silence ends after it begins, in the future, and lasts at most a year")
        _check(matchers)
        id_ = str(uuid.uuid4())
        row = {
            "id": id_,
            "matchers": list(matchers),
            "starts_unix_ns": start,
            "ends_unix_ns": end,
            "created_unix_ns": now,
            "actor": author.name[:255],
            "comment": comment[:4000],
        }
        with self._changing() as connection:
            if len(self._silences) >= _COUNT_MAX:
                raise PreconditionError("usage.invalid", f"more than {_COUNT_MAX} silences", hint="expire some")
            connection.execute(insert(silences).values(row))
            _audit(connection, now, author, "silence.added", id_, matchers=", ".join(matchers), ends_unix_ns=end)
        return id_

    def expire(self, id_: str, author: Author) -> None:
        """End a silence now; one that hasn't begun is deleted, one that is over stays. Raises PreconditionError silence.not_found."""
        now = self._clock.wall_unix_ns()
        with self._changing() as connection:
            row = connection.execute(select(silences).where(silences.c.id == id_)).one_or_none()
            if row is None:
                raise PreconditionError("silence.not_found", f"no silence has the id {id_}")
            if row.ends_unix_ns > now:
                if row.starts_unix_ns >= now:
                    connection.execute(delete(silences).where(silences.c.id == id_))
                else:
                    connection.execute(update(silences).where(silences.c.id == id_).values(ends_unix_ns=now))
                _audit(connection, now, author, "silence.expired", id_)

    def add_window(
        self,
        name: str,
        matchers: Sequence[str],
        *,
        days: Sequence[str],
        at: str,
        duration_s: float,
        zone: str,
        comment: str,
        author: Author,
    ) -> str:
        """A new recurring window; returns its id. Raises ConfigError usage.invalid."""
        now = self._clock.wall_unix_ns()
        _check(matchers)
        schedule = weekly(days, at, duration_s, zone_of(zone))
        id_ = str(uuid.uuid4())
        row = {
            "id": id_,
            "name": name[:255],
            "matchers": list(matchers),
            "days": [day.lower() for day in days],
            "at": schedule.at.strftime("%H:%M"),
            "duration_s": duration_s,
            "zone": zone,
            "created_unix_ns": now,
            "actor": author.name[:255],
            "comment": comment[:4000],
        }
        with self._changing() as connection:
            if len(self._windows) >= _COUNT_MAX:
                raise PreconditionError("usage.invalid", f"more than {_COUNT_MAX} windows", hint="remove some")
            connection.execute(insert(maintenance_windows).values(row))
            _audit(connection, now, author, "maintenance.added", id_, name=name, matchers=", ".join(matchers))
        return id_

    def remove_window(self, id_: str, author: Author) -> None:
        """Delete a window; alerts that it mutes are told at once. Raises PreconditionError silence.not_found."""
        now = self._clock.wall_unix_ns()
        with self._changing() as connection:
            if not connection.execute(delete(maintenance_windows).where(maintenance_windows.c.id == id_)).rowcount:
                raise PreconditionError("silence.not_found", f"no maintenance window has the id {id_}")
            _audit(connection, now, author, "maintenance.removed", id_)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Connection]:
        """One transaction; in force only once it is committed: what a full disk refused must not mute anybody."""
        with self._lock:
            with self._store.begin() as connection:
                yield connection
                silences_now, windows_now = _read(connection)
            self._silences, self._windows = silences_now, windows_now
            self._matched.clear()

    def _matches(self, one: Silence | Maintenance, fingerprint: str, labels: Mapping[str, str]) -> bool:
        known = self._matched.get((one.id, fingerprint))
        if known is None:
            if len(self._matched) >= _CACHE_MAX:
                self._matched.clear()
            known = self._matched[one.id, fingerprint] = matches(one.matchers, labels, full_match)
        return known


def start_in_zone(local: str, zone: str) -> int:
    """ "2026-12-24T22:00" on the wall clocks of a zone, as unix ns. Raises ConfigError usage.invalid."""
    try:
        moment = datetime.fromisoformat(local)
    except ValueError as error:
        raise ConfigError("usage.invalid", f"{local[:64]!r} isn't a time", hint="write it like 2026-12-24T22:00") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone_of(zone))
    return int(moment.timestamp()) * 1_000_000_000


def _check(matchers: Sequence[str]) -> Any:
    if not matchers:
        raise ConfigError("usage.invalid", "it would mute every alert", hint='say which: cluster="main", alertname=~".+"')
    return parse_matchers(matchers, full_match)


def _read(connection: Connection) -> tuple[tuple[Silence, ...], tuple[Maintenance, ...]]:
    rows = connection.execute(select(silences)).mappings()
    found = tuple(
        Silence(row["id"], _check(row["matchers"]), row["starts_unix_ns"], row["ends_unix_ns"], row["actor"], row["comment"])
        for row in rows
    )
    windows = map(_window, connection.execute(select(maintenance_windows)).mappings())
    return found, tuple(window for window in windows if window is not None)


def _window(row: Any) -> Maintenance | None:
    """None, and said in the log, for one that can't be kept here: its time zone went with an update of the database of zones.

    It mutes nobody then, which is the safer of the two errors, and everything else goes on.
    """
    try:
        schedule = weekly(row["days"], row["at"], row["duration_s"], zone_of(row["zone"]))
    except ConfigError as error:
        _log.error("maintenance.unusable", window=row["id"], name=row["name"], error=error.message)
        return None
    return Maintenance(row["id"], row["name"], _check(row["matchers"]), schedule, row["actor"], row["comment"])


def _outlook(window: Maintenance | None, now_unix_ns: int) -> dict[str, Any]:
    if window is None:
        return {"state": "unusable", "next_unix_ns": None}
    state = "active" if window.is_active(now_unix_ns) else "waiting"
    return {"state": state, "next_unix_ns": window.schedule.next_start_unix_ns(now_unix_ns)}


def _state(starts_unix_ns: int, ends_unix_ns: int, now_unix_ns: int) -> str:
    return "expired" if ends_unix_ns <= now_unix_ns else "pending" if starts_unix_ns > now_unix_ns else "active"


def _audit(connection: Connection, now_unix_ns: int, author: Author, action: str, subject: str, **detail: str | int) -> None:
    write_audit(connection, unix_ns=now_unix_ns, actor=author.name, via=author.via, action=action, subject=subject, **detail)
