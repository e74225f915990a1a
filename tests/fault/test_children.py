"""Child processes are judged: status, stderr, deadline, environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from pgherd.proto.errors import ConfigError, PreconditionError, TransientError
from pgherd.runtime.process import clean_environment, run, running

pytestmark = pytest.mark.fault


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_failing_status_is_an_error_with_the_last_words() -> None:
    finished = run(python("import sys; print('out'); sys.stderr.write('first\\nlast words\\n'); sys.exit(3)"), timeout_s=20)
    assert finished.stdout == b"out\n"
    with pytest.raises(PreconditionError, match="status 3: last words") as caught:
        finished.require_success()
    assert caught.value.context["stderr"] == "first\nlast words"


def test_a_signal_is_an_error_too() -> None:
    finished = run(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), timeout_s=20)
    with pytest.raises(PreconditionError, match="killed by signal 9"):
        finished.require_success()


def test_warnings_count_when_asked() -> None:
    finished = run(python("import sys; sys.stderr.write('warning: half of it\\n')"), timeout_s=20)
    finished.require_success()
    with pytest.raises(PreconditionError) as caught:
        finished.require_success(warnings_allowed=False)
    assert caught.value.code == "child.warned"


def test_a_child_past_its_deadline_is_ended() -> None:
    with pytest.raises(TransientError) as caught:
        run(python("import time; time.sleep(60)"), timeout_s=0.5)
    assert caught.value.code == "child.timeout"


def test_leaving_the_block_ends_the_child() -> None:
    with running(python("import time; time.sleep(60)")) as child:
        assert psutil.pid_exists(child.pid)
    assert not psutil.pid_exists(child.pid)


def test_a_chatty_stderr_blocks_nobody() -> None:
    finished = run(
        python(
            "import sys; sys.stderr.write('x' * 80 + '\\n') if 0 else [print('y'*80, file=sys.stderr) for _ in range(20000)]"
        ),
        timeout_s=30,
    )
    assert finished.status == 0
    assert len(finished.stderr_lines) == 200


def test_a_missing_program_says_so() -> None:
    with pytest.raises(ConfigError) as caught:
        run(["pgherd-no-such-program"], timeout_s=5)
    assert caught.value.code == "child.missing"


def test_credentials_of_our_environment_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "canary")
    monkeypatch.setenv("DATABASE_URL", "postgres://u:canary@h/d")
    assert "canary" not in " ".join(clean_environment().values())
    finished = run(python("import os; print(dict(os.environ))"), timeout_s=20)
    assert b"canary" not in finished.stdout


def test_input_and_output_pass_through() -> None:
    finished = run(python("import sys; sys.stdout.write(sys.stdin.read().upper())"), timeout_s=20, input_bytes=b"abc" * 100_000)
    assert finished.stdout == b"ABC" * 100_000


def test_too_much_output_is_an_error() -> None:
    with pytest.raises(PreconditionError, match="more than 1000 bytes"):
        run(python("print('x' * 100000)"), timeout_s=20, stdout_bytes_max=1000)


def test_another_working_directory(tmp_path: Path) -> None:
    assert os.fsdecode(run(python("import os; print(os.getcwd())"), timeout_s=20, cwd=tmp_path).stdout.strip()) == str(tmp_path)
