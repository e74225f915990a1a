"""The spool on a healthy disk: order, counts, bounds, restarts, formats."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pgherd.proto.errors import IntegrityError, PreconditionError
from pgherd.runtime.queue import ledger
from pgherd.runtime.queue.segment import HEADER_BYTES, MAGIC, SegmentHeader, encode_header, encode_record
from support.spooling import drain, is_balanced, open_spool


def noise(size: int) -> bytes:
    return os.urandom(size)


def test_gives_back_what_it_was_given_in_order(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool")
    payloads = [noise(n * 10) for n in range(1, 200)]
    assert all(spool.append(payload, n) for n, payload in enumerate(payloads, 1))
    taken = drain(spool)
    assert [batch.payload for batch in taken] == payloads
    assert [batch.sequence for batch in taken] == list(range(1, 200))
    assert {batch.incarnation for batch in taken} == {spool.incarnation}
    assert spool.status.counts.acked_points == spool.status.counts.sampled_points == sum(range(1, 200))
    assert spool.status.pending_batches == 0
    assert spool.status.oldest_unix_ns == 0
    spool.close()


def test_the_head_stays_until_it_is_released(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool")
    spool.append(b"one", 1)
    spool.append(b"two", 1)
    first = spool.head()
    again = spool.head()
    assert first is not None
    assert again is not None
    assert again.sequence == first.sequence == 1
    spool.release(again, "acked")
    spool.release(again, "acked")  # a second release of the same batch changes nothing
    second = spool.head()
    assert second is not None
    assert second.payload == b"two"
    assert spool.status.counts.acked_batches == 1
    spool.close()


def test_a_group_ends_at_a_gap_in_the_sequences(tmp_path: Path) -> None:
    """The collector counts a group's sequences on from its first: across a gap each would get another batch's."""
    directory = tmp_path / "spool"
    spool = open_spool(directory)
    incarnation = spool.incarnation
    spool.close()
    for path in directory.glob("*.segment"):
        path.unlink()
    records = [encode_record(b"%d" % n, sequence=n, points=1, appended_unix_ns=n, codec=0) for n in (1, 2, 4, 5)]
    segment = encode_header(SegmentHeader(incarnation, 1, 0, 1)) + b"".join(records)
    (directory / f"{1:020d}.segment").write_bytes(segment)
    spool = open_spool(directory)
    groups = []
    while group := spool.heads(256, 1 << 20):
        groups.append([(batch.sequence, batch.payload) for batch in group])
        spool.release_all(group, "acked")
    assert groups == [[(1, b"1"), (2, b"2")], [(4, b"4"), (5, b"5")]]
    spool.close()


def test_restarts_keep_batches_counts_and_sequences(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool")
    incarnation = spool.incarnation
    for n in range(10):
        spool.append(noise(900), n)
    for _ in range(4):
        batch = spool.head()
        assert batch is not None
        spool.release(batch, "acked")
    before = spool.status
    spool.close()
    spool = open_spool(tmp_path / "spool")
    assert spool.incarnation == incarnation
    assert spool.status.counts == before.counts
    assert spool.status.pending_batches == 6
    spool.append(b"after", 1)
    assert [batch.sequence for batch in drain(spool)] == [5, 6, 7, 8, 9, 10, 11]
    spool.close()
    spool = open_spool(tmp_path / "spool")  # everything released: the sequence still goes on
    spool.append(b"later", 1)
    assert [batch.sequence for batch in drain(spool)] == [12]
    spool.close()


def test_released_segments_leave_the_disk(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool")
    for _ in range(50):
        spool.append(noise(900), 1)
    assert len(list((tmp_path / "spool").glob("*.segment"))) > 5
    drain(spool)
    assert len(list((tmp_path / "spool").glob("*.segment"))) == 1
    spool.close()


def test_over_its_bound_the_oldest_goes_and_is_counted(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool", size_max=20_000)
    for _ in range(100):
        assert spool.append(noise(900), 3)
        assert spool.status.size_bytes <= 20_000
    assert sum(path.stat().st_size for path in (tmp_path / "spool").glob("*.segment")) <= 20_000
    taken = drain(spool)
    assert taken[-1].sequence == 100
    assert [batch.sequence for batch in taken] == list(range(taken[0].sequence, 101))
    counts = spool.status.counts
    assert counts.evicted_points == 300 - 3 * len(taken) > 0
    assert counts.refused_points == 0
    assert is_balanced(spool)
    spool.close()


def test_a_batch_larger_than_the_spool_is_refused_and_counted(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool", size_max=5000)
    spool.append(b"small", 1)
    assert not spool.append(noise(6000), 7)
    assert spool.status.counts.refused_points == 7
    assert [batch.payload for batch in drain(spool)] == [b"small"]
    spool.close()


def test_a_batch_evicted_while_on_its_way_counts_once(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool", size_max=6000, segment_max=2000)
    spool.append(noise(900), 5)
    flying = spool.head()
    assert flying is not None
    while spool.status.counts.evicted_points == 0:
        spool.append(noise(900), 1)
    evicted = spool.status.counts.evicted_points
    spool.release(flying, "acked")
    counts = spool.status.counts
    assert counts.acked_points == 5
    assert counts.evicted_points == evicted - 5
    assert is_balanced(spool)
    drain(spool)
    assert spool.status.counts.pending_points == 0
    spool.close()


def test_a_poisonous_batch_is_set_aside_and_the_next_one_comes(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool")
    spool.append(b"poison", 2)
    spool.append(b"good", 1)
    batch = spool.head()
    assert batch is not None
    spool.release(batch, "poisoned")
    assert (tmp_path / "spool" / "set-aside" / "refused-1.otlp").read_bytes() == b"poison"
    assert [batch.payload for batch in drain(spool)] == [b"good"]
    assert spool.status.counts.poisoned_points == 2
    spool.close()


def test_set_aside_files_are_bounded(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool")
    for _ in range(20):
        spool.append(b"poison", 1)
        batch = spool.head()
        assert batch is not None
        spool.release(batch, "poisoned")
    assert len(list((tmp_path / "spool" / "set-aside").iterdir())) == 8
    spool.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool")
    with pytest.raises(PreconditionError, match=r"state\.locked"):
        open_spool(tmp_path / "spool")
    spool.close()
    open_spool(tmp_path / "spool").close()


def test_a_newer_segment_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    spool = open_spool(directory)
    spool.append(b"x", 1)
    spool.close()
    newer = directory / f"{2:020d}.segment"
    content = MAGIC + struct.pack("<HH", 9, 0) + bytes(HEADER_BYTES)
    newer.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"format version 9.*format\.newer"):
        open_spool(directory)
    assert newer.read_bytes() == content
    newer.unlink()
    spool = open_spool(directory)
    assert [batch.payload for batch in drain(spool)] == [b"x"]
    spool.close()


def test_a_newer_ledger_or_identity_is_refused_by_name(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    open_spool(directory).close()
    original = (directory / "ledger").read_bytes()
    (directory / "ledger").write_bytes(original[:135] + bytes([ledger.FORMAT_VERSION + 1]) + original[136:])
    with pytest.raises(IntegrityError, match=r"format\.newer"):
        open_spool(directory)
    (directory / "ledger").write_bytes(original)
    identity = directory / "spool.json"
    identity.write_text(identity.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(IntegrityError, match=r"format\.newer"):
        open_spool(directory)


def test_a_lost_ledger_without_segments_starts_a_new_incarnation(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    spool = open_spool(directory)
    spool.append(b"x", 1)
    drain(spool)
    incarnation = spool.incarnation
    spool.close()
    (directory / "ledger").write_bytes(b"damaged")
    for path in directory.glob("*.segment"):
        path.unlink()
    spool = open_spool(directory)
    assert spool.incarnation != incarnation
    spool.close()


def test_a_lost_ledger_with_segments_ships_again_but_never_reuses_a_sequence(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    spool = open_spool(directory)
    for _ in range(3):
        spool.append(b"x", 1)
    drain(spool)
    spool.close()
    (directory / "ledger").write_bytes(bytes(256))
    spool = open_spool(directory)
    spool.append(b"new", 1)
    assert [batch.sequence for batch in drain(spool)] == [1, 2, 3, 4]
    spool.close()


def test_the_other_ledger_slot_survives_a_torn_write(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    book = ledger.Ledger(path)
    book.write(ledger.Counts(spooled_points=10, acked_points=3))
    book.write(ledger.Counts(spooled_points=10, acked_points=7))
    book.close()
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF  # the second write went into the first slot
    path.write_bytes(bytes(data))
    book = ledger.Ledger(path)
    assert book.counts.acked_points == 3
    book.close()
