"""Empty a work folder: finished stages, partial results and leftovers of killed runs."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cushion_deploy.errors import UsageError
from cushion_deploy.store.files import disk_errors
from cushion_deploy.store.owned import owned_folder
from cushion_deploy.store.work_folder import NAME, TEMPORARY, StageStore

Kind = Literal["finished", "partial", "leftover"]
_KINDS: dict[str, Kind] = {"stages": "finished", "scratch": "partial"}
_LEFTOVERS, _LOCK = "tmp", "lock"
_KEY = re.compile(r"[0-9a-f]{64}")
_DAY = 24 * 60 * 60


@dataclass(frozen=True)
class Removed:
    """Folders of one stage that were removed.

    Attributes:
        stage: name of the stage; empty for leftovers, whose stage is not recorded.
        kind: ``finished``, ``partial`` (what a resumed stage would have continued from), or ``leftover`` (of a killed
            run).
        folders: number of folders.
        bytes: bytes freed; a file that a bundle shares through a hard link counts as 0.
    """

    stage: str
    kind: Kind
    folders: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


@dataclass(frozen=True)
class _Folder:
    path: Path
    stage: str
    kind: Kind
    bytes: int
    written: float


def clean(root: Path, *, older_than: float | None = None, dry_run: bool = False) -> list[Removed]:
    """Remove what a work folder holds and return what was removed, by stage.

    The folder itself stays, with empty subfolders and the lock file. Whatever stops the process, the stages that are
    still there are whole: each folder is renamed into ``tmp`` before it is deleted.

    Args:
        root: the work folder.
        older_than: minimum age in days; stages written since then stay. Leftovers are removed whatever their age.
        dry_run: remove nothing, and return what would be removed.

    Raises:
        UsageError: ``root`` is not a work folder, holds anything else, or a build is using it; nothing is removed then.
            Or a file cannot be removed.
    """
    store = StageStore(root)
    with disk_errors(root):
        _require_work_folder(root)  # before the lock, which writes a file
    with store.lock(sweep=False), disk_errors(root):
        _require_work_folder(root)
        chosen = list(_stages(root))
        if older_than is not None:
            latest = time.time() - older_than * _DAY
            chosen = [folder for folder in chosen if folder.written <= latest]
        leftovers = list(_leftovers(root))
        if not dry_run:
            swept = store.sweep()
            leftovers = [folder for folder in leftovers if folder.path in swept]
            _remove(root, chosen)
        return _by_stage([*chosen, *leftovers])


def _require_work_folder(root: Path) -> None:
    """Check that a folder has the layout of a :class:`StageStore` and holds nothing else."""
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder", hint="name a work folder with --work-dir")
    entries = sorted(root.iterdir())
    known = {*_KINDS, _LEFTOVERS, _LOCK}
    foreign = [entry for entry in entries if entry.name not in known or entry.is_symlink()]
    foreign += [entry for entry in entries if entry.name in known and entry.is_dir() is (entry.name == _LOCK)]
    for name in _KINDS:
        if (root / name).is_dir() and not foreign:
            foreign += [path for path in _children(root / name) if not _is_folder(path, NAME)]
            foreign += [path for path in root.glob(f"{name}/*/*") if not _is_folder(path, _KEY)]
    if foreign or not entries:
        found = f"it holds {foreign[0].relative_to(root)}" if foreign else "it is empty"
        raise UsageError(
            f"{root} is not a work folder of cushion-deploy: {found}; nothing was removed",
            hint="name a work folder with --work-dir, or move the other files out of it",
        )


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_folder(path: Path, name: re.Pattern[str]) -> bool:
    return name.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def _stages(root: Path) -> Iterator[_Folder]:
    for name, kind in _KINDS.items():
        for stage in _children(root / name):
            for path in _children(stage):
                yield _measured(path, stage.name, kind)


def _leftovers(root: Path) -> Iterator[_Folder]:
    for path in _children(root / _LEFTOVERS):
        if path.name.startswith(TEMPORARY) and path.is_dir() and not path.is_symlink():
            yield _measured(path, "", "leftover")


def _measured(path: Path, stage: str, kind: Kind) -> _Folder:
    """Return a folder with the bytes that its removal frees, and when the newest of its files was written."""
    size, written = 0, path.stat().st_mtime
    for current, _, names in os.walk(path):
        for name in names:
            info = Path(current, name).lstat()
            size += info.st_size if info.st_nlink == 1 else 0
            written = max(written, info.st_mtime)
    return _Folder(path, stage, kind, size, written)


def _remove(root: Path, folders: list[_Folder]) -> None:
    if not folders:
        return
    (root / _LEFTOVERS).mkdir(exist_ok=True)
    with owned_folder(root / _LEFTOVERS, TEMPORARY, root) as trash:
        for folder in folders:
            moved = trash / folder.path.name
            os.rename(folder.path, moved)
            shutil.rmtree(moved)


def _by_stage(folders: list[_Folder]) -> list[Removed]:
    rows = sorted({(folder.stage, folder.kind) for folder in folders}, key=lambda row: (row[0] == "", row))
    return [
        Removed(stage, kind, len(group), sum(folder.bytes for folder in group))
        for stage, kind in rows
        for group in [[folder for folder in folders if (folder.stage, folder.kind) == (stage, kind)]]
    ]
