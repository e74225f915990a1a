"""The series store: what goes in comes out, once, in order, bit for bit."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pytest

from pgherd.proto.errors import ConfigError, IntegrityError, PreconditionError, TransientError
from pgherd.proto.samples import STALE_NAN, STALE_NAN_BITS, Metric, MetricKind
from pgherd.proto.selectors import Matcher, MatchOp
from pgherd.runtime.clock import SystemClock
from pgherd.storage.series.batch import Batch, Shipment, layout_of
from pgherd.storage.series.database import FORMAT_VERSION, Database, DatabaseSettings
from pgherd.storage.series.queue import CommitQueue
from pgherd.storage.series.store import SeriesSettings, SeriesStore
from support.series import BASE_MS, HandClock, batch, layout, name_is, open_store, quiet, read_all
from support.waiting import wait_until

NAN_BITS = [STALE_NAN_BITS, 0x7FF8000000000001, 0x7FF8000000000000, 0xFFF8000000000123, 0x8000000000000000, 0x7FF0000000000000]


def test_samples_come_back_sorted_and_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    made = layout(2)
    for sequence, time_ms in enumerate([BASE_MS + 30, BASE_MS + 10, BASE_MS + 20], 1):
        assert store.append(batch(made, time_ms, [1.0 * sequence, 2.0 * sequence], sequence)).result(10).stored_points == 2
    again = store.append(batch(made, BASE_MS + 99, [9.0, 9.0], 2)).result(10)
    assert again.repeated
    assert again.stored_points == 0
    found = read_all(store)
    assert found[("__name__", "m"), ("i", "0")] == [(BASE_MS + 10, 2.0), (BASE_MS + 20, 3.0), (BASE_MS + 30, 1.0)]
    assert [w.times_ms.tolist() for w in store.select([name_is("m")], BASE_MS + 10, BASE_MS + 20)] == [
        [BASE_MS + 10, BASE_MS + 20]
    ] * 2
    assert store.select([name_is("m")], BASE_MS + 11, BASE_MS + 19) == []
    store.close()


def test_of_equal_times_the_last_committed_is_read(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    made = layout(1)
    for value in (1.0, 2.0, 3.0):
        store.append(batch(made, BASE_MS, [value])).result(10)
    columns = np.array([4.0, 5.0])
    store.append(Batch(made, np.zeros(2, np.int32), np.full(2, BASE_MS + 1, np.int64), columns)).result(10)
    assert read_all(store) == {(("__name__", "m"), ("i", "0")): [(BASE_MS, 3.0), (BASE_MS + 1, 5.0)]}
    store.close()


def test_nan_payloads_survive_arrow_duckdb_checkpoint_and_restart(tmp_path: Path) -> None:
    values = np.array(NAN_BITS * 400, np.uint64).view(np.float64)  # more than one of DuckDB's vectors
    ids = np.zeros(len(values), np.int32)
    times = BASE_MS + np.arange(len(values), dtype=np.int64)
    store = open_store(tmp_path)
    store.append(Batch(layout(1), ids, times, values, Shipment("a", "i", 1))).result(10)
    before = store.select([name_is("m")], 0, 1 << 60)[0].values.view(np.uint64).tolist()
    store.close()  # checkpoints: the column is compressed now
    store = open_store(tmp_path)
    after = store.select([name_is("m")], 0, 1 << 60)[0].values.view(np.uint64).tolist()
    store.close()
    assert before == after == NAN_BITS * 400


def test_high_water_gaps_and_counts_survive_a_restart(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    made = layout(3)
    store.append(batch(made, BASE_MS, [1, 2, 3], 1)).result(10)
    assert store.append(batch(made, BASE_MS + 1, [1, 2, 3], 5)).result(10).gap == 3
    empty = Batch(made, np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0), Shipment("agent-a", "one", 6))
    assert store.append(empty).result(10).stored_points == 0
    store.append(batch(made, BASE_MS + 1, [1, 2, 3], 1, incarnation="two")).result(10)
    store.close()
    store = open_store(tmp_path)
    states = {state.incarnation: state for state in store.shipments()}
    assert (states["one"].last_sequence, states["one"].gaps, states["one"].stored_points) == (6, 3, 6)
    assert (states["two"].last_sequence, states["two"].gaps, states["two"].stored_points) == (1, 0, 3)
    assert store.append(batch(made, BASE_MS, [7, 7, 7], 6)).result(10).repeated
    store.close()


def test_labels_values_series_metadata(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    up = Metric("pg_up", MetricKind.GAUGE, "up or not", "1")
    made = layout_of(
        [{"__name__": "pg_up", "node": "a", "odd": "line\nbreak \x00 é"}, {"__name__": "pg_up", "node": "b", "empty": ""}], [up]
    )
    store.append(batch(made, BASE_MS, [1.0, 0.0], 1)).result(10)
    store.append(batch(layout(1, "other"), BASE_MS + 60_000, [1.0], 2)).result(10)
    store.close()
    store = open_store(tmp_path)
    assert store.label_names([]) == ["__name__", "i", "node", "odd"]
    assert store.label_names([name_is("pg_up")], BASE_MS, BASE_MS) == ["__name__", "node", "odd"]
    assert store.label_values("node", []) == ["a", "b"]
    assert store.label_values("__name__", [], BASE_MS + 1, BASE_MS + 100_000) == ["other"]
    assert store.series([Matcher("node", MatchOp.REGEX, "a|z")]) == [
        {"__name__": "pg_up", "node": "a", "odd": "line\nbreak \x00 é"}
    ]
    assert store.series([Matcher("node", MatchOp.EQUAL, "")]) == [{"__name__": "other", "i": "0"}]
    assert store.metadata() == {"pg_up": up}
    store.close()


def test_hostile_regular_expressions_end_quickly_or_are_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append(batch(layout(1, x="a" * 4000 + "!"), BASE_MS, [1.0])).result(10)
    assert store.series([Matcher("x", MatchOp.REGEX, "(a+)+$")]) == []  # minutes with a backtracking engine
    for pattern in ("(?=a)", "a)|(b", "x{1001}", "(", "a" * 20_000):
        with pytest.raises(ConfigError) as caught:
            store.series([Matcher("x", MatchOp.REGEX, pattern)])
        assert caught.value.code == "promql.parse"
    store.close()


def test_series_limit_refuses_new_series_only(tmp_path: Path) -> None:
    store = open_store(tmp_path, quiet(series_max=2))
    assert store.append(batch(layout(2), BASE_MS, [1, 2], 1)).result(10).points_refused == 0
    receipt = store.append(batch(layout(4), BASE_MS + 1, [1, 2, 3, 4], 2)).result(10)
    assert (receipt.stored_points, receipt.points_refused, receipt.series_refused) == (2, 2, 2)
    assert store.gauges().series == 2
    store.close()


def test_selecting_too_much_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path, replace(quiet(), select_samples_max=5))
    store.append(batch(layout(6), BASE_MS, [1.0] * 6)).result(10)
    assert len(store.select([name_is("m"), Matcher("i", MatchOp.NOT_EQUAL, "0")], 0, 1 << 60)) == 5
    with pytest.raises(PreconditionError) as caught:
        store.select([name_is("m")], 0, 1 << 60)
    assert caught.value.code == "promql.limit"
    store.close()


def test_full_queue_refuses_and_keeps_what_it_has() -> None:
    queue = CommitQueue(points_max=5, bytes_max=1 << 30)
    first = queue.put(batch(layout(9), BASE_MS, [1.0] * 9))  # alone it may be larger than the bound
    with pytest.raises(TransientError) as caught:
        queue.put(batch(layout(1), BASE_MS, [1.0]))
    assert caught.value.code == "ingest.overloaded"
    assert [future for _, future in queue.take(points_max=1, timeout_s=0)] == [first]
    queue.put(batch(layout(1), BASE_MS, [1.0]))
    assert (queue.points, queue.size_bytes > 0) == (1, True)
    assert len(queue.take(points_max=100, timeout_s=0)) == 1
    assert (queue.points, queue.size_bytes) == (0, 0)
    narrow = CommitQueue(points_max=1 << 30, bytes_max=1)
    narrow.put(batch(layout(1), BASE_MS, [1.0]))
    with pytest.raises(TransientError):
        narrow.put(batch(layout(1), BASE_MS, [1.0]))


def test_waiting_batches_share_a_commit(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    made = layout(5)
    barrier = threading.Barrier(8)
    futures: list[Future[object]] = []

    def send(agent: int) -> None:
        barrier.wait(10)
        futures.extend(store.append(batch(made, BASE_MS + n, [1.0] * 5, n, agent=str(agent))) for n in range(1, 26))  # type: ignore[misc]

    threads = [threading.Thread(target=send, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    for future in futures:
        future.result(10)
    assert store.counters.points_stored == 8 * 25 * 5
    assert store.counters.commits < 8 * 25 / 2
    assert {(s.last_sequence, s.stored_points) for s in store.shipments()} == {(25, 125)}
    store.close()


def test_expiry_removes_old_samples_series_and_incarnations(tmp_path: Path) -> None:
    clock = HandClock()
    settings = quiet(retention_s=100.0, expiry_interval_s=0.05, expiry_chunk_rows=10)
    store = open_store(tmp_path, settings, clock)
    store.append(batch(layout(35, "old"), BASE_MS, [1.0] * 35, 1, incarnation="first")).result(10)
    clock.unix_ms += 99_000
    store.append(batch(layout(2, "new"), clock.unix_ms, [1.0] * 2, 1, incarnation="second")).result(10)
    assert len(store.series([])) == 37
    clock.unix_ms += 2_000
    wait_until(lambda: store.counters.series_expired == 35, 10, "the old series to expire")
    assert store.counters.points_expired == 35
    assert read_all(store, "old") == {}
    assert len(read_all(store, "new")) == 2
    assert store.label_values("__name__", []) == ["new"]
    assert [state.incarnation for state in store.shipments()] == ["second"]
    store.append(batch(layout(1, "old"), clock.unix_ms, [5.0], 2, incarnation="second")).result(10)
    store.close()
    store = open_store(tmp_path, clock=clock)
    assert read_all(store, "old") == {(("__name__", "old"), ("i", "0")): [(clock.unix_ms, 5.0)]}
    assert len(store.series([])) == 3
    store.close()


def test_newer_format_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append(batch(layout(1), BASE_MS, [1.0], 1)).result(10)
    store.close()
    path = tmp_path / "series.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'version'", [str(FORMAT_VERSION + 1)])
    before = path.read_bytes()
    with pytest.raises(IntegrityError) as caught:
        open_store(tmp_path)
    assert caught.value.code == "format.newer"
    assert str(path) in caught.value.message
    assert path.read_bytes() == before


def test_foreign_database_is_refused(tmp_path: Path) -> None:
    with duckdb.connect(str(tmp_path / "series.duckdb")) as connection:
        connection.execute("CREATE TABLE somebody_elses (x INTEGER)")
    with pytest.raises(IntegrityError) as caught:
        open_store(tmp_path)
    assert caught.value.code == "format.corrupt"


def test_second_opener_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(PreconditionError) as caught:
        open_store(tmp_path)
    assert caught.value.code == "state.locked"
    store.close()
    open_store(tmp_path).close()


def test_closed_store_refuses_appends_and_reads(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append(batch(layout(1), BASE_MS, [1.0], 1)).result(10)
    store.close()
    with pytest.raises(TransientError) as caught:
        store.append(batch(layout(1), BASE_MS, [1.0], 2))
    assert caught.value.code == "store.unavailable"


def test_hot_database_has_no_index_and_its_storage_version_is_pinned(tmp_path: Path) -> None:
    open_store(tmp_path, SeriesSettings()).close()
    with duckdb.connect(str(tmp_path / "series.duckdb"), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM duckdb_indexes()").fetchone() == (0,)
        assert connection.execute(
            "SELECT count(*) FROM duckdb_constraints() WHERE constraint_type <> 'NOT NULL'"
        ).fetchone() == (0,)
        tags = connection.execute("SELECT tags FROM duckdb_databases() WHERE database_name = 'series'").fetchone()
        assert tags is not None
        assert tags[0]["storage_version"].startswith("v1.5.0")


def test_running_totals_go_on_after_a_restart(tmp_path: Path) -> None:
    """An increase that was acknowledged counts, one that is repeated doesn't, and the series shows no reset."""
    made = replace(layout(3), deltas=(0, 1))

    def put(store: SeriesStore, time_ms: int, values: list[float]) -> tuple[int, int]:
        receipt = store.append(batch(made, BASE_MS + time_ms, values)).result(10)
        return receipt.stored_points, receipt.deltas_repeated

    store = open_store(tmp_path)
    assert put(store, 1, [5.0, 1.0, 7.0]) == (3, 0)
    assert put(store, 2, [2.0, 1.0, 8.0]) == (3, 0)
    assert put(store, 3, [0.5, STALE_NAN, 8.0]) == (3, 0)
    store.close()
    store = open_store(tmp_path)
    assert put(store, 3, [0.5, 3.0, 9.0]) == (2, 1)  # the answer was lost: the first is a repeat, the second had no value
    assert put(store, 4, [1.0, 1.0, 9.0]) == (3, 0)
    read = {dict(labels)["i"]: [value for _, value in samples] for labels, samples in read_all(store).items()}
    assert read["0"] == [5.0, 7.0, 7.5, 8.5]
    assert read["1"][-1] == 6.0
    assert read["2"] == [7.0, 8.0, 9.0, 9.0]
    store.close()


