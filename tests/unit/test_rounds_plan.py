"""Which relations get series, whose turn it is, and how much a database may say."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pgherd.agent.rounds.plan import (
    BASIC,
    OTHERS,
    SERIES_PER_INDEX,
    SERIES_PER_TABLE,
    Database,
    relations_allowed,
    visiting_order,
)
from pgherd.agent.rounds.ranking import Ranking, Relation, parse_relations
from pgherd.agent.rounds.walk import load_probes


def tables(**activity: int) -> list[Relation]:
    """t1=5: the table with oid 1 has done 5, all of the same size."""
    return [Relation(int(name[1:]), done, 1, 0) for name, done in activity.items()]


def test_the_text_in_which_a_server_lists_its_relations() -> None:
    assert parse_relations("16385 12 3 0,16390 5 1 16385") == [Relation(16385, 12, 3, 0), Relation(16390, 5, 1, 16385)]
    assert parse_relations(None) == parse_relations("") == []


def test_change_since_the_last_walk_counts_not_a_long_life() -> None:
    ranking = Ranking()
    assert ranking.choose(1, tables(t1=1000, t2=10, t3=0), 1).tables == [1], "at first all that is known is the life so far"
    assert ranking.choose(1, tables(t1=1000, t2=500, t3=0), 1).tables == [2]
    assert ranking.choose(2, tables(t1=1000, t2=500), 1).tables == [1], "another database has a memory of its own"


def test_half_of_the_places_are_for_the_largest() -> None:
    relations = [Relation(oid, 100 - oid, oid, 0) for oid in range(1, 11)]  # the busiest are the smallest
    assert set(Ranking().choose(1, relations, 4).tables) == {1, 2, 10, 9}


def test_a_table_s_activity_includes_its_indexes() -> None:
    relations = [Relation(1, 5, 1, 0), Relation(2, 6, 1, 0), Relation(11, 100, 1, 1)]
    choice = Ranking().choose(1, relations, 1)
    assert (choice.tables, choice.indexes) == ([1], [11])


def test_who_is_reported_stays_unless_another_did_much_more() -> None:
    ranking = Ranking()
    ranking.choose(1, tables(t1=10, t2=0), 1)
    assert ranking.choose(1, tables(t1=20, t2=14), 1).tables == [1]
    assert ranking.choose(1, tables(t1=30, t2=34), 1).tables == [2]


def test_a_reset_counter_counts_from_nothing() -> None:
    ranking = Ranking()
    ranking.choose(1, tables(t1=1000, t2=1000), 1)
    assert ranking.choose(1, tables(t1=40, t2=1010), 1).tables == [1]


def test_memory_has_a_bound_over_all_databases() -> None:
    ranking = Ranking(memory_max=5)
    ranking.choose(1, tables(t1=1, t2=2, t3=3), 1)
    ranking.choose(2, tables(t1=1, t2=2, t3=3), 1)
    assert ranking.remembered == 3, "the second didn't fit and is ranked by its life so far"
    ranking.forget(1)
    ranking.choose(2, tables(t1=1, t2=2, t3=3), 1)
    assert ranking.remembered == 3


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.integers(0, 100), st.integers(0, 100)), max_size=60, unique_by=lambda row: row[0]
    ),
    st.integers(1, 10),
)
def test_never_more_than_the_limit_and_never_the_same_twice(rows: list[tuple[int, int, int]], limit: int) -> None:
    relations = [Relation(oid, activity, pages, 0) for oid, activity, pages in rows]
    chosen = Ranking().choose(1, relations, limit).tables
    assert len(chosen) == len(set(chosen)) == min(limit, len(relations))


def test_who_waited_longest_comes_first_and_the_busiest_of_the_new_ones() -> None:
    databases = [Database(1, "a", 5), Database(2, "b", 50), Database(3, "c"), Database(4, "d")]
    assert [one.oid for one in visiting_order(databases, {3: 20.0, 4: 10.0})] == [2, 1, 4, 3]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(1_000, 50_000))
def test_everybody_together_stays_within_the_bound(databases: int, series_max: int) -> None:
    held: dict[int, int] = {}
    for oid in range(databases):
        allowed = relations_allowed(series_max, 50, databases, held)
        assert 0 <= allowed <= 50
        held[oid] = OTHERS + allowed * (SERIES_PER_TABLE + SERIES_PER_INDEX) if allowed else BASIC
    assert sum(held.values()) <= max(series_max, databases * BASIC)


def test_with_very_many_databases_the_busiest_still_tell_of_their_tables() -> None:
    allowed = [relations_allowed(10_000, 50, 500, dict.fromkeys(range(number), 50 * 34)) for number in range(3)]
    assert allowed[0] == 50
    assert allowed[1] > 30
    assert relations_allowed(10_000, 50, 53, {}) > 3


def test_the_plan_knows_what_a_table_costs() -> None:
    probes = load_probes()
    assert sum(len(column.metrics) for column in probes["tables"].columns) <= SERIES_PER_TABLE
    assert sum(len(column.metrics) for column in probes["indexes"].columns) <= SERIES_PER_INDEX
