"""PromQL over the real series store, and over Debian's Prometheus with the same samples where it is installed.

    python tests/perf/bench_query.py [--series 1000] [--hours 4] [--runs 7]

Both are asked over their HTTP API, in turn, on the same machine; times are medians with the answer read whole. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import numpy as np
from fastapi import FastAPI

from pgherd.collector.api.prometheus import prometheus_router
from pgherd.collector.api.query_pool import QueryPool
from pgherd.collector.config import QueryConfig
from pgherd.runtime.clock import SystemClock
from pgherd.storage.series.batch import Batch, layout_of
from pgherd.storage.series.store import SeriesSettings, SeriesStore
from support.asgi import AsgiClient
from support.prometheus import Dataset, prometheus

STEP_S = 15
QUERIES = {
    "instant selector": ("query", "bench_total", 0),
    "instant sum(rate)": ("query", "sum(rate(bench_total[5m]))", 0),
    "range sum by (node)(rate)": ("query_range", "sum by (node) (rate(bench_total[5m]))", 60),
    "range one series": ("query_range", 'bench_total{series="7"}', 15),
    "range raw": ("query_range", "bench_total", 60),
}


def fill(store: SeriesStore, series: int, times_ms: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> None:
    layout = layout_of({"__name__": "bench_total", "node": f"n{i % 20}", "series": str(i)} for i in range(series))
    for row, moment in enumerate(times_ms):
        batch = Batch(layout, np.arange(series, dtype=np.int32), np.full(series, moment, dtype=np.int64), values[row])
        store.append(batch).result(60)


def median_ms(ask: Callable[[], httpx.Response], runs: int) -> float:
    assert ask().is_success
    spent = []
    for _ in range(runs):
        started = time.perf_counter()
        ask()  # read whole
        spent.append((time.perf_counter() - started) * 1000)
    return round(statistics.median(spent), 1)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    end_s = int(time.time_ns() / 1e9) // 60 * 60  # ends in the past minute, so nothing of it is in the future
    start_s = end_s - int(options.hours * 3600)
    times_ms = np.arange(start_s * 1000 + 7, end_s * 1000, STEP_S * 1000, dtype=np.int64)
    values = np.cumsum(np.random.default_rng(1).poisson(5, (len(times_ms), options.series)), axis=0).astype(np.float64)
    report: dict[str, Any] = {"bench": "query", "series": options.series, "samples": int(values.size), "queries": {}}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = SeriesStore.open(directory / "bench.duckdb", SeriesSettings(), SystemClock())
        stack.callback(store.close)
        fill(store, options.series, times_ms, values)
        pool = QueryPool(SystemClock(), 2)
        stack.callback(pool.close)
        app = FastAPI()
        app.include_router(prometheus_router(store, pool, QueryConfig(), SystemClock(), "bench"))
        ours = stack.enter_context(AsgiClient(app))
        peer = None
        if shutil.which("prometheus") and shutil.which("promtool"):
            (directory / "peer").mkdir()
            dataset: Dataset = {
                ("bench_total", (("node", f"n{i % 20}"), ("series", str(i)))): list(
                    zip(times_ms.tolist(), values[:, i].tolist(), strict=True)
                )
                for i in range(options.series)
            }
            peer = stack.enter_context(prometheus(dataset, directory / "peer"))
        for name, (path, query, step_s) in QUERIES.items():
            parameters: dict[str, Any] = {"query": query}
            parameters |= {"start": start_s + 600, "end": end_s, "step": step_s} if step_s else {"time": end_s}
            row = {"pgherd_ms": median_ms(partial(ours.get, f"/api/v1/{path}", params=parameters), options.runs)}
            if peer is not None:
                row["prometheus_ms"] = median_ms(partial(peer.get, f"/api/v1/{path}", params=parameters), options.runs)
                row["ratio"] = round(row["pgherd_ms"] / row["prometheus_ms"], 2)
            report["queries"][name] = row
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
