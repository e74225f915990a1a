"""`make bench`: what pgherd costs and how fast it is, beside its peers where they are installed. Asserts nothing.

    python tests/perf/bench.py [--quick] [--json] [--only PART ...]

Each part is a program of its own in this folder; figures of peers come from the same run on the same machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from perf import sheet
from perf.sheet import Report, Rows

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "deploy" / "demo" / "demo.py"


@dataclass(frozen=True, slots=True)
class Part:
    """One program: its arguments in full and quick, and how its document is read."""

    rows: Callable[[Report], Rows]
    program: Path
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()

    def run(self, *, quick: bool) -> Report:
        """The JSON document that it prints; its progress goes through to stderr."""
        argv = [sys.executable, str(self.program), *(self.quick if quick else self.full)]
        finished = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
        document: Report = json.loads(finished.stdout)
        return document


PARTS = {
    "ingest": Part(sheet.ingest_rows, HERE / "bench_ingest.py", ("--seconds", "20"), ("--seconds", "5")),
    "sampling": Part(
        sheet.sampling_rows,
        HERE / "bench_sampling.py",
        ("--cycles", "200", "--seconds", "60"),
        ("--cycles", "50", "--seconds", "20"),
    ),
    "wide": Part(
        sheet.wide_rows, HERE / "bench_wide.py", quick=("--databases", "10", "--tables", "200", "--statements", "1000")
    ),
    "impact": Part(sheet.impact_rows, HERE / "bench_impact.py", quick=("--pairs", "2", "--seconds", "5")),
    "query": Part(sheet.query_rows, HERE / "bench_query.py", ("--series", "1000"), ("--series", "200")),
    "event": Part(sheet.event_rows, HERE / "bench_event.py", quick=("--events", "5")),
    "agents": Part(
        sheet.agents_rows, HERE / "bench_idle_agents.py", quick=("--idle", "200", "--shipping", "20", "--seconds", "20")
    ),
    "lag": Part(sheet.lag_rows, HERE / "bench_lag.py", ("--scale", "2"), ("--scale", "1")),
    "latency": Part(
        sheet.latency_rows,
        HERE / "bench_latency.py",
        ("--windows", "1", "--seconds", "60", "--cost"),
        ("--windows", "1", "--seconds", "20", "--cost"),
    ),
    "backup": Part(sheet.backup_rows, HERE / "bench_backup.py", ("--rows", "2000000"), ("--rows", "200000")),
    "demo": Part(sheet.demo_rows, DEMO, ("--for", "60s", "--json"), ("--for", "60s", "--json")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short runs, rough figures")
    parser.add_argument("--json", action="store_true", help="print the parts' documents instead of the table")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part (can be repeated)", default=[])
    options = parser.parse_args()
    report = {}
    for name in options.only or PARTS:
        print(f"bench: {name}", file=sys.stderr)
        report[name] = PARTS[name].run(quick=options.quick)
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    table = Table(box=None, header_style="bold")
    for heading in ("WHAT", "MEASURED", "BESIDE IT"):
        table.add_column(heading)
    for name, document in report.items():
        for row in PARTS[name].rows(document):
            table.add_row(*row)
    Console(highlight=False, markup=False, width=130).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
