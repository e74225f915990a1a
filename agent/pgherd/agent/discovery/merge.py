"""From clues to instances: processes, sockets and Debian's cluster layout say parts of one thing. Pure.

Never broken: every clue ends up in exactly one instance; what no clue tells is None and has a reason in
`unseen`; nothing that may be secret is looked at (no environment, no settings but the few named here).

Sources: PostgreSQL docs "postgres" (options), "Database File Layout"; postgresql-common, pg_lsclusters(1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

SETTINGS = ("data_directory", "port", "unix_socket_directories", "cluster_name")  # all that is read of a postgresql.conf
_MAJOR_IN_PATH = re.compile(r"/(?:postgresql|pgsql-|pgsql/|postgres)/?(\d{2})(?:\.\d+)?/")
_SETTING = re.compile(r"^\s*(\w+)\s*=?\s*(?:'((?:[^']|'')*)'|([^\s#']+))\s*(?:#.*)?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ProcessClue:
    """A running postmaster, as its command line and, where readable, its files tell."""

    pid: int
    user: str
    argv: tuple[str, ...]
    working_directory: str | None = None  # a postmaster's is its data directory
    lock_file: tuple[str, ...] | None = None  # postmaster.pid's lines
    version_file: str | None = None  # PG_VERSION


@dataclass(frozen=True, slots=True)
class SocketClue:
    """A UNIX socket that somebody listens on; `pid` is the listener's."""

    directory: str
    port: int
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class ClusterClue:
    """A cluster in Debian's layout, running or not."""

    major: int
    name: str
    config_file: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Instance:
    """One server of this host. None: not seen, for the reason in `unseen`."""

    name: str  # Debian's "15/main", else ""
    running: bool
    pid: int | None = None
    user: str | None = None
    major: int | None = None
    port: int | None = None
    socket_directory: str | None = None
    data_directory: str | None = None
    unseen: Mapping[str, str] = field(default_factory=dict)
    configured: str | None = None  # alias of the node that serves it


def settings_of(text: str) -> dict[str, str]:
    """The few settings of interest in a postgresql.conf; of several the last counts. Includes aren't followed."""
    found = {}
    for match in _SETTING.finditer(text):
        if match[1].lower() in SETTINGS:
            found[match[1].lower()] = match[2].replace("''", "'") if match[2] is not None else match[3]
    return found


def options_of(argv: Sequence[str]) -> dict[str, str]:
    """data_directory, port, config_file and what else a postmaster's command line sets, by setting name."""
    found: dict[str, str] = {}
    short = {"-D": "data_directory", "-p": "port", "-k": "unix_socket_directories"}
    words = iter(argv[1:])
    for word in words:
        if word[:2] in short:
            found[short[word[:2]]] = word[2:] or next(words, "")
        elif word == "-c":
            name, _, value = next(words, "").partition("=")
            found[name.replace("-", "_")] = value
        elif (word.startswith("-c") and "=" in word) or (word.startswith("--") and "=" in word):
            name, _, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value
    return found


def instances(
    processes: Iterable[ProcessClue], sockets: Iterable[SocketClue], clusters: Iterable[ClusterClue]
) -> list[Instance]:
    """All instances, by port. Every clue is in one of them."""
    open_sockets, unclaimed = list(sockets), list(clusters)
    found = []
    for process in processes:
        mine = [one for one in open_sockets if one.pid == process.pid]
        open_sockets = [one for one in open_sockets if one.pid != process.pid]
        options = options_of(process.argv)
        directory = _data_directory(process, options)
        cluster = next((one for one in unclaimed if _is_of(one, options, directory)), None)
        if cluster is not None:
            unclaimed.remove(cluster)
        found.append(_running(process, options, directory, mine, cluster))
    by_port = {one.port: index for index, one in enumerate(found) if one.port is not None and one.socket_directory is None}
    for socket in open_sockets:
        if socket.port in by_port:  # the process is known by its port, its socket by no pid
            index = by_port.pop(socket.port)
            found[index] = _without_unseen(replace(found[index], socket_directory=socket.directory), "socket_directory")
        elif not any(one.port == socket.port and one.socket_directory == socket.directory for one in found):
            found.append(_socket_only(socket, unclaimed))
    found += [_stopped(cluster) for cluster in unclaimed]
    return sorted(found, key=lambda one: (one.port is None, one.port or 0, one.data_directory or "", one.name))


