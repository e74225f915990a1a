"""Commands and events mean the same on both sides of the wire, and nothing else can be said."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from pgherd.proto.commands import (
    GRADES,
    VERB_NAMES,
    BackupRun,
    BackupVerify,
    Diagnostics,
    Event,
    Offer,
    Ping,
    Restore,
    Verb,
    check_backup_name,
    check_directory_name,
    policy_name,
    verb_from_json,
    verb_name,
    verb_to_json,
)
from pgherd.proto.control.v1 import control_pb2 as pb
from pgherd.proto.errors import ConfigError, PeerError, TransientError

VERBS: list[Verb] = [
    Ping(),
    BackupRun(),
    BackupVerify(""),
    BackupVerify("20261123T180000.123Z-ab12"),
    Restore("20261123T180000.123Z-ab12"),
    Restore("", "drills", "monday_1"),
    Diagnostics(),
]

RESULTS: list[tuple[Verb, dict[str, object]]] = [
    (Ping(), {"agent_unix_ns": 5}),
    (
        BackupRun(),
        {
            "name": "n", "node_id": "i", "system_identifier": "7", "started_unix_ns": 1, "finished_unix_ns": 2,
            "stored_bytes": 3, "databases": ["a", "b"], "complete": True, "warnings": ["w"], "grade": "read back",
        },
    ),
    (BackupVerify(), {"backup": "n", "grade": "read back", "read_bytes": 9, "duration_s": 0.5}),
    (
        Restore(),
        {"backup": "n", "grade": "content-equal", "tables_compared": 2, "rows_compared": 5, "duration_s": 0.5, "directory": ""},
    ),
    (Diagnostics(), {"findings": [{"check": "c", "severity": "ok", "message": "m", "remedy": "r"}]}),
]  # fmt: skip


def offer(verb: Verb) -> Offer:
    return Offer(str(uuid.uuid4()), str(uuid.uuid4()), verb, 10, 2000, "uid:root", epoch=3)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: f"{verb}")
def test_offers_round_trip(verb: Verb) -> None:
    sent = offer(verb)
    assert Offer.from_wire(pb.CommandOffer.FromString(sent.to_wire().SerializeToString())) == sent
    assert verb_from_json(verb_name(verb), verb_to_json(verb)) == verb


def test_the_lists_here_cover_every_verb() -> None:
    assert {type(verb) for verb in VERBS} == set(VERB_NAMES) == {type(verb) for verb, _ in RESULTS}


@pytest.mark.parametrize(("verb", "body"), RESULTS, ids=lambda value: type(value).__name__)
def test_results_round_trip(verb: Verb, body: dict[str, object]) -> None:
    sent = Event(str(uuid.uuid4()), 4, 11, "succeeded", body)
    assert Event.from_wire(pb.CommandEvent.FromString(sent.to_wire(verb).SerializeToString())) == sent


@pytest.mark.parametrize("kind", ["rejected", "failed", "indeterminate"])
def test_errors_round_trip(kind: str) -> None:
    error = TransientError("command.interrupted", "stopped", hint="again", waited_s=3)
    sent = Event(str(uuid.uuid4()), 2, 11, kind, error.as_dict())
    received = Event.from_wire(pb.CommandEvent.FromString(sent.to_wire(Ping()).SerializeToString()))
    rebuilt = received.error()
    assert received.final
    assert isinstance(rebuilt, TransientError)
    assert (rebuilt.code, rebuilt.message, rebuilt.hint) == (error.code, error.message, error.hint)
    assert rebuilt.context == {"waited_s": "3"}  # context crosses the wire as text


def test_grades_have_the_numbers_of_the_wire() -> None:
    assert [value.name for value in pb.Grade.DESCRIPTOR.values] == [
        f"GRADE_{grade.upper().replace(' ', '_').replace('-', '_')}" for grade in GRADES
    ]


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", ".hidden", "a..b", "a b", "-rf", "x" * 129, "a\n", "a\0"])
def test_names_that_could_leave_their_directory_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        check_backup_name(name)
    with pytest.raises(ConfigError):
        check_directory_name(name)
    wire = offer(BackupVerify("ok")).to_wire()
    wire.backup_verify.backup = name
    with pytest.raises(ConfigError):
        Offer.from_wire(wire)


def test_an_offer_without_a_known_verb_is_unsupported() -> None:
    wire = offer(Ping()).to_wire()
    wire.ClearField("ping")
    with pytest.raises(PeerError) as caught:
        Offer.from_wire(wire)
    assert caught.value.code == "command.unsupported"


def test_verbs_take_no_other_arguments() -> None:
    with pytest.raises(ConfigError):
        verb_from_json("ping", {"shell": "rm"})
    with pytest.raises(ConfigError):
        verb_from_json("shell", {})
    with pytest.raises(ConfigError):
        Restore("b", root="only-root")


def test_policies_tell_the_two_kinds_of_restore_apart() -> None:
    assert policy_name(Restore("b")) == "restore.scratch"
    assert policy_name(Restore("b", "r", "n")) == "restore.directory"


@pytest.mark.parametrize("grade", [-1, 4, 2**31 - 1])
def test_a_grade_that_isn_t_known_proves_nothing(grade: int) -> None:
    """A list index would have read -1 as the best of them."""
    results = [pb.Succeeded() for _ in range(3)]
    open_enum: Any = grade  # any int32 may come over the wire
    results[0].backup_verify.grade = open_enum
    results[1].restore.grade = open_enum
    results[2].backup_run.backup.grade = open_enum
    for result in results:
        with pytest.raises(PeerError):
            Event.from_wire(pb.CommandEvent(command_id=str(uuid.uuid4()), sequence=1, succeeded=result))


@pytest.mark.parametrize("duration_s", [float("nan"), float("inf")])
def test_a_duration_that_json_can_t_carry_is_refused(duration_s: float) -> None:
    """Stored, it would make every listing of commands fail."""
    for result in (
        pb.Succeeded(backup_verify=pb.VerifyResult(duration_s=duration_s)),
        pb.Succeeded(restore=pb.RestoreResult(duration_s=duration_s)),
    ):
        with pytest.raises(PeerError):
            Event.from_wire(pb.CommandEvent(command_id=str(uuid.uuid4()), sequence=1, succeeded=result))
