"""Backup against its parts: `pg_dump -Fc -Z0` alone and piped through zstd, the fingerprint's share, restore time.

    python tests/perf/bench_backup.py [--rows 1000000] [--major 15]

Prints one JSON document; asserts no time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pgherd.postgres.connection import Target, connect
from pgherd.postgres.content import fingerprint, plan_content
from pgherd.postgres.scratch import workspace
from pgherd.runtime.logging import configure
from support.backup import backup_node
from support.postgres import PARENT, Server, default_major, fleet

_FILL = """
CREATE TABLE accounts AS SELECT g AS aid, g % 100 AS bid, (g::bigint * 7919) % 100000 AS abalance, md5(g::text) || md5((g * 3)::text) AS filler
FROM generate_series(1, {rows}) g;
ALTER TABLE accounts ADD PRIMARY KEY (aid);
CREATE TABLE mixed AS SELECT g, now() + g * interval '1 s' AS at, (g / 7.0)::numeric(20, 6) AS amount, jsonb_build_object('k', g) AS doc,
ARRAY[g, g + 1] AS list, decode(md5(g::text), 'hex') AS raw FROM generate_series(1, {rows} / 4) g;
"""


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and the answer."""
    started_s = time.perf_counter()
    answer = action()
    return time.perf_counter() - started_s, answer


def _fingerprint(server: Server) -> int:
    with connect(Target(server.conninfo()), "bench") as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        return fingerprint(connection, plan_content(connection)).rows


def _dump(server: Server, level: int | None) -> int:
    """Bytes of pg_dump's output, through zstd when a level is given."""
    import zstandard

    argv: list[str | Path] = [server.binaries.program("pg_dump"), "-Fc", "-Z0", "-d", server.conninfo(dbname="bench")]
    compressor = zstandard.ZstdCompressor(level=level).compressobj() if level is not None else None
    count = 0
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while chunk := process.stdout.read(1 << 20):
            count += len(compressor.compress(chunk) if compressor else chunk)
    assert process.returncode == 0
    return count


def main() -> None:
    configure(level="warning")  # logs to stderr: stdout is the document
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--major", type=int, default=None)
    options = parser.parse_args()
    with fleet() as ships, workspace(PARENT) as home:
        server = ships.server(options.major or default_major())
        server.create_database("bench")
        server.execute(_FILL.format(rows=options.rows), dbname="bench")
        server.execute("VACUUM ANALYZE", dbname="bench")
        _dump(server, None)  # warm
        plain_s, plain_bytes = timed(lambda: _dump(server, None))
        zstd_s, _ = timed(lambda: _dump(server, 3))
        fingerprint_s, rows = timed(lambda: _fingerprint(server))
        node = backup_node(server, home, verify_after=False)
        backup_s, taken = timed(node.run)
        verify_s, _ = timed(node.verify)
        restore_s, restored = timed(node.restore)
        print(
            json.dumps(
                {
                    "major": server.major,
                    "rows": rows,
                    "archive_bytes": plain_bytes,
                    "stored_bytes": taken["stored_bytes"],
                    "pg_dump_s": round(plain_s, 3),
                    "pg_dump_zstd_s": round(zstd_s, 3),
                    "fingerprint_s": round(fingerprint_s, 3),
                    "backup_s": round(backup_s, 3),
                    "verify_s": round(verify_s, 3),
                    "restore_and_compare_s": round(restore_s, 3),
                    "backup_bytes_per_s": round(plain_bytes / backup_s),
                    "backup_to_pg_dump_zstd_ratio": round(backup_s / zstd_s, 3),
                    "fingerprint_to_backup_ratio": round(fingerprint_s / backup_s, 3),
                    "grade": restored["grade"],
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
