"""Files and folders: hash, list, sync to disk, link and remove them, and turn disk errors into messages."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cushion_deploy.errors import CushionError, UntrustedArtifact, UsageError
from cushion_deploy.store.snapshot import stat_file

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Codes of a disk, a quota or a limit of the process that is exhausted."""
_LONGEST_NAME = 200
"""Bytes of a name that leave room for a suffix of 54."""
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def hash_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file, read in pieces of 1 MiB.

    Raises:
        OSError: the file cannot be read.
    """
    h = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as f:
        while count := f.readinto(buffer):
            h.update(buffer[:count])
    return h.hexdigest()


def hash_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 (hex) of each file, in the given order."""
    return {path: hash_file(path) for path in paths}


def list_files(folder: Path, blobs: Path | None = None) -> dict[str, int]:
    """Return every file below a folder as relative POSIX path to size in bytes, sorted by path.

    Empty folders hold no bytes and are not listed.

    Args:
        folder: where to look.
        blobs: a folder whose files count as those that link to them; see :func:`~.snapshot.blobs_of`.

    Raises:
        UntrustedArtifact: the folder contains another symbolic link or a special file (pipe, socket, device) at any
            depth.
        OSError: a folder cannot be read.
    """
    found: dict[str, int] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                relative = prefix + entry.name
                info = stat_file(folder / relative, blobs)
                if stat.S_ISDIR(info.st_mode):
                    pending.append(relative + "/")
                elif stat.S_ISREG(info.st_mode):
                    found[relative] = info.st_size
                else:
                    kind = "a symbolic link" if stat.S_ISLNK(info.st_mode) else "a special file"
                    raise UntrustedArtifact(
                        f"{relative!r} in {folder} is {kind}; only plain files are expected",
                        hint="copy the folder with links resolved, or create it again",
                    )
    return dict(sorted(found.items()))


