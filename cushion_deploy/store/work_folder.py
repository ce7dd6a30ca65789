"""The work folder: finished stages by key, scratch folders for resumable work, and a lock."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.files import disk_errors, remove_tree, sync_tree
from cushion_deploy.store.manifest import check_files, measure_files, parse_files, read_json
from cushion_deploy.store.owned import owned_folder, swap_in, sweep_dead

logger = logging.getLogger(__name__)

STAGE_MANIFEST = "stage.json"
NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
TEMPORARY = "tmp-"


class StageStore:
    """A work folder that keeps the results of stages under content-derived keys, so that they can be reused.

    Layout: ``stages/<stage>/<key>/`` finished, ``scratch/<stage>/<key>/`` resumable, ``tmp/`` being written, ``lock``.

    Args:
        root: the work folder; created on first write.
        read_only: whether a damaged folder stays where it is.
    """

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        """Store the path of the root; nothing is created or read."""
        self.root, self.read_only = root, read_only

    def _folder(self, kind: str, stage: str, key: str) -> Path:
        for name in (stage, key):
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a valid stage name or key: only letters, digits, '.', '_' and '-'")
        return self.root / kind / stage / key

    def find(self, stage: str, key: str) -> Path | None:
        """Return the folder of a finished stage if every byte is as it was written, otherwise None.

        A damaged folder is removed with a logged warning, unless the store is read-only: the stage has to run again.

        Args:
            stage: name of the stage, such as ``search``.
            key: digest of everything that determines the stage's result.

        Returns:
            The folder, which includes ``stage.json``, or None.
        """
        folder = self._folder("stages", stage, key)
        if not folder.is_dir():
            return None
        try:
            raw, data = read_json(folder / STAGE_MANIFEST)
            if not isinstance(data, dict) or (data.get("stage"), data.get("key")) != (stage, key):
                raise UntrustedArtifact(f"{STAGE_MANIFEST} belongs to another stage", hint="run the stage again")
            if _manifest_bytes({name: value for name, value in data.items() if name != "digest"}) != raw:
                raise UntrustedArtifact(f"{STAGE_MANIFEST} was altered", hint="run the stage again")
            check_files(folder, parse_files(data.get("files"), STAGE_MANIFEST), STAGE_MANIFEST)
        except (UntrustedArtifact, OSError) as e:
            logger.warning("stage %s is damaged and will run again: %s", stage, e)
            if self.read_only:
                return None
            with disk_errors(folder):
                shutil.rmtree(folder)
            return None
        return folder

    def facts(self, stage: str, key: str) -> dict[str, str]:
        """Return what was recorded about the run of a finished stage; empty if nothing was."""
        _, data = read_json(self._folder("stages", stage, key) / STAGE_MANIFEST)
        found = data.get("facts", {}) if isinstance(data, dict) else {}
        return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}

    @contextmanager
    def write(self, stage: str, key: str, facts: Mapping[str, str] | None = None) -> Iterator[Path]:
        """Yield an empty folder for a stage's files, and rename it into place on a clean exit.

        On any exception, KeyboardInterrupt included, the folder is removed and the store is unchanged. On success the
        scratch folder of the same stage and key is removed.

        Args:
            stage, key: see :meth:`find`.
            facts: what to record about the run beside the files, as it is on exit.

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
                # A name that find() would reject must fail here, not in every later run.
                parse_files(files, STAGE_MANIFEST)
                manifest = {"stage": stage, "key": key, "facts": dict(facts or {}), "files": files}
                (staged / STAGE_MANIFEST).write_bytes(_manifest_bytes(manifest))
                sync_tree(staged)
                swap_in(staged, target)
        remove_tree(self._folder("scratch", stage, key))

    def scratch(self, stage: str, key: str) -> Path:
        """Return an existing folder for partial results of a stage; it survives a killed process.

        Its content is not verified: write with :func:`~cushion_deploy.store.replace_file` and validate what is read.

        Raises:
            UsageError: the disk is full or not writable.
        """
        folder = self._folder("scratch", stage, key)
        with disk_errors(self.root):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def lock(self, *, sweep: bool = True) -> Iterator[None]:
        """Lock the work folder for one build.

        Args:
            sweep: whether leftovers of killed processes are removed on entry.

        Raises:
            UsageError: another process holds the lock (raised immediately), or the folder is not writable.
        """
        # Imported here because the runtime reads bundles through this package and needs no locks.
        from filelock import FileLock, Timeout

        path = self.root / "lock"
        held = FileLock(path, timeout=0)
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                held.acquire()
            except Timeout as e:
                raise UsageError(
                    f"another command is using the work folder {self.root} (lock file {path})",
                    hint="wait until it ends, or choose another work folder; "
                    "the lock is released when its process ends, so the file never has to be deleted",
                ) from e
        try:
            if sweep:
                self.sweep()
            yield
        finally:
            held.release(force=True)

    def sweep(self) -> list[Path]:
        """Remove what killed processes left, and return it: temporary folders, partial results of finished stages.

        Temporary folders of running processes are kept, and so are partial results that a stage can continue from.
        """
        with disk_errors(self.root):
            removed = sweep_dead(self.root / "tmp", TEMPORARY)
            for scratch in sorted((self.root / "scratch").glob("*/*")):
                if (self.root / "stages" / scratch.parent.name / scratch.name).is_dir():
                    remove_tree(scratch)
                    removed.append(scratch)
        if removed:
            logger.info("removed %d unfinished folders of killed runs", len(removed))
        return removed


def _manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """Return the text of ``stage.json``: its content and the digest of that, in the only form that is accepted."""
    text = json.dumps({**content, "digest": digest_json(content)}, indent=1, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"
