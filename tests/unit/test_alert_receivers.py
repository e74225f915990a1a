"""Receivers against real servers on loopback: what they send, what they make of refusals, and that no secret gets out."""

from __future__ import annotations

import asyncio
import random
import re
import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from pgherd.alerts.messages import discord_payload, plain_text, slack_payload
from pgherd.alerts.notification import Note, Notification, notification
from pgherd.alerts.notify import DeliveryError, Receiver
from pgherd.alerts.notify_apprise import AppriseReceiver
from pgherd.alerts.notify_http import discord_receiver, slack_receiver, webhook_receiver
from pgherd.alerts.notify_mail import MailReceiver, MailSettings
from pgherd.collector.alerting import rows
from pgherd.collector.alerting.alertmanager import AlertmanagerPush
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.outbox import OutboxSettings, OutboxWorker
from pgherd.collector.alerting.setup import alertmanagers_of, receivers_of, routing_of
from pgherd.collector.alerting.silencing import Author, Silencer
from pgherd.collector.config import AlertsConfig, MailConfig, ReceiverConfig
from pgherd.proto.errors import ConfigError
from pgherd.runtime.clock import SystemClock
from pgherd.storage.control.schema import outbox
from pgherd.storage.control.store import ControlStore
from support.alerts import SECOND_NS, START_UNIX_NS, Answers, TestClock, group, no_facts, rule
from support.endless import endless
from support.mailserver import PASSWORD, USER, MailServer, mail_server
from support.waiting import wait_until
from support.webhook import webhook

URL = "https://pgherd.example"
RULE = "g/High#0123456789abcdef"


def _note(node: str, *, ended: bool = False, **annotations: str) -> Note:
    labels = {"alertname": "DiskSpace", "node": node, "cluster": "main", "severity": "warning"}
    ends_unix_ns = START_UNIX_NS + 60 * SECOND_NS if ended else None
    return Note(RULE, labels, annotations, 0.9, START_UNIX_NS, ends_unix_ns, "recovered" if ended else "")


def _message(*notes: Note) -> Notification:
    labels = {"alertname": "DiskSpace", "cluster": "main"}
    return notification("0123456789abcdef.17", '{}:{alertname="DiskSpace"}', labels, notes or (_note("db1", summary="full"),))


MIXED = _message(
    _note("db1", summary="db1 is <81 %> full & rising @everyone", description="soon", runbook_url="docs/x.md"),
    _note("db2", ended=True, summary="db2 was full"),
)


def _deliver(receiver: Receiver, message: Notification = MIXED) -> None:
    async def run() -> None:
        try:
            await receiver.deliver(message)
        finally:
            await receiver.close()

    asyncio.run(run())


def test_the_text_says_what_where_since_when_and_what_to_do() -> None:
    assert plain_text(MIXED, URL).splitlines() == [
        "Firing:",
        "- DiskSpace (warning) db1: db1 is <81 %> full & rising @everyone",
        "  soon",
        "  docs/x.md",
        "  since 2025-10-09T08:53:20Z",
        "",
        "Resolved:",
        "- DiskSpace (warning) db2: db2 was full",
        "  since 2025-10-09T08:53:20Z, until 2025-10-09T08:54:20Z (recovered)",
        "",
        "https://pgherd.example/alerts",
    ]
    assert MIXED.title == "[FIRING:1] DiskSpace main"
    many = notification("d.1", "k", {}, [_note(f"n{number}") for number in range(250)])
    assert (len(many.notes), many.truncated, many.title) == (200, 50, "[FIRING:250] DiskSpace")
    assert "… and 180 more" in plain_text(many)
    assert "… and 50 that this message has no room for" in plain_text(many)


def test_slack_gets_an_attachment_whose_markup_is_ours_alone() -> None:
    with webhook() as hook:
        _deliver(slack_receiver("slack", hook.url, timeout_s=5, external_url=URL))
        (call,) = hook.calls
    assert call.key == MIXED.id
    assert set(call.payload) == {"text", "attachments"}
    (attachment,) = call.payload["attachments"]
    assert set(attachment) == {"color", "fallback", "title", "title_link", "text", "mrkdwn_in"}
    assert re.fullmatch(r"#[0-9a-f]{6}", attachment["color"])
    assert "db1 is &lt;81 %&gt; full &amp; rising" in attachment["text"]
    assert attachment["title_link"] == f"{URL}/alerts"
    resolved = slack_payload(_message(_note("db1", ended=True)))
    assert resolved["text"] == "[RESOLVED] DiskSpace main"
    assert resolved["attachments"][0]["color"] != attachment["color"]  # type: ignore[index]


