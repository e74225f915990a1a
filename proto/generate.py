"""Generate the wire code from the .proto files; `--check` fails when the committed code isn't fresh.

Run from anywhere: `python proto/generate.py [--check]`. The import paths come out right only when the
files are compiled by their path from `proto/` with `-Iproto`.
"""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCES = ("pgherd/proto/control/v1/control.proto", "pgherd/proto/remote/v1/remote.proto")
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate(into: Path) -> None:
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}",
            f"--python_out={into}", f"--pyi_out={into}", f"--grpc_python_out={into}", *SOURCES,
        ],
        check=True, cwd=ROOT,
    )  # fmt: skip


def main() -> int:
    if sys.argv[1:] not in ([], ["--check"]):
        print("usage: generate.py [--check]", file=sys.stderr)
        return 2
    if not sys.argv[1:]:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        generate(Path(temporary))
        stale = [
            relative
            for source in SOURCES
            for suffix in SUFFIXES
            if not filecmp.cmp(
                Path(temporary) / (relative := source.removesuffix(".proto") + suffix), ROOT / relative, shallow=False
            )
        ]
    for relative in stale:
        print(f"stale: proto/{relative}: run `make proto`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
