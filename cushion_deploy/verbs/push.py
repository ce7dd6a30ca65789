"""Push: put a bundle on the Hugging Face hub in one commit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.runtime.hub import hub_errors, import_hub
from cushion_deploy.store import MANIFEST_NAME, read_manifest, verify_bundle
from cushion_deploy.store.snapshot import SIGNATURE_NAME, is_document


@dataclass(frozen=True)
class Pushed:
    """What a push did: the commit with its address, and which files the repository has and no longer has."""

    commit: str
    url: str
    uploaded: tuple[str, ...]
    removed: tuple[str, ...]


def push_bundle(path: Path, name: str, *, private: bool = False) -> Pushed:
    """Verify a bundle and put it on the hub; the repository is created if it does not exist.

    One commit adds all files of the bundle and its signature, and removes those of an earlier bundle that this one does
    not have, so that nobody fetches a mixture. What the manifest of the earlier bundle does not list stays, and so do
    documents.

    Args:
        path: folder of the bundle.
        name: ``org/name``.
        private: whether a new repository is private; an existing one stays as it is.

    Raises:
        UsageError: the path is not a folder, the repository has files but no bundle, or the hub refuses access.
        UntrustedArtifact: the bundle is damaged; nothing is sent then.
        MissingDependency: the hub cannot be reached, or huggingface_hub is not installed.
    """
    manifest = verify_bundle(path)
    hub = import_hub()
    # A document may have been removed, and not every bundle is signed.
    files = [file for file in (MANIFEST_NAME, SIGNATURE_NAME, *manifest.files) if (path / file).exists()]
    with hub_errors(name):
        api = hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        head = api.model_info(name).sha
        remote = api.list_repo_files(name, revision=head)
        earlier = _earlier_bundle(hub, name, head, remote)
        old = [file for file in remote if _is_left(file, earlier) and file not in files]
        operations = [hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(path / file)) for file in files]
        operations += [hub.CommitOperationDelete(path_in_repo=file) for file in old]
        commit = api.create_commit(
            name, operations, commit_message=f"Bundle {manifest.digest[:12]}", parent_commit=head
        )
    return Pushed(str(commit.oid), str(commit.commit_url), tuple(files), tuple(old))


def _is_left(file: str, earlier: Collection[str]) -> bool:
    """Return whether a file of the repository is of the bundle that a push replaces."""
    return (bool(earlier) and file == SIGNATURE_NAME) or (file in earlier and not is_document(file))


def _earlier_bundle(hub: Any, name: str, commit: str, remote: Sequence[str]) -> Collection[str]:
    """Return the files of the bundle in a commit of a repository; raises UsageError if it has other files only."""
    if MANIFEST_NAME not in remote:
        if foreign := [file for file in remote if not is_document(file)]:
            raise UsageError(
                f"'{name}' has files that are not of a bundle ({foreign[0]!r}), and no {MANIFEST_NAME}",
                hint="push to a new repository, or remove the files there first if nobody needs them",
            )
        return ()
    snapshot = hub.snapshot_download(name, revision=commit, allow_patterns=[MANIFEST_NAME])
    try:
        return read_manifest(Path(snapshot)).files
    except UntrustedArtifact as e:
        raise UsageError(
            f"which files of '{name}' are of an earlier bundle is not known: {e.message}",
            hint=f"push to a new repository, or remove the {MANIFEST_NAME} there and all files that it lists",
        ) from e
