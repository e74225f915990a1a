"""The outbox against a real HTTP receiver: order, patience, restarts, pruning."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from pgherd.alerts.model import fnv1a_64
from pgherd.alerts.notification import Note, Notification, from_document, notification, to_document
from pgherd.alerts.notify import DeliveryError, LogReceiver
from pgherd.alerts.notify_http import webhook_receiver
from pgherd.collector.alerting import rows
from pgherd.collector.alerting.outbox import OutboxSettings, OutboxWorker
from pgherd.proto.errors import IntegrityError
from pgherd.runtime.clock import SystemClock
from pgherd.storage.control.schema import outbox
from pgherd.storage.control.store import ControlStore
from support.alerts import SECOND_NS, START_UNIX_NS
from support.webhook import Webhook, webhook

FAST = OutboxSettings(backoff_min_s=0.02, backoff_max_s=0.05, poll_s=0.05, retention_s=3600)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ControlStore]:
    opened = ControlStore.open(tmp_path / "control.sqlite")
    yield opened
    opened.close()


def _episode(alert: str, at_s: float = 0, instance: str = "a:5432") -> tuple[Notification, Notification]:
    """A firing and its resolution."""
    start_unix_ns = START_UNIX_NS + int(at_s * SECOND_NS)
    labels = {"alertname": alert, "instance": instance}
    note = Note("g/rule#0123456789abcdef", labels, {"summary": "2.5"}, 2.5, start_unix_ns)
    over = replace(note, ends_unix_ns=start_unix_ns + 15 * SECOND_NS, reason="recovered")
    key, digest = f'{{}}:{{alertname="{alert}"}}', fnv1a_64((alert, instance))
    return (
        notification(f"{digest}.{start_unix_ns}", key, {"alertname": alert}, [note]),
        notification(f"{digest}.{start_unix_ns + 15}", key, {"alertname": alert}, [over]),
    )


def _post(store: ControlStore, messages: Sequence[Notification], *receivers: str) -> None:
    with store.begin() as connection:
        for receiver in receivers or ("hook",):
            rows.post(connection, receiver, messages, SystemClock().wall_unix_ns(), 1000)


def _letters(store: ControlStore) -> list[Any]:
    with store.read() as connection:
        return list(connection.execute(select(outbox).order_by(outbox.c.id)))


def _deliver(store: ControlStore, hook: Webhook, until: Callable[[], bool], settings: OutboxSettings = FAST) -> OutboxWorker:
    """Run a worker until the condition holds."""
    made: list[OutboxWorker] = []

    async def run() -> None:
        receiver = webhook_receiver("hook", hook.url, timeout_s=5, external_url="https://pgherd.example")
        worker = OutboxWorker(store, [receiver], SystemClock(), settings, random.Random(1))
        made.append(worker)
        task = asyncio.create_task(worker.run())
        try:
            async with asyncio.timeout(20):
                while not await asyncio.to_thread(until):
                    assert not task.done(), task.exception()
                    await asyncio.sleep(0.01)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    return made[0]


def _all_delivered(store: ControlStore) -> Callable[[], bool]:
    return lambda: all(letter.delivered_unix_ns is not None for letter in _letters(store))


def test_the_payload_is_alertmanagers(store: ControlStore) -> None:
    with webhook() as hook:
        _post(store, _episode("High"))
        _deliver(store, hook, _all_delivered(store))
        firing, resolved = (call.payload for call in hook.calls)
    labels = {"alertname": "High", "instance": "a:5432"}
    alert = {
        "status": "firing",
        "labels": labels,
        "annotations": {"summary": "2.5"},
        "startsAt": "2025-10-09T08:53:20Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "https://pgherd.example/alerts",
        "fingerprint": _episode("High")[0].notes[0].fingerprint,
    }
    assert firing == {
        "version": "4",
        "groupKey": '{}:{alertname="High"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "hook",
        "groupLabels": {"alertname": "High"},
        "commonLabels": labels,
        "commonAnnotations": {"summary": "2.5"},
        "externalURL": "https://pgherd.example",
        "alerts": [alert],
    }
    assert resolved["status"] == "resolved"
    assert resolved["alerts"] == [{**alert, "status": "resolved", "endsAt": "2025-10-09T08:53:35Z"}]


def test_a_receiver_that_is_down_gets_everything_later_in_order(store: ControlStore) -> None:
    with webhook() as closed:
        port = closed.port
    _post(store, [*_episode("High"), *_episode("Low")])
    with webhook(port=0) as elsewhere:  # the worker is told the port where nobody listens yet
        elsewhere.port = port
        worker = _deliver(store, elsewhere, lambda: _letters(store)[0].attempts >= 3)
        assert worker.counters["hook"].delivered == 0
    assert [letter.attempts for letter in _letters(store)][1:] == [0, 0, 0], "a receiver that is down is left alone"
    with webhook(port) as hook:
        _deliver(store, hook, _all_delivered(store))
        assert [call.told for call in hook.calls if "High" in call.told] == ["firing High", "resolved High"]
        assert [call.told for call in hook.calls if "Low" in call.told] == ["firing Low", "resolved Low"]


def test_a_refused_letter_blocks_its_own_alert_only(store: ControlStore) -> None:
    accepting = False

    def answer(payload: dict[str, Any]) -> int:
        return 200 if accepting or payload["groupLabels"]["alertname"] != "High" else 400

    with webhook(answer=answer) as hook:
        _post(store, [*_episode("High"), *_episode("Low")])
        _deliver(store, hook, lambda: len(hook.accepted) == 2 and sum(call.status == 400 for call in hook.calls) >= 3)
        assert [call.told for call in hook.accepted] == ["firing Low", "resolved Low"]
        assert {call.told for call in hook.calls if call.status == 400} == {"firing High"}, "no resolved overtakes its firing"
        assert "HTTP 400" in _letters(store)[0].last_error
        accepting = True
        _deliver(store, hook, _all_delivered(store))
        assert [call.told for call in hook.accepted][2:] == ["firing High", "resolved High"]


def test_an_overloaded_receiver_gets_one_letter_at_a_time(store: ControlStore) -> None:
    with webhook(answer=lambda _payload: 503) as hook:
        _post(store, [_episode(f"A{number}")[0] for number in range(20)])
        _deliver(store, hook, lambda: len(hook.calls) >= 4)
        assert {call.told for call in hook.calls} == {"firing A0"}


def test_repeats_carry_the_same_key(store: ControlStore) -> None:
    """The answer was lost, or we were killed before noting it."""
    transition = _episode("High")[0]
    with webhook() as hook:
        _post(store, [transition])
        _deliver(store, hook, _all_delivered(store))
        with store.begin() as connection:
            connection.execute(update(outbox).values(delivered_unix_ns=None))
        _deliver(store, hook, _all_delivered(store))
        assert [call.key for call in hook.calls] == [transition.id] * 2
        _post(store, [transition])
        assert len(_letters(store)) == 1, "the same fact is written once"


def test_an_attempt_stamped_by_a_wrong_clock_is_due(store: ControlStore) -> None:
    _post(store, [_episode("High")[0]])
    with store.begin() as connection:
        connection.execute(update(outbox).values(next_attempt_unix_ns=SystemClock().wall_unix_ns() + 3600 * 10**9))
    with webhook() as hook:
        _deliver(store, hook, _all_delivered(store))


def test_delivered_letters_are_pruned_and_strangers_given_up(store: ControlStore) -> None:
    _post(store, [_episode("High")[0]], "hook", "gone")
    with webhook() as hook:
        settings = OutboxSettings(poll_s=0.05, retention_s=0.05)
        _deliver(store, hook, lambda: _letters(store) == [], settings)
        assert len(hook.calls) == 1


def test_each_receiver_has_its_own_line(store: ControlStore) -> None:
    _post(store, [_episode("High")[0]], "hook", "log")
    assert [(letter.receiver, letter.attempts) for letter in _letters(store)] == [("hook", 0), ("log", 0)]
    asyncio.run(LogReceiver("log").deliver(_episode("High")[0]))


def test_a_url_never_shows_in_an_error() -> None:
    async def attempt() -> str:
        receiver = webhook_receiver("hook", "http://127.0.0.1:1/secret-path", timeout_s=5)
        try:
            await receiver.deliver(_episode("High")[0])
        except DeliveryError as error:
            return f"{error!r} {error.as_dict()} {error.__cause__}"
        finally:
            await receiver.close()
        return ""

    assert "ConnectError" in (text := asyncio.run(attempt()))
    assert "secret-path" not in text


def test_a_stored_notification_reads_back_whole() -> None:
    for transition in _episode("High"):
        assert from_document(to_document(transition)) == transition


@pytest.mark.parametrize(
    ("change", "code"),
    [({"version": 3}, "format.newer"), ({"notes": []}, "format.corrupt"), ({"notes": [{}]}, "format.corrupt")],
)
def test_a_stored_notification_of_another_shape_is_refused(change: dict[str, object], code: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        from_document({**to_document(_episode("High")[0]), **change})
    assert caught.value.code == code


def test_a_letter_of_the_first_format_is_still_delivered() -> None:
    first = {
        "version": 1,
        "id": "0123456789abcdef.1.0123456789abcdef.resolved",
        "kind": "resolved",
        "rule_id": "g/High#0123456789abcdef",
        "labels": {"alertname": "High", "instance": "a"},
        "annotations": {},
        "value": "nan",
        "starts_unix_ns": 1,
        "ends_unix_ns": 2,
        "reason": "recovered",
        "expr": "x > 1",
    }
    message = from_document(first)
    assert (message.id, message.status, message.group_labels) == (first["id"], "resolved", {"alertname": "High"})
