"""The spool against a model: any mixture of appends, releases, restarts and cuts loses only what is counted."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pgherd.runtime.queue.segment import (
    HEADER_BYTES,
    SegmentHeader,
    Tail,
    decode_header,
    encode_header,
    encode_record,
    payload_of,
    scan,
)
from support.spooling import drain, is_balanced, open_spool

INCARNATION = "33333333-3333-4333-8333-333333333333"
HEADER = encode_header(SegmentHeader(INCARNATION, 1, 0, 123))

batches = st.lists(st.tuples(st.binary(max_size=60), st.integers(0, 2**32 - 1)), max_size=12)


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pgherd-spool-") as path:
        yield Path(path) / "spool"


@given(batches, st.data())
def test_a_cut_at_any_byte_leaves_the_records_before_it(content: list[tuple[bytes, int]], data: st.DataObject) -> None:
    records = [
        encode_record(payload, sequence=n, points=points, appended_unix_ns=n, codec=0)
        for n, (payload, points) in enumerate(content, 1)
    ]
    whole = HEADER + b"".join(records)
    cut = data.draw(st.integers(HEADER_BYTES, len(whole)))
    found, end, tail = scan(whole[:cut])
    ends = [HEADER_BYTES + sum(map(len, records[: n + 1])) for n in range(len(records))]
    complete = sum(e <= cut for e in ends)
    assert [(r.sequence, r.points) for r in found] == [(n, content[n - 1][1]) for n in range(1, complete + 1)]
    assert [payload_of(whole[r.offset : r.offset + r.size]) for r in found] == [payload for payload, _ in content[:complete]]
    assert end == ([HEADER_BYTES, *ends])[complete]
    assert tail is (Tail.CLEAN if cut == end else Tail.TORN)


@given(batches.filter(bool), st.data())
def test_a_flipped_bit_never_yields_a_wrong_record(content: list[tuple[bytes, int]], data: st.DataObject) -> None:
    whole = bytearray(HEADER)
    for n, (payload, points) in enumerate(content, 1):
        whole += encode_record(payload, sequence=n, points=points, appended_unix_ns=n, codec=0)
    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] ^= 1 << data.draw(st.integers(0, 7))
    if position < HEADER_BYTES:
        header = decode_header(bytes(whole))
        assert header is None or header.version > 1 or header == decode_header(HEADER)
        return
    found, _, tail = scan(bytes(whole))
    assert tail is not Tail.CLEAN
    for record, (payload, points) in zip(found, content, strict=False):
        assert payload_of(bytes(whole[record.offset : record.offset + record.size])) == payload
        assert record.points == points


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(1, 400).map(lambda n: ("append", n)), st.just(("ack", 0)), st.just(("restart", 0))), max_size=40
    )
)
def test_any_history_keeps_order_sequences_and_the_balance(steps: list[tuple[str, int]]) -> None:
    with directory() as path:
        spool = open_spool(path, size_max=4000, segment_max=700)
        offered: dict[int, int] = {}
        acked: list[int] = []
        sequence = 0
        for verb, size in steps:
            if verb == "append":
                assert spool.append(os.urandom(size), size)
                sequence += 1
                offered[sequence] = size
            elif verb == "ack" and (batch := spool.head()) is not None:
                assert batch.points == offered[batch.sequence] == len(batch.payload)
                acked.append(batch.sequence)
                spool.release(batch, "acked")
            elif verb == "restart":
                spool.close()
                spool = open_spool(path, size_max=4000, segment_max=700)
            assert is_balanced(spool)
            assert spool.status.size_bytes <= 4000
            assert spool.status.counts.sampled_points == sum(offered.values())
        acked += [batch.sequence for batch in drain(spool)]
        assert acked == sorted(set(acked)), "in order, each once"
        counts = spool.status.counts
        assert counts.acked_points == sum(offered[n] for n in acked)
        assert counts.evicted_points == sum(offered.values()) - counts.acked_points
        assert counts.lost_points == counts.corrupt_segments == 0
        spool.close()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.data())
def test_damage_anywhere_never_reuses_a_sequence(count: int, data: st.DataObject) -> None:
    """A collector that has seen sequences up to `count` must never get one of them with other content."""
    with directory() as path:
        spool = open_spool(path, segment_max=600)
        for n in range(count):
            spool.append(bytes([n]) * 100, 1)
        spool.close()
        victim = data.draw(st.sampled_from(sorted(path.glob("*.segment"))))
        content = bytearray(victim.read_bytes())
        kind = data.draw(st.sampled_from(["flip", "cut"]))
        position = data.draw(st.integers(10, len(content) - 1))  # a flipped version is the newer-format test
        if kind == "flip":
            content[position] ^= 0xFF
        else:
            del content[position:]
        victim.write_bytes(content)
        ledger_lost = kind == "flip" and data.draw(st.booleans())
        if ledger_lost:
            (path / "ledger").write_bytes(bytes((path / "ledger").stat().st_size))
        for _ in range(data.draw(st.integers(1, 3))):  # restarts before anything new is appended
            spool = open_spool(path, segment_max=600)
            spool.close()
        spool = open_spool(path, segment_max=600)
        spool.append(b"new", 1)
        taken = drain(spool)
        assert taken[-1].payload == b"new"
        assert taken[-1].sequence > count
        for batch in taken[:-1]:
            assert batch.payload == bytes([batch.sequence - 1]) * 100
        counts = spool.status.counts
        assert ledger_lost or counts.acked_points + counts.lost_points == count + 1
        assert is_balanced(spool)
        spool.close()