def test_discord_gets_one_embed_within_its_limits_that_mentions_nobody() -> None:
    with webhook() as hook:
        _deliver(discord_receiver("discord", hook.url, timeout_s=5, external_url=URL))
        (call,) = hook.calls
    assert set(call.payload) == {"embeds", "allowed_mentions"}
    assert call.payload["allowed_mentions"] == {"parse": []}
    long: Any = discord_payload(_message(*(_note(f"n{n}", summary="x" * 500) for n in range(50))))
    for embed in (call.payload["embeds"][0], long["embeds"][0]):
        assert {"title", "description", "color"} <= set(embed) <= {"title", "description", "color", "url"}
        assert 0 <= embed["color"] <= 0xFFFFFF
        assert len(embed["title"]) <= 256
        assert len(embed["description"]) <= 4096
        assert len(embed["title"]) + len(embed["description"]) <= 6000


@pytest.mark.parametrize(
    ("status", "header", "ill", "retry_after_s"),
    [
        (429, "7", True, 7.0),
        (429, "0.65", True, 0.65),
        (503, "Wed, 21 Oct 2026 07:28:00 GMT", True, None),
        (400, "7", False, None),
        (404, "", False, None),
    ],
)
def test_what_a_refusal_means(status: int, header: str, ill: bool, retry_after_s: float | None) -> None:
    with webhook(answer=lambda _payload: status) as hook:
        hook.headers = {"Retry-After": header} if header else {}
        with pytest.raises(DeliveryError) as caught:
            _deliver(discord_receiver("discord", f"{hook.url}/secret", timeout_s=5))
    assert (caught.value.receiver_ill, caught.value.retry_after_s) == (ill, retry_after_s)
    assert "secret" not in f"{caught.value!r} {caught.value.as_dict()}"


def test_a_receiver_that_says_when_to_come_back_is_left_alone_until_then(store: ControlStore) -> None:
    with store.begin() as connection:
        for receiver in ("busy", "other"):
            rows.post(connection, receiver, [_message()], SystemClock().wall_unix_ns(), 100)

    async def run(busy_url: str, other_url: str) -> None:
        fast = OutboxSettings(backoff_min_s=0.01, backoff_max_s=0.02, poll_s=0.02)
        receivers = [webhook_receiver("busy", busy_url, timeout_s=5), webhook_receiver("other", other_url, timeout_s=5)]
        task = asyncio.create_task(OutboxWorker(store, receivers, SystemClock(), fast, random.Random(1)).run())
        try:
            # The other fails twenty times meanwhile, at the pace that this one isn't asked any more.
            seen = lambda: len(other.calls) >= 20 and bool(busy.calls)  # noqa: E731
            await asyncio.to_thread(wait_until, seen, 20, "twenty attempts")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    with webhook(answer=lambda _payload: 429) as busy, webhook(answer=lambda _payload: 503) as other:
        busy.headers = {"Retry-After": "3000"}
        asyncio.run(run(busy.url, other.url))
        assert len(busy.calls) == 1
    with store.read() as connection:
        assert connection.execute(select(outbox.c.delivered_unix_ns)).scalars().all() == [None, None]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ControlStore]:
    opened = ControlStore.open(tmp_path / "control.sqlite")
    yield opened
    opened.close()


# --- mail ---------------------------------------------------------------------------------------


def _mail(server: MailServer, *, password: str = PASSWORD, ca: bool = True, **changes: Any) -> MailReceiver:
    settings = {
        "host": "127.0.0.1",
        "port": server.port,
        "sender": "pgherd@db.example",
        "recipients": ("dba@db.example", "oncall@db.example"),
        "user": USER,
        "password": password,
        "ca_file": str(server.ca_file) if ca else None,
        **changes,
    }
    return MailReceiver("mail", MailSettings(**settings), timeout_s=5, external_url=URL)


