"""Totals over successive readings of pg_stat_statements, and which statements get series."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgherd.agent.statements.ledger import Counts, Key, StatementLedger
from pgherd.agent.statements.reader import unpack


def key(queryid: int, database: str = "app") -> Key:
    return Key(queryid, database, "me")


def counts(calls: float, seconds: float = 0.0) -> Counts:
    return Counts(calls, seconds, calls * 2, 0.0, 0.0)


def calls(ledger: StatementLedger, entries: dict[Key, Counts], *, whole: bool = True, database: str = "app") -> float:
    return ledger.read(entries.items(), whole=whole).totals[database].calls


def test_counting_begins_with_the_first_reading() -> None:
    ledger = StatementLedger(10)
    assert calls(ledger, {key(1): counts(1000)}) == 0
    assert calls(ledger, {key(1): counts(1005)}) == 5
    assert calls(ledger, {key(1): counts(1005), key(2): counts(7)}) == 12, "a new statement counts wholly"


def test_a_reset_an_eviction_and_a_return_never_take_anything_away() -> None:
    ledger = StatementLedger(10)
    calls(ledger, {key(1): counts(100), key(2): counts(100)})
    assert calls(ledger, {key(1): counts(110)}) == 10, "2 was evicted"
    assert calls(ledger, {key(1): counts(110), key(2): counts(3)}) == 13, "and began anew"
    assert calls(ledger, {key(1): counts(4), key(2): counts(1)}) == 18, "all was reset"
    assert calls(ledger, {}) == 18


def test_a_reading_that_was_cut_short_counts_only_what_it_knows() -> None:
    ledger = StatementLedger(10)
    calls(ledger, {key(1): counts(100)}, whole=False)
    assert calls(ledger, {key(1): counts(101), key(2): counts(5000)}, whole=False) == 1
    assert calls(ledger, {key(1): counts(101), key(2): counts(5001)}, whole=False) == 2


def test_another_server_s_counts_are_a_new_beginning() -> None:
    ledger = StatementLedger(10)
    calls(ledger, {key(1): counts(10)})
    calls(ledger, {key(1): counts(15)})
    ledger.forget()
    assert calls(ledger, {key(1): counts(90_000)}) == 5
    ledger.keep_databases(["other"])
    assert ledger.read([]).totals == {}


def test_series_go_to_those_that_take_most_time_now() -> None:
    ledger = StatementLedger(1)
    assert list(ledger.read({key(1): counts(1, 100.0), key(2): counts(1, 1.0)}.items()).top) == [key(1)], (
        "at first: in all their life"
    )
    assert list(ledger.read({key(1): counts(1, 100.0), key(2): counts(9, 4.0)}.items()).top) == [key(2)]
    assert list(ledger.read({key(1): counts(2, 104.0), key(2): counts(19, 7.0)}.items()).top) == [key(2)], (
        "who is there stays for a little less"
    )
    assert list(ledger.read({key(1): counts(3, 109.0), key(2): counts(29, 10.0)}.items()).top) == [key(1)]


@given(
    st.lists(st.dictionaries(st.integers(1, 5), st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=5), max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_totals_never_go_back_whatever_is_read(readings: list[dict[int, tuple[int, int]]], whole: list[bool]) -> None:
    ledger = StatementLedger(3)
    before: dict[str, Counts] = {}
    for number, reading in enumerate(readings):
        seen = ledger.read([(key(q), counts(c, float(s))) for q, (c, s) in reading.items()], whole=whole[number])
        assert len(seen.top) == min(3, len(reading))
        for database, total in seen.totals.items():
            assert all(now >= then for now, then in zip(total, before.get(database, total), strict=True))
        before = dict(seen.totals)


def test_the_packed_form() -> None:
    rows: list[dict[str, Any]] = [
        {"datname": "app", "role": "me", "packed": "-5 2 0.5 3 0.00 0,7 1 2.5e-05 0 1 2"},
        {"datname": "", "role": "gone", "packed": "1 2 3 4 5"},  # no id: hidden from this role
        {"datname": "x", "role": "y", "packed": None},
    ]
    assert dict(unpack(rows)) == {
        Key(-5, "app", "me"): Counts(2, 0.5, 3, 0, 0),
        Key(7, "app", "me"): Counts(1, 2.5e-05, 0, 1, 2),
    }
    with pytest.raises(ValueError, match="could not convert"):
        list(unpack([{"datname": "a", "role": "b", "packed": "1 2 3 4 5 x"}]))
