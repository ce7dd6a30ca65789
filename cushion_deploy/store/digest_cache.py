"""Cache of the SHA-256 digests of checkpoints, in the user's cache folder, so that a large file is read once.

A digest is stored with the file's size, modification time, change time, inode and device, and reused only while all
five are unchanged. Setting the modification time back does not hide an edit, because doing so updates the change time
(except on Windows, where that field is the creation time). The digest of a file that changed less than two seconds ago
is not stored: another change within the resolution of the file system's clock could leave the same times.

The cache is for the user's own files: checkpoint folders and GGUF files. Bundles, exported graphs and finished stages
are always read in full, with :func:`~cushion_deploy.store.files.hash_file`.

Security: the cache is only as trustworthy as its folder. Anyone who can write to it can make a replaced checkpoint pass
for the original: finished stages of the original are reused, stages that still have to run use the replacement, and the
report and the bundle record the original's digest. Nothing else is gained: the checks for pickles, remote code and
damaged files do not depend on digests, and no bundle is verified against the cache. If other users can write to the
folder, set ``CUSHION_CACHE_DIR`` to an empty value.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from cushion_deploy.store.file_state import FileState
from cushion_deploy.store.files import hash_file, replace_file

logger = logging.getLogger(__name__)

ENVIRONMENT = "CUSHION_CACHE_DIR"
SCHEMA = 1
MAX_ENTRIES = 1024
SETTLED_NS = 2_000_000_000
"""FAT has the coarsest clock of the common file systems: two seconds."""
_MAX_BYTES = 8 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


Entries = dict[str, tuple[FileState, str]]
"""Absolute path, with links resolved, to the state of the file and its SHA-256."""


def cache_file() -> Path | None:
    """Return the cache file: in ``CUSHION_CACHE_DIR`` if that is set, else in the user's cache folder.

    None if ``CUSHION_CACHE_DIR`` is empty, or the user has no home folder.
    """
    chosen = os.environ.get(ENVIRONMENT)
    if chosen == "":
        return None
    try:
        if chosen is not None:
            folder = Path(chosen).expanduser()
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME", ""))
            # The XDG specification says to ignore a relative path.
            folder = (base if base.is_absolute() else Path.home() / ".cache") / "cushion-deploy"
    except RuntimeError:
        return None
    return folder / "digests.json"


def cached_digests(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 (hex) of each file, in the given order; a file whose digest is cached is not read.

    A damaged or read-only cache is ignored, and the files are read.

    Raises:
        OSError: a file cannot be read.
    """
    file = cache_file()
    kept: Entries = _read(file) if file else {}
    fresh: Entries = {}
    found = {}
    try:
        for path in paths:
            real = path.resolve(strict=True)
            state = FileState.of(real)
            if kept.get(str(real), (None, ""))[0] == state:
                found[path] = kept[str(real)][1]
                continue
            started = time.time_ns()
            found[path] = hash_file(real)
            settled = max(state.modified, state.changed) + SETTLED_NS < started
            if settled and FileState.of(real) == state:
                fresh[str(real)] = state, found[path]
    finally:  # an interrupt during the last shard keeps the digests of the others
        if file and fresh:
            _add(file, fresh)
    return found


def _read(file: Path) -> Entries:
    """Return the valid entries of the cache; none if it is damaged or of another schema."""
    try:
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            return {}
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        logger.debug("ignoring the digest cache %s: %s", file, e)
        return {}
    rows = data.get("files") if isinstance(data, dict) and data.get("schema") == SCHEMA else None
    if not isinstance(rows, dict):
        return {}
    return {path: (FileState(*row[:-1]), row[-1]) for path, row in rows.items() if _is_entry(row)}


def _is_entry(row: object) -> bool:
    if not isinstance(row, list) or len(row) != len(FileState._fields) + 1:
        return False
    *state, digest = row
    whole = all(isinstance(value, int) for value in state)
    return whole and isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None


def _add(file: Path, fresh: Mapping[str, tuple[FileState, str]]) -> None:
    """Add entries, and drop those whose file is gone or has changed, and the oldest beyond ``MAX_ENTRIES``.

    Entries that another process adds between the read and the write here are lost; those files are hashed again.
    """
    current = {path: entry for path, entry in _read(file).items() if path not in fresh and _is_current(path, entry[0])}
    rows = [(path, [*state, digest]) for path, (state, digest) in {**current, **fresh}.items()]
    text = json.dumps({"schema": SCHEMA, "files": dict(rows[-MAX_ENTRIES:])}, indent=0)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(file, text.encode())
    except OSError as e:
        logger.debug("the digest cache %s cannot be written: %s", file, e)


def _is_current(path: str, state: FileState) -> bool:
    try:
        return FileState.of(Path(path)) == state
    except (OSError, ValueError):
        return False
