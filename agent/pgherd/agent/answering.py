"""How a verb answers the resident agent that started it as a child: the contract of ARCHITECTURE's command flow.

The last line on stdout (with `--ndjson`) and the document in `--result-file` are the same:
`{"result": …}` or `{"error": …}`. The lock beside the result file tells a restarted agent that we are
alive. SIGTERM unwinds, so that connections and temporary things go.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pgherd.proto.errors import PgherdError
from pgherd.runtime.durable import exclusive_lock, publish_json
from pgherd.runtime.render import emit_json_line

Answer = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def answering(result_file: Path | None, *, ndjson: bool) -> Iterator[Answer]:
    """Inside, call the yielded function with the result's members once; a PgherdError answers by itself."""

    def terminate(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    def publish(document: Mapping[str, Any]) -> None:
        if result_file is not None:
            publish_json(result_file, document)
        if ndjson:
            emit_json_line(document)

    previous = signal.signal(signal.SIGTERM, terminate)
    lock = (
        exclusive_lock(result_file.with_name(f"{result_file.name}.lock"), f"the result {result_file}")
        if result_file is not None
        else contextlib.nullcontext()
    )
    try:
        with lock:
            try:
                yield lambda result: publish({"result": dict(result)})
            except PgherdError as error:
                publish({"error": error.as_dict()})
                raise
    finally:
        signal.signal(signal.SIGTERM, previous)