def test_an_owner_has_its_share_and_the_collector_its_reserve(tmp_path: Path) -> None:
    """One that makes new series all the time takes no other's room; the last percent is for what the herd says."""
    clock = HandClock()
    store = open_store(tmp_path, quiet(series_max=200, series_per_owner_max=150, retention_s=60.0), clock)

    def put(owner: str, name: str, count: int) -> tuple[int, int, bool]:
        made = replace(batch(layout(count, name), clock.unix_ms, [1.0] * count), owner=owner)
        receipt = store.append(made).result(10)
        return receipt.stored_points, receipt.points_refused, receipt.over_share

    assert put("agent:mad", "a", 100) == (100, 0, False)
    assert put("agent:mad", "b", 100) == (50, 50, True)
    assert put("agent:calm", "c", 40) == (40, 0, False)
    assert put("agent:calm", "a", 100) == (100, 0, False)  # series that exist cost nobody anything
    assert put("agent:calm", "d", 20) == (8, 12, False)  # the store is full but for the reserve
    assert put("", "own", 3) == (2, 1, False)
    store.close()
    store = open_store(
        tmp_path, quiet(series_max=1000, series_per_owner_max=150, retention_s=60.0, expiry_interval_s=0.05), clock
    )
    assert put("agent:mad", "e", 1) == (0, 1, True)  # a restart gives no new share
    clock.unix_ms += 3_600_000
    wait_until(lambda: store.gauges().series == 0, 20, "what expired to be forgotten")
    assert put("agent:mad", "f", 150) == (150, 0, False)  # and expiry gives room back
    store.close()


