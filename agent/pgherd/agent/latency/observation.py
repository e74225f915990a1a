"""One look at pg_stat_activity: what every client backend was doing at one instant of the server's clock. Pure.

Never broken: times are the server's own, so no clock of ours is in any duration; a backend whose state may not be
read is counted as hidden, never as idle.

Source: PostgreSQL docs "pg_stat_activity" (query_start: when the active query began, or the last one if idle;
state_change: when the state was last changed, so their difference is an idle backend's last duration).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Backend(NamedTuple):
    """One client backend. Times are the server's wall clock in seconds. (A tuple: thousands a second are made.)"""

    pid: int
    active: bool
    in_transaction: bool  # of one that isn't active: its transaction goes on
    query_start_s: float
    state_change_s: float
    query_id: int | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """One tick's answer. Idle backends without news since `since_s` of the question may be left out."""

    now_s: float
    backends: tuple[Backend, ...]
    hidden: int = 0  # sessions whose state our role may not see
    untracked: int = 0  # sessions with track_activities off
    role_is_shared: bool = False  # somebody else works under our role


def look_of(rows: Iterable[Mapping[str, Any]]) -> Look:
    """The rows of `sampler.LOOK_SQL` as a Look. There is always at least one, for the clock."""
    now_s, hidden, untracked, shared = 0.0, 0, 0, False
    backends = []
    for row in rows:
        now_s = max(now_s, row["now"])
        pid, state = row["pid"], row["state"]
        if pid is None:
            continue
        shared = shared or bool(row["our_role"])
        if row["hidden"]:
            hidden += 1
        elif state == "disabled":
            untracked += 1
        elif row["query_start"] is not None and row["state_change"] is not None:
            active = state in ("active", "fastpath function call")
            in_transaction = not active and state != "idle"
            backends.append(Backend(pid, active, in_transaction, row["query_start"], row["state_change"], row["query_id"]))
    return Look(now_s, tuple(backends), hidden, untracked, shared)
