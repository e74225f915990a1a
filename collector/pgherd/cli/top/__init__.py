"""`pgherd top`: the herd as it is now, on a terminal."""

from pgherd.cli.top.command import top

__all__ = ["top"]
