"""Results and errors on their way out of a command: text or JSON on stdout, errors on stderr, exit status.

Every verb ends through `command_main`; no other code prints an error or chooses an exit status.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from pgherd.proto.codes import Exit
from pgherd.proto.errors import PgherdError
from pgherd.proto.printable import printable
from pgherd.runtime.logging import redact


def emit_json(document: object, stream: TextIO | None = None) -> None:
    """One JSON document and a newline on stdout."""
    print(json.dumps(document, indent=2, default=str), file=stream or sys.stdout, flush=True)


def emit_json_line(document: object, stream: TextIO | None = None) -> None:
    """One line of NDJSON (streams: progress, watch)."""
    print(json.dumps(document, default=str, separators=(",", ":")), file=stream or sys.stdout, flush=True)


def render_error(error: PgherdError, *, as_json: bool) -> None:
    """What, why, what next, on stderr."""
    if as_json:
        emit_json({"error": error.as_dict()}, sys.stderr)
        return
    print(f"error: {redact(error.message)}", file=sys.stderr)
    for key, value in error.context.items():
        if key == "stderr" and value:
            print("  " + redact(str(value)).replace("\n", "\n  "), file=sys.stderr)
    if error.hint:
        print(f"  try: {error.hint}", file=sys.stderr)
    print(f"  code: {error.code} (docs/errors.md)", file=sys.stderr)


def command_main(body: Callable[[], int | None], *, as_json: bool) -> int:
    """Run a command's body and turn its end into an exit status; Ctrl-C is 130."""
    try:
        return body() or Exit.OK
    except PgherdError as error:
        render_error(error, as_json=as_json)
        return error.info.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return Exit.OK  # the reader of our stdout went away (| head)


_WHOLE = frozenset({"id", "name", "alias"})  # what people copy is never broken over lines


def table(rows: Sequence[Mapping[str, Any]], columns: Iterable[tuple[str, str]]) -> None:
    """Print rows as a table; `columns` are (key, heading). Nothing but the headings for no rows."""
    from rich.console import Console
    from rich.table import Table

    sheet = Table(box=None, pad_edge=False, header_style="bold")
    keys = []
    for key, heading in columns:
        sheet.add_column(heading, overflow="fold", no_wrap=key in _WHOLE)
        keys.append(key)
    for row in rows:
        sheet.add_row(*(_cell(row.get(key)) for key in keys))
    # In a pipe every row is one line: ids can be cut out and grepped.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 4096).print(sheet)


def show_settings(leaves: Sequence[tuple[str, object, str]], *, origin: bool, as_json: bool) -> None:
    """`config show`: every setting as it is in force (from `Loaded.show`), with where it came from if asked."""
    rows = [{"key": key, "value": value, "origin": where} for key, value, where in leaves]
    if as_json:
        emit_json(rows)
    else:
        table(rows, [("key", "KEY"), ("value", "VALUE"), *([("origin", "ORIGIN")] if origin else [])])


def _cell(value: object) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, list | tuple):
        return printable(", ".join(str(item) for item in value))
    return printable(str(value))


def human_bytes(count: float) -> str:
    """1536 → "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class Progress:
    """Progress of one long operation: a line rewritten on a terminal, nothing or NDJSON elsewhere.

    Bounded to five updates a second whatever the caller does.
    """

    def __init__(self, *, ndjson: bool = False, stream: TextIO | None = None) -> None:
        self._ndjson = ndjson
        self._stream = stream or (sys.stdout if ndjson else sys.stderr)
        self._last_mono_s = 0.0
        self._phase = ""
        self._open_line = False

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if phase == self._phase and now - self._last_mono_s < 0.2 and done != total:
            return
        self._last_mono_s, self._phase = now, phase
        if self._ndjson:
            emit_json_line({"progress": {"phase": phase, "done": done, "total": total, "unit": unit}}, self._stream)
        elif self._stream.isatty():
            amount = f"{human_bytes(done)}" if unit == "bytes" else f"{done} {unit}"
            share = f" {100 * done // total:3d} %" if total else ""
            print(f"\r\x1b[2K{phase}: {amount}{share}", end="", file=self._stream, flush=True)
            self._open_line = True

    def close(self) -> None:
        """End the rewritten line."""
        if self._open_line:
            print("\r\x1b[2K", end="", file=self._stream, flush=True)
            self._open_line = False