def test_mail_goes_out_over_starttls_with_a_login(tmp_path: Path) -> None:
    with mail_server(tmp_path) as server:
        _deliver(_mail(server))
        (mail,) = server.mails
    assert mail["Subject"] == "[FIRING:1] DiskSpace main"
    assert (mail["From"], mail["To"]) == ("pgherd@db.example", "dba@db.example, oncall@db.example")
    assert mail["Message-ID"] == f"<{MIXED.id}@db.example>"
    assert mail["References"] == "<0123456789abcdef@db.example>"
    assert mail["Auto-Submitted"] == "auto-generated"
    body = mail.get_payload(decode=True)
    assert isinstance(body, bytes)
    assert body.decode().replace("\r\n", "\n") == plain_text(MIXED, URL)


def test_mail_goes_out_over_tls_and_in_the_clear(tmp_path: Path) -> None:
    for security in ("tls", "none"):
        with mail_server(tmp_path, security=security) as server:
            _deliver(_mail(server, security=security, user=""))
            assert len(server.mails) == 1


def test_a_label_cant_write_headers(tmp_path: Path) -> None:
    labels = {"alertname": "A\r\nBcc: all@db.example"}
    with mail_server(tmp_path, security="none") as server:
        _deliver(_mail(server, security="none", user=""), notification("d.1", "k", labels, [_note("db1")]))
        (mail,) = server.mails
    assert mail["Bcc"] is None
    assert server.recipients == [["dba@db.example", "oncall@db.example"]]


def test_one_unknown_address_doesnt_page_the_others_twice(tmp_path: Path) -> None:
    with mail_server(tmp_path, security="none") as server:
        server.refuse = {"dba@db.example": "550 no such user"}
        _deliver(_mail(server, security="none", user=""))
        assert server.recipients == [["oncall@db.example"]]


@pytest.mark.parametrize(
    ("refuse", "ill"),
    [
        ({"dba@db.example": "550 no", "oncall@db.example": "550 no"}, False),
        ({"DATA": "554 spam"}, False),
        ({"DATA": "451 later"}, True),
    ],
)
def test_what_a_mail_servers_refusal_means(tmp_path: Path, refuse: dict[str, str], ill: bool) -> None:
    with mail_server(tmp_path, security="none") as server:
        server.refuse = refuse
        with pytest.raises(DeliveryError) as caught:
            _deliver(_mail(server, security="none", user=""))
    assert caught.value.receiver_ill is ill


def test_a_wrong_password_an_unknown_authority_and_a_dead_server_are_told_without_secrets(tmp_path: Path) -> None:
    with mail_server(tmp_path) as server:
        wrong = _mail(server, password="swordfish")
        stranger = _mail(server, ca=False)
        for receiver in (wrong, stranger):
            with pytest.raises(DeliveryError) as caught:
                _deliver(receiver)
            assert caught.value.receiver_ill
            assert "swordfish" not in f"{caught.value!r}"
            assert PASSWORD not in f"{caught.value!r}"
        assert server.mails == []
    with pytest.raises(DeliveryError) as caught:
        _deliver(_mail(server, password="swordfish"))
    assert "swordfish" not in repr(wrong._settings)


