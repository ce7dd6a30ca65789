"""Publish a finished bundle by renaming it into place: atomically, and never over a folder that is not a bundle."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.store.files import disk_errors, exists, hidden_name, list_files, sync_tree
from cushion_deploy.store.manifest import (
    MANIFEST_NAME,
    PICKLE_SUFFIXES,
    BundleManifest,
    measure_files,
    parse_files,
    read_manifest,
)
from cushion_deploy.store.owned import FILES, owned_folder, swap_in, sweep_dead

_ELSEWHERE = "choose another output folder, or move this one away first"


def _prefix(target: Path) -> str:
    return f"{hidden_name(target.name)}.cushion-"


def _resolve(out: Path) -> Path:
    # Path.resolve raises RuntimeError for a loop of links before Python 3.13; this does not.
    return Path(os.path.realpath(out))


def require_publishable(out: Path) -> None:
    """Check that a bundle may be written to ``out``: it does not exist, is an empty folder, or is a bundle of ours.

    A bundle with additional files does not count as ours, because replacing it would delete those files. Nothing is
    changed.

    Raises:
        UsageError: the message says what is in the way.
    """
    target = _resolve(out)
    with disk_errors(target):
        _require_publishable(out, target)


def _require_publishable(out: Path, target: Path) -> None:
    if os.path.ismount(target):
        raise UsageError(
            f"{out} is a mount point; a bundle is published by renaming its folder, which is not possible there",
            hint=f"choose a folder below it, such as {out / 'bundle'}",
        )
    if target in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(
            f"{out} is or holds the current folder, which a bundle cannot replace", hint="choose a folder below it"
        )
    if exists(target):
        _require_ours(out, target)
    parent = target.parent
    while not exists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"{parent} is a file, so {out} cannot be created", hint="choose another output folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{parent} is not writable, so {out} cannot be created", hint="choose another output folder")


def _require_ours(out: Path, target: Path) -> None:
    if not target.is_dir():
        raise UsageError(f"{out} exists and is not a folder", hint=_ELSEWHERE)
    if not any(target.iterdir()):
        return
    try:
        known = {MANIFEST_NAME, *read_manifest(target).files}
        others = [path for path in list_files(target) if path not in known]
    except UntrustedArtifact as e:
        raise UsageError(f"{out} exists and is not a bundle of ours: {e.message}", hint=_ELSEWHERE) from e
    except OSError as e:
        raise UsageError(f"{out} exists and cannot be read: {e}", hint=_ELSEWHERE) from e
    if others:
        raise UsageError(
            f"{out} is a bundle with files that do not belong to it, such as {others[0]!r}",
            hint="move those files away first, or choose another output folder",
        )


def recover(out: Path) -> None:
    """Clean up after killed publications to ``out``: restore a bundle that was moved aside, remove temporary files.

    Publications that are still running in other processes are not touched.
    """
    target = _resolve(out)
    with disk_errors(target.parent):
        sweep_dead(target.parent, _prefix(target), target)


@contextmanager
def staging_area(out: Path) -> Iterator[Path]:
    """Yield an empty folder next to ``out``, on its file system, to be filled and passed to :func:`publish`.

    It is removed on exit unless it was published. Leftovers of killed processes are cleaned up first.

    Raises:
        UsageError: ``out`` may not be replaced, or the disk is full or not writable.
    """
    require_publishable(out)
    target = _resolve(out)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(out)
        with owned_folder(target.parent, _prefix(target), target) as staged:
            yield staged


def publish(staged: Path, out: Path, recipe: Mapping[str, Any], parents: Mapping[str, str]) -> Path:
    """Write the manifest into ``staged``, force everything to disk, and rename the folder to ``out``.

    An existing bundle is moved aside first, removed when :func:`staging_area` ends, and restored if the rename
    fails.

    Args:
        staged: the finished folder that ``staging_area(out)`` yielded.
        out: destination of the bundle.
        recipe: the recipe that the bundle was built with, JSON-ready.
        parents: digests of everything that the bundle was made from, by name.

    Returns:
        ``out``.

    Raises:
        UsageError: ``out`` may not be replaced, or the disk is full or not writable; ``out`` is unchanged.
        UntrustedArtifact: ``staged`` contains a file that no reader would accept.
        ValueError: ``staged`` does not come from ``staging_area(out)``.
    """
    target = _resolve(out)
    if (
        staged.name != FILES
        or staged.parent.parent != target.parent
        or not staged.parent.name.startswith(_prefix(target))
    ):
        raise ValueError(f"{staged} was not created by staging_area({out})")
    require_publishable(out)
    with disk_errors(target):
        (staged / MANIFEST_NAME).unlink(missing_ok=True)
        files = measure_files(staged)
        for path in parse_files({path: asdict(entry) for path, entry in files.items()}):
            if path.lower().endswith(PICKLE_SUFFIXES):
                raise UntrustedArtifact(
                    f"{path!r} has the suffix of a pickle and may not be in a bundle",
                    hint="convert the file, or omit it",
                )
        (staged / MANIFEST_NAME).write_bytes(BundleManifest(files, recipe, parents).to_bytes())
        sync_tree(staged)
        try:
            swap_in(staged, target)
        except OSError as e:
            if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                raise UsageError(
                    f"{out} could not be replaced because another process uses it: {e.strerror}",
                    hint="wait for the other process to end and run again (finished stages are kept)",
                ) from e
            raise
    return out
