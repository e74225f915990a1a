"""The sockets that the collector listens on, and how many connections each may hold.

A connection costs a descriptor from accept on, before TLS and before anybody is asked who they are; a collector
without descriptors can't open its own files. So each listener has a bound, in all and per source, and the sum of
the bounds stays below the process's limit.

Overflow rule: the connection that is one too many is closed at once; those that exist go on.
"""

from __future__ import annotations

import contextlib
import ipaddress
import resource
import socket
import stat
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgherd.collector.api.socketpeer import peer_uid
from pgherd.proto.enrolment import split_address
from pgherd.proto.errors import ConfigError, PreconditionError

_UNIX_PATH_BYTES_MAX = 107  # unix(7): sun_path with its NUL
_DESCRIPTORS_WANTED = 65_536  # ten thousand agents with room; more only makes the kernel's tables bigger


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Connections at once: in all, and from one address (TCP) or user (UNIX)."""

    total: int
    per_source: int


@dataclass(frozen=True, slots=True)
class Limits:
    """The shares of the listeners; what is left belongs to stores, logs and notifications."""

    http: ConnectionLimits
    local: ConnectionLimits
    enrol: ConnectionLimits
    otlp: ConnectionLimits
    grpc: int

    @classmethod
    def of(cls, descriptors: int) -> Limits:
        """Shares of a process that may have so many open files."""
        http, local, enrol = min(512, descriptors // 8), min(256, descriptors // 16), min(1024, descriptors // 8)
        otlp = min(4096, descriptors // 8)
        return cls(
            http=ConnectionLimits(http, http),  # loopback: all come from one address
            local=ConnectionLimits(local, local // 4),
            enrol=ConnectionLimits(enrol, enrol // 4),  # a rack behind one NAT may renew together
            otlp=ConnectionLimits(otlp, otlp // 4),
            grpc=descriptors // 2,
        )


def raise_descriptor_limit() -> int:
    """Lift the soft limit of open files towards the hard one and return it: many systems start services with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS_WANTED)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _DESCRIPTORS_WANTED if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class BoundedListener(socket.socket):
    """A listening socket that counts what it accepted until it is closed. Takes the descriptor of `listener` over."""

    def __init__(self, listener: socket.socket, limits: ConnectionLimits) -> None:
        super().__init__(listener.family, listener.type, listener.proto, fileno=listener.detach())
        self._limits = limits
        self._held: Counter[str] = Counter()
        self.refused = 0

    @property
    def connections(self) -> int:
        """How many are open now."""
        return self._held.total()

    def accept(self) -> tuple[socket.socket, Any]:
        """As socket.accept. Raises ConnectionAbortedError for one too many: event loops take that for a caller who left."""
        connection, address = super().accept()
        source = _source(connection, address)
        if self._held.total() >= self._limits.total or self._held[source] >= self._limits.per_source:
            connection.close()
            self.refused += 1
            raise ConnectionAbortedError("too many connections")
        self._held[source] += 1
        return _Counted(connection, self._held, source), address


class _Counted(socket.socket):
    """An accepted connection that takes itself off the count when it is closed, or forgotten."""

    def __init__(self, connection: socket.socket, held: Counter[str], source: str) -> None:
        super().__init__(connection.family, connection.type, connection.proto, fileno=connection.detach())
        self._leave = weakref.finalize(self, _leave, held, source)

    def close(self) -> None:
        super().close()
        self._leave()


def _leave(held: Counter[str], source: str) -> None:
    held[source] -= 1
    if not held[source]:
        del held[source]


def _source(connection: socket.socket, address: Any) -> str:
    uid = peer_uid(connection)
    if uid is not None:
        return f"uid:{uid}"
    host = str(address[0])
    if ":" not in host:
        return host
    return str(ipaddress.ip_network((host.partition("%")[0], 64), strict=False))  # a host may have all of its /64


def tcp_listener(address: str, what: str, limits: ConnectionLimits, *, loopback_only: bool = False) -> BoundedListener:
    """A bound TCP socket. Raises ConfigError config.invalid, PreconditionError state.locked when the port is taken."""
    host, port = split_address(address)
    if loopback_only and not _is_loopback(host):
        raise ConfigError(
            "config.invalid",
            f"{what}: {address} can be reached from outside, and this port speaks plain HTTP",
            hint="keep it on loopback and put a TLS proxy in front",
            key=what,
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, since asyncio turns Nagle off for this protocol only, and Nagle costs each answer 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        listener.close()
        raise PreconditionError(
            "state.locked",
            f"{what}: can't listen on {address}: {getattr(error, 'strerror', None) or error}",
            hint="see who listens there (ss -ltnp)",
        ) from error
    return BoundedListener(listener, limits)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def unix_listener(path: Path, limits: ConnectionLimits) -> Iterator[BoundedListener]:
    """The local CLI's socket: everybody may connect, the kernel says who it is, auth.py decides.

    Raises ConfigError config.invalid for a path that can't be a socket's, or that is something else's already.
    """
    if len(bytes(path)) > _UNIX_PATH_BYTES_MAX:
        raise ConfigError(
            "config.invalid",
            f"http.socket: {path} has more than the {_UNIX_PATH_BYTES_MAX} bytes that a UNIX socket's path may have",
            hint="set http.socket to a shorter path, such as /run/pgherd-collector/collector.sock",
            key="http.socket",
        )
    _remove_old_socket(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o666)
    except OSError as error:
        listener.close()
        raise ConfigError(
            "config.invalid", f"http.socket: can't listen on {path}: {error.strerror}", key="http.socket"
        ) from error
    with contextlib.closing(BoundedListener(listener, limits)) as bounded:
        try:
            yield bounded
        finally:
            path.unlink(missing_ok=True)


def _remove_old_socket(path: Path) -> None:
    """What a killed collector left; with the state directory's lock held nobody else listens there, unless elsewhere."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # nothing there, or bind will say what
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            "config.invalid", f"http.socket: {path} exists and isn't a socket", hint="choose another path", key="http.socket"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(str(path)) == 0:
            raise PreconditionError(
                "state.locked", f"http.socket: another process listens on {path}", hint=f"see who (ss -lxp src {path})"
            )
    path.unlink()
