"""The CLI's frame: exit statuses, errors on stderr, `--json` on every verb, secrets only by file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pgherd.agent.main import agent
from pgherd.cli.client import Address, Client
from pgherd.cli.main import pgherd
from pgherd.proto.codes import Exit
from pgherd.proto.errors import ConfigError, TransientError
from pgherd.runtime.logging import redact
from pgherd.runtime.render import human_bytes

# Verbs that run until they are stopped answer nothing.
_NO_ANSWER = {"pgherd collector run", "pgherd-agent run"}


def leaves(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from leaves(below, f"{path} {name}")
    else:
        yield path, command


VERBS = dict([*leaves(pgherd, "pgherd"), *leaves(agent, "pgherd-agent")])


@pytest.mark.parametrize("path", sorted(VERBS))
def test_every_verb_answers_in_json_and_explains_itself(path: str) -> None:
    command = VERBS[path]
    assert command.help, path
    if path not in _NO_ANSWER:
        assert any("--json" in option.opts for option in command.params), path


@pytest.mark.parametrize("path", sorted(VERBS))
def test_no_verb_takes_a_secret_as_an_argument(path: str) -> None:
    for parameter in VERBS[path].params:
        names = " ".join([*parameter.opts, parameter.name or ""]).lower()
        if any(word in names for word in ("password", "secret", "token")):
            assert "file" in names or parameter.name == "token_id", f"{path} {names}"


def test_no_collector_is_unreachable_and_says_what_next(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "pgherd.cli.main", "--socket", str(tmp_path / "none.sock"), "nodes", "ls", "--json"]
    finished = subprocess.run(argv, capture_output=True, text=True)
    assert finished.returncode == Exit.UNREACHABLE
    assert finished.stdout == ""
    error = json.loads(finished.stderr)["error"]
    assert error["code"] == "peer.unreachable"
    assert "pgherd collector run" in error["hint"]


@pytest.mark.parametrize("argv", [["nodes", "frobnicate"], ["backups", "run"], ["--no-such-flag"]])
def test_usage_errors_exit_with_2(argv: list[str]) -> None:
    assert CliRunner().invoke(pgherd, argv).exit_code == Exit.USAGE


def test_a_token_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("pgherd_x_y")
    token.chmod(0o644)
    with pytest.raises(ConfigError, match="readable by others"):
        Address.resolve(url="http://127.0.0.1:1", socket=None, token_file=token)


def test_environment_comes_after_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHERD_URL", "http://from-environment:1")
    monkeypatch.setenv("PGHERD_SOCKET", str(tmp_path / "environment.sock"))
    assert Address.resolve(url=None, socket=None, token_file=None).url == "http://from-environment:1"
    assert Address.resolve(url="http://flag:1", socket=None, token_file=None).url == "http://flag:1"
    assert Address.resolve(url=None, socket=tmp_path / "flag.sock", token_file=None).socket == tmp_path / "flag.sock"


def test_a_refused_connection_is_transient() -> None:
    with Client(Address("http://127.0.0.1:9", None, None)) as client, pytest.raises(TransientError) as caught:
        client.get("/api/v1/nodes")
    assert caught.value.code == "peer.unreachable"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("conninfo password=hunter2 host=x", "hunter2"),
        ("postgres://u:hunter2@h/d", "hunter2"),
        ("Authorization: Bearer hunter2", "hunter2"),
        ("pgherd1_abcdefgh_hunterab_00ff@host:1 is bad", "hunterab"),
        ("PASSWORD 'hunter2'", "hunter2"),
        ("Bearer abcdefgh.ijklmnop", "abcdefgh"),
        ("secret=hunter2", "hunter2"),
    ],
)
def test_secrets_are_removed_from_text(text: str, hidden: str) -> None:
    assert hidden not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "the request carries no bearer token",
        "token:grafana is viewer; this needs operator",
        'password authentication failed for user "x"',
    ],
)
def test_words_about_secrets_stay(text: str) -> None:
    """An error that says what is missing must still say it."""
    assert redact(text) == text


def test_bytes_for_people() -> None:
    assert [human_bytes(count) for count in (0, 1023, 1536, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
