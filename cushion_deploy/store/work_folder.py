"""The work folder: finished stages by content key, scratch folders for resumable work, and its lock."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.store.files import disk_errors, remove_tree, sync_tree
from cushion_deploy.store.manifest import check_files, measure_files, parse_files, read_json
from cushion_deploy.store.owned import owned_folder, swap_in, sweep_dead

logger = logging.getLogger(__name__)

STAGE_MANIFEST = "stage.json"
NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
TEMPORARY = "tmp-"


class StageStore:
    """A content-addressed work folder that makes stages reusable.

    Layout: ``stages/<stage>/<key>/`` finished, ``scratch/<stage>/<key>/`` resumable, ``tmp/`` being written, ``lock``.

    Args:
        root: the work folder; created on first write.
    """

    def __init__(self, root: Path) -> None:
        """Remember the root; nothing is touched."""
        self.root = root

    def _folder(self, kind: str, stage: str, key: str) -> Path:
        for name in (stage, key):
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a stage or key: letters, digits, '.', '_' and '-' only")
        return self.root / kind / stage / key

    def holds(self, stage: str, key: str) -> Path | None:
        """Return the folder of a finished stage without comparing a byte of it, or None; touches nothing.

        For telling what a run would reuse; what uses the result calls :meth:`find`.
        """
        folder = self._folder("stages", stage, key)
        return folder if (folder / STAGE_MANIFEST).is_file() else None

    def find(self, stage: str, key: str) -> Path | None:
        """Return the finished folder of a stage if every byte of it is as it was written.

        A damaged one is removed with a logged warning, and the stage has to run again.

        Args:
            stage: the stage's name, such as ``search``.
            key: digest over everything that decides the stage's result.

        Returns:
            The folder, its ``stage.json`` included; or None.
        """
        folder = self._folder("stages", stage, key)
        if not folder.is_dir():
            return None
        try:
            _, data = read_json(folder / STAGE_MANIFEST)
            if not isinstance(data, dict) or (data.get("stage"), data.get("key")) != (stage, key):
                raise UntrustedArtifact(f"{STAGE_MANIFEST} is of another stage", hint="run the stage again")
            check_files(folder, parse_files(data.get("files")), STAGE_MANIFEST)
        except (UntrustedArtifact, OSError) as e:
            logger.warning("stage %s is damaged and will run again: %s", stage, e)
            with disk_errors(folder):
                shutil.rmtree(folder)
            return None
        return folder

    @contextmanager
    def write(self, stage: str, key: str) -> Iterator[Path]:
        """Yield an empty folder for a stage's files; put it in place by rename on a clean exit.

        On any exception, KeyboardInterrupt included, the folder is removed and the store is as before. On success
        the scratch folder of the same stage and key is removed.

        Raises:
            UsageError: the disk is full or not writable.
        """
        target = self._folder("stages", stage, key)
        temporary = self.root / "tmp"
        with disk_errors(self.root):
            temporary.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            with owned_folder(temporary, TEMPORARY, target) as staged:
                yield staged
                (staged / STAGE_MANIFEST).unlink(missing_ok=True)
                files = {path: asdict(entry) for path, entry in measure_files(staged).items()}
                parse_files(files)  # a name that find() would refuse must fail here, not on every later run
                text = json.dumps({"stage": stage, "key": key, "files": files}, indent=1, ensure_ascii=False)
                (staged / STAGE_MANIFEST).write_text(text + "\n", encoding="utf-8")
                sync_tree(staged)
                swap_in(staged, target)
        remove_tree(self._folder("scratch", stage, key))

    def scratch(self, stage: str, key: str) -> Path:
        """Return an existing folder for partial results of a stage; it survives a kill.

        Nothing in it is verified: write with :func:`~cushion_deploy.store.replace_file` and check what is read.

        Raises:
            UsageError: the disk is full or not writable.
        """
        folder = self._folder("scratch", stage, key)
        with disk_errors(self.root):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def lock(self, *, sweep: bool = True) -> Iterator[None]:
        """Hold the work folder for one build.

        Args:
            sweep: whether leftovers of killed runs are removed on entry.

        Raises:
            UsageError: at once, if another process holds it; or the folder is not writable.
        """
        # Only here: the runtime reads bundles through this package and should need no more than it says.
        from filelock import FileLock, Timeout

        path = self.root / "lock"
        held = FileLock(path, timeout=0)
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                held.acquire()
            except Timeout as e:
                raise UsageError(
                    f"another build is using the work folder {self.root} (lock file {path})",
                    hint="wait until it ends, or choose another work folder; "
                    "the lock ends with its process, so the file never has to be deleted",
                ) from e
        try:
            if sweep:
                self.sweep()
            yield
        finally:
            held.release(force=True)

    def sweep(self) -> list[Path]:
        """Remove the temporary folders of killed runs and return them; those of living processes stay."""
        with disk_errors(self.root):
            removed = sweep_dead(self.root / "tmp", TEMPORARY)
        if removed:
            logger.info("removed %d unfinished folders of killed runs", len(removed))
        return removed
