"""Push: put a bundle on the Hugging Face hub in one commit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cushion_deploy.runtime.hub import hub_errors, import_hub
from cushion_deploy.store import MANIFEST_NAME, verify_bundle
from cushion_deploy.store.snapshot import is_document


@dataclass(frozen=True)
class Pushed:
    """What a push did: the commit with its address, and which files the repository has and no longer has."""

    commit: str
    url: str
    uploaded: tuple[str, ...]
    removed: tuple[str, ...]


def push_bundle(path: Path, name: str, *, private: bool = False) -> Pushed:
    """Verify a bundle and put it on the hub; the repository is created if it does not exist.

    One commit adds all files of the bundle, and removes those of an earlier bundle that this one does not have, so that
    nobody fetches a mixture. Documents that are not in the bundle, such as a licence, stay.

    Args:
        path: folder of the bundle.
        name: ``org/name``.
        private: whether a new repository is private; an existing one stays as it is.

    Raises:
        UsageError: the path is not a folder, or the hub refuses access.
        UntrustedArtifact: the bundle is damaged; nothing is sent then.
        MissingDependency: the hub cannot be reached, or huggingface_hub is not installed.
    """
    manifest = verify_bundle(path)
    hub = import_hub()
    # A document may have been removed.
    files = [file for file in (MANIFEST_NAME, *manifest.files) if (path / file).exists()]
    with hub_errors(name):
        api = hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        old = [file for file in api.list_repo_files(name) if file not in files and not is_document(file)]
        operations = [hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(path / file)) for file in files]
        operations += [hub.CommitOperationDelete(path_in_repo=file) for file in old]
        commit = api.create_commit(name, operations, commit_message=f"Bundle {manifest.digest[:12]}")
    return Pushed(str(commit.oid), str(commit.commit_url), tuple(files), tuple(old))
