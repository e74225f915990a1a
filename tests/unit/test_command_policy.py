"""The local policy as a table: who may have what done on this host."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from pgherd.agent.command.epochs import SeenEpochs
from pgherd.agent.command.policy import decide, policy_of
from pgherd.agent.config import PolicyConfig
from pgherd.proto.commands import BackupRun, BackupVerify, Diagnostics, Offer, Ping, Restore, Verb
from pgherd.proto.errors import ConfigError, DeniedError, IntegrityError

ROOTS = {"drills": Path("/srv/drills")}


def offer(verb: Verb, epoch: int = 0) -> Offer:
    return Offer(str(uuid.uuid4()), str(uuid.uuid4()), verb, 1, 1000, "uid:root", epoch)


DEFAULT, WITH_ROOT = PolicyConfig(), PolicyConfig(restore_roots=ROOTS)


def only(name: str, answer: Literal["allow", "deny"], **more: Any) -> PolicyConfig:
    return PolicyConfig(verbs={name: answer}, **more)


@pytest.mark.parametrize(
    ("config", "verb", "code"),
    [
        (DEFAULT, Ping(), None),
        (DEFAULT, BackupRun(), None),
        (DEFAULT, BackupVerify("b"), None),
        (DEFAULT, Diagnostics(), None),
        (DEFAULT, Restore("b"), None),
        (DEFAULT, Restore("b", "drills", "x"), "restore.outside_roots"),
        (WITH_ROOT, Restore("b", "drills", "x"), None),
        (WITH_ROOT, Restore("b", "elsewhere", "x"), "restore.outside_roots"),
        (only("ping", "deny"), Ping(), "command.denied"),
        (only("ping", "deny"), BackupRun(), None),
        (only("backup.run", "deny"), BackupRun(), "command.denied"),
        (only("backup.run", "deny"), BackupVerify(), None),
        (only("backup.verify", "deny"), BackupVerify(), "command.denied"),
        (only("diagnostics", "deny"), Diagnostics(), "command.denied"),
        (only("restore.scratch", "deny"), Restore("b"), "command.denied"),
        (only("restore.scratch", "deny", restore_roots=ROOTS), Restore("b", "drills", "x"), None),
        (only("restore.directory", "deny", restore_roots=ROOTS), Restore("b", "drills", "x"), "command.denied"),
        (only("restore.directory", "deny"), Restore("b"), None),
    ],
)
def test_policy_table(config: PolicyConfig, verb: Verb, code: str | None) -> None:
    refusal = decide(offer(verb), policy_of(config), seen_epoch=0)
    assert (refusal.code if refusal else None) == code
    assert refusal is None or isinstance(refusal, DeniedError)


def test_a_verb_that_nobody_named_is_denied() -> None:
    policy = policy_of(DEFAULT)
    smaller = replace(policy, allowed=policy.allowed - {"backup.run"})  # as if a later version had added the verb
    assert decide(offer(BackupRun()), smaller, 0) is not None


@pytest.mark.parametrize(("epoch", "seen", "code"), [(0, 9, None), (9, 9, None), (10, 9, None), (8, 9, "command.stale_epoch")])
def test_a_smaller_epoch_is_refused(epoch: int, seen: int, code: str | None) -> None:
    refusal = decide(offer(Ping(), epoch), policy_of(DEFAULT), seen)
    assert (refusal.code if refusal else None) == code


def test_a_mistyped_name_is_refused_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        policy_of(only("backup.rnu", "deny"))
    assert caught.value.code == "config.invalid"


def test_verbs_shown_to_the_collector() -> None:
    assert "restore.directory" not in policy_of(DEFAULT).verbs_allowed()
    assert "restore.directory" in policy_of(WITH_ROOT).verbs_allowed()
    assert "ping" not in policy_of(only("ping", "deny")).verbs_allowed()


def test_epochs_are_kept_and_never_lowered(tmp_path: Path) -> None:
    file = tmp_path / "epochs.json"
    seen = SeenEpochs.open(file)
    seen.see("n", 7)
    seen.see("n", 5)
    assert SeenEpochs.open(file).of("n") == 7
    assert SeenEpochs.open(file).of("other") == 0
    file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(IntegrityError) as caught:
        SeenEpochs.open(file)
    assert caught.value.code == "format.newer"
