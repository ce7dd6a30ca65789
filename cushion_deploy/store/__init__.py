"""Files that survive killed processes and detect damage: the stage store, the bundle manifest and publication.

A finished folder is either complete or absent, however the process stops; no byte of a stage or a bundle is trusted
before its SHA-256 has been compared. The package knows nothing of models, graphs or engines.
"""

from __future__ import annotations

from cushion_deploy.store.file_state import FileState, file_states, relinked, require_unchanged
from cushion_deploy.store.files import hash_file, hash_files, place, replace_file, require_space
from cushion_deploy.store.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    BundleManifest,
    FileEntry,
    changed_documents,
    read_manifest,
    verify_bundle,
)
from cushion_deploy.store.publish import publish, recover, require_publishable, staging_area
from cushion_deploy.store.work_folder import StageStore

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA",
    "BundleManifest",
    "FileEntry",
    "FileState",
    "StageStore",
    "changed_documents",
    "file_states",
    "hash_file",
    "hash_files",
    "place",
    "publish",
    "read_manifest",
    "recover",
    "relinked",
    "replace_file",
    "require_publishable",
    "require_space",
    "require_unchanged",
    "staging_area",
    "verify_bundle",
]
