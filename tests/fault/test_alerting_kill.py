"""kill -9 of evaluator, notifier and outbox at random points: no page lost, none early, repeats only under one key."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pgherd.collector.alerting.silencing import Author, Silencer
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.durable import publish
from pgherd.storage.control.store import ControlStore
from support.alerting_process import FOR_S
from support.waiting import wait_until
from support.webhook import Webhook, webhook

pytestmark = [pytest.mark.fault, pytest.mark.slow]

_REPOSITORY = Path(__file__).parent.parent.parent
_KILLS = 4


class Victim:
    """The process, restarted at will."""

    def __init__(self, directory: Path, url: str, group_by: Sequence[str] = ("...",), **timing: float) -> None:
        self._directory, self._url = directory, url
        self._grouping = json.dumps({"group_by": group_by, "timing": timing})
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(_REPOSITORY / "tests")}
        argv = [sys.executable, "-m", "support.alerting_process", str(self._directory), self._url, self._grouping]
        self.child = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE)

    def kill(self) -> None:
        if self.child is not None:
            self.child.send_signal(signal.SIGKILL)
            self.child.wait(10)
            if self.child.stderr is not None:
                self.child.stderr.close()
            self.child = None

    def evaluations(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return (self._directory / "evaluations").stat().st_size
        return 0


def test_no_page_is_lost_early_or_doubled(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    names = [f"i{number}" for number in range(_KILLS)]
    holding: list[str] = []
    arrived_mono_s: dict[tuple[str, str], float] = {}
    kill_on_call = {"after": 2, "before": 2}  # of the calls still to come: noted by us and then killed; killed and not noted
    with webhook() as hook:
        victim = Victim(tmp_path, hook.url)
        request.addfinalizer(victim.kill)

        def tell_truth() -> None:
            publish(tmp_path / "truth.json", json.dumps(holding).encode())

        def answer(payload: dict[str, Any]) -> int:
            moment = "after" if kill_on_call["after"] else "before"
            if kill_on_call[moment] and dice.random() < 0.7 and victim.child is not None:
                kill_on_call[moment] -= 1
                victim.child.send_signal(signal.SIGKILL)
                if moment == "before":
                    return 503
            (alert,) = payload["alerts"]
            arrived_mono_s.setdefault((alert["labels"]["instance"], payload["status"]), time.monotonic())
            return 200

        hook.answer = answer
        tell_truth()
        for name in names:
            holding.append(name)
            for told in [one for one in holding if (one, "firing") in arrived_mono_s]:
                holding.remove(told)
            tell_truth()
            victim.start()
            target = victim.evaluations() + dice.randint(1, 9)
            _run_until(victim, lambda target=target: victim.evaluations() >= target)
            victim.kill()
        for kind in ("firing", "resolved"):
            _run_until(
                victim,
                lambda kind=kind: all((name, kind) in arrived_mono_s for name in names),
                forever=True,
                what=f"{kind} of {names}, seed {seed}",
            )
            holding.clear()
            tell_truth()
        settled = victim.evaluations() + 10
        _run_until(victim, lambda: victim.evaluations() >= settled, forever=True)
        victim.kill()
        seen_ms = {name: int((tmp_path / f"seen-{name}").read_text()) for name in names}
        _judge(hook, seen_ms, arrived_mono_s)
    assert kill_on_call == {"after": 0, "before": 0}, "every kind of kill did happen"


def _run_until(victim: Victim, condition: Any, *, forever: bool = False, what: str = "evaluations") -> None:
    """Wait for the condition; a process that was killed by an answer is started again (`forever`) or ends the wait."""

    def look() -> bool:
        if victim.child is None or victim.child.poll() is not None:
            status = victim.child.returncode if victim.child is not None else -signal.SIGKILL
            assert status == -signal.SIGKILL, victim.child is not None and victim.child.stderr and victim.child.stderr.read()
            victim.kill()
            if not forever:
                return True
            victim.start()
        return bool(condition())

    wait_until(look, 60, what)


def _judge(hook: Webhook, seen_ms: dict[str, int], arrived_mono_s: dict[tuple[str, str], float]) -> None:
    keys: dict[tuple[str, str], list[str]] = {}
    for call in hook.accepted:
        (alert,) = call.payload["alerts"]
        keys.setdefault((alert["labels"]["instance"], call.payload["status"]), []).append(call.key)
    assert sorted(keys) == sorted((name, kind) for name in seen_ms for kind in ("firing", "resolved"))
    for fact, used in keys.items():
        assert len(set(used)) == 1, f"{fact} was told as {len(set(used))} different facts: {used}"
    assert any(len(used) > 1 for used in keys.values()), "a kill after the POST repeats it"
    for name, first_ms in seen_ms.items():
        fired = next(call for call in hook.accepted if call.told == "firing High" and call.instance == name)
        held_ms = datetime.fromisoformat(fired.payload["alerts"][0]["startsAt"]).timestamp() * 1000 - first_ms
        assert held_ms >= FOR_S * 1000 - 5, f"{name} was paged after {held_ms:.0f} ms"  # 5: the wall clock may be slewed
        assert arrived_mono_s[name, "firing"] < arrived_mono_s[name, "resolved"]


def test_groups_and_silences_survive_kills(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A group that grows and ends while its process dies under it; one of its alerts is silenced until the end."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    names = [f"i{number}" for number in range(4)]
    quiet = names[-1]
    kills = {"after": 2, "before": 2}
    with webhook() as hook:
        victim = Victim(tmp_path, hook.url, ("alertname",), wait_s=0.2, interval_s=0.2)
        request.addfinalizer(victim.kill)

        def answer(_payload: dict[str, Any]) -> int:
            moment = "after" if kills["after"] else "before"
            if kills[moment] and dice.random() < 0.7 and victim.child is not None:
                kills[moment] -= 1
                victim.child.send_signal(signal.SIGKILL)
                return 200 if moment == "after" else 503
            return 200

        hook.answer = answer
        with _silencer(tmp_path) as silencer:
            id_ = silencer.add([f'instance="{quiet}"'], duration_s=3600, author=Author("test", "socket"))
        holding: list[str] = []
        for name in reversed(names):
            holding.append(name)
            publish(tmp_path / "truth.json", json.dumps(holding).encode())
            victim.start()
            target = victim.evaluations() + dice.randint(1, 12)
            _run_until(victim, lambda target=target: victim.evaluations() >= target)
            victim.kill()
        _run_until(victim, lambda: _known(hook)[0] == set(names[:-1]), forever=True, what=f"all but {quiet}, seed {seed}")
        victim.kill()
        with _silencer(tmp_path) as silencer:
            silencer.expire(id_, Author("test", "socket"))
        assert quiet not in {alert["labels"]["instance"] for call in hook.accepted for alert in call.payload["alerts"]}
        _run_until(victim, lambda: _known(hook)[0] == set(names), forever=True, what=f"{quiet} after its silence, seed {seed}")
        publish(tmp_path / "truth.json", b"[]")
        _run_until(victim, lambda: _known(hook) == (set(), set(names)), forever=True, what=f"all over, seed {seed}")
        settled = victim.evaluations() + 10
        _run_until(victim, lambda: victim.evaluations() >= settled, forever=True)
        victim.kill()
    told = _distinct(hook)
    assert len({json.dumps(payload["alerts"], sort_keys=True) for payload in told}) == len(told), "the same told as two facts"
    assert kills == {"after": 0, "before": 0}, "every kind of kill did happen"


def test_repeats_keep_their_pace_through_kills(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    publish(tmp_path / "truth.json", b'["i0"]')
    with webhook() as hook:
        victim = Victim(tmp_path, hook.url, repeat_s=0.8)
        request.addfinalizer(victim.kill)
        wait_for = 1
        while len(_distinct(hook)) < 4:
            victim.start()
            target = victim.evaluations() + dice.randint(2, 12)
            _run_until(victim, lambda target=target: victim.evaluations() >= target)
            victim.kill()
            wait_for += 1
            assert wait_for < 100
    stamps_ns = sorted({int(call.key.split(".")[1]) for call in hook.accepted})
    gaps_s = [(later - earlier) / 1e9 for earlier, later in itertools.pairwise(stamps_ns)]
    assert min(gaps_s) >= 0.8, f"told again too early: {gaps_s}, seed {seed}"


@contextlib.contextmanager
def _silencer(directory: Path) -> Iterator[Silencer]:
    store = ControlStore.open(directory / "control.sqlite")
    try:
        silencer = Silencer(store, SystemClock())
        silencer.load()
        yield silencer
    finally:
        store.close()


def _distinct(hook: Webhook) -> list[dict[str, Any]]:
    """What was told, each key once; a repeated key repeats its payload."""
    told: dict[str, dict[str, Any]] = {}
    for call in hook.accepted:
        assert told.setdefault(call.key, call.payload) == call.payload, "one key, two facts"
    return list(told.values())


def _known(hook: Webhook) -> tuple[set[str], set[str]]:
    """What a receiver that remembers keys knows: who fires, who is over. No end comes without its beginning."""
    firing: set[str] = set()
    over: set[str] = set()
    for payload in _distinct(hook):
        for alert in payload["alerts"]:
            name = alert["labels"]["instance"]
            if alert["status"] == "firing":
                assert name not in over, f"{name} fires again after it was over"
                firing.add(name)
            else:
                assert name in firing, f"{name} is over and was never told"
                firing.discard(name)
                over.add(name)
    return firing, over