def sync_file(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders; it writes their entries through
        return
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Force every file and folder below ``folder``, and the folder itself, to disk."""
    for current, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(current, name))
        sync_file(Path(current))


def hidden_name(name: str) -> str:
    """Return the begin of the name of a temporary file or folder beside the one of that name.

    A file system allows 255 bytes for a name: one that leaves no room for what follows is replaced by its digest.
    """
    raw = os.fsencode(name)
    return f".{name}" if len(raw) <= _LONGEST_NAME else f".{hashlib.sha256(raw).hexdigest()[:32]}"


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that a killed process leaves either the old or the new content, never a part of it."""
    temporary = path.with_name(f"{hidden_name(path.name)}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_file(path.parent)


def place(src: Path, dst: Path, *, link: bool = True) -> None:
    """Make the file ``src`` available at ``dst``, creating folders; a symbolic link is followed, not copied as a link.

    Args:
        src: an existing file; with ``link``, a file of the stage store.
        dst: the second path; must not exist.
        link: share the bytes through a hard link if the file system supports it; False always copies, which is needed
            for files that belong to the user.

    Raises:
        OSError: neither linking nor copying is possible.
    """
    dst.parent.mkdir(parents=True, exist_ok=True)
    real = src.resolve(strict=True)
    # Decision: a hard link halves the disk space and the time that a bundle of several gigabytes needs. Its price is
    # that editing the bundle's file in place also changes the stage's file. This cannot go unnoticed: the store
    # compares every digest before it reuses a stage and removes a stage that differs, so the price is one more run.
    if link:
        try:
            os.link(real, dst)
            return
        except FileExistsError:
            raise
        except OSError as e:
            # Another file system, one without hard links, or a file of another owner: a copy always works.
            logger.debug("copying %s, because a hard link is not possible: %s", real, e)
    if dst.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(dst))
    shutil.copyfile(real, dst)


def remove_tree(folder: Path) -> None:
    """Remove a folder; failures are logged, so that clean-up never hides the error that led to it."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as e:
        logger.warning("could not remove %s: %s; remove it manually", folder, e)


def exists(path: Path) -> bool:
    """Return whether something is at a path.

    ``Path.exists`` says no to every error since Python 3.14, also where nothing can be created.

    Raises:
        OSError: that cannot be found out, because a name is too long or a folder may not be searched.
    """
    try:
        path.stat()
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    return True


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free for this user at the location of ``folder``, which need not exist."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def human_bytes(count: int) -> str:
    """Format a number of bytes in decimal units, as used for disks."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def require_space(folder: Path, needed: int) -> None:
    """Check that ``needed`` bytes are free at the location of ``folder``, which need not exist.

    Raises:
        UsageError: there is not enough space.
    """
    free = free_bytes(folder)
    if free < needed:
        raise UsageError(
            f"not enough disk space for {folder}: {human_bytes(needed)} needed, {human_bytes(free)} free",
            hint=f"free {human_bytes(needed - free)} more there, or choose a folder on a larger disk",
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission and similar errors while writing ``folder`` into a UsageError.

    Other errors pass unchanged. Libraries written in Rust and C++ raise errors of their own, which are recognized by
    the words of the operating system in them.
    """
    try:
        yield
    except CushionError:
        raise
    except Exception as e:
        error = _disk_error(e, folder)
        if error is None:
            raise
        raise error from e


def _disk_error(e: Exception, folder: Path) -> UsageError | None:
    code = e.errno if isinstance(e, OSError) else _code_in(str(e))
    if code is None:
        return None
    name = getattr(e, "filename", None)
    where, reason = os.fsdecode(name) if isinstance(name, (str, bytes)) else str(folder), os.strerror(code)
    if code in DISK_FULL:
        return UsageError(
            f"cannot write {where}: {reason} ({human_bytes(free_bytes(folder))} free)",
            hint="free some space or choose a folder on a larger disk, and run again (finished stages are kept)",
        )
    if code in _REFUSED:
        return UsageError(
            f"cannot use {where}: {reason}", hint="change its permissions or choose a folder you may write to"
        )
    if code == errno.ENAMETOOLONG:
        return UsageError(f"the name {where} is too long", hint="choose a shorter path")
    return None


def _code_in(message: str) -> int | None:
    """Return the code of a disk error that a message names, as Rust does by number and C++ in words."""
    for code in DISK_FULL | _REFUSED:
        if f"(os error {code})" in message or (code in DISK_FULL | {errno.EROFS} and os.strerror(code) in message):
            return code
    return None


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield an empty folder for temporary files, which is removed on exit.

    Raises:
        UsageError: no folder for temporary files can be used, or the disk that holds it is full or not writable.
    """
    with disk_errors(temporary_root()), tempfile.TemporaryDirectory(prefix=prefix) as name:
        yield Path(name)


def temporary_root() -> Path:
    """Return the folder in which temporary files are created.

    Raises:
        UsageError: there is none that can be written to.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as e:
        raise (no_temporary_root(e) or e) from e


def no_temporary_root(e: OSError) -> UsageError | None:
    """Return the error for what ``tempfile`` raises if it finds no folder; None for any other error."""
    if not str(e.strerror).startswith("No usable temporary directory"):
        return None
    return UsageError(
        f"no folder for temporary files can be written to: {e.strerror}",
        hint="set TMPDIR to a folder that you may write to, on a disk that is not full",
    )


def write_file(path: Path, data: bytes) -> None:
    """Write a file that a user asked for: whole, or not at all; a device or a pipe is written to.

    Raises:
        UsageError: the disk is full or not writable; a file that was there is unchanged.
    """
    target = Path(os.path.realpath(path))
    with disk_errors(path):
        if target.is_dir():
            raise UsageError(f"{path} is a folder, expected a file", hint="add the name of the file to write")
        if target.exists() and not target.is_file():
            with open(target, "wb") as f:
                f.write(data)
        else:
            replace_file(target, data)
