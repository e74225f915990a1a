"""PostgreSQL versions as the server states them. Pure."""

from __future__ import annotations


def major_of(server_version_num: int) -> int:
    """150018 → 15 (version numbers of 10 and later)."""
    return server_version_num // 10000
