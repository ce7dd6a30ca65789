"""The bundle manifest ``cushion.json``, and the verification of a bundle against it before every use."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.files import hash_file, list_files
from cushion_deploy.store.snapshot import blobs_of, is_document, stat_file

MANIFEST_NAME = "cushion.json"
SCHEMA = 1
TOOL = "cushion-deploy"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_LIMIT = 16 * 1024 * 1024
_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!-]{0,39}")
_REBUILD = "the folder was altered or damaged; copy it again or build it again"


def tool_version() -> str:
    """Return the installed version of cushion-deploy; ``0+source`` if it runs from a source tree."""
    try:
        return importlib.metadata.version(TOOL)
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


@dataclass(frozen=True)
class FileEntry:
    """Entry of a file in a manifest: SHA-256 (64 lower-case hex digits) and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class BundleManifest:
    """The contents of a bundle.

    Attributes:
        files: the exact set of files, as entries by relative POSIX path; the manifest itself is not included.
        recipe: the recipe that the bundle was built with, JSON-ready.
        parents: digests of everything that the bundle was made from, by name.
        created: UTC time in ISO 8601, to the second.
        version: version of the tool that wrote the manifest.
        tool: name of that tool.
        schema: version of the manifest format.
    """

    files: Mapping[str, FileEntry]
    recipe: Mapping[str, Any]
    parents: Mapping[str, str]
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    version: str = field(default_factory=tool_version)
    tool: str = TOOL
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict, starting with the version of the format."""
        d = asdict(self)
        d["files"] = dict(sorted(d["files"].items()))
        return {k: d[k] for k in ("schema", "tool", "version", "created", "recipe", "parents", "files")}

    @property
    def digest(self) -> str:
        """SHA-256 of the content; identifies the bundle, because it covers the digest of every file."""
        # Converted to JSON and back, so that keys and tuples are what a reader will see.
        return digest_json(json.loads(json.dumps(self.to_json(), allow_nan=False)))

    def to_bytes(self) -> bytes:
        """Return the content of ``cushion.json``: the fields and their digest.

        Raises:
            UsageError: the content is larger than a reader accepts.
        """
        content = {**self.to_json(), "digest": self.digest}
        data = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if len(data) > _LIMIT:
            raise UsageError(
                f"the manifest of {len(self.files)} files has {len(data)} bytes, more than {_LIMIT}",
                hint="shorten the recipe or reduce the number of files",
            )
        return data

    @classmethod
    def from_json(cls, data: Any) -> BundleManifest:
        """Validate and rebuild from :meth:`to_json`; ``data`` is not trusted, and a digest in it is not compared.

        Raises:
            UntrustedArtifact: a field is missing, unknown, of the wrong type or dangerous.
        """
        if not isinstance(data, dict):
            _bad("is not a JSON object")
        schema = data.get("schema")
        if type(schema) is not int or schema < 1:
            _bad(f"has no valid schema version (found {schema!r:.40}, expected {SCHEMA})")
        if schema != SCHEMA:
            version = data.get("version")
            known = isinstance(version, str) and _VERSION.fullmatch(version)
            raise UntrustedArtifact(
                f"{MANIFEST_NAME} has schema version {schema}; {TOOL} {tool_version()} reads version {SCHEMA}",
                hint=f"use {TOOL} {version} or later, which wrote it" if known else f"use a later version of {TOOL}",
            )
        data = {k: v for k, v in data.items() if k != "digest"}
        expected = {"schema", "tool", "version", "created", "recipe", "parents", "files"}
        if odd := sorted(expected ^ set(data)):
            _bad(f"has {'an unknown' if odd[0] in data else 'no'} field {odd[0]!r:.80}")
        for name, kind in (("tool", str), ("version", str), ("created", str), ("recipe", dict), ("parents", dict)):
            if not isinstance(data[name], kind):
                _bad(f"has a field {name!r} of type {type(data[name]).__name__}, expected {kind.__name__}")
        if not all(isinstance(v, str) for v in data["parents"].values()):
            _bad("has a parent that is not text")
        try:
            datetime.fromisoformat(data["created"])
        except ValueError:
            _bad(f"has {data['created']!r:.60} as its time, expected ISO 8601")
        return cls(
            files=parse_files(data["files"]),
            **{k: data[k] for k in ("recipe", "parents", "created", "version", "tool", "schema")},
        )


def _bad(what: str, name: str = MANIFEST_NAME) -> NoReturn:
    raise UntrustedArtifact(f"{name} {what}", hint=_REBUILD)


def check_path(path: str) -> str | None:
    """Return why a relative POSIX path is not allowed in a manifest; None if it is allowed."""
    if not path or any(part in ("", ".", "..") for part in path.split("/")):
        return "is not a plain relative path"
    if "\\" in path or ":" in path:
        return "has a backslash or a colon, which some systems read as a separator"
    if not path.isprintable():
        return "has characters that cannot be printed"
    return None


def _fold(path: str) -> str:
    # Names that case-insensitive and normalizing file systems treat as equal.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def parse_files(data: Any, manifest_name: str = MANIFEST_NAME) -> dict[str, FileEntry]:
    """Validate and rebuild the ``files`` of a manifest, which no manifest lists itself among.

    Raises:
        UntrustedArtifact: the message names the first invalid path.
    """
    if not isinstance(data, dict):
        _bad("has no table of files", manifest_name)
    files: dict[str, FileEntry] = {}
    folded: dict[str, str] = {}
    for path, entry in sorted(data.items()):
        if reason := check_path(path):
            _bad(f"lists {path!r:.200}, which {reason}", manifest_name)
        key = _fold(path)
        if key in folded:
            _bad(f"lists {folded[key]!r} and {path!r}, which differ in case only", manifest_name)
        folded[key] = path
        if key == manifest_name:
            _bad("lists itself", manifest_name)
        if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
            _bad(f"has no sha256 and size for {path!r}", manifest_name)
        sha256, size = entry["sha256"], entry["size"]
        if not isinstance(sha256, str) or not _DIGEST.fullmatch(sha256) or type(size) is not int or size < 0:
            _bad(f"has an invalid sha256 or size for {path!r}", manifest_name)
        files[path] = FileEntry(sha256, size)
    return files


def measure_files(folder: Path) -> dict[str, FileEntry]:
    """Return the entry of every file below a folder, sorted by path.

    Raises:
        UntrustedArtifact: the folder contains a link or a special file.
    """
    return {path: FileEntry(hash_file(folder / path), size) for path, size in list_files(folder).items()}


def check_files(
    folder: Path,
    files: Mapping[str, FileEntry],
    manifest_name: str,
    blobs: Path | None = None,
    ignored: Callable[[str], bool] = lambda _: False,
) -> None:
    """Check that a folder contains exactly ``files`` and the manifest, byte for byte.

    Every path that is opened comes from listing the folder, never from the manifest.

    Args:
        folder, files, manifest_name: what to compare.
        blobs: where the links of the folder may point; see :func:`~.snapshot.blobs_of`.
        ignored: whether a path may be there with any content, or be absent.

    Raises:
        UntrustedArtifact: the message names the first file that is extra, missing, or has another size or content.
    """
    found = {path: size for path, size in list_files(folder, blobs).items() if not ignored(path)}
    files = {path: entry for path, entry in files.items() if not ignored(path)}
    found.pop(manifest_name, None)
    for path in found:
        if path not in files:
            raise UntrustedArtifact(f"{path!r} in {folder} is not listed in {manifest_name}", hint=_REBUILD)
    for path, entry in sorted(files.items()):
        if path not in found:
            raise UntrustedArtifact(f"{path!r} is missing from {folder}", hint=_REBUILD)
        if found[path] != entry.size:
            raise UntrustedArtifact(
                f"{path!r} in {folder} has {found[path]} bytes, expected {entry.size}", hint=_REBUILD
            )
    for path, entry in sorted(files.items()):
        actual = hash_file(folder / path)
        if actual != entry.sha256:
            raise UntrustedArtifact(
                f"{path!r} in {folder} has SHA-256 {actual[:16]}…, expected {entry.sha256[:16]}…", hint=_REBUILD
            )


_WRITTEN = f"point to a folder that `{TOOL} build` has written"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    d = dict(pairs)
    if len(d) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return d


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def read_json(path: Path) -> tuple[bytes, Any]:
    """Read a small JSON file that is not trusted; return its bytes and its value.

    Raises:
        UntrustedArtifact: missing, not a plain file, larger than 16 MB, or not JSON (duplicate keys and NaN included).
    """
    name = path.name
    try:
        info = stat_file(path, blobs_of(path.parent))
    except FileNotFoundError as e:
        known = _known_as(path.parent) if name == MANIFEST_NAME else ""
        kind = UsageError if known else UntrustedArtifact  # what is something else is not a damaged bundle
        raise kind(f"{path.parent} has no {name}", hint=known or _WRITTEN) from e
    if not stat.S_ISREG(info.st_mode):
        raise UntrustedArtifact(f"{path} is a link or a special file, expected a plain file", hint=_REBUILD)
    with open(path, "rb") as f:
        raw = f.read(_LIMIT + 1)
    if len(raw) > _LIMIT:
        raise UntrustedArtifact(f"{path} has {info.st_size} bytes, more than {_LIMIT}", hint=_REBUILD)
    try:
        return raw, json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise UntrustedArtifact(f"{path} is not valid JSON: {reason:.200}", hint=_REBUILD) from e


def _known_as(path: Path) -> str:
    """Say what a path is and how to get to a bundle from there; empty if it is nothing that is known."""
    gguf = path.suffix == ".gguf" and path.is_file()
    if gguf or ((path / "config.json").is_file() and not (path / "model.onnx").exists()):
        return f"it is a model: `{TOOL} build {path} --output OUT` makes a bundle of it"
    if (path / "stages").is_dir() and (path / "lock").is_file():
        return f"it is a work folder: give the folder that `{TOOL} build` wrote with --output"
    if (path.parent / MANIFEST_NAME).is_file():
        return f"it is a part of a bundle: give {path.parent}"
    return ""


def read_manifest(bundle: Path) -> BundleManifest:
    """Read ``cushion.json`` only: its form is checked, the files it lists are not.

    Raises:
        UntrustedArtifact: missing, not a plain file, too large, not JSON, another schema version, dangerous or altered.
    """
    raw, data = read_json(bundle / MANIFEST_NAME)
    manifest = BundleManifest.from_json(data)
    # Byte for byte, digest included, so that one flipped bit in a number of the recipe is found. A tool that writes the
    # same content in another form has to raise SCHEMA. This detects damage; against forgery, sign the bundle.
    if manifest.to_bytes() != raw:
        _bad("was altered after it was written: its digest does not match its content")
    return manifest


def verify_bundle(path: Path) -> BundleManifest:
    """Verify a bundle against its manifest: exact set of files, sizes, SHA-256, plain files only, no pickles.

    Call it before any other byte of the bundle is used. In a snapshot of the hub's cache, links into its ``blobs/``
    count as files. Documents that nothing reads may be added, edited or absent; :func:`changed_documents` names them.

    Raises:
        UsageError: the path does not exist or is not a folder.
        UntrustedArtifact: the message names the first file that fails.
    """
    try:
        if not path.is_dir():
            state = "is a file, expected a folder" if path.exists() else "does not exist"
            raise UsageError(f"{path} {state}", hint=_known_as(path) or _WRITTEN)
        manifest = read_manifest(path)
        for name in manifest.files:
            if name.lower().endswith(PICKLE_SUFFIXES):
                raise UntrustedArtifact(
                    f"{name!r} in {path} has the suffix of a pickle, which can run code when it is loaded",
                    hint="a bundle never contains such files; build it again",
                )
        check_files(path, manifest.files, MANIFEST_NAME, blobs_of(path), is_document)
    except OSError as e:
        raise UsageError(
            f"cannot read {os.fsdecode(e.filename) if e.filename else path}: {e.strerror}",
            hint="change the permissions of the bundle, or copy it again",
        ) from e
    return manifest


def changed_documents(path: Path, manifest: BundleManifest) -> dict[str, str]:
    """Return the documents of a verified bundle that are not as published, each with what is different."""
    found = {name: size for name, size in list_files(path, blobs_of(path)).items() if is_document(name)}
    changed = {name: "added" for name in found if name not in manifest.files}
    for name, entry in manifest.files.items():
        if is_document(name) and name not in found:
            changed[name] = "removed"
        elif is_document(name) and hash_file(path / name) != entry.sha256:
            changed[name] = "edited"
    return dict(sorted(changed.items()))
