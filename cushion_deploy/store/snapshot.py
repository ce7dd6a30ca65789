"""Snapshots in the cache of the Hugging Face hub: folders of links into the `blobs/` of their repository."""

from __future__ import annotations

import os
import stat
from pathlib import Path

SIGNATURE_NAME = "model.sig"
"""Signature of a bundle. A manifest cannot list it, because what is signed includes the manifest."""
DOCUMENTS = frozenset(
    {"readme.md", ".gitattributes", ".gitignore", "license", "license.md", "license.txt", "notice", "notice.txt"}
    | {SIGNATURE_NAME}
)
"""Files beside a bundle that no run reads: people, the hub, git and `sign` add them, and people edit them there."""
_FOLDERS = (".git/", ".cache/huggingface/")


def blobs_of(folder: Path) -> Path | None:
    """Return the folder that the links of a snapshot may point into; None if ``folder`` is not a snapshot.

    The layout is ``models--ORG--NAME/snapshots/REVISION``, beside ``models--ORG--NAME/blobs``.
    """
    snapshot = Path(os.path.realpath(folder))
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return None
    blobs = repository / "blobs"
    return blobs if blobs.is_dir() and not blobs.is_symlink() else None


def stat_file(path: Path, blobs: Path | None = None) -> os.stat_result:
    """Return the status of a path, or of what it links to if that is a file directly in ``blobs``.

    Raises:
        OSError: the path does not exist.
    """
    info = os.lstat(path)
    if blobs is None or not stat.S_ISLNK(info.st_mode):
        return info
    target = Path(os.path.realpath(path))
    if target.parent != blobs:
        return info
    try:
        behind = os.lstat(target)
    except FileNotFoundError:
        return info
    return behind if stat.S_ISREG(behind.st_mode) else info


def is_document(path: str) -> bool:
    """Return whether a file of this relative POSIX path is text for people or for git, which no run depends on."""
    return path.casefold() in DOCUMENTS or path.startswith(_FOLDERS)
