"""Fixtures that several kinds of tests share: real PostgreSQL servers.

`postgres` and `postgres_pair` live for the session: make your own database (`database`) and leave the
server as you found it. A test that stops, kills or reconfigures takes `private_postgres`,
`private_pair` or asks `postgres_fleet`. Another major: `@pytest.mark.parametrize("postgres", [17], indirect=True)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from pgherd.postgres.scratch import workspace
from support.postgres import PARENT, Fleet, Pair, Server, default_major, fleet

_DATABASE_NUMBERS = itertools.count(1)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A test that configures logging (a CLI verb does) leaves it unconfigured for the next."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def postgres_fleet() -> Iterator[Fleet]:
    """Makes any servers a test wants; they end with the session."""
    with fleet() as made:
        yield made


@pytest.fixture(scope="session")
def postgres(postgres_fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Server]:
    """One server for the session (indirect parameter: its major)."""
    server = postgres_fleet.server(getattr(request, "param", None) or default_major())
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_pair(postgres_fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A primary with a streaming standby for the session (indirect parameter: their major)."""
    pair = postgres_fleet.pair(getattr(request, "param", None) or default_major())
    yield pair
    pair.standby.stop()
    pair.primary.stop()


@pytest.fixture
def private_postgres(postgres_fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server for this test alone: stop, kill, pause and reconfigure it."""
    server = postgres_fleet.server(getattr(request, "param", None) or default_major())
    yield server
    server.stop()


@pytest.fixture
def private_pair(postgres_fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A primary and standby for this test alone."""
    pair = postgres_fleet.pair(getattr(request, "param", None) or default_major())
    yield pair
    pair.standby.stop()
    pair.primary.stop()


@pytest.fixture
def database(postgres: Server) -> Iterator[str]:
    """The name of a fresh empty database on `postgres`, dropped afterwards."""
    name = postgres.create_database(f"test_{next(_DATABASE_NUMBERS)}")
    yield name
    postgres.drop_database(name)


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that servers' OS users can pass through (tmp_path is private), removed afterwards."""
    with workspace(PARENT) as directory:
        yield directory
