"""The light install: what an agent's host gets from `pip install pgherd`, and what its resident loads.

Run by `make check`. Two promises: the base distribution's closure (from the installed metadata) holds
none of the collector's libraries, and the resident's modules import nothing but the few they may.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires

FORBIDDEN_IN_BASE = {
    "duckdb",
    "fastapi",
    "uvicorn",
    "numpy",
    "pyarrow",
    "sqlalchemy",
    "alembic",
    "promql-parser",
    "apprise",
    "jinja2",
    "cramjam",
    "textual",
}
FORBIDDEN_IN_RESIDENT = (
    "pydantic", "click", "cryptography", "obstore", "opentelemetry.sdk", "pyrage", "rich", "httpx",
    "duckdb", "fastapi", "numpy", "sqlalchemy", "pgherd.cli", "pgherd.collector",
)  # fmt: skip
RESIDENT = "pgherd.agent.resident"


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def base_closure() -> set[str]:
    """Names of all distributions that the base install pulls in, extras left out."""
    closure: set[str] = set()
    todo = ["pgherd"]
    while todo:
        try:
            needed = requires(todo.pop()) or []
        except PackageNotFoundError:
            continue  # another platform's dependency
        for requirement in needed:
            specifier, _, marker = requirement.partition(";")
            match = re.match(r"[A-Za-z0-9._-]+", specifier)
            if "extra ==" in marker or match is None:
                continue
            name = normalised(match[0])
            if name not in closure:
                closure.add(name)
                todo.append(name)
    return closure


def main() -> int:
    failures = []
    heavy = base_closure() & FORBIDDEN_IN_BASE
    if heavy:
        failures.append(f"the base install pulls in {', '.join(sorted(heavy))}")
    if "grpcio" not in base_closure():
        failures.append("the base install's closure is empty: is pgherd installed?")
    probe = f"import sys, {RESIDENT}; print(' '.join(name for name, module in sys.modules.items() if module))"
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split()
    guests = sorted(
        module
        for module in loaded
        if module.startswith(tuple(f"{name}." for name in FORBIDDEN_IN_RESIDENT)) or module in FORBIDDEN_IN_RESIDENT
    )
    if guests:
        failures.append(f"the resident agent loads {', '.join(guests[:10])}")
    blocked = "".join(f"sys.modules[{name.replace('-', '_')!r}] = None; " for name in sorted(FORBIDDEN_IN_BASE))
    for argv, status in (
        (["pgherd-agent", "--help"], 0),
        (["pgherd-agent", "sql", "--for", "monitor", "--major", "17"], 0),
        (["pgherd", "--help"], 0),
        (["pgherd", "collector", "init"], 2),  # says which extra it needs
    ):
        module = "pgherd.agent.main" if argv[0] == "pgherd-agent" else "pgherd.cli.main"
        code = f"import sys; {blocked} sys.argv = {argv!r}; from {module} import main; main()"
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if finished.returncode != status or "Traceback" in finished.stderr:
            failures.append(
                f"{' '.join(argv)} without the collector's libraries: {finished.returncode} {finished.stderr[-300:]}"
            )
    for failure in failures:
        print(f"light install: {failure}", file=sys.stderr)
    if not failures:
        print(f"light install: ok ({len(base_closure())} distributions, {len(loaded)} modules in the resident)")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
