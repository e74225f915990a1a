"""Layers, origins and the refusal of what isn't meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgherd.agent.config import ENVIRONMENT_PREFIX, AgentConfig
from pgherd.collector.config import CollectorConfig
from pgherd.proto.errors import ConfigError
from pgherd.runtime.config import from_plain, load, parse_duration_s, parse_size_bytes, to_plain

FILE = """
state_directory = "state"
[sampling]
interval = "5s"
[spool]
size_max = "1GiB"
[[nodes]]
alias = "a"
cluster = "main"
password_file = "secret"
[policy.verbs]
"backup.run" = "deny"
[policy.restore_roots]
drills = "/srv/drills"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(FILE)
    return path


def test_later_layers_win_and_origins_are_kept(file: Path) -> None:
    loaded = load(
        AgentConfig,
        file=file,
        environment_prefix=ENVIRONMENT_PREFIX,
        environment={"PGHERD_AGENT__SAMPLING__INTERVAL": "7s", "PGHERD_AGENT__BACKUP__KEEP": "9", "OTHER": "x"},
        flags={"backup.keep": 11, "log_level": None},
    )
    config = loaded.value
    assert config.sampling.interval == 7.0
    assert config.backup.keep == 11
    assert config.spool.size_max == 1 << 30
    assert config.policy.verbs == {"backup.run": "deny"}
    origins = {key: origin for key, _, origin in loaded.show()}
    assert origins["sampling.interval"] == "env PGHERD_AGENT__SAMPLING__INTERVAL"
    assert origins["backup.keep"] == "flag backup.keep"
    assert origins["spool.size_max"] == str(file)
    assert origins["nodes.0.alias"] == str(file)
    assert origins["log_level"] == "default"


def test_relative_paths_are_taken_from_the_file(file: Path) -> None:
    config = load(AgentConfig, file=file, environment_prefix="X__", environment={}).value
    assert config.state_directory == file.parent / "state"
    assert config.nodes[0].password_file == file.parent / "secret"


@pytest.mark.parametrize(
    ("flags", "key", "hint"),
    [
        ({"spool.siz_max": "1GiB"}, "spool.siz_max", "size_max"),
        ({"sampling.interval": 5}, "sampling.interval", ""),
        ({"sampling.interval": "5 parsecs"}, "sampling.interval", ""),
        ({"backup.compression": "rar"}, "backup.compression", ""),
        ({"policy.verbs": {"ping": "maybe"}}, "policy.verbs.ping", ""),
    ],
)
def test_bad_values_name_their_key(flags: dict[str, object], key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(AgentConfig, file=None, environment_prefix="X__", environment={}, flags=flags)
    assert caught.value.code == "config.invalid"
    assert caught.value.context["key"] == key
    assert hint in caught.value.hint


@pytest.mark.parametrize("schema", [AgentConfig, CollectorConfig])
def test_a_resident_gets_the_same_configuration_without_pydantic(schema: type[Any], file: Path) -> None:
    source = file if schema is AgentConfig else None
    value = load(schema, file=source, environment_prefix="X__", environment={}).value
    assert from_plain(schema, to_plain(value)) == value


def test_a_file_that_is_not_toml_names_the_line(tmp_path: Path) -> None:
    broken = tmp_path / "agent.toml"
    broken.write_text("a = \n")
    with pytest.raises(ConfigError, match="line 1") as caught:
        load(AgentConfig, file=broken, environment_prefix="X__", environment={})
    assert caught.value.code == "config.unreadable"


@given(st.integers(1, 10**6), st.sampled_from(["ms", "s", "m", "h", "d", "w"]))
def test_durations(amount: int, unit: str) -> None:
    factor_s = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[unit]
    assert parse_duration_s(f"{amount}{unit}") == pytest.approx(amount * factor_s)


def test_combined_durations_and_sizes() -> None:
    assert parse_duration_s("1h30m") == 5400
    assert parse_size_bytes("1.5GiB") == 3 << 29
    for text in ("", "h", "1", "1h garbage", "1h,30m", "-5s"):
        with pytest.raises(ValueError, match="duration"):
            parse_duration_s(text)
    for text in ("", "1", "1GB", "GiB"):
        with pytest.raises(ValueError, match="size"):
            parse_size_bytes(text)
