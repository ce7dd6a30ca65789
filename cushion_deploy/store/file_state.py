"""Metadata of files, to detect that a file was changed or replaced after it was read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.store.snapshot import is_document


class FileState(NamedTuple):
    """Metadata that an edit of a file changes; times in nanoseconds since the epoch.

    The kernel sets the change time on every write, rename and change of the other times; a program cannot set it. On
    Windows that field is the creation time.
    """

    size: int
    modified: int
    changed: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Return the state of the file at ``path``, behind links; raises OSError if there is none."""
        info = path.stat()
        return cls(info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino, info.st_dev)


def file_states(folder: Path) -> dict[str, FileState]:
    """Return the state of each file below a folder, by relative POSIX path.

    Documents that nothing reads are left out, and so are files that cannot be examined: verification names those.
    """
    states = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        with suppress(OSError):
            if path.is_file() and not is_document(name):
                states[name] = FileState.of(path)
    return states


def relinked(folder: Path, states: Mapping[str, FileState]) -> frozenset[str]:
    """Return the files of :func:`file_states` whose change time is another, if nothing else differs in the folder.

    A build that links such a file into another folder does that, but so does a write that sets the times back: the
    files have to be verified again. Empty if something else differs too.
    """
    now = file_states(folder)
    if states.keys() != now.keys():
        return frozenset()
    different = frozenset(name for name, state in states.items() if state != now[name])
    only_times = all(states[name]._replace(changed=now[name].changed) == now[name] for name in different)
    return different if only_times else frozenset()


def require_unchanged(folder: Path, states: Mapping[str, FileState]) -> None:
    """Check that a folder still has the files of :func:`file_states`, none of them written or replaced since.

    Raises:
        UntrustedArtifact: the message names the first file that differs.
    """
    now = file_states(folder)
    for name in sorted({*states, *now}):
        if states.get(name) != now.get(name):
            raise UntrustedArtifact(
                f"{name!r} in {folder} was written or replaced while the bundle was loaded",
                hint="find out which process writes there; then run the command again",
            )
