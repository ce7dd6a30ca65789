"""New output folders, created under a temporary name and renamed, so that an aborted command leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cushion_deploy.errors import UsageError
from cushion_deploy.store.files import disk_errors, exists, hidden_name
from cushion_deploy.store.owned import owned_folder, swap_in


def require_new_folder(output: Path) -> None:
    """Check that ``output`` can be created: it does not exist or is an empty folder."""
    with disk_errors(output):
        occupied = exists(output) and (not output.is_dir() or any(output.iterdir()))
    if occupied:
        raise UsageError(f"{output} exists and is not an empty folder", hint="choose another output folder")
    _require_writable(output)


def require_parent(file: Path) -> None:
    """Check before long work that a file can be written to its folder."""
    with disk_errors(file):
        found, is_folder = file.absolute().parent.is_dir(), file.is_dir()
    if is_folder:
        raise UsageError(f"{file} is a folder, expected the name of a file", hint="add the name of the file to write")
    if not found:
        raise UsageError(f"the folder of {file} does not exist", hint="create it first, or choose another folder")
    if not os.path.exists(file) or os.path.isfile(file):
        _require_writable(file)


def _require_writable(output: Path) -> None:
    """Check that the nearest folder above ``output`` that exists may be written to."""
    with disk_errors(output):
        folder = output.absolute().parent
        while not exists(folder):
            folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} is not writable, so {output} cannot be created", hint="choose another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` on a clean exit and is removed on any other."""
    require_new_folder(output)
    target = output.absolute()
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with owned_folder(target.parent, f"{hidden_name(target.name)}.cushion-", target) as staged:
            yield staged
            swap_in(staged, target)
