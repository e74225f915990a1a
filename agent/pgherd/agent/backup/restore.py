"""Restoring a backup away from production: into a scratch server, or into a data directory that is new.

Both rebuild into a server of the source's own major, compare content with the recorded fingerprint
and publish the verdict as a proof. Neither needs the collector, and neither can touch what exists: the
scratch server vanishes, the new directory is built in a hidden sibling and renamed at the end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pgherd.agent.backup.deadline import Deadline
from pgherd.agent.backup.dump import Progress
from pgherd.agent.backup.rebuild import Rebuilding, amcheck, compare, leave_workshop, rebuild
from pgherd.agent.backup.repository import Entry, NodeRepository
from pgherd.agent.backup.verify import record_failure
from pgherd.agent.backup.watch import require_free, watching
from pgherd.postgres.binaries import Binaries, client_for, exactly
from pgherd.postgres.os_user import OsUser, owner_of, server_user
from pgherd.postgres.scratch import (
    UNSAFE_SETTINGS,
    ScratchServer,
    initdb,
    scratch_server,
    serving,
    socket_directory,
    socket_settings,
    sweep,
    usable_by,
    workspace,
    write_file,
    write_settings,
)
from pgherd.proto.clock import Clock
from pgherd.proto.commands import GRADES
from pgherd.proto.errors import ConfigError, IntegrityError, PreconditionError
from pgherd.runtime.durable import fsync_directory, storage_error
from pgherd.runtime.logging import get_logger
from pgherd.runtime.process import run
from pgherd.storage.manifest import Manifest, Proof

_log = get_logger(__name__)

HIDDEN = ".pgherd"  # where a restore root keeps a directory until it is whole

# A restored directory trusts nobody but its own OS user, until its owner says otherwise.
_HBA = """\
# Written by pgherd's restore: extend it for your clients.
local all all peer
host all all 127.0.0.1/32 scram-sha-256
host all all ::1/128 scram-sha-256
"""


@dataclass(frozen=True, slots=True)
class RestoreSettings:
    """Where scratch servers live and as whom; `bin_directory` as configured for the node."""

    scratch_parent: Path
    user: OsUser
    bin_directory: Path | None
    timeout_s: float
    free_min_bytes: int


@dataclass(frozen=True, slots=True)
class Restored:
    """The result members of a restore; `directory` is empty for a scratch server."""

    backup: str
    grade: str
    tables_compared: int
    rows_compared: int
    duration_s: float
    directory: str = ""


def scratch_parent(state_directory: Path, stated: Path | None, user: OsUser) -> Path:
    """Where scratch servers go: as stated, else below the state directory, else (when the servers' OS user
    can't pass through that) a directory of ours in /var/tmp, which unlike /tmp is expected to be a disk.

    Raises ConfigError config.invalid when somebody else owns that name.
    """
    if stated is not None:
        return stated
    below = state_directory / "scratch"
    if user.reaches(below / "data"):
        return below
    parent = Path("/var/tmp" if Path("/var/tmp").is_dir() else tempfile.gettempdir()) / f"pgherd-scratch-{os.geteuid()}"  # noqa: S108  # owner checked below
    return _ours(parent, "state backup.scratch_directory")


def _ours(directory: Path, hint: str) -> Path:
    """Make a directory where others may write, or check that it is ours: nobody may swap what we make in it."""
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o711)
            directory.chmod(0o711)
        status = directory.lstat()
    except OSError as error:
        raise storage_error(error, directory, "creating") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o022 or not stat.S_ISDIR(status.st_mode):
        raise ConfigError("config.invalid", f"{directory} isn't ours", hint=hint, path=str(directory))
    return directory


def sweep_leftovers(parents: Iterable[Path]) -> int:
    """Remove what killed restores left in these directories: a whole copy of a server each, perhaps still running."""
    return sum(sweep(parent) for parent in parents if parent.is_dir() and not parent.is_symlink())


def restore_to_scratch(
    repository: NodeRepository, name: str, settings: RestoreSettings, clock: Clock, progress: Progress
) -> Restored:
    """Restore (empty name: the newest) into a scratch server, compare, remove it.

    Raises IntegrityError backup.corrupt | backup.content_differs | format.* (published as a failed
    proof), PreconditionError backup.not_found | state.locked | postgres.start_failed | child.failed,
    ConfigError postgres.binaries, TransientError child.timeout | disk.full.
    """
    entry = repository.entry(name)
    sweep_leftovers([settings.scratch_parent])
    manifest = entry.manifest

    @contextlib.contextmanager
    def server(binaries: Binaries) -> Iterator[ScratchServer]:
        with scratch_server(
            binaries,
            parent=settings.scratch_parent,
            user=settings.user,
            superuser=manifest.bootstrap_superuser,
            settings=_extra_settings(manifest),
        ) as running_server:
            yield running_server

    return _prove(repository, entry, settings, server, settings.scratch_parent, clock, progress)


def restore_to_directory(
    repository: NodeRepository,
    name: str,
    target: Path,
    settings: RestoreSettings,
    clock: Clock,
    progress: Progress,
) -> Restored:
    """Restore into the new data directory `target`, whose parent is a restore root.

    It belongs to the root's owner (when that is root: to `postgres`, else the scratch user), listens on nothing until
    configured, and trusts peers only. Errors as `restore_to_scratch`, and PreconditionError
    restore.target_exists; then `target` doesn't exist.
    """
    entry = repository.entry(name)
    root = target.parent
    user = (owner_of(root) if root.is_dir() else None) or server_user("postgres", settings.user.name)
    _require_absent(target)
    hidden = _ours(root / HIDDEN, f"look at who made it, and remove {root / HIDDEN}")
    sweep_leftovers([hidden])

    @contextlib.contextmanager
    def server(binaries: Binaries) -> Iterator[ScratchServer]:
        with workspace(hidden) as directory:
            with _directory_server(binaries, directory, user, entry.manifest) as running_server:
                yield running_server
            _publish_directory(usable_by(binaries, user, directory), directory / "data", target, user)

    restored = _prove(repository, entry, settings, server, root, clock, progress, directory=str(target))
    with contextlib.suppress(OSError):
        hidden.rmdir()
    return restored


def _extra_settings(manifest: Manifest) -> dict[str, str]:
    settings = {"maintenance_work_mem": "256MB"}
    if manifest.server_major >= 17:
        settings["event_triggers"] = "off"  # a restored login trigger must not run under us
    return settings


def _prove(
    repository: NodeRepository,
    entry: Entry,
    settings: RestoreSettings,
    server: Callable[[Binaries], contextlib.AbstractContextManager[ScratchServer]],
    place: Path,
    clock: Clock,
    progress: Progress,
    directory: str = "",
) -> Restored:
    manifest = entry.manifest
    started_mono_s = clock.mono_s()
    binaries = exactly(manifest.server_major, settings.bin_directory)
    client = client_for(max(manifest.server_major, manifest.tools_major), settings.bin_directory)
    require_free(place, settings.free_min_bytes, sum(part.plain_bytes for part in manifest.parts))
    with repository.reading(manifest.name):
        entry = repository.entry(manifest.name)  # retention may have been faster
        try:
            with (
                Deadline(settings.timeout_s, "the restore") as deadline,
                watching(deadline, lambda: require_free(place, settings.free_min_bytes)),
                server(binaries) as running_server,
            ):
                work = Rebuilding(repository, entry, running_server, client, deadline, progress)
                logs_in = rebuild(work)
                compared = compare(work, logs_in)
                reached = "content-equal"
                if compared.obstacles:
                    _log.warning("restore.not_comparable", backup=manifest.name, reasons=list(compared.obstacles))
                    reached = "checked" if amcheck(work) else "read back"
                leave_workshop(work, logs_in)
        except IntegrityError as error:
            record_failure(repository, entry, error, clock, started_mono_s)
            raise
        duration_s = clock.mono_s() - started_mono_s
        repository.add_proof(
            Proof(
                backup=manifest.name,
                manifest_sha256=entry.sha256,
                grade=reached,
                finished_unix_ns=clock.wall_unix_ns(),
                duration_s=duration_s,
                read_bytes=manifest.stored_bytes,
                tables_compared=compared.tables,
                rows_compared=compared.rows,
                detail="; ".join(compared.obstacles),
            )
        )
    _log.info("restore.proven", backup=manifest.name, grade=reached, directory=directory)
    shown = reached if manifest.complete else GRADES[0]
    return Restored(manifest.name, shown, compared.tables, compared.rows, duration_s, directory)


# ---- a new data directory -----------------------------------------------------------------------


@contextlib.contextmanager
def _directory_server(binaries: Binaries, directory: Path, user: OsUser, manifest: Manifest) -> Iterator[ScratchServer]:
    """A server on `directory`/data that is shut down cleanly at the end."""
    if not user.reaches(directory / "data"):
        raise ConfigError(
            "config.invalid",
            f"user {user.name} can't reach {directory}",
            hint="let the restore root's owner pass through its parents",
        )
    data = directory / "data"
    usable = usable_by(binaries, user, directory)
    with socket_directory(directory, user) as sockets:
        initdb(usable, data, user, superuser=manifest.bootstrap_superuser, checksums=manifest.data_checksums)
        original = (data / "postgresql.conf").read_text(encoding="utf-8")
        building = {**UNSAFE_SETTINGS, **socket_settings(sockets), **_extra_settings(manifest)}
        write_settings(data, building, user)
        with serving(usable, data, user) as process:
            yield ScratchServer(usable, data, sockets, manifest.bootstrap_superuser, process)
        write_file(data / "postgresql.conf", original, user)
        write_file(data / "pg_hba.conf", _HBA, user)


def _require_absent(target: Path) -> None:
    if os.path.lexists(target):
        raise _target_exists(target)
    if not target.parent.is_dir():
        raise ConfigError(
            "config.invalid", f"the restore root {target.parent} isn't a directory", hint="create it for its owner"
        )


def _target_exists(target: Path) -> PreconditionError:
    return PreconditionError(
        "restore.target_exists", f"{target} exists already", hint="name a directory that doesn't exist", path=str(target)
    )


def _publish_directory(binaries: Binaries, data: Path, target: Path, user: OsUser) -> None:
    """Make everything durable (the build ran with fsync off), then give it its name."""
    run(
        [binaries.program("initdb"), "--sync-only", "-D", data],
        timeout_s=3600.0,
        cwd=data,
        user=user.child_user,
        group=user.child_group,
    ).require_success()
    _require_absent(target)
    try:
        data.rename(target)
        fsync_directory(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _target_exists(target) from error
        raise storage_error(error, target, "publishing") from error
