"""The layout that tools rely on (ADR 0001)."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PORTIONS = ("agent", "alerts", "collector", "proto", "storage")


def test_the_namespace_itself_is_no_package() -> None:
    assert [portion for portion in PORTIONS if (ROOT / portion / "pgherd" / "__init__.py").exists()] == []


def test_every_folder_below_it_is_one() -> None:
    """mypy, import-linter and the wheel don't see a folder without `__init__.py`."""
    missing = [
        str(folder.relative_to(ROOT))
        for portion in PORTIONS
        for folder in (ROOT / portion / "pgherd").rglob("*")
        if folder.is_dir() and any(folder.glob("*.py")) and not (folder / "__init__.py").exists()
    ]
    assert missing == []


def test_the_build_lists_every_portion() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert sorted(build["dev-mode-dirs"]) == sorted(PORTIONS)
    assert sorted(build["targets"]["wheel"]["sources"]) == sorted(PORTIONS)
    assert sorted(build["targets"]["wheel"]["only-include"]) == sorted(f"{portion}/pgherd" for portion in PORTIONS)


def test_nothing_is_called_by_a_name_that_says_nothing() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
    assert [str(path) for portion in PORTIONS for path in (ROOT / portion).rglob("*.py") if path.stem in vague] == []


def test_the_lock_names_no_host() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert "--hash=sha256:" in lock
    assert not (ROOT / "uv.lock").exists()
