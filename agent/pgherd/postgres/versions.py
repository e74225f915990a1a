"""PostgreSQL versions as the server and its programs state them. Pure."""

from __future__ import annotations

OLDEST_TESTED_MAJOR = 15
OLDEST_MAJOR = 13  # 13 and 14: best effort


def major_of(server_version_num: int) -> int:
    """150018 → 15 (version numbers of 10 and later)."""
    return server_version_num // 10000


def version_text(server_version_num: int) -> str:
    """150018 → "15.18"."""
    return f"{server_version_num // 10000}.{server_version_num % 10000}"