def test_a_store_of_version_1_is_upgraded_and_keeps_its_series(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append(batch(layout(2), BASE_MS, [1.0, 2.0])).result(10)
    store.close()
    with duckdb.connect(str(tmp_path / "series.duckdb")) as connection:
        connection.execute("ALTER TABLE series DROP COLUMN owner")
        connection.execute("UPDATE meta SET value = '1' WHERE key = 'version'")
    for series in (2, 3):
        store = open_store(tmp_path)
        assert len(read_all(store)) == series
        assert store.append(replace(batch(layout(3), BASE_MS + 1, [1.0] * 3), owner="agent:a")).result(10).stored_points == 3
        store.close()


def test_few_points_wait_a_moment_for_company_and_many_do_not() -> None:
    queue = CommitQueue(points_max=1000, bytes_max=1 << 30)
    made = layout(3)
    queue.put(batch(made, BASE_MS, [1.0] * 3))
    threading.Timer(0.05, lambda: queue.put(batch(made, BASE_MS, [2.0] * 3))).start()
    assert len(queue.take(points_max=100, timeout_s=0.0, linger_s=30.0, linger_points=6)) == 2
    queue.put(batch(made, BASE_MS, [1.0] * 3))
    assert len(queue.take(points_max=100, timeout_s=0.0, linger_s=0.01, linger_points=6)) == 1
    queue.put(batch(made, BASE_MS, [1.0] * 3))
    queue.close()
    assert len(queue.take(points_max=100, timeout_s=0.0, linger_s=30.0, linger_points=6)) == 1


def test_a_few_series_and_many_are_selected_alike(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append(batch(layout(200), BASE_MS, [float(number) for number in range(200)])).result(10)
    for pattern, wanted in (("7", 1), ("[0-9]|[1-5][0-9]", 60), ("[0-9]{1,2}", 100), (".*", 200)):
        found = store.select([name_is("m"), Matcher("i", MatchOp.REGEX, pattern)], BASE_MS, BASE_MS)
        assert sorted(float(window.labels["i"]) for window in found) == sorted(float(window.values[0]) for window in found)
        assert len(found) == wanted
    store.close()


def test_a_read_that_takes_too_long_is_cut_off_and_the_next_is_not(tmp_path: Path) -> None:
    database = Database.open(tmp_path / "s.duckdb", DatabaseSettings(read_timeout_s=0.3), SystemClock())
    for _ in range(2):
        with pytest.raises(TransientError) as caught, database.read() as cursor:
            cursor.execute("SELECT max(hash(a.i + b.j)) FROM range(10000000) a(i), range(10000000) b(j)").fetchone()
        assert caught.value.code == "query.timeout"
        with database.read() as cursor:
            assert cursor.execute("SELECT 1").fetchone() == (1,)
    database.close()
