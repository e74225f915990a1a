"""The lasting identity of each node: an instance UUID per alias, made once and kept in the state directory."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path

from pgherd.proto.errors import IntegrityError
from pgherd.runtime.durable import publish_json, read_json

_FORMAT = "pgherd.nodes"
_VERSION = 1


def node_ids(state_directory: Path, aliases: Iterable[str]) -> dict[str, str]:
    """UUID of each alias, making those that are missing (nodes.json, format v1).

    An alias keeps its UUID for ever, also while it is out of the configuration. Raises IntegrityError
    format.newer | format.corrupt, TransientError disk.*.
    """
    path = state_directory / "nodes.json"
    try:
        document = read_json(path, format_name=_FORMAT, newest_version=_VERSION)
    except FileNotFoundError:
        document = {"format": _FORMAT, "version": _VERSION, "nodes": {}}
    known = document.get("nodes")
    if not isinstance(known, dict) or not all(isinstance(value, str) for value in known.values()):
        raise IntegrityError("format.corrupt", f"{path} holds no table of nodes", path=str(path))
    wanted = list(aliases)
    missing = [alias for alias in wanted if alias not in known]
    if missing:
        known.update({alias: str(uuid.uuid4()) for alias in missing})
        publish_json(path, document)
    return {alias: known[alias] for alias in wanted}
