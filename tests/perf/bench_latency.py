"""How true the latency percentiles are: against the server's own duration log, beside what the field does. Prints JSON.

    python tests/perf/bench_latency.py [--workload NAME …] [--windows 3] [--seconds 60] [--major 15] [--cost] [--table]

Real PostgreSQL with log_min_duration_statement = 0 is the truth; pgbench makes the load; the agent's samplers look on
with a role that has pg_monitor. Each window gives the true P50/P95/P99, ours with interval and estimator, and two
baselines from pg_stat_statements: the call-weighted percentile of per-statement means, and a lognormal mixture fitted to
calls, total and sum of squares. Windows where ours is wrong or missing are printed like the others. `--cost` measures
what a look costs the agent and the server. Asserts nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg

sys.path.insert(0, str(Path(__file__).parents[1]))

from pgherd.agent.config import NodeConfig, SamplingConfig, SpoolConfig
from pgherd.agent.latency.estimate import QUANTILES, Estimate
from pgherd.agent.latency.sampler import LatencySampler
from pgherd.agent.probes.catalog import load_catalog
from pgherd.agent.sampler import NodeSampler
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.logging import configure
from pgherd.runtime.queue.spool import Spool
from support.postgres import Server, default_major, fleet
from support.sampling import AGENT_ID, NODE_ID
from support.waiting import wait_until

ROWS = 100_000
LOG_LINE_S = 0.00003  # writing the log line comes after its figure and before the session is idle: it is in ours only
_LOOKUP = f"\\set a random(1, {ROWS})\nSELECT abalance FROM accounts WHERE aid = :a;\n"
_ZIPF = f"\\set n random_zipfian(1, {ROWS}, 1.05)\nSELECT sum(abalance) FROM accounts WHERE aid <= :n;\n"
_LOGNORMAL = "\\set g random_gaussian(-5000, 5000, 5.0)\nSELECT pg_sleep({median} * exp({sigma} * :g / 1000.0)) FROM accounts WHERE aid = 1;\n"
_BIMODAL = (
    "SELECT pg_sleep(CASE WHEN random() < 0.02 THEN 1.2 ELSE 0.004 + 0.001 * random() END) FROM accounts WHERE aid = 1;\n"
)
_MIX_UPDATE = f"\\set a random(1, {ROWS})\nUPDATE accounts SET abalance = abalance + 1 WHERE aid = :a;\n"
_TRANSACTION = (
    f"\\set a random(1, {ROWS})\nBEGIN;\nSELECT abalance FROM accounts WHERE aid = :a;\nSELECT pg_sleep(0.004);\n"
    f"UPDATE accounts SET abalance = abalance + 1 WHERE aid = :a;\nEND;\n"
)
_THINKING = (
    "\\set g random_gaussian(-5000, 5000, 5.0)\n\\set us 5000 * exp(1.0 * :g / 1000.0)\nSELECT pg_sleep(:us / 1000000.0) FROM accounts WHERE aid = 1;\n"
    "\\set t 2000 + 4 * :us\n\\sleep :t us\n"
)


@dataclass(frozen=True, slots=True)
class Workload:
    """What pgbench runs: (script, weight) pairs and its options."""

    scripts: Sequence[tuple[str, int]]
    options: Sequence[str]
    about: str


WORKLOADS = {
    "lookups": Workload([(_LOOKUP, 1)], ["-c8", "-R800"], "index lookups, 800/s"),
    "zipf": Workload([(_ZIPF, 1)], ["-c8", "-R100"], "one statement, Zipf range sum, 100/s"),
    "lognormal": Workload([(_LOGNORMAL.format(median=0.021, sigma=1.2), 1)], ["-c16", "-R150"], "lognormal sleep, sigma 1.2"),
    "bimodal": Workload([(_BIMODAL, 1)], ["-c16", "-R150"], "2 % of calls at 1.2 s"),
    "functions-only": Workload(
        [(_BIMODAL.replace(" FROM accounts WHERE aid = 1", ""), 1)], ["-c16", "-R150"], "bimodal, touches no table: counters come late"
    ),
    "saturated": Workload([(_BIMODAL, 1)], ["-c8"], "2 % of calls at 1.2 s, no think time"),
    "lognormal-saturated": Workload([(_LOGNORMAL.format(median=0.021, sigma=1.2), 1)], ["-c8"], "lognormal, no think time"),
    "mix": Workload(
        [(_LOOKUP, 60), (_MIX_UPDATE, 20), (_LOGNORMAL.format(median=0.004, sigma=0.5), 15), (_ZIPF, 5)],
        ["-c8", "-R250"], "60/20/15/5 mix with updates, 250/s",
    ),
    "connection-per-query": Workload(
        [(_LOGNORMAL.format(median=0.021, sigma=1.2), 1)], ["-c8", "-C", "-R40"], "every statement on a new connection (-C)"
    ),
    "transactions": Workload([(_TRANSACTION, 1)], ["-c8", "-R60"], "BEGIN, three statements, END"),
    "prepared-transactions": Workload([(_TRANSACTION, 1)], ["-c8", "-R60", "-Mprepared"], "the same with prepared statements"),
    "prepared-updates": Workload([(_MIX_UPDATE, 1)], ["-c8", "-R200", "-Mprepared"], "extended protocol, autocommit updates"),
    "thinking": Workload([(_THINKING, 1)], ["-c8"], "think time grows with duration"),
}  # fmt: skip
MAIN = ("lookups", "zipf", "lognormal", "bimodal")


# ---- the truth ------------------------------------------------------------------------------------

_LINE = re.compile(r"^(\d+\.\d+) bench LOG:  duration: (\d+\.\d+) ms  (statement|execute|parse|bind)")


def logged(path: Path) -> list[tuple[float, float]]:
    """(end on the server's clock, seconds) of every statement of the load, from the server's log."""
    found = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            match = _LINE.match(line)
            if match and match[3] in ("statement", "execute"):
                found.append((float(match[1]), float(match[2]) / 1000.0))
    return found


def quantile_of(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


# ---- the baselines --------------------------------------------------------------------------------

Totals = dict[tuple[Any, ...], tuple[float, float, float]]  # calls, total s, sum of squares s²

_TOTALS_SQL = """
SELECT userid, dbid, queryid, toplevel, calls, total_exec_time / 1000,
       calls * ((stddev_exec_time / 1000) ^ 2 + (mean_exec_time / 1000) ^ 2)
FROM pg_stat_statements(false) WHERE userid = 'bench'::regrole
"""


def totals(connection: psycopg.Connection[Any]) -> Totals:
    if not connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'pg_stat_statements'").fetchall():
        return {}
    return {tuple(row[:4]): (float(row[4]), float(row[5]), float(row[6])) for row in connection.execute(_TOTALS_SQL)}


def differences(before: Totals, after: Totals) -> list[tuple[float, float, float]]:
    found = []
    for key, now in after.items():
        then = before.get(key, (0.0, 0.0, 0.0))
        delta = (now[0] - then[0], now[1] - then[1], max(0.0, now[2] - then[2]))
        if delta[0] > 0:
            found.append(delta)
    return found


def percentile_of_means(deltas: list[tuple[float, float, float]], share: float) -> float:
    if not deltas:
        return math.nan
    means = sorted((total / calls, calls) for calls, total, _ in deltas)
    wanted, running = share * sum(calls for _, calls in means), 0.0
    for mean, calls in means:
        running += calls
        if running >= wanted:
            return mean
    return math.nan


def lognormal_mixture(deltas: list[tuple[float, float, float]], share: float) -> float:
    """The quantile of lognormals with each statement's mean and variance, mixed by calls."""
    if not deltas:
        return math.nan
    parts = []
    for calls, total, squares in deltas:
        mean = max(total / calls, 1e-9)
        spread = math.log(max(1.0 + 1e-9, squares / calls / mean**2))
        parts.append((calls, math.log(mean) - spread / 2, math.sqrt(spread)))
    everything = sum(calls for calls, _, _ in parts)
    low, high = math.log(1e-7), math.log(1e5)
    for _ in range(80):
        middle = (low + high) / 2
        below = sum(calls * 0.5 * (1 + math.erf((middle - mu) / (sigma * math.sqrt(2)))) for calls, mu, sigma in parts)
        low, high = (middle, high) if below < share * everything else (low, middle)
    return math.exp(low)


# ---- one workload ---------------------------------------------------------------------------------


@contextlib.contextmanager
def load(server: Server, workload: Workload, directory: Path, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """pgbench at work, ended with the block."""
    argv = [str(server.binaries.program("pgbench")), "-n", "-T", str(math.ceil(seconds)), *workload.options]
    for number, (script, weight) in enumerate(workload.scripts):
        path = directory / f"script{number}.sql"
        path.write_text(script, encoding="utf-8")
        argv += ["-f", f"{path}@{weight}"]
    argv += ["-h", str(server.socket_directory), "-p", str(server.port), "-U", "bench", "postgres"]
    with (directory / "pgbench.log").open("wb") as output:
        child = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield child
        finally:
            child.terminate()
            child.wait(20)


def sampler_of(server: Server, directory: Path, window_s: float) -> tuple[NodeSampler, LatencySampler, Spool]:
    clock = SystemClock()
    spool = Spool.open(directory / "spool", SpoolConfig(), clock)
    node = NodeConfig("n", "c", server.conninfo("monitor"))
    sampler = NodeSampler(
        agent_id=AGENT_ID,
        node_id=NODE_ID,
        node=node,
        sampling=SamplingConfig(server_share_max=0.05),  # a machine that is busy with other things sheds nothing here
        catalog=load_catalog(),
        spool=spool,
        clock=clock,
    )
    latency = LatencySampler(
        connection=sampler.connection,
        emitter=sampler.emitter,
        status=lambda: sampler.status,
        window_s=window_s,
        threshold_s=1.0,
        clock=clock,
        budget=sampler.budget,
        chance=random.random,
    )
    return sampler, latency, spool


async def watch(server: Server, directory: Path, windows: int, seconds: float) -> tuple[list[Estimate], list[Totals], float]:
    """Estimates of so many windows, the statements' totals at their ends, and the agent's CPU seconds a second."""
    sampler, latency, spool = sampler_of(server, directory, seconds)
    estimates: list[Estimate] = []
    async with asyncio.TaskGroup() as tasks:
        ticking = tasks.create_task(sampler.run())
        while sampler.status.condition != "up":  # noqa: ASYNC110 - the sampler has no event for it
            await asyncio.sleep(0.05)
        with server.connect() as connection:
            snapshots = [totals(connection)]
            started, cpu = time.monotonic(), time.process_time()
            looking = tasks.create_task(latency.run())
            while len(estimates) < windows:
                await asyncio.sleep(0.2)
                if latency.last is not None and (not estimates or latency.last is not estimates[-1]):
                    estimates.append(latency.last)
                    snapshots.append(totals(connection))
            share = (time.process_time() - cpu) / (time.monotonic() - started)
        looking.cancel()
        ticking.cancel()
    spool.close()
    return estimates, snapshots, share


def judge(estimate: Estimate, truth: list[float], deltas: list[tuple[float, float, float]]) -> dict[str, Any]:
    """One window: truth, ours and the baselines."""
    ordered = sorted(truth)
    over = sum(duration > 1.0 for duration in ordered)
    report: dict[str, Any] = {
        "statements": len(ordered),
        "counted": None if estimate.count is None else round(estimate.count.best),
        "counted_by": None if estimate.count is None else estimate.count.source,
        "over_1s": over,
        "over_1s_ours": estimate.over,
        "ratio": estimate.ratio,
        "looks": [estimate.looks, estimate.missed],
        "sampled": round(estimate.sampled),
        "coverage": round(estimate.coverage, 2),
        "notes": estimate.notes,
        "quantiles": [],
    }
    for quantile in estimate.quantiles:
        true_s = quantile_of(ordered, quantile.share)
        within = quantile.value_s is not None and abs(quantile.value_s - true_s) <= max(0.15 * true_s, 0.0002)
        covered = quantile.low_s is not None and quantile.high_s is not None and quantile.low_s <= true_s <= quantile.high_s
        report["quantiles"].append(
            {
                "quantile": quantile.share,
                "true_ms": true_s * 1000,
                "ours_ms": None if quantile.value_s is None else quantile.value_s * 1000,
                "low_ms": None if quantile.low_s is None else quantile.low_s * 1000,
                "high_ms": None if quantile.high_s is None else quantile.high_s * 1000,
                "estimator": quantile.estimator,
                "reason": quantile.reason,
                "within": within,
                "covered": covered,
                "nearly_covered": quantile.low_s is not None
                and quantile.high_s is not None
                and quantile.low_s - LOG_LINE_S <= true_s <= quantile.high_s + LOG_LINE_S,
                "means_ms": percentile_of_means(deltas, quantile.share) * 1000,
                "lognormal_ms": lognormal_mixture(deltas, quantile.share) * 1000,
            }
        )
    return report


def run(server: Server, log: Path, name: str, windows: int, seconds: float) -> dict[str, Any]:
    workload = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as home:
        directory = Path(home)
        offset = log.stat().st_size
        with load(server, workload, directory, windows * seconds + 15):
            time.sleep(1.0)
            estimates, snapshots, cpu = asyncio.run(watch(server, directory, windows, seconds))
        cut = directory / "cut.log"
        with log.open("rb") as whole:
            whole.seek(offset)
            cut.write_bytes(whole.read())
        statements = logged(cut)
    reports = []
    for number, estimate in enumerate(estimates):
        truth = [took for ended, took in statements if estimate.started_s < ended <= estimate.ended_s]
        reports.append(judge(estimate, truth, differences(snapshots[number], snapshots[number + 1])))
    return {"workload": name, "about": workload.about, "seconds": seconds, "agent_cpu_share": round(cpu, 4), "windows": reports}


# ---- what a look costs ----------------------------------------------------------------------------


def cost(server: Server, connections: int, looks: int = 300) -> dict[str, Any]:
    """CPU of agent and server per look, with so many idle sessions of which a tenth has news."""

    async def work() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
            sessions = [stack.enter_context(server.connect(role="bench")) for _ in range(connections)]
            sampler, latency, spool = sampler_of(server, Path(home), 3600.0)
            await sampler.tick()
            await latency.look()
            (row,) = await sampler.connection.fetch("SELECT pg_backend_pid() AS pid")
            backend = psutil.Process(row["pid"])
            agent_s, server_s = 0.0, sum(backend.cpu_times()[:2])
            for number in range(looks):
                for session in sessions[number % 10 :: 10]:
                    session.execute("SELECT 1")
                before = time.process_time()
                await latency.look()
                agent_s += time.process_time() - before
            server_s = sum(backend.cpu_times()[:2]) - server_s
            await sampler.close()
            spool.close()
            return agent_s / looks, server_s / looks

    agent_s, server_s = asyncio.run(work())
    return {"connections": connections, "agent_share": round(agent_s * 10, 5), "server_share": round(server_s * 10, 5)}


# ---- output ---------------------------------------------------------------------------------------


def _error(value_ms: float | None, true_ms: float) -> str:
    return "—" if value_ms is None or math.isnan(value_ms) or not true_ms > 0 else f"{(value_ms / true_ms - 1) * 100:+.0f}"


def table(report: dict[str, Any]) -> str:
    """Markdown: a row a window; errors in percent of the truth."""
    lines = [
        "| workload | N true / ours | truth ms P50/P95/P99 | ours ms | ours % | interval holds | estimator | means % | lognormal % | > 1 s true / ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part in report["workloads"]:
        for window in part["windows"]:
            quantiles = window["quantiles"]
            estimators = list(dict.fromkeys(quantile["estimator"] for quantile in quantiles))
            over = window["over_1s_ours"]
            lines.append(
                f"| {part['workload']} | {window['statements']} / {window['counted']} ({window['counted_by']}) | "
                + "/".join(f"{q['true_ms']:.3g}" for q in quantiles)
                + " | "
                + "/".join("—" if q["ours_ms"] is None else f"{q['ours_ms']:.3g}" for q in quantiles)
                + " | "
                + "/".join(_error(q["ours_ms"], q["true_ms"]) for q in quantiles)
                + " | "
                + "/".join(
                    "—" if q["low_ms"] is None else "yes" if q["covered"] else "±30 µs" if q["nearly_covered"] else "**no**"
                    for q in quantiles
                )
                + f" | {', '.join(estimators)}{' (' + ', '.join(window['notes']) + ')' if window['notes'] else ''} | "
                + "/".join(_error(q["means_ms"], q["true_ms"]) for q in quantiles)
                + " | "
                + "/".join(_error(q["lognormal_ms"], q["true_ms"]) for q in quantiles)
                + f" | {window['over_1s']} / {'—' if over is None else f'{over[0]:.0f}…{over[1]:.0f}'} |"
            )
    return "\n".join(lines)


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares over all windows: of the published values and of the intervals."""
    quantiles = [quantile for part in parts for window in part["windows"] for quantile in window["quantiles"]]
    published = [quantile for quantile in quantiles if quantile["ours_ms"] is not None]
    intervals = [quantile for quantile in quantiles if quantile["low_ms"] is not None]
    windows = [window for part in parts for window in part["windows"] if window["over_1s_ours"] is not None]
    bracketed = [w for w in windows if w["over_1s_ours"][0] - 1e-6 <= w["over_1s"] <= w["over_1s_ours"][1] + 1e-6]
    return {
        "percentiles": len(quantiles),
        "published": len(published),
        "published_within_15pct_or_200us": sum(quantile["within"] for quantile in published),
        "intervals": len(intervals),
        "intervals_that_hold_the_truth": sum(quantile["covered"] for quantile in intervals),
        "intervals_that_hold_it_within_30us": sum(quantile["nearly_covered"] for quantile in intervals),
        "windows": len(windows),
        "windows_whose_count_above_1s_is_bracketed": len(bracketed),
    }


def output(report: dict[str, Any], *, as_table: bool) -> None:
    if as_table:
        print(table(report))
        print(json.dumps({"summary": report["summary"], "cost": report.get("cost")}, indent=2))
    else:
        print(json.dumps(report, indent=2))


SETTINGS = {
    "log_min_duration_statement": "0", "log_line_prefix": "%n %u ", "max_connections": "260", "shared_buffers": "64MB", "fsync": "on",
}  # fmt: skip


@contextlib.contextmanager
def logging_server(server: Server) -> Iterator[Path]:
    """Run it with its log going straight to a file; the file.

    Not through the logging collector: waking that process after every statement keeps the backend from being idle for
    longer than the statement took, and we would measure the log instead of the server.
    """
    path = server.data_directory.parent / "truth.log"
    with path.open("ab") as log:
        argv = [str(server.binaries.program("postgres")), "-D", str(server.data_directory)]
        user = server.user
        child = subprocess.Popen(
            argv, cwd=server.data_directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            user=user.child_user, group=user.child_group,
        )  # fmt: skip
    try:
        wait_until(lambda: accepts(server), 30, "the server")
        yield path
    finally:
        child.send_signal(signal.SIGINT)  # fast shutdown
        child.wait(60)


def accepts(server: Server) -> bool:
    with contextlib.suppress(psycopg.OperationalError):
        server.execute("SELECT 1")
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=[*WORKLOADS, "main", "all"])
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--major", type=int, default=default_major())
    parser.add_argument("--cost", action="store_true", help="also measure what a look costs")
    parser.add_argument("--table", action="store_true", help="Markdown instead of JSON")
    parser.add_argument("--no-statements", action="store_true", help="without pg_stat_statements")
    parser.add_argument("--read", nargs="+", type=Path, metavar="FILE", help="print what earlier runs wrote, measure nothing")
    options = parser.parse_args()
    configure(level="warning")
    if options.read:
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.read]
        parts = [part for earlier in reports for part in earlier["workloads"]]
        costs = [row for earlier in reports for row in earlier.get("cost", [])]
        output({"workloads": parts, "summary": summary(parts), "cost": costs}, as_table=options.table)
        return
    names = options.workload or ["main"]
    names = [name for given in names for name in (MAIN if given == "main" else WORKLOADS if given == "all" else [given])]
    report: dict[str, Any] = {"bench": "latency", "major": options.major, "quantiles": QUANTILES, "workloads": []}
    with fleet() as servers:
        server = servers.server(options.major, SETTINGS, start=False)
        with logging_server(server) as log:
            server.create_role("monitor", member_of=["pg_monitor"])
            server.create_role("bench")
            server.execute(
                f"CREATE TABLE accounts (aid int PRIMARY KEY, abalance int NOT NULL) WITH (fillfactor = 50);"
                f"INSERT INTO accounts SELECT n, 0 FROM generate_series(1, {ROWS}) AS n;"
                f"ANALYZE accounts; GRANT ALL ON accounts TO bench"
            )
            if not options.no_statements:
                server.execute("CREATE EXTENSION pg_stat_statements")
            for name in names:
                print(f"{name} …", file=sys.stderr)
                report["workloads"].append(run(server, log, name, options.windows, options.seconds))
            if options.cost:
                report["cost"] = [cost(server, connections) for connections in (5, 50, 200)]
    report["summary"] = summary(report["workloads"])
    output(report, as_table=options.table)


if __name__ == "__main__":
    main()
