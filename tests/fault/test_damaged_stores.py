"""Damage to the collector's stores: named, set aside or refused, never silently replaced; what agents hold still finds a door."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import grpc
import pytest
from sqlalchemy import func, insert, select

from pgherd.agent.identity.join import join_herd
from pgherd.proto.enrolment import JoinToken
from pgherd.proto.errors import IntegrityError, PgherdError, PreconditionError
from pgherd.storage.control.health import commits_behind_damage
from pgherd.storage.control.schema import settings
from pgherd.storage.control.store import ControlStore
from support.collector import collector
from support.otlp import simple
from support.series import BASE_MS, batch, layout, name_is, open_store, read_all
from support.waiting import wait_until

pytestmark = pytest.mark.fault

ROWS = 300
SERIES, SEQUENCES = 200, 300
_EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


def flipped(content: bytes, *places: int) -> bytes:
    damaged = bytearray(content)
    for at in places:
        damaged[at] ^= 0x55
    return bytes(damaged)


# ---- the control store


@pytest.fixture(scope="module")
def control_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("control") / "control.db"
    store = ControlStore.open(path)
    with store.begin() as connection:
        connection.execute(insert(settings), [{"name": f"n{i}", "value": "v" * 200} for i in range(ROWS)])
    store.close()
    return path.read_bytes()


def rows(store: ControlStore) -> int:
    with store.read() as connection:
        return connection.execute(select(func.count()).select_from(settings)).scalar_one()


def _foreign_database(content: bytes) -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as other:
        other.execute("CREATE TABLE theirs (x)")
        return other.serialize()


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "zero length": lambda _content: b"",
    "cut in half": lambda content: content[: len(content) // 8192 * 4096],
    "last page missing": lambda content: content[:-4096],
    "a DuckDB file": lambda _content: bytes(8) + b"DUCK" + bytes(9000),
    "another program's database": _foreign_database,
    "a page of zeros": lambda content: content[:8192] + bytes(4096) + content[12288:],
    "a header of zeros": lambda content: bytes(100) + content[100:],
}


@pytest.mark.parametrize("damage", WRONG)
def test_a_control_store_that_isnt_one_is_refused_with_what_why_and_what_next(
    tmp_path: Path, control_bytes: bytes, damage: str
) -> None:
    path = tmp_path / "control.db"
    path.write_bytes(WRONG[damage](control_bytes))
    before = path.read_bytes()
    with pytest.raises(IntegrityError) as caught:
        ControlStore.open(path)
    assert caught.value.code == "format.corrupt"
    assert str(path) in caught.value.message
    assert "restore" in (caught.value.hint or "")
    assert path.read_bytes() == before
    with pytest.raises(IntegrityError):
        ControlStore.open(path, create=False)


def test_no_flipped_byte_loses_a_row_of_the_control_store_in_silence(tmp_path: Path, control_bytes: bytes) -> None:
    """SQLite has no checksums: a flip inside a value is beyond what anybody can notice; a lost row isn't."""
    dice = random.Random(4)
    refused = 0
    for at in [*range(16, 100, 7), *(dice.randrange(100, len(control_bytes)) for _ in range(60))]:
        path = tmp_path / f"{at}.db"
        path.write_bytes(flipped(control_bytes, at))
        try:
            store = ControlStore.open(path)
        except PgherdError as error:
            assert error.code in ("format.corrupt", "format.newer"), f"byte {at}: {error}"  # noqa: PT017
            refused += 1
            continue
        assert rows(store) == ROWS, f"byte {at}"
        store.close()
    assert refused > 5


