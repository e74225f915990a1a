"""The ledger against a model: requests, offers, events in any order and number, deadlines, reconnects."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import select

from pgherd.collector.control.herd import Herd
from pgherd.collector.control.ledger import Ledger
from pgherd.collector.control.lifecycle import OPEN_STATES, State
from pgherd.collector.control.views import Views
from pgherd.proto.commands import BackupRun, Event, Offer, Ping, Verb, is_exclusive, verb_name
from pgherd.proto.errors import PreconditionError, TransientError
from pgherd.storage.control.schema import command_events
from pgherd.storage.control.store import ControlStore
from support.control import ManualClock, add_node, enrol

ERROR = TransientError("command.interrupted", "stopped").as_dict()
VERBS: list[Verb] = [Ping(), BackupRun()]
RESULTS: dict[str, dict[str, Any]] = {
    "ping": {"agent_unix_ns": 1},
    "backup.run": {
        "name": "b", "node_id": "", "system_identifier": "7", "started_unix_ns": 1, "finished_unix_ns": 2,
        "stored_bytes": 3, "databases": [], "complete": True, "warnings": [], "grade": "read back",
    },
}  # fmt: skip

_DIRECTORY = tempfile.TemporaryDirectory(prefix="pgherd-ledger-")
_STORE: list[ControlStore] = []


def store() -> ControlStore:
    """One file for all examples: each has an agent of its own, and migrating costs more than an example."""
    if not _STORE:
        _STORE.append(ControlStore.open(Path(_DIRECTORY.name) / "control.db"))
    return _STORE[0]


def teardown_module() -> None:
    for opened in _STORE:
        opened.close()
    _STORE.clear()
    _DIRECTORY.cleanup()


class LedgerMachine(RuleBasedStateMachine):
    """The agent in the model journals before it reports, and reports each event any number of times."""

    @initialize()
    def begin(self) -> None:
        self.clock = ManualClock()
        self.ledger = Ledger(store(), self.clock)
        self.views = Views(store(), Herd(store(), self.clock, heartbeat_interval_s=5))
        self.agent = enrol(store(), f"a-{uuid.uuid4()}")
        self.node = add_node(store(), self.agent, f"n-{uuid.uuid4()}")
        self.issued: dict[str, Verb] = {}
        self.keys: dict[str, tuple[str, Verb]] = {}
        self.journal: dict[str, list[Event]] = {}  # the agent's
        self.delivered: dict[str, set[int]] = {}
        self.final: dict[str, tuple[str, Any, Any]] = {}

    # ---- the operator ---------------------------------------------------------------------------

    @rule(verb=st.sampled_from(VERBS), key=st.sampled_from([None, "k1", "k2"]))
    def submit(self, verb: Verb, key: str | None) -> None:
        full_key = f"{self.agent}-{key}" if key else None
        if key in self.keys and self.keys[key][1] != verb:
            with pytest.raises(PreconditionError, match="idempotency key"):
                self.ledger.submit(self.node, verb, actor="t", via="test", idempotency_key=full_key)
            return
        submitted = self.ledger.submit(self.node, verb, actor="t", via="test", idempotency_key=full_key, accept_within_s=30)
        if key in self.keys:
            assert (submitted.command_id, submitted.created) == (self.keys[key][0], False)
            return
        assert submitted.created
        self.issued[submitted.command_id] = verb
        if key:
            self.keys[key] = (submitted.command_id, verb)

    @rule(seconds=st.sampled_from([1, 20, 40]))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)
        expired = self.ledger.expire_due()
        assert not [one for one in expired if one in self.issued and self.delivered.get(one)]

    # ---- the agent ------------------------------------------------------------------------------

    @rule(lost=st.booleans())
    def offers_arrive(self, lost: bool) -> None:
        for offer in self.ledger.take_offers(self.agent):
            assert 0 < offer.accept_within_ms <= 60_000
            if not lost:
                self._journal(offer)

    def _journal(self, offer: Offer) -> None:
        self.journal.setdefault(offer.command_id, [Event(offer.command_id, 1, self.clock.unix_ns, "accepted")])

    @precondition(lambda self: self.journal)
    @rule(data=st.data(), kind=st.sampled_from(["progress", "succeeded", "failed", "indeterminate"]))
    def something_happens(self, data: st.DataObject, kind: str) -> None:
        command_id = data.draw(st.sampled_from(sorted(self.journal)))
        events = self.journal[command_id]
        if events[-1].final:
            return
        body = {"progress": {"phase": "p", "done": 1, "total": 2, "unit": "bytes"}}.get(kind, ERROR)
        if kind == "succeeded":
            body = RESULTS[verb_name(self.issued[command_id])]
        events.append(Event(command_id, events[-1].sequence + 1, self.clock.unix_ns, kind, body))

    @precondition(lambda self: self.journal)
    @rule(data=st.data())
    def an_event_arrives(self, data: st.DataObject) -> None:
        command_id = data.draw(st.sampled_from(sorted(self.journal)))
        event = data.draw(st.sampled_from(self.journal[command_id]))
        recorded = self.ledger.record(self.agent, event)
        assert recorded.known
        if event.sequence in self.delivered.setdefault(command_id, set()):
            assert not recorded.changed
        self.delivered[command_id].add(event.sequence)

    @rule()
    def the_agent_reconnects(self) -> None:
        unfinished = {one: events[-1].sequence for one, events in self.journal.items()}
        found = self.ledger.reconcile(self.agent, unfinished)
        assert not found.forgotten
        assert not found.unknown
        assert not set(found.offer) & set(self.journal)

    # ---- what must hold -------------------------------------------------------------------------

    @invariant()
    def every_state_is_what_was_delivered(self) -> None:
        for command_id in getattr(self, "issued", {}):
            shown = self.views.command(command_id)
            kinds = {
                event.kind for event in self.journal.get(command_id, []) if event.sequence in self.delivered.get(command_id, ())
            }
            finals = kinds & {"succeeded", "failed", "indeterminate"}
            if finals:
                assert {shown["state"]} == finals
            elif "progress" in kinds:
                assert shown["state"] == "running"
            elif "accepted" in kinds:
                assert shown["state"] == "accepted"
            else:
                assert shown["state"] in ("queued", "offered", "expired")
            if finals:
                seen = (shown["state"], shown["result"], shown["error"])
                assert self.final.setdefault(command_id, seen) == seen, "an outcome changed"

    @invariant()
    def one_exclusive_command_is_out(self) -> None:
        states = [
            State(self.views.command(one)["state"]) for one, verb in getattr(self, "issued", {}).items() if is_exclusive(verb)
        ]
        told = [state for state in states if state in OPEN_STATES and state is not State.QUEUED]
        # Two only when the first was called expired in silence and the agent turned out to have it.
        assert len(told) <= 1 or any(self.views.command(one)["late"] for one in self.issued)

    @invariant()
    def progress_does_not_fill_the_table(self) -> None:
        for command_id in getattr(self, "issued", {}):
            with store().read() as connection:
                rows = connection.execute(select(command_events.c.kind).where(command_events.c.command_id == command_id)).all()
            assert [row.kind for row in rows].count("progress") <= 1


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
