"""Files that survive kills and refuse damage: the stage store, the bundle manifest and publication.

Promises: a finished folder is complete or absent, whatever stops the process; no byte of a stage or a bundle is
trusted before its SHA-256 was compared. Knows nothing of models, graphs or engines.
"""

from __future__ import annotations

from cushion_deploy.store.files import hash_file, hash_files, place, replace_file, require_space
from cushion_deploy.store.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    BundleManifest,
    FileEntry,
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
    "StageStore",
    "hash_file",
    "hash_files",
    "place",
    "publish",
    "read_manifest",
    "recover",
    "replace_file",
    "require_publishable",
    "require_space",
    "staging_area",
    "verify_bundle",
]
