"""The highest leadership epoch that this agent has seen, per node: never forgotten, never lowered."""

from __future__ import annotations

from pathlib import Path

from pgherd.proto.errors import IntegrityError
from pgherd.runtime.durable import publish_json, read_json

_FORMAT = "pgherd.epochs"
_VERSION = 1


class SeenEpochs:
    """Epochs in `epochs.json` of the state directory."""

    def __init__(self, path: Path, seen: dict[str, int]) -> None:
        self._path = path
        self._seen = seen

    @classmethod
    def open(cls, path: Path) -> SeenEpochs:
        """Raises IntegrityError format.newer | format.corrupt: an agent that doesn't know what it promised must not act."""
        try:
            document = read_json(path, format_name=_FORMAT, newest_version=_VERSION)
        except FileNotFoundError:
            return cls(path, {})
        nodes = document.get("nodes")
        if not isinstance(nodes, dict) or not all(isinstance(epoch, int) for epoch in nodes.values()):
            raise IntegrityError("format.corrupt", f"{path} holds no table of epochs", path=str(path))
        return cls(path, dict(nodes))

    def of(self, node_id: str) -> int:
        """The highest epoch seen for the node; 0 for none."""
        return self._seen.get(node_id, 0)

    def see(self, node_id: str, epoch: int) -> None:
        """Keep `epoch` if it is the highest; durable when it returns. Raises TransientError disk.*."""
        if epoch > self.of(node_id):
            nodes = self._seen | {node_id: epoch}
            publish_json(self._path, {"format": _FORMAT, "version": _VERSION, "nodes": nodes})
            self._seen = nodes
