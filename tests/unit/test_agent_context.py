"""What every verb of the agent refuses before it does anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgherd.agent.context import AgentContext
from pgherd.proto.errors import ConfigError


def context(tmp_path: Path, conninfo: str) -> AgentContext:
    file = tmp_path / "agent.toml"
    file.write_text(f"[[nodes]]\nalias = 'a'\ncluster = 'c'\nconninfo = {conninfo!r}\n")
    return AgentContext(config_file=file)


@pytest.mark.parametrize(
    "conninfo",
    [
        "host=/x password=sesame",
        "postgresql://u:sesame@h/db",
        "host=h sslkey=/k sslpassword=sesame",
        "host=h password = 'sesame'",
    ],
)
def test_no_secret_may_be_in_a_conninfo(tmp_path: Path, conninfo: str) -> None:
    """It becomes an argument of pg_dump, which every user of the host can read."""
    with pytest.raises(ConfigError) as caught:
        _ = context(tmp_path, conninfo).config
    assert caught.value.code == "config.invalid"
    assert "password_file" in caught.value.hint
    assert "sesame" not in str(caught.value.as_dict())


def test_a_conninfo_that_isnt_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        _ = context(tmp_path, "host=/x nonsense").config


def test_a_conninfo_without_a_secret_is_taken(tmp_path: Path) -> None:
    assert context(tmp_path, "host=/x user=u passfile=/p").config.nodes[0].alias == "a"
