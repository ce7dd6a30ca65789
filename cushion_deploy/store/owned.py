"""Temporary folders that hold a lock of their owner, so that those of killed processes can be recognized and removed.

Layout: ``<parent>/<prefix><random>/`` contains ``owner.lock``, ``files/`` (being written) and, during a swap,
``previous/`` (being replaced). The kernel releases the lock when its process dies for any reason; process ids would be
reused, and mean nothing in another container.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cushion_deploy.store.files import remove_tree, sync_file
from cushion_deploy.store.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from filelock import FileLock

logger = logging.getLogger(__name__)

FILES = "files"
_PREVIOUS = "previous"
_LOCK = "owner.lock"
_ATTEMPTS = 5


def _claim(parent: Path, prefix: str) -> tuple[Path, FileLock]:
    """Create a folder and hold its lock; retry if another process removed it before it was complete."""
    # Imported here because the runtime reads bundles through this package and needs no locks.
    from filelock import FileLock, Timeout

    for attempt in itertools.count(1):
        # Not tempfile.mkdtemp: its mode 0700 would persist after the rename.
        folder = parent / f"{prefix}{uuid.uuid4().hex}"
        folder.mkdir()
        lock = FileLock(folder / _LOCK, timeout=0)
        try:
            lock.acquire()
            (folder / FILES).mkdir()
        except (Timeout, FileNotFoundError):
            lock.release(force=True)
            remove_tree(folder)
            if attempt == _ATTEMPTS:
                raise
        except BaseException:
            lock.release(force=True)
            remove_tree(folder)
            raise
        else:
            break
    return folder, lock


def _discard(folder: Path, lock: FileLock) -> None:
    """Remove an owned folder; the lock file is removed last, so that no other process removes the same files."""
    for child in (FILES, _PREVIOUS):
        remove_tree(folder / child)
    lock.release(force=True)
    remove_tree(folder)


def put_back(folder: Path, target: Path) -> bool:
    """Move what an interrupted :func:`swap_in` moved aside back to its place; return whether there was anything."""
    previous = folder / _PREVIOUS
    if not previous.exists() or os.path.lexists(target):
        return False
    os.rename(previous, target)
    sync_file(target.parent)
    return True


@contextmanager
def owned_folder(parent: Path, prefix: str, target: Path) -> Iterator[Path]:
    """Yield a new empty folder on the file system of ``parent``; whatever is left of it on exit is removed.

    Args:
        parent: an existing folder.
        prefix: beginning of the name.
        target: destination of a later :func:`swap_in`.
    """
    owned = None
    try:
        with uninterrupted():
            owned = _claim(parent, prefix)
        yield owned[0] / FILES
    finally:
        if owned:
            folder, lock = owned
            with uninterrupted():
                put_back(folder, target)
                _discard(folder, lock)


def swap_in(staged: Path, target: Path) -> None:
    """Rename the folder ``staged`` of an :func:`owned_folder` to ``target``; the old folder is kept until this is done.

    A reader never sees an incomplete folder: it finds the old one, for a moment none, then the new one.

    Raises:
        OSError: the rename failed; the old folder is back in place.
    """
    owner = staged.parent
    if os.path.lexists(target):
        os.rename(target, owner / _PREVIOUS)
    try:
        os.rename(staged, target)
    except BaseException:
        put_back(owner, target)
        raise
    sync_file(target.parent)
    sync_file(owner)


def sweep_dead(parent: Path, prefix: str, target: Path | None = None) -> list[Path]:
    """Remove the owned folders of killed processes in ``parent`` and return them.

    Args:
        parent: the folder to search; need not exist.
        prefix: beginning of the names.
        target: if given, a folder that a killed swap had moved aside is first restored there.
    """
    from filelock import FileLock, Timeout

    if not parent.is_dir():
        return []
    name = re.compile(re.escape(prefix) + r"[0-9a-f]{32}")
    removed = []
    for folder in sorted(parent.iterdir()):
        if not name.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        lock = FileLock(folder / _LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        if target is not None and put_back(folder, target):
            logger.warning("restored %s, which a killed run had moved aside", target)
        _discard(folder, lock)
        removed.append(folder)
    return removed
