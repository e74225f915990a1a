"""A child as the executor starts it, without a database: says that it ran, reports, waits, publishes.

    tiny_command.py <directory of the test> <result file> <command id>

It appends its command's id to `executions`, then waits for the file `go`. `mode` may hold: "result",
"error", "vanish" (exit 0 without a result), "die" (killed), "stubborn" (ignores SIGTERM).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    directory, result_file, command_id = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    mode_file = directory / "mode"
    mode = mode_file.read_text() if mode_file.exists() else "result"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else signal.SIG_DFL)
    fd = os.open(directory / "executions", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{command_id} {os.getpid()}\n".encode())
    os.close(fd)
    print(json.dumps({"progress": {"phase": "waiting", "done": 1, "total": 2, "unit": "steps"}}), flush=True)
    deadline = time.monotonic() + 60
    while not (directory / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "vanish":
        print("something went wrong: password=hunter2", file=sys.stderr)
        return
    backup = {
        "name": "b1", "node_id": "", "system_identifier": "7", "started_unix_ns": 1, "finished_unix_ns": 2,
        "stored_bytes": 3, "databases": ["app"], "complete": True, "warnings": [], "grade": "read back",
    }  # fmt: skip
    error = {"code": "postgres.unreachable", "message": "it is down", "hint": "start it", "context": {"attempts": 2}}
    document = {"error": error} if mode == "error" else {"result": backup}
    temporary = result_file.with_name("result.json.new")
    temporary.write_text(json.dumps(document))
    temporary.rename(result_file)


if __name__ == "__main__":
    main()
