"""What a restarted agent does with a command that it had accepted. Pure.

Never broken:

- a command whose child lives is adopted, never started a second time;
- a result that was published is reported, whatever else is known;
- a step that must not be repeated and may have happened ends `indeterminate`, never `failed`, never again;
- every command that has no outcome gets exactly one way on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pgherd.proto.commands import BackupRun, BackupVerify, Diagnostics, Ping, Restore, Verb


class StepKind(StrEnum):
    """What may be done again after a crash."""

    IDEMPOTENT = "idempotent"  # doing it twice is doing it once
    PROBE_THEN_ACT = "probe-then-act"  # looks first, so that a second start does only what is missing
    STAGED = "staged"  # works aside and publishes last: without a result nothing happened
    ONCE = "once"  # may have happened, and must not happen twice


class Resume(StrEnum):
    """The way on."""

    NOTHING = "nothing"  # it has its outcome
    ADOPT = "adopt"  # its child lives: wait for it
    REPORT = "report"  # its child ended and left a result
    RUN = "run"  # it never started, or may be started again
    INTERRUPTED = "interrupted"  # failed; nothing was published
    INDETERMINATE = "indeterminate"  # somebody has to look


@dataclass(frozen=True, slots=True)
class Found:
    """What the journal and the file system say about an accepted command."""

    finished: bool  # an outcome is journalled
    starting: bool  # a child may have been started
    child_alive: bool
    result_present: bool


_WITHOUT_RESULT = {
    StepKind.IDEMPOTENT: Resume.RUN,
    StepKind.PROBE_THEN_ACT: Resume.RUN,
    StepKind.STAGED: Resume.INTERRUPTED,
    StepKind.ONCE: Resume.INDETERMINATE,
}


def step_kind(verb: Verb) -> StepKind:
    """The kind of the one step that a verb is today."""
    match verb:
        case Ping() | Diagnostics():
            return StepKind.IDEMPOTENT
        case BackupRun() | BackupVerify() | Restore():
            return StepKind.STAGED


def resume(kind: StepKind, found: Found) -> Resume:
    """How to go on with a command of `kind`."""
    if found.finished:
        return Resume.NOTHING
    if found.child_alive:
        return Resume.ADOPT
    if found.result_present:
        return Resume.REPORT
    if not found.starting:
        return Resume.RUN
    return _WITHOUT_RESULT[kind]