def test_a_missing_control_store_is_not_a_beginning(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    with pytest.raises(PreconditionError) as caught:
        ControlStore.open(path, create=False)
    assert caught.value.code == "store.missing"
    assert list(tmp_path.iterdir()) == []


def crashed_control(directory: Path, commits: int = 12) -> tuple[Path, Path]:
    """A store whose last commits are only in its log, as kill -9 leaves it."""
    live = directory / "live"
    live.mkdir()
    store = ControlStore.open(live / "control.db")
    for number in range(commits):
        with store.begin() as connection:
            connection.execute(insert(settings).values(name=f"n{number}", value="v" * 500))
    path, log = directory / "control.db", directory / "control.db-wal"
    path.write_bytes((live / "control.db").read_bytes())
    log.write_bytes((live / "control.db-wal").read_bytes())
    store.close()
    return path, log


def test_a_damaged_log_of_the_control_store_is_refused_because_sqlite_would_drop_the_rest(tmp_path: Path) -> None:
    path, log = crashed_control(tmp_path)
    good, content = path.read_bytes(), log.read_bytes()
    assert commits_behind_damage(content) == 0
    for at in (5, 17, 32 + 24 + 100, 32 + 4, len(content) // 2):
        path.write_bytes(good)
        log.write_bytes(flipped(content, at))
        with pytest.raises(IntegrityError, match="log") as caught:
            ControlStore.open(path)
        assert caught.value.code == "format.corrupt"
        assert (path.read_bytes(), log.read_bytes()) == (good, flipped(content, at))
    path.write_bytes(good)
    log.write_bytes(content)
    store = ControlStore.open(path)
    assert rows(store) == 12
    store.close()


def test_a_damaged_store_with_a_healthy_log_is_refused_with_both_untouched(tmp_path: Path) -> None:
    """Looking must not move the log into the file: it is what the rescue is made of."""
    path, log = crashed_control(tmp_path)
    page = path.stat().st_size // 2 // 4096 * 4096
    path.write_bytes(path.read_bytes()[:page] + bytes(4096) + path.read_bytes()[page + 4096 :])
    before = path.read_bytes(), log.read_bytes()
    with pytest.raises(IntegrityError):
        ControlStore.open(path)
    assert (path.read_bytes(), log.read_bytes()) == before


def test_a_commit_that_a_crash_tore_is_no_damage(tmp_path: Path) -> None:
    path, log = crashed_control(tmp_path)
    log.write_bytes(flipped(log.read_bytes(), log.stat().st_size - 10))
    store = ControlStore.open(path)
    assert rows(store) == 11  # its commit had not returned
    store.close()


# ---- the series store


@pytest.fixture(scope="module")
def series_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("series")
    store = open_store(directory)
    made, dice = layout(SERIES), random.Random(1)
    for sequence in range(1, SEQUENCES + 1):
        store.append(batch(made, BASE_MS + sequence, [dice.random() for _ in range(SERIES)], sequence)).result(20)
    store.close()
    return (directory / "series.duckdb").read_bytes()


FOREIGN_BYTES: dict[str, Callable[[bytes], bytes]] = {
    "zero length": lambda _content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "random bytes": lambda _content: random.Random(2).randbytes(9000),
    "a SQLite file": lambda _content: b"SQLite format 3\0" + bytes(9000),
    "both headers": lambda content: flipped(content, 4096 + 10, 8192 + 10),
}


@pytest.mark.parametrize("damage", FOREIGN_BYTES)
def test_a_damaged_series_file_is_set_aside_whole_and_the_next_batch_finds_a_door(
    tmp_path: Path, series_bytes: bytes, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "series.duckdb"
    damaged = FOREIGN_BYTES[damage](series_bytes)
    path.write_bytes(damaged)
    log = tmp_path / "series.duckdb.wal"
    log.write_bytes(b"the log that belongs to it" * 20)
    store = open_store(tmp_path)
    (aside,) = tmp_path.glob("series.duckdb.damaged-*Z")
    assert aside.read_bytes() == damaged
    logs = [path.read_bytes() for path in tmp_path.iterdir() if ".wal" in path.name and "damaged" in path.name]
    assert logs == [b"the log that belongs to it" * 20]
    assert "series.store_set_aside" in "".join(capsys.readouterr())
    assert store.gauges().set_aside in (1, 2)  # DuckDB may blame the log first
    assert aside.name in store.notes()[0]
    receipt = store.append(batch(layout(3), BASE_MS + 99, [1.0, 2.0, 3.0], SEQUENCES + 1)).result(20)
    assert (receipt.stored_points, receipt.gap) == (3, SEQUENCES)  # what is missing is counted
    store.close()
    store = open_store(tmp_path)
    assert len(store.select([name_is("m")], 0, 1 << 60)) == 3
    assert store.gauges().set_aside in (1, 2)  # until somebody looks
    store.close()


def test_no_flipped_byte_of_the_series_file_loses_anything_in_silence(tmp_path: Path, series_bytes: bytes) -> None:
    """Set aside, or the answer says that it lacks something, or nothing is missing."""
    dice = random.Random(7)
    seen = set()
    path = tmp_path / "series.duckdb"
    for at in [8, 12, 4096 + 10, 8192 + 10, *(dice.randrange(12288, len(series_bytes)) for _ in range(16))]:
        for left in tmp_path.glob("series.duckdb*"):
            left.unlink()
        path.write_bytes(flipped(series_bytes, at))
        store = open_store(tmp_path)
        if store.gauges().set_aside:
            seen.add("set aside")
        else:
            try:
                found = read_all(store)
            except IntegrityError as error:
                assert error.code == "store.damaged"  # noqa: PT017
                assert store.gauges().damage
                seen.add("named")
            else:
                assert {len(points) for points in found.values()} == {SEQUENCES}, f"byte {at}"
        # Whatever it was: the next batch is stored and outlives a restart.
        store.append(batch(layout(2, "next"), BASE_MS + 99, [1.0, 2.0], SEQUENCES + 1)).result(20)
        store.close()
        store = open_store(tmp_path)
        assert len(store.select([name_is("next")], 0, 1 << 60)) == 2, f"byte {at}"
        store.close()
    assert seen == {"set aside", "named"}


def test_damage_that_the_running_store_meets_is_set_aside_too_and_writing_goes_on(tmp_path: Path, series_bytes: bytes) -> None:
    path = tmp_path / "series.duckdb"
    path.write_bytes(series_bytes)
    store = open_store(tmp_path)
    with path.open("r+b") as file:
        for at in (4096 + 10, 8192 + 10):
            file.seek(at)
            file.write(b"\xaa")
    store._writer._broken = True  # what a failing checkpoint leaves: the writer opens the file again
    receipt = store.append(batch(layout(3), BASE_MS + 99, [1.0, 2.0, 3.0], SEQUENCES + 1)).result(20)
    assert (receipt.stored_points, receipt.gap) == (3, SEQUENCES)
    assert store.gauges().set_aside == 1
    store.close()


def test_a_database_of_somebody_else_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "series.duckdb"
    with duckdb.connect(str(path)) as other:
        other.execute("CREATE TABLE theirs (x INTEGER)")
    before = path.read_bytes()
    with pytest.raises(IntegrityError, match="isn't a series store"):
        open_store(tmp_path)
    assert path.read_bytes() == before


def test_a_file_that_another_program_has_open_is_neither_damaged_nor_moved(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    program = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", program, str(tmp_path / "series.duckdb")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "open\n"
        with pytest.raises(PreconditionError) as caught:
            open_store(tmp_path)
        assert shell.stdin is not None
        shell.stdin.close()
    assert caught.value.code == "state.locked"
    assert list(tmp_path.glob("*damaged*")) == []
    open_store(tmp_path).close()


# ---- the whole collector


@pytest.fixture
def shipping() -> Iterator[tuple[Any, Callable[[int], grpc.StatusCode], dict[str, str]]]:
    with collector() as herd:
        herd.start()
        identity = join_herd(herd.directory / "agent", JoinToken.parse(herd.ask("agents", "add")["token"]))
        parts = [path.read_bytes() for path in (identity.ca_file, identity.key_file, identity.certificate_file)]
        incarnation = str(uuid.uuid4())
        with grpc.secure_channel(f"localhost:{herd.ports['grpc']}", grpc.ssl_channel_credentials(*parts)) as channel:
            export: Any = channel.unary_unary(_EXPORT, None, None)

            def ship(sequence: int) -> grpc.StatusCode:
                body = simple([float(sequence)] * 10, time.time_ns(), agent=identity.agent_id, node="")
                metadata = (("pgherd-incarnation", incarnation), ("pgherd-sequence", str(sequence)))
                try:
                    export(body, timeout=30, metadata=metadata, wait_for_ready=True)
                except grpc.RpcError as error:
                    code: grpc.StatusCode = error.code()
                    return code
                return grpc.StatusCode.OK

            yield herd, ship, herd.token("viewer")


def test_a_collector_with_a_damaged_series_file_starts_says_so_and_takes_what_agents_still_hold(
    shipping: tuple[Any, Callable[[int], grpc.StatusCode], dict[str, str]],
) -> None:
    herd, ship, headers = shipping
    assert [ship(sequence) for sequence in (1, 2, 3)] == [grpc.StatusCode.OK] * 3
    herd.kill()
    path = herd.state / "series.duckdb"
    path.write_bytes(flipped(path.read_bytes(), 4096 + 10, 8192 + 10))
    herd.start()
    with herd.http(headers=headers) as http:
        body = http.get("/readyz").json()
        assert body["ready"]
        assert "set aside" in body["notes"][0]
        assert 'pgherd_store_quarantined{store="series"} 1' in http.get("/metrics").text
        assert "series.store_set_aside" in herd.log
        wait_until(lambda: ship(4) is grpc.StatusCode.OK, 30, "the unacknowledged batch to be taken")
        (books,) = http.get("/api/v1/shipments").json()["items"]
        assert (books["last_sequence"], books["gaps"], books["stored_points"]) == (4, 3, 10)
    assert "Traceback" not in herd.log
