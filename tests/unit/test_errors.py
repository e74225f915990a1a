"""The error registry and its classes: one code, one kind, one way out."""

from __future__ import annotations

import pytest

from pgherd.proto import errors
from pgherd.proto.codes import REGISTRY, Exit, Kind
from pgherd.proto.errors import ConfigError, PeerError, PgherdError, TransientError, from_dict

CLASSES = {cls.kind: cls for cls in PgherdError.__subclasses__()}


def test_every_kind_has_exactly_one_class() -> None:
    assert set(CLASSES) == set(Kind)
    assert len(PgherdError.__subclasses__()) == len(Kind)


@pytest.mark.parametrize("code", sorted(REGISTRY))
def test_every_code_survives_the_wire(code: str) -> None:
    """An error raised on one side is the same error on the other."""
    info = REGISTRY[code]
    sent = CLASSES[info.kind](code, "what happened", hint="what next", free_bytes=7)
    received = from_dict(sent.as_dict())
    assert type(received) is type(sent)
    assert received.as_dict() == sent.as_dict()


def test_an_unregistered_code_fails_at_once() -> None:
    with pytest.raises(ValueError, match="unregistered"):
        ConfigError("config.nonsense", "x")


def test_a_code_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="registered as"):
        ConfigError("disk.full", "x")


def test_an_unknown_code_from_a_newer_peer_is_named_not_lost() -> None:
    error = from_dict({"code": "quantum.flux", "message": "odd", "hint": "h", "context": {"a": 1}})
    assert isinstance(error, PeerError)
    assert error.context["original_code"] == "quantum.flux"
    assert error.message == "odd"


def test_only_transient_errors_are_retryable() -> None:
    assert TransientError("disk.full", "x").retryable
    assert not ConfigError("config.invalid", "x").retryable


def test_exit_statuses_are_the_documented_ones() -> None:
    assert {e.name: e.value for e in Exit} == {
        "OK": 0, "FAILED": 1, "USAGE": 2, "UNREACHABLE": 3, "DENIED": 4, "NEEDS_APPROVAL": 5, "PARTIAL": 6,
    }  # fmt: skip
    assert REGISTRY["peer.unreachable"].exit_status is Exit.UNREACHABLE
    assert REGISTRY["command.needs_approval"].exit_status is Exit.NEEDS_APPROVAL
    assert REGISTRY["backup.incomplete"].exit_status is Exit.PARTIAL
    assert REGISTRY["command.denied"].exit_status is Exit.DENIED


def test_the_tree_in_the_docstring_names_every_class() -> None:
    assert errors.__doc__ is not None
    for cls in CLASSES.values():
        assert cls.__name__ in errors.__doc__