@contextmanager
def _dripping() -> Iterator[int]:
    """The port of a mail server that says one letter after the other and never finishes its first line; ends with its test."""
    over = threading.Event()

    class Drip(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                while not over.wait(0.05):
                    self.request.sendall(b"2")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            over.set()
            server.shutdown()
            thread.join()


def _mail_to(port: int, timeout_s: float) -> MailReceiver:
    settings = MailSettings("127.0.0.1", port, "pgherd@db.example", ("dba@db.example",), "none")
    return MailReceiver("mail", settings, timeout_s=timeout_s)


def test_slow_receivers_keep_nobody_else_waiting() -> None:
    """Rules are evaluated on the event loop's threads: mail servers that drip their answers took them all."""

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        with _dripping() as port:
            receivers = [_mail_to(port, 30) for _ in range(4)]
            deliveries = [asyncio.create_task(receiver.deliver(MIXED)) for receiver in receivers]
            await asyncio.sleep(0)  # each has begun
            try:
                assert await asyncio.wait_for(asyncio.to_thread(int), 5) == 0
                assert not any(delivery.done() for delivery in deliveries)
            finally:
                for delivery in deliveries:
                    delivery.cancel()
        for receiver in receivers:
            await receiver.close()

    asyncio.run(run())


def test_a_delivery_ends_though_each_of_its_steps_goes_on() -> None:
    async def run() -> None:
        with _dripping() as port:
            receiver = _mail_to(port, 0.2)
            for _ in range(2):  # the second waits behind the first, which nobody can stop
                with pytest.raises(DeliveryError) as caught:
                    await asyncio.wait_for(receiver.deliver(MIXED), 20)
                assert caught.value.receiver_ill
        await receiver.close()

    asyncio.run(run())


# --- apprise ------------------------------------------------------------------------------------


def test_apprise_carries_the_rest() -> None:
    with webhook() as hook:
        _deliver(AppriseReceiver("chat", f"json://127.0.0.1:{hook.port}/x", timeout_s=5, external_url=URL))
        (call,) = hook.calls
    assert call.payload["title"] == MIXED.title
    assert call.payload["message"].strip() == plain_text(MIXED, URL).strip()
    assert call.payload["type"] == "failure"


def test_apprises_failures_are_ours_to_retry_and_its_urls_stay_secret() -> None:
    with webhook(answer=lambda _payload: 500) as hook, pytest.raises(DeliveryError) as failed:
        _deliver(AppriseReceiver("chat", f"json://user:swordfish@127.0.0.1:{hook.port}/x", timeout_s=5))
    assert failed.value.receiver_ill
    with pytest.raises(ConfigError) as caught:
        AppriseReceiver("chat", "nosuch://swordfish", timeout_s=5)
    assert "swordfish" not in f"{failed.value!r} {caught.value!r} {caught.value.as_dict()}"


# --- Alertmanager -------------------------------------------------------------------------------


def test_alertmanager_is_told_the_state_again_and_again_and_the_end(store: ControlStore) -> None:
    clock, query = TestClock(), Answers()
    evaluator = Evaluator(groups=[group(rule())], store=store, query=query, facts=no_facts, clock=clock)
    silencer = Silencer(store, clock)

    def turn(*nodes: str) -> None:
        query.vectors["x > 1"] = [({"node": node}, 2.0) for node in nodes]
        clock.advance(15)
        for evaluation in evaluator._evaluations:
            evaluation.evaluate(clock.wall_unix_ns(), clock.mono_s(), clock)

    def push(url: str) -> AlertmanagerPush:
        return AlertmanagerPush(
            "am", url, status=evaluator.status, silencer=silencer, clock=clock, timeout_s=5, external_url=URL
        )

    async def run(url: str) -> None:
        one = push(url)
        turn("a", "b")
        silencer.add(['node="b"'], duration_s=3600, author=Author("t", "socket"))
        await one.push()
        await one.push()
        silencer.add(['node="a"'], duration_s=3600, author=Author("t", "socket"))
        await one.push()  # pushed before: to stop would end it there
        hook.got = [{"fingerprint": hook_fingerprint(evaluator, "a")}]
        await push(url).push()  # and so after a kill
        turn("b")
        await one.push()

    with webhook() as hook:
        asyncio.run(run(f"http://127.0.0.1:{hook.port}/base/"))
        seen = [[(alert["labels"]["node"], alert["endsAt"]) for alert in call.payload] for call in hook.calls]
        first = hook.calls[0].payload[0]
        assert {call.path for call in hook.calls} == {"/base/api/v2/alerts"}
    assert set(first) == {"labels", "annotations", "startsAt", "endsAt", "generatorURL"}
    assert first["startsAt"] == "2025-10-09T08:53:35Z"
    assert seen == [[("a", "2025-10-09T08:57:35Z")]] * 4 + [[("a", "2025-10-09T08:53:50Z")]]


def test_alertmanager_is_told_nothing_of_a_former_process_before_the_first_evaluation(store: ControlStore) -> None:
    """What was restored is how things stood before we were away: it has ended meanwhile."""
    clock, query = TestClock(), Answers({"x > 1": [({"node": "a"}, 2.0)]})

    def restarted() -> Evaluator:
        evaluator = Evaluator(groups=[group(rule())], store=store, query=query, facts=no_facts, clock=clock)
        evaluator.restore()
        return evaluator

    def evaluate(evaluator: Evaluator) -> None:
        clock.advance(15)
        for evaluation in evaluator._evaluations:
            evaluation.evaluate(clock.wall_unix_ns(), clock.mono_s(), clock)

    evaluate(restarted())
    evaluator = restarted()
    assert len(evaluator.status()[0].alerting[0].instances) == 1
    looked = threading.Event()

    def status() -> Any:
        looked.set()
        return evaluator.status()

    async def run(url: str) -> None:
        one = AlertmanagerPush("am", url, status=status, silencer=Silencer(store, clock), clock=clock, timeout_s=5)
        task = asyncio.create_task(one.run())
        try:
            for _ in range(3):  # it looks, again and again, and waits
                looked.clear()
                assert await asyncio.to_thread(looked.wait, 20)
            assert hook.calls == []
            query.vectors["x > 1"] = []
            await asyncio.to_thread(evaluate, evaluator)
            await asyncio.to_thread(wait_until, lambda: bool(hook.calls), 20, "the end being told")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    with webhook() as hook:
        asyncio.run(run(f"http://127.0.0.1:{hook.port}"))
        ends = [alert["endsAt"] for call in hook.calls for alert in call.payload]
    assert ends == ["2025-10-09T08:53:50Z"], "resolved, and never firing"


@pytest.mark.parametrize("answer", [None, {"status": "ok"}, ["x"], [{}]])
def test_what_isnt_an_alertmanager_is_a_failure_like_others(store: ControlStore, answer: Any) -> None:
    """A proxy's page under a 200 ended the collector, at every start."""
    clock = TestClock()
    with webhook() as hook:
        hook.got = answer
        url = f"http://127.0.0.1:{hook.port}"
        one = AlertmanagerPush("am", url, status=lambda: (), silencer=Silencer(store, clock), clock=clock, timeout_s=5)
        with pytest.raises(DeliveryError):
            asyncio.run(one.push())


def test_an_alertmanager_whose_answer_has_no_end_is_given_up(store: ControlStore) -> None:
    clock = TestClock()
    with endless() as server:
        url = f"http://127.0.0.1:{server.port}"
        one = AlertmanagerPush("am", url, status=lambda: (), silencer=Silencer(store, clock), clock=clock, timeout_s=20)
        with pytest.raises(DeliveryError):
            asyncio.run(one.push())
    assert server.sent_bytes < 128 * 1024 * 1024


def hook_fingerprint(evaluator: Evaluator, node: str) -> str:
    (status,) = evaluator.status()[0].alerting
    return next(key for key, one in status.instances.items() if one.labels["node"] == node)


# --- configuration ------------------------------------------------------------------------------


def test_the_configuration_makes_every_kind(tmp_path: Path, store: ControlStore) -> None:
    secret = tmp_path / "secret"
    secret.write_text("http://127.0.0.1:1/secret\n")
    secret.chmod(0o600)
    mail = MailConfig(host="mail", sender="a@b", recipients=("c@d",), user="u", password_file=secret)
    config = AlertsConfig(
        receivers=(
            ReceiverConfig("log", "log"),
            *(ReceiverConfig(kind, kind, url_file=secret) for kind in ("webhook", "slack", "discord", "alertmanager")),
            ReceiverConfig("mail", "smtp", mail=mail),
            ReceiverConfig("rest", "apprise", url="json://127.0.0.1:1/x"),
        )
    )
    assert [one.name for one in receivers_of(config)] == ["log", "webhook", "slack", "discord", "mail", "rest"]
    assert [one.receiver for one in routing_of(config).default] == ["log", "webhook", "slack", "discord", "mail", "rest"]
    clock = TestClock()
    pushes = alertmanagers_of(config, list, Silencer(store, clock), clock)
    assert [one.name for one in pushes] == ["alertmanager"]


@pytest.mark.parametrize(
    "receiver",
    [
        ReceiverConfig("a", "slack"),
        ReceiverConfig("a", "discord", url="ftp://x"),
        ReceiverConfig("a", "smtp"),
        ReceiverConfig("a", "smtp", mail=MailConfig(host="h", sender="s@t")),
        ReceiverConfig("a", "apprise", url="nosuch://x"),
    ],
)
def test_receivers_that_cant_be_are_refused(receiver: ReceiverConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        receivers_of(AlertsConfig(receivers=(receiver,)))
    assert caught.value.code == "config.invalid"


def test_a_password_in_the_clear_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("swordfish")
    secret.chmod(0o600)
    mail = MailConfig(host="h", sender="s@t", recipients=("r@t",), security="none", user="u", password_file=secret)
    with pytest.raises(ConfigError, match="in the clear"):
        receivers_of(AlertsConfig(receivers=(ReceiverConfig("a", "smtp", mail=mail),)))
