"""The OS user that servers of ours run as: never root, which PostgreSQL refuses.

As an ordinary user that is simply us. As root it is somebody else, who must be able to reach the
programs and the data directory through every parent directory.
"""

from __future__ import annotations

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from pgherd.proto.errors import ConfigError


@dataclass(frozen=True, slots=True)
class OsUser:
    """An OS account; `dropped` when we are root and become it for our servers."""

    name: str
    uid: int
    gid: int
    dropped: bool

    @property
    def child_user(self) -> int | None:
        """`user=` of a child process: None means as we are."""
        return self.uid if self.dropped else None

    @property
    def child_group(self) -> int | None:
        return self.gid if self.dropped else None

    def own(self, path: Path) -> None:
        """Give `path` itself to this user (nothing to do when that's us)."""
        if self.dropped:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def own_tree(self, root: Path) -> None:
        """Give `root` and everything below it to this user; symbolic links aren't followed."""
        if self.dropped:
            for directory, _, names in os.walk(root):
                for path in (directory, *(f"{directory}/{name}" for name in names)):
                    os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def reaches(self, path: Path) -> bool:
        """Whether this user may pass through every directory above `path` that exists (mode bits; ACLs aren't looked at)."""
        return not self.dropped or all(self._may_enter(parent) for parent in path.resolve().parents if parent.exists())

    def _may_enter(self, directory: Path) -> bool:
        status = directory.stat()
        if status.st_uid == self.uid:
            return bool(status.st_mode & stat.S_IXUSR)
        if status.st_gid == self.gid:
            return bool(status.st_mode & stat.S_IXGRP)
        return bool(status.st_mode & stat.S_IXOTH)


def _account(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def server_user(*preferred: str) -> OsUser:
    """The user for a server of ours: us, or, when we are root, the first of `preferred` that exists.

    Raises ConfigError config.invalid when none exists.
    """
    if os.geteuid() != 0:
        account = pwd.getpwuid(os.geteuid())
        return OsUser(account.pw_name, account.pw_uid, account.pw_gid, dropped=False)
    for name in preferred:
        found = _account(name) if name else None
        if found is not None and found.pw_uid != 0:
            return OsUser(found.pw_name, found.pw_uid, found.pw_gid, dropped=True)
    raise ConfigError(
        "config.invalid",
        f"PostgreSQL doesn't run as root and none of these users exists: {', '.join(filter(None, preferred))}",
        hint="create an unprivileged user and state it as backup.scratch_user",
    )


def owner_of(path: Path) -> OsUser | None:
    """The owner of `path` as a user for servers; None when root owns it or it has no account."""
    uid = path.stat().st_uid
    if uid == 0:
        return None
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        return None
    return OsUser(account.pw_name, uid, account.pw_gid, dropped=os.geteuid() == 0)
