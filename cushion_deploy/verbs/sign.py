"""Sign a bundle with a private key, and verify the signature with the public key, through sigstore's model-signing."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.store import MANIFEST_NAME, BundleManifest, replace_file, verify_bundle
from cushion_deploy.store.files import disk_errors, temporary_folder
from cushion_deploy.store.snapshot import DOCUMENTS, SIGNATURE_NAME, is_document
from cushion_deploy.verbs.signing_keys import (
    check_private_key,
    check_public_key,
    read_small_file,
    require_model_signing,
)

UNSIGNED = sorted({*DOCUMENTS, "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt"})
"""Documents that a signature leaves out, in the spellings that people use; model-signing compares names exactly."""
_FOLDERS = [".git", ".cache/huggingface"]
_KIND = "application/vnd.dev.sigstore.bundle"
"""Beginning of the media type of a signature file; its version follows."""
_LARGEST = 16 << 20
_DO_NOT_USE = "do not use the bundle; get bundle, signature and public key from who made it"


@dataclass(frozen=True)
class Signed:
    """What a signature covers: the signature file, the digest of the manifest, and the names of the signed files."""

    signature: Path
    digest: str
    files: tuple[str, ...]


def sign_bundle(path: Path, key: Path, *, password: bytes | None = None, output: Path | None = None) -> Signed:
    """Verify a bundle, sign the digests of its files, and write the signature; an earlier signature is replaced.

    Args:
        path: folder of the bundle.
        key: PEM file with a private key of the curve P-256, P-384 or P-521.
        password: of an encrypted key.
        output: where the signature is written; None for ``model.sig`` in the bundle, the only name allowed there.

    Raises:
        UsageError: the path is not a folder, the key cannot be used, or the signature cannot be written.
        UntrustedArtifact: the bundle is damaged; nothing is signed then.
        MissingDependency: model-signing is not installed.
    """
    require_model_signing()
    from model_signing import signing

    target = path / SIGNATURE_NAME if output is None else output
    check_private_key(key, password)
    manifest = verify_bundle(path)
    _require_writable(path, target)
    digests = BundleDigests(path, manifest)
    signer = signing.Config().use_elliptic_key_signer(private_key=key, password=password)
    with temporary_folder("cushion-sign-") as folder, disk_errors(target.parent):
        signer.set_hashing_config(digests).sign(path, folder / SIGNATURE_NAME)
        replace_file(target, (folder / SIGNATURE_NAME).read_bytes())
    return Signed(target, manifest.digest, tuple(digests.files))


def verify_signature(path: Path, manifest: BundleManifest, public_key: Path, signature: Path | None = None) -> Signed:
    """Check that the owner of a key signed exactly the files of a verified bundle.

    Nothing is read again: what the signature states is compared with the digests that :func:`verify_bundle` has just
    compared with the files. A signature that leaves out a file of the bundle does not hold.

    Args:
        path: folder of the bundle.
        manifest: what ``verify_bundle`` returned for it.
        public_key: PEM file.
        signature: signature file; None for ``model.sig`` in the bundle.

    Raises:
        UsageError: the public key cannot be used, or the signature file that was named cannot be read.
        UntrustedArtifact: the bundle has no signature, the signature is damaged, is by another key, or is of other
            files.
        MissingDependency: model-signing is not installed.
    """
    require_model_signing()
    from model_signing import verifying

    file = path / SIGNATURE_NAME if signature is None else signature
    check_public_key(public_key)
    _read_signature(file, named=signature is not None)
    digests = BundleDigests(path, manifest)
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(digests)
    with _refusals(file, public_key, digests.files):
        verifier.verify(path, file)
    return Signed(file, manifest.digest, tuple(digests.files))


class BundleDigests:
    """The digests of a verified bundle, in the place of model-signing's own hashing of a folder.

    model-signing would read every file again, follow or refuse all links of a snapshot of the hub alike, and leave out
    whatever a signature asks it to leave out.
    """

    def __init__(self, path: Path, manifest: BundleManifest) -> None:
        """Collect what is signed: the manifest and all files in it but the documents, which people may edit."""
        listed = {name: entry.sha256 for name, entry in manifest.files.items() if not is_document(name)}
        self.name = Path(os.path.abspath(path)).name
        self.files = dict(sorted({**listed, MANIFEST_NAME: hashlib.sha256(manifest.to_bytes()).hexdigest()}.items()))

    def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
        """Return them as a ``model_signing.manifest.Manifest``, which states how to verify without this tool."""
        from model_signing import manifest
        from model_signing._hashing.hashing import Digest

        # Links are followed: in a snapshot of the hub every file is one, and only content is signed.
        how = {"method": "files", "hash_type": "sha256", "allow_symlinks": True, "ignore_paths": UNSIGNED + _FOLDERS}
        serialization = manifest.SerializationType.from_args(how)
        items = [serialization.new_item(name, Digest("sha256", bytes.fromhex(d))) for name, d in self.files.items()]
        return manifest.Manifest(self.name, items, serialization)

    def add_ignored_paths(self, **_: Any) -> None:
        """Ignore what a signature wants ignored."""


def _require_writable(path: Path, target: Path) -> None:
    """Check that a signature may be written to ``target``: only to a free place, or over another signature."""
    bundle, folder = Path(os.path.realpath(path)), Path(os.path.realpath(target.parent))
    beside_the_manifest = folder == bundle and target.name == SIGNATURE_NAME
    if folder.is_relative_to(bundle) and not beside_the_manifest:
        raise UsageError(
            f"{target} is in the bundle, where only {SIGNATURE_NAME} may be added",
            hint=f"leave out --output for {path / SIGNATURE_NAME}, or give a file elsewhere",
        )
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist", hint="create it, or choose another output")
    if target.exists() and not _is_signature(target):
        raise UsageError(f"{target} exists and is not a signature", hint="choose another output, or move it away first")


def _is_signature(file: Path) -> bool:
    """Return whether a file is a bundle of sigstore, as model-signing writes them."""
    try:
        return not _why_no_signature(read_small_file(file, _LARGEST, ValueError))
    except ValueError:
        return False


def _why_no_signature(data: bytes) -> str:
    """Return why the content of a file is no bundle of sigstore; empty if it is one."""
    if not data.strip():
        return "it is empty"
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return "it is not JSON"
    kind = found.get("mediaType") if isinstance(found, dict) else None
    return "" if str(kind).startswith(_KIND) else f"its mediaType is {kind!r:.60}, expected {_KIND}"


def _read_signature(file: Path, *, named: bool) -> None:
    if not named and not file.exists():
        raise UntrustedArtifact(
            f"{file.parent} is not signed: it has no {SIGNATURE_NAME}",
            hint="give the signature with --signature FILE if it lies elsewhere",
        )
    hint = "give the file that `cushion-deploy sign` has written"
    data = read_small_file(
        file, _LARGEST, lambda reason: UsageError(f"cannot read the signature {file}: {reason}", hint=hint)
    )
    if reason := _why_no_signature(data):
        raise UntrustedArtifact(
            f"{file} is not a signature: {reason}",
            hint="get the signature again from who made the bundle; if that is you, run `cushion-deploy sign` again",
        )


@contextlib.contextmanager
def _refusals(file: Path, public_key: Path, files: Mapping[str, str]) -> Iterator[None]:
    """Turn what model-signing raises for a signature that does not hold, or is no signature, into UntrustedArtifact."""
    from cryptography.exceptions import InvalidSignature

    try:
        # It prints a warning for signatures that do not say which key made them.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except InvalidSignature as e:
        raise UntrustedArtifact(
            f"the signature {file} was not made with the private key of {public_key}, or was altered", hint=_DO_NOT_USE
        ) from e
    except ValueError as e:
        reason = str(e)
        if "Key mismatch" in reason:
            raise UntrustedArtifact(
                f"the signature {file} was made with another key than that of {public_key}", hint=_DO_NOT_USE
            ) from e
        if reason.startswith("Signature mismatch"):
            raise UntrustedArtifact(
                f"the signature {file} is of other files ({_difference(file, files)})", hint=_DO_NOT_USE
            ) from e
        raise _no_signature(file, e) from e
    except Exception as e:  # whatever a damaged file provokes in the library: KeyError, TypeError, RecursionError
        raise _no_signature(file, e) from e


def _difference(file: Path, files: Mapping[str, str]) -> str:
    """State how files with their digests differ from what a signature is of, which model-signing has verified."""
    statement = json.loads(base64.b64decode(json.loads(file.read_bytes())["dsseEnvelope"]["payload"]))
    signed = {row["name"]: row["digest"] for row in statement.get("predicate", {}).get("resources", [])}
    differing = {
        "changed": [name for name in files if name in signed and files[name] != signed[name]],
        "not signed": [name for name in files if name not in signed],
        "signed and missing": [name for name in signed if name not in files],
    }
    return "; ".join(f"{what}: {', '.join(names)[:200]}" for what, names in differing.items() if names)


def _no_signature(file: Path, error: Exception) -> UntrustedArtifact:
    reason = " ".join(str(error).split())
    return UntrustedArtifact(
        f"{file} is not a valid signature: {type(error).__name__}{f': {reason:.200}' if reason else ''}",
        hint=_DO_NOT_USE,
    )
