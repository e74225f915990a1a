"""The journal on disk: what was written is there, what was torn is not, what is damaged or newer is refused."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import uuid
import zlib
from pathlib import Path

import pytest

from pgherd.agent.command.journal import PROGRESS_BLOCK, Journal, Retention
from pgherd.proto.commands import BackupRun, Offer, Ping, Restore, Verb
from pgherd.proto.errors import DeniedError, IntegrityError, PreconditionError, TransientError
from support.control import ManualClock

NODE = "5f0c1df0-3b0e-4f42-8d9b-0f8b1a4a7c11"
DENIED = DeniedError("command.denied", "no").as_dict()


def offer(verb: Verb | None = None) -> Offer:
    return Offer(str(uuid.uuid4()), NODE, verb or Ping(), 1, 1000, "uid:root", epoch=3)


def reopened(journal: Journal, directory: Path, clock: ManualClock, retention: Retention | None = None) -> Journal:
    journal.close()
    return Journal.open(directory, clock, retention)


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    clock = ManualClock()
    journal = Journal.open(tmp_path / "c", clock)
    given = offer(Restore("b", "drills", "x"))
    entry = journal.begin(given, "accepted")
    journal.note_starting(entry)
    journal.note_child(entry, 4711)
    journal.append(entry, "failed", DENIED)
    journal.acknowledge(given.command_id, 1)
    again = reopened(journal, tmp_path / "c", clock).entry(given.command_id)
    assert again is not None
    assert again.offer == given
    assert [(event.sequence, event.kind) for event in again.events] == [(1, "accepted"), (2, "failed")]
    assert (again.starting, again.child_pid, again.acknowledged) == (True, 4711, {1})
    assert again.outcome is not None
    assert again.outcome.body == DENIED


def test_a_sequence_is_never_used_twice_over_a_crash(tmp_path: Path) -> None:
    clock = ManualClock()
    journal = Journal.open(tmp_path / "c", clock)
    entry = journal.begin(offer(BackupRun()), "accepted")
    sent = {journal.progress_sequence(entry) for _ in range(50)}  # sent, and not written anywhere
    journal = reopened(journal, tmp_path / "c", clock)
    again = journal.entries()[0]
    more = {journal.progress_sequence(again) for _ in range(5)}
    assert not sent & more
    final = journal.append(again, "failed", DENIED)
    assert final.sequence > max(number for number in sent | more if number)


def test_progress_stops_at_the_end_of_its_block(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "c", ManualClock())
    entry = journal.begin(offer(), "accepted")
    entry.next_sequence = PROGRESS_BLOCK + 1
    assert journal.progress_sequence(entry) == PROGRESS_BLOCK + 1
    assert journal.progress_sequence(entry) is None


def test_a_journal_torn_at_any_byte_opens_with_what_was_whole(tmp_path: Path) -> None:
    clock = ManualClock()
    journal = Journal.open(tmp_path / "whole", clock)
    given = offer(BackupRun())
    entry = journal.begin(given, "accepted")
    begun_bytes = entry.size_bytes
    journal.note_starting(entry)
    starting_bytes = entry.size_bytes
    journal.append(entry, "failed", DENIED)
    journal.close()
    content = (entry.directory / "journal.jsonl").read_bytes()
    first_two = [len(b"\n".join(content.split(b"\n")[:count])) + 1 for count in (1, 2)]
    for cut in [*range(0, len(content), 7), *first_two, begun_bytes, starting_bytes - 1, starting_bytes, len(content) - 1]:
        directory = tmp_path / "torn"
        shutil.rmtree(directory, ignore_errors=True)
        (directory / given.command_id).mkdir(parents=True)
        file = directory / given.command_id / "journal.jsonl"
        file.write_bytes(content[:cut])
        torn = Journal.open(directory, clock)
        found = torn.entry(given.command_id)
        if cut < first_two[1]:
            assert found is None, cut  # the event wasn't whole: nothing had followed from it
        else:
            assert found is not None, cut
            assert found.starting == (cut >= starting_bytes), cut
            assert found.outcome is None, cut
            torn.append(found, "failed", DENIED)  # and it can be written on
            found = reopened(torn, directory, clock).entry(given.command_id)
            assert found is not None
            assert found.outcome is not None, cut


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    clock = ManualClock()
    journal = Journal.open(tmp_path / "c", clock)
    entry = journal.begin(offer(), "accepted")
    journal.close()
    file = entry.directory / "journal.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"accepted"', b'"rejected"'))
    with pytest.raises(IntegrityError) as caught:
        Journal.open(tmp_path / "c", clock)
    assert caught.value.code == "format.corrupt"
    assert entry.offer.command_id in str(caught.value.context["path"])


@pytest.mark.fault
def test_a_newer_format_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    clock = ManualClock()
    journal = Journal.open(tmp_path / "c", clock)
    entry = journal.begin(offer(), "accepted")
    journal.close()
    file = entry.directory / "journal.jsonl"
    newer = newer_first_line(file.read_bytes())
    file.write_bytes(newer)
    with pytest.raises(IntegrityError) as caught:
        Journal.open(tmp_path / "c", clock)
    assert caught.value.code == "format.newer"
    assert caught.value.context["version"] == 2
    assert file.read_bytes() == newer


def newer_first_line(content: bytes) -> bytes:
    first, _, rest = content.partition(b"\n")
    record = json.loads(first)["record"] | {"version": 2}
    text = json.dumps(record, separators=(",", ":")).encode()
    return b'{"crc32":"%08x","record":%s}\n' % (zlib.crc32(text), text) + rest


def test_two_agents_never_share_a_journal(tmp_path: Path) -> None:
    clock = ManualClock()
    journal = Journal.open(tmp_path / "c", clock)
    with pytest.raises(PreconditionError) as caught:
        Journal.open(tmp_path / "c", clock)
    assert caught.value.code == "state.locked"
    journal.close()


def test_only_what_the_collector_has_is_pruned_the_oldest_first(tmp_path: Path) -> None:
    clock = ManualClock()
    retention = Retention(finished_max=2, age_max_s=100.0)
    journal = Journal.open(tmp_path / "c", clock, retention)
    given = [offer() for _ in range(4)]
    for one in given:
        clock.advance(1)
        entry = journal.begin(one, "accepted")
        journal.append(entry, "succeeded", {"agent_unix_ns": 1})
    assert len(journal.unacknowledged()) == 8
    assert len(journal.unfinished()) == 4
    for one in given[:3]:
        journal.acknowledge(one.command_id, 1)
        journal.acknowledge(one.command_id, 2)
    left = {entry.offer.command_id for entry in journal.entries()}
    assert left == {given[1].command_id, given[2].command_id, given[3].command_id}
    clock.advance(1000)
    journal = reopened(journal, tmp_path / "c", clock, retention)
    assert [entry.offer.command_id for entry in journal.entries()] == [given[3].command_id], "unacknowledged stays"
    assert sorted(child.name for child in (tmp_path / "c").iterdir() if child.is_dir()) == [given[3].command_id]


def test_the_schedule_of_an_agent_without_collector_never_fills_the_journal(tmp_path: Path) -> None:
    clock = ManualClock()
    journal = Journal.open(tmp_path / "c", clock, Retention(finished_max=3))
    asked = offer()
    journal.append(journal.begin(asked, "accepted"), "succeeded", {"agent_unix_ns": 1})
    for _ in range(10):
        clock.advance(3600)
        own = offer()
        entry = journal.begin(own, "accepted", {"issued_here": own.to_json()})
        journal.append(entry, "succeeded", {"agent_unix_ns": 1})
    kept = [entry.offer.command_id for entry in journal.entries()]
    assert len(kept) == 4
    assert {asked.command_id, own.command_id} <= set(kept), "what the collector asked for waits for it"


def test_what_the_wire_cannot_carry_is_not_journalled(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "c", ManualClock())
    entry = journal.begin(offer(BackupRun()), "accepted")
    size_bytes = entry.size_bytes
    with pytest.raises(ValueError, match="nonsense"):
        journal.append(entry, "succeeded", {"nonsense": 1})
    assert entry.size_bytes == size_bytes
    assert entry.outcome is None


@pytest.mark.fault
def test_a_line_that_a_full_disk_cut_leaves_no_trace(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse bytes past the limit, as a full disk does."""
    clock = ManualClock()
    journal = Journal.open(tmp_path / "c", clock)
    entry = journal.begin(offer(BackupRun()), "accepted")
    file = entry.directory / "journal.jsonl"
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(TransientError) as caught:
            journal.append(entry, "failed", DENIED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.code == "disk.full"
    assert file.read_bytes() == before
    assert entry.outcome is None
    journal.append(entry, "failed", DENIED)
    again = reopened(journal, tmp_path / "c", clock).entry(entry.offer.command_id)
    assert again is not None
    assert [event.kind for event in again.events] == ["accepted", "failed"]


@pytest.mark.fault
def test_an_acknowledgement_on_a_full_disk_is_taken_all_the_same(tmp_path: Path) -> None:
    """It comes through the session, which would otherwise end and begin for as long as the disk is full."""
    clock = ManualClock()
    journal = Journal.open(tmp_path / "c", clock)
    entry = journal.begin(offer(BackupRun()), "accepted")
    file = entry.directory / "journal.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, limits[1]))
    try:
        journal.acknowledge(entry.offer.command_id, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert journal.unacknowledged() == []
    journal = reopened(journal, tmp_path / "c", clock)
    assert [event.sequence for _, event in journal.unacknowledged()] == [1], "sent once more after a restart"
