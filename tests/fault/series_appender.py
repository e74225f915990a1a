"""Run as a program by the fault tests: appends to a series store and says on stdout what is acknowledged.

argv: directory, first sequence, mode (`run` until killed, or `full`, `full-die`: see test_series_store_faults),
and for `run` after how many acknowledgements it kills itself, in the very call that acknowledges (0: never).
"""

from __future__ import annotations

import itertools
import json
import resource
import signal
import sys
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from pgherd.proto.errors import TransientError
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.logging import configure
from pgherd.storage.series.batch import Batch, Receipt, Shipment, layout_of
from pgherd.storage.series.store import SeriesSettings, SeriesStore
from pgherd.storage.series.writer import WriterSettings
from support.waiting import wait_until

SERIES = 20
LAYOUT = layout_of({"__name__": "m", "i": str(i)} for i in range(SERIES))
WRITER = WriterSettings(checkpoint_interval_s=0.07, expiry_interval_s=3600.0, commit_points_max=10 * SERIES)


def batch(sequence: int) -> Batch:
    """Sequence n is stored at time n with value n, for every series."""
    ids = np.arange(SERIES, dtype=np.int32)
    columns = np.full(SERIES, sequence, np.int64)
    return Batch(LAYOUT, ids, columns, columns.astype(np.float64), Shipment("agent", "one", sequence))


def say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def run_until_killed(store: SeriesStore, sequence: int, die_after: int) -> None:
    room = threading.Semaphore(40)
    acks = itertools.count(1)

    def acknowledged(number: int, future: Future[Receipt]) -> None:
        room.release()
        say(acked=number, repeated=future.result().repeated)
        if next(acks) == die_after:  # we are in the writer thread: nothing that it would do later happens
            signal.raise_signal(signal.SIGKILL)

    while True:
        room.acquire()
        number = sequence
        store.append(batch(number)).add_done_callback(lambda future, number=number: acknowledged(number, future))  # type: ignore[misc]
        sequence += 1


def read(store: SeriesStore) -> int:
    """How many series can be read; 0 in the moment in which a failed checkpoint closes the database."""
    try:
        return len(store.select([], 0, 1 << 40))
    except TransientError:
        return 0


def fill_the_disk(store: SeriesStore, directory: Path, *, checkpoints: bool) -> None:
    """A file-size limit stands in for the full disk: it needs no root, and write() fails in the middle just the same."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    acked: list[int] = []
    refused: list[str] = []
    sequence = 1
    for _ in range(20):
        store.append(batch(sequence)).result(20)
        acked.append(sequence)
        sequence += 1
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    wal = directory / "series.duckdb.wal"
    resource.setrlimit(resource.RLIMIT_FSIZE, ((wal.stat().st_size if wal.exists() else 0) + 1500, hard))
    while len(refused) < 5:
        try:
            store.append(batch(sequence)).result(20)
            acked.append(sequence)
            sequence += 1
        except TransientError as error:
            refused.append(error.code)
    if checkpoints:
        wait_until(lambda: store.counters.reopened, 20, "a checkpoint to run into the limit too")
    say(series_read_while_full=wait_until(lambda: read(store), 20, "a read while the disk is full"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    for _ in range(5):  # the same sequence again, as a sender would
        store.append(batch(sequence)).result(20)
        acked.append(sequence)
        sequence += 1
    say(acked=acked, refused=refused, writable=store.gauges().is_writable, reopened=store.counters.reopened,
        checkpoints_failed=store.counters.checkpoints_failed)  # fmt: skip


def main() -> None:
    configure(level="warning")  # to stderr: stdout belongs to what is acknowledged
    directory, sequence, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    writer = WRITER if mode != "full" else replace(WRITER, checkpoint_interval_s=3600.0)
    store = SeriesStore.open(directory / "series.duckdb", SeriesSettings(writer=writer), SystemClock())
    say(opened=True, set_aside=store.gauges().set_aside)
    if mode == "run":
        run_until_killed(store, sequence, int(sys.argv[4]))
    fill_the_disk(store, directory, checkpoints=mode == "full-die")
    if mode == "full-die":
        signal.raise_signal(signal.SIGKILL)
    store.close()


if __name__ == "__main__":
    main()
