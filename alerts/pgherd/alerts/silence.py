"""Silences and maintenance windows: when they mute which alerts. Pure; zones come in as tzinfo.

A silence has a start and an end. A maintenance window recurs: on some weekdays at a wall-clock time of its zone, for a
span of real time. Where daylight saving leaves a wall-clock time out, the window begins as much later as the clocks were set
forward; where it happens twice, at the first. A muted alert keeps its state; nobody is told of it until the muting ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo

from pgherd.proto.errors import ConfigError
from pgherd.proto.selectors import Matcher

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DURATION_MAX_S = 7 * 86_400.0
_SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Silence:
    """Mutes what matches from `starts_unix_ns` until before `ends_unix_ns`."""

    id: str
    matchers: tuple[Matcher, ...]
    starts_unix_ns: int
    ends_unix_ns: int
    actor: str = ""
    comment: str = ""

    def is_active(self, now_unix_ns: int) -> bool:
        return self.starts_unix_ns <= now_unix_ns < self.ends_unix_ns


@dataclass(frozen=True, slots=True)
class Weekly:
    """On each of `days` (0 Monday … 6 Sunday) at `at` in `zone`, for `duration_s` of real time."""

    days: frozenset[int]
    at: time
    duration_s: float
    zone: tzinfo

    def is_active(self, now_unix_ns: int) -> bool:
        return any(start <= now_unix_ns < start + self._duration_ns for start in self._starts_around(now_unix_ns))

    def next_start_unix_ns(self, now_unix_ns: int) -> int:
        """The first start after now."""
        return min(start for start in self._starts_around(now_unix_ns) if start > now_unix_ns)

    @property
    def _duration_ns(self) -> int:
        return int(self.duration_s * _SECOND_NS)

    def _starts_around(self, now_unix_ns: int) -> list[int]:
        today = datetime.fromtimestamp(now_unix_ns // _SECOND_NS, self.zone).date()
        back_days = int(self.duration_s // 86_400) + 2
        candidates = (today + timedelta(days=offset) for offset in range(-back_days, 9))
        return [self._start_unix_ns(day) for day in candidates if day.weekday() in self.days]

    def _start_unix_ns(self, day: date) -> int:
        # fold=0: of a time that happens twice the first; one that never happens counts with the offset before the change.
        local = datetime.combine(day, self.at, self.zone)
        return int(local.astimezone(UTC).timestamp()) * _SECOND_NS


@dataclass(frozen=True, slots=True)
class Maintenance:
    """A recurring window under a name."""

    id: str
    name: str
    matchers: tuple[Matcher, ...]
    schedule: Weekly
    actor: str = ""
    comment: str = ""

    def is_active(self, now_unix_ns: int) -> bool:
        return self.schedule.is_active(now_unix_ns)


def weekly(days: Sequence[str], at: str, duration_s: float, zone: tzinfo) -> Weekly:
    """From "sat", "02:30" and so on; no days: every day. Raises ConfigError usage.invalid."""
    unknown = [day for day in days if day.lower() not in WEEKDAYS]
    if unknown:
        raise ConfigError("usage.invalid", f"{unknown[0]!r} isn't a weekday", hint=f"days are {', '.join(WEEKDAYS)}")
    if not 60 <= duration_s <= DURATION_MAX_S:
        raise ConfigError("usage.invalid", "a window lasts between a minute and seven days")
    try:
        hour, _colon, minute = at.partition(":")
        wall = time(int(hour), int(minute))
    except ValueError as error:
        raise ConfigError("usage.invalid", f"{at!r} isn't a time of day", hint="write it like 02:30") from error
    numbers = frozenset(WEEKDAYS.index(day.lower()) for day in days) or frozenset(range(7))
    return Weekly(numbers, wall, duration_s, zone)
