"""What the pages say exists, exists: files, links, verbs, settings, error codes' anchors."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from pgherd.agent.config import AgentConfig
from pgherd.agent.main import agent
from pgherd.cli.main import pgherd
from pgherd.runtime.config import load

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)")
_TOP = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in _LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    prose = _FENCE.sub("", page.read_text())
    named = [code for code in _CODE.findall(prose) if "/" in code and code.split("/")[0] in _TOP and " " not in code]
    concrete = [code.rstrip("/") for code in named if not any(sign in code for sign in "<>*{…")]
    assert [code for code in concrete if not (ROOT / code).exists()] == []


def commands_in(page: Path) -> list[list[str]]:
    """Lines of our two commands in a page's shell blocks."""
    lines = [
        line.partition("#")[0].partition("|")[0].strip()
        for language, block in _FENCE.findall(page.read_text())
        if language in ("sh", "bash", "console", "")
        for line in block.splitlines()
    ]
    return [shlex.split(line) for line in lines if line.startswith(("pgherd ", "pgherd-agent "))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_printed_commands_are_real(page: Path) -> None:
    """Every `pgherd …` line of a page names a verb that exists, with options that it has."""
    for words in commands_in(page):
        command: click.Command = pgherd if words[0] == "pgherd" else agent
        context = click.Context(command, info_name=words[0])
        rest = words[1:]
        while isinstance(command, click.Group):
            while rest and rest[0].startswith("-"):
                option = next((o for o in command.params if rest[0].split("=")[0] in o.opts), None)
                assert option is not None, f"{page.name}: {' '.join(words)}: {rest[0]}"
                takes_value = isinstance(option, click.Option) and not option.is_flag and "=" not in rest[0]
                rest = rest[2 if takes_value else 1 :]
            assert rest, f"{page.name}: {' '.join(words)} stops at a group"
            below = command.get_command(context, rest[0])
            assert below is not None, f"{page.name}: {' '.join(words)}: no verb {rest[0]}"
            command, rest = below, rest[1:]
        known = {opt for parameter in command.params for opt in parameter.opts}
        unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known | {"--help"}]
        assert not unknown, f"{page.name}: {' '.join(words)}: {unknown}"


def test_the_readmes_agent_file_is_valid(tmp_path: Path) -> None:
    blocks = [block for language, block in _FENCE.findall((ROOT / "README.md").read_text()) if language == "toml"]
    assert blocks
    for block in blocks:
        tomllib.loads(block)
        file = tmp_path / "agent.toml"
        file.write_text(block)
        config = load(AgentConfig, file=file, environment_prefix="X__", environment={}).value
        assert config.nodes[0].alias == "db1"


def test_reference_pages_are_fresh() -> None:
    finished = subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