def _data_directory(process: ProcessClue, options: Mapping[str, str]) -> str | None:
    if process.lock_file is not None and len(process.lock_file) > 1:
        return process.lock_file[1]
    directory = process.working_directory or options.get("data_directory")
    return directory if directory and directory.startswith("/") else None


def _is_of(cluster: ClusterClue, options: Mapping[str, str], directory: str | None) -> bool:
    if options.get("config_file"):
        return options["config_file"] == cluster.config_file
    return directory is not None and cluster.settings.get("data_directory") == directory


def _running(
    process: ProcessClue,
    options: Mapping[str, str],
    directory: str | None,
    sockets: Sequence[SocketClue],
    cluster: ClusterClue | None,
) -> Instance:
    stated = {**(cluster.settings if cluster is not None else {}), **options}
    lock = process.lock_file or ()
    port = _number(lock[3]) if len(lock) > 3 else None
    port = port or (sockets[0].port if sockets else None) or _number(stated.get("port"))
    place = (sockets[0].directory if sockets else None) or (lock[4] if len(lock) > 4 else None) or None
    major = _number((process.version_file or "").strip().split(".")[0]) or (cluster.major if cluster is not None else None)
    if major is None and (match := _MAJOR_IN_PATH.search(process.argv[0] if process.argv else "")):
        major = int(match[1])
    unseen = {
        what: why
        for what, value, why in (
            ("data_directory", directory, "no -D on the command line; only its own user may see more"),
            ("port", port, "postmaster.pid can't be read and no socket of this process was found"),
            ("socket_directory", place, "no UNIX socket of this process was found"),
            ("major", major, "PG_VERSION can't be read and the program's path doesn't tell"),
        )
        if value is None
    }
    return Instance(
        name=f"{cluster.major}/{cluster.name}" if cluster is not None else "",
        running=True,
        pid=process.pid,
        user=process.user,
        major=major,
        port=port,
        socket_directory=place,
        data_directory=directory,
        unseen=unseen,
    )


def _socket_only(socket: SocketClue, unclaimed: list[ClusterClue]) -> Instance:
    """A socket whose process we can't see: another user's with hidepid, or another namespace's."""
    cluster = next((one for one in unclaimed if _number(one.settings.get("port")) == socket.port), None)
    if cluster is not None:
        unclaimed.remove(cluster)
        known = _stopped(cluster)
        return replace(
            known, running=True, socket_directory=socket.directory, unseen={"pid": "its process is hidden from this user"}
        )
    why = "its process is hidden from this user"
    return Instance(
        "",
        running=True,
        port=socket.port,
        socket_directory=socket.directory,
        unseen={"pid": why, "data_directory": why, "major": why},
    )


def _stopped(cluster: ClusterClue) -> Instance:
    sockets = cluster.settings.get("unix_socket_directories", "/var/run/postgresql").split(",")
    unseen = {} if "data_directory" in cluster.settings else {"data_directory": f"{cluster.config_file} doesn't say"}
    return Instance(
        name=f"{cluster.major}/{cluster.name}",
        running=False,
        major=cluster.major,
        port=_number(cluster.settings.get("port")) or 5432,
        socket_directory=sockets[0].strip() or None,
        data_directory=cluster.settings.get("data_directory"),
        unseen=unseen,
    )


def _without_unseen(instance: Instance, what: str) -> Instance:
    return replace(instance, unseen={name: why for name, why in instance.unseen.items() if name != what})


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None
