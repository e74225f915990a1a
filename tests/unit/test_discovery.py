"""Clues become instances: each clue in one, nothing guessed, nothing secret read."""

from __future__ import annotations

import tomllib

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgherd.agent.discovery.merge import ClusterClue, Instance, ProcessClue, SocketClue, instances, options_of, settings_of
from pgherd.agent.discovery.propose import toml_of, with_nodes

BINARY = "/usr/lib/postgresql/15/bin/postgres"
CONF = "/etc/postgresql/15/main/postgresql.conf"
DEBIAN = ClusterClue(15, "main", CONF, {"data_directory": "/var/lib/postgresql/15/main", "port": "5432"})
ARGV = (BINARY, "-D", "/var/lib/postgresql/15/main", "-c", f"config_file={CONF}")


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (("postgres", "-D", "/d", "-p", "5433"), {"data_directory": "/d", "port": "5433"}),
        (("postgres", "-D/d", "-p5433", "-k", "/s"), {"data_directory": "/d", "port": "5433", "unix_socket_directories": "/s"}),
        (("postgres", "--port=1", "-c", "config-file=/c"), {"port": "1", "config_file": "/c"}),
        (("postgres", "-cport=1"), {"port": "1"}),
        (("postgres", "-D"), {"data_directory": ""}),
        (("postgres: main: checkpointer ",), {}),
        ((), {}),
    ],
)
def test_what_a_command_line_says(argv: tuple[str, ...], options: dict[str, str]) -> None:
    assert options_of(argv) == options


def test_only_named_settings_are_taken_from_a_file() -> None:
    text = """
#port = 1
port = 5433   # changed
primary_conninfo = 'host=x password=secret'
data_directory = '/it''s/here'
 cluster_name 'c'
port=5434
"""
    assert settings_of(text) == {"port": "5434", "data_directory": "/it's/here", "cluster_name": "c"}


def test_root_sees_one_whole_instance() -> None:
    lock = ("812", "/var/lib/postgresql/15/main", "1700000000", "5439", "/run/postgresql", "*", "1 2", "ready")
    process = ProcessClue(812, "postgres", ARGV, "/var/lib/postgresql/15/main", lock, "15\n")
    (found,) = instances([process], [SocketClue("/run/postgresql", 5439, 812)], [DEBIAN])
    assert found == Instance(
        "15/main", True, 812, "postgres", 15, 5439, "/run/postgresql", "/var/lib/postgresql/15/main"
    )  # the port is the running server's, not the file's


def test_a_user_without_rights_sees_what_is_public_and_what_is_not() -> None:
    process = ProcessClue(812, "postgres", ("/opt/pg/bin/postgres", "-D", "/data"))
    (found,) = instances([process], [], [])
    assert (found.data_directory, found.port, found.major) == ("/data", None, None)
    assert set(found.unseen) == {"port", "socket_directory", "major"}
    (found,) = instances([process], [SocketClue("/run/postgresql", 5432, 812)], [])
    assert (found.port, set(found.unseen)) == (5432, {"major"})


def test_a_hidden_process_is_known_by_its_socket() -> None:
    (found,) = instances([], [SocketClue("/run/postgresql", 5432)], [DEBIAN])
    assert (found.running, found.name, found.data_directory) == (True, "15/main", "/var/lib/postgresql/15/main")
    assert set(found.unseen) == {"pid"}
    (found,) = instances([], [SocketClue("/tmp", 6000)], [])
    assert (found.running, found.port) == (True, 6000)
    assert set(found.unseen) == {"pid", "data_directory", "major"}


def test_instances_that_are_down_and_those_of_other_ports_stay_apart() -> None:
    other = ClusterClue(17, "b", "/etc/postgresql/17/b/postgresql.conf", {"data_directory": "/b", "port": "5433"})
    process = ProcessClue(1, "postgres", ARGV)
    found = instances(
        [process, ProcessClue(2, "x", ("postgres", "-D", "/c", "-p", "6000"))], [SocketClue("/s", 6000)], [DEBIAN, other]
    )
    assert [(one.name, one.running, one.port) for one in found] == [
        ("15/main", True, 5432),
        ("17/b", False, 5433),
        ("", True, 6000),
    ]
    assert found[2].socket_directory == "/s"


def test_which_node_serves_what() -> None:
    found = [
        Instance("", True, port=5432, socket_directory="/run/postgresql"),
        Instance("", True, port=5433, socket_directory="/run/postgresql"),
        Instance("", True, port=5434),
    ]
    nodes = {"a": ("/var/run/postgresql", ""), "b": ("127.0.0.1", "5433"), "far": ("db.example", "5434")}
    matched = with_nodes(found, nodes, lambda path: path.removeprefix("/var"))
    assert [one.configured for one in matched] == ["a", "b", None]


def test_the_proposed_lines_are_toml_whatever_a_path_holds() -> None:
    evil = Instance("", True, port=5432, major=15, socket_directory='/tmp/"a b\n[x]', data_directory="/d\n[[policy]]")
    alias, text = toml_of(evil, "db1.example", ["db1-5432"], lambda keywords: make_conninfo("", **keywords))
    document = tomllib.loads(text)
    (node,) = document["nodes"]
    assert set(document) == {"nodes"}
    assert alias == node["alias"] == "db1-5432-2"
    assert conninfo_to_dict(node["conninfo"]) == {"host": '/tmp/"a b\n[x]', "port": "5432", "user": "pgherd"}
