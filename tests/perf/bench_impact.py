"""What an agent costs the server it samples: transactions a second of pgbench, in pairs with and without the agent.

    python tests/perf/bench_impact.py [--pairs 8] [--seconds 10] [--major 15]

Prints JSON; asserts nothing. The agent is the real resident with default settings, backups off, spooling to its own disk. Runs
alternate (without, with, with, without, …) so that a machine that warms up or slows down favours neither; the figure is
the median of the pairs' ratios with the smallest and largest beside it: on a shared machine that spread is the result's error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.postgres import Server, default_major, fleet

_CONFIG = """\
state_directory = "{home}/state"
[backup]
enabled = false
[[nodes]]
alias = "n1"
cluster = "c1"
conninfo = "{conninfo}"
"""
_CLIENTS = 4


@contextlib.contextmanager
def agent(home: Path, server: Server) -> Iterator[psutil.Process]:
    """The resident, from its first samples on."""
    config = home / "agent.toml"
    config.write_text(_CONFIG.format(home=home, conninfo=server.conninfo("monitor")))
    argv = [sys.executable, "-m", "pgherd.agent.main", "--config", str(config), "run", "--standalone"]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            deadline_s = time.monotonic() + 30
            while not server.execute("SELECT 1 FROM pg_stat_activity WHERE usename = 'monitor'"):
                if time.monotonic() > deadline_s or process.poll() is not None:
                    raise SystemExit("the agent doesn't sample")
                time.sleep(0.1)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(20)


def pgbench(server: Server, seconds: float) -> float:
    """Transactions a second of the built-in TPC-B-like script, without connection time."""
    argv = [str(server.binaries.program("pgbench")), "-n", "-c", str(_CLIENTS), "-j", "2", "-T", f"{seconds:.0f}"]
    done = subprocess.run([*argv, server.conninfo(dbname="bench")], capture_output=True, text=True, timeout=seconds + 60)
    found = re.search(r"tps = ([0-9.]+)", done.stdout)
    if done.returncode != 0 or found is None:
        raise SystemExit(done.stderr)
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--major", type=int, default=default_major())
    options = parser.parse_args()
    ratios, without, with_agent, cpu = [], [], [], []
    with fleet() as servers, tempfile.TemporaryDirectory() as directory:
        server = servers.server(options.major)
        server.create_role("monitor", member_of=["pg_monitor"])
        server.create_database("bench")
        initialise = [str(server.binaries.program("pgbench")), "-i", "-q", "-s", "10", server.conninfo(dbname="bench")]
        subprocess.run(initialise, check=True, capture_output=True, timeout=300)
        pgbench(server, options.seconds)  # warm
        for pair in range(options.pairs):
            tps: dict[bool, float] = {}
            for sampled in (False, True) if pair % 2 == 0 else (True, False):
                if not sampled:
                    tps[sampled] = pgbench(server, options.seconds)
                    continue
                with agent(Path(directory), server) as process:
                    before = process.cpu_times()
                    tps[sampled] = pgbench(server, options.seconds)
                    after = process.cpu_times()
                    cpu.append((after.user + after.system - before.user - before.system) / options.seconds)
            without.append(tps[False])
            with_agent.append(tps[True])
            ratios.append(tps[True] / tps[False])
            print(f"pair {pair + 1}: {tps[False]:.0f} without, {tps[True]:.0f} with", file=sys.stderr)
    print(
        json.dumps(
            {
                "bench": "impact",
                "major": options.major,
                "pairs": options.pairs,
                "seconds": options.seconds,
                "tps_without": round(statistics.median(without), 1),
                "tps_with": round(statistics.median(with_agent), 1),
                "ratio_median": round(statistics.median(ratios), 4),
                "ratio_min": round(min(ratios), 4),
                "ratio_max": round(max(ratios), 4),
                "agent_cpu_share": round(statistics.median(cpu), 4),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
