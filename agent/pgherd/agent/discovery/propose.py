"""Which instance is which configured node, and the configuration's lines for the others. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from pgherd.agent.discovery.merge import Instance

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
Address = tuple[str, str]  # host or socket directory ("" the default), port ("" the default)


def with_nodes(found: Iterable[Instance], nodes: Mapping[str, Address], real: Callable[[str], str]) -> list[Instance]:
    """The instances with the alias of the node that serves each. `real` resolves a socket directory's links."""
    return [
        replace(one, configured=next((alias for alias, address in nodes.items() if _serves(address, one, real)), None))
        for one in found
    ]


def _serves(address: Address, instance: Instance, real: Callable[[str], str]) -> bool:
    host, port = address
    if instance.port is None or (port or "5432") != str(instance.port):
        return False
    if host in _LOOPBACK:
        return True
    if host and not host.startswith("/"):
        return False
    return instance.socket_directory is None or not host or real(host) == real(instance.socket_directory)


def toml_of(
    instance: Instance, hostname: str, taken: Sequence[str], conninfo: Callable[[Mapping[str, str]], str]
) -> tuple[str, str]:
    """(alias, [[nodes]] table) for an instance; `taken` are the aliases in use, `conninfo` writes libpq keywords."""
    alias = _alias(instance, hostname, taken)
    keywords = {"host": instance.socket_directory or "127.0.0.1", "port": str(instance.port or 5432), "user": "pgherd"}
    about = [f"PostgreSQL {instance.major}" if instance.major else "PostgreSQL"]
    about += [instance.data_directory] if instance.data_directory else []
    return alias, "\n".join(
        [
            "[[nodes]]",
            f"# {json.dumps(', '.join(about), ensure_ascii=False)[1:-1]}",
            f"alias = {_toml_text(alias)}",
            f"cluster = {_toml_text(alias)}  # the same on all nodes that replicate from each other",
            f"conninfo = {_toml_text(conninfo(keywords))}",
        ]
    )


def _alias(instance: Instance, hostname: str, taken: Sequence[str]) -> str:
    parts = [hostname.split(".")[0], *([instance.name.replace("/", "-")] if instance.name else [str(instance.port or "")])]
    alias = "-".join(part for part in parts if part)
    number = 2
    while alias in taken:
        alias, number = f"{'-'.join(part for part in parts if part)}-{number}", number + 1
    return alias


def _toml_text(text: str) -> str:
    """A TOML basic string: JSON's escapes are a subset of TOML's (but for DEL)."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
