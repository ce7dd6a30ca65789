"""Bundles on the Hugging Face hub: fetch the files that a manifest lists and the signature, from one commit."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cushion_deploy.errors import CushionError, MissingDependency, UntrustedArtifact, UsageError
from cushion_deploy.store.manifest import MANIFEST_NAME, PICKLE_SUFFIXES, read_manifest
from cushion_deploy.store.snapshot import SIGNATURE_NAME

_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(rf"({_NAME})(?:@([A-Za-z0-9][\w./-]*))?")
_LONGEST = 96
_FORM = "give the folder of a bundle, or org/name (or org/name@revision) of one on the hub"


def is_hub_name(name: str) -> bool:
    """Return whether a text has the form ``org/name``."""
    # The hub's own rule; a path of this form, such as `out/model--int8`, can only be a folder.
    if not re.fullmatch(_NAME, name) or "--" in name or ".." in name or name.endswith(".git"):
        return False
    return all(part[-1] not in ".-" and len(part) <= _LONGEST for part in name.split("/"))


def local_bundle(bundle: Path | str) -> Path:
    """Return the folder of a bundle, which is fetched if it is named as ``org/name`` or ``org/name@revision``.

    What exists on this machine is never looked up on the hub. Nothing is verified here but the manifest.

    Raises:
        UsageError: the hub has no such repository or revision, or it is not a bundle.
        MissingDependency: the hub cannot be reached, or huggingface_hub is not installed.
        UntrustedArtifact: its manifest is damaged or lists a pickle.
    """
    found = _on_hub(bundle)
    return fetch_bundle(found[1], found[2]) if found else Path(bundle)


def is_on_hub(bundle: Path | str) -> bool:
    """Return whether :func:`local_bundle` would look a bundle up on the hub."""
    return _on_hub(bundle) is not None


def _on_hub(bundle: Path | str) -> re.Match[str] | None:
    """Return name and revision of a bundle on the hub; None for what is on this machine or can only be a path."""
    path, found = Path(bundle), _REFERENCE.fullmatch(str(bundle))
    if not found or not is_hub_name(found[1]) or path.exists() or path.is_symlink():
        return None
    return found


def hub_bundle(text: str) -> Path | None:
    """Return the snapshot of a bundle on the hub if that is what ``org/name[@revision]`` names; None for anything else.

    Raises:
        UsageError, MissingDependency, UntrustedArtifact: see :func:`local_bundle`.
    """
    found = _on_hub(text)
    if found is None:
        return None
    hub = import_hub()
    with hub_errors(found[1]):
        begun = Path(hub.snapshot_download(found[1], revision=found[2], allow_patterns=[MANIFEST_NAME]))
    return fetch_bundle(found[1], begun.name) if (begun / MANIFEST_NAME).exists() else None


def fetch_bundle(name: str, revision: str | None = None) -> Path:
    """Fetch a bundle into the cache of the hub, and return its snapshot; files already there are not fetched again.

    The manifest is fetched first, then the files it lists and the signature, and no other, from the same commit.

    Args:
        name: ``org/name``.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        UsageError, MissingDependency, UntrustedArtifact: see :func:`local_bundle`.
    """
    hub = import_hub()
    with hub_errors(name):
        snapshot = Path(hub.snapshot_download(name, revision=revision, allow_patterns=[MANIFEST_NAME]))
    if not (snapshot / MANIFEST_NAME).exists():
        raise UsageError(f"'{name}' on the hub is not a bundle: it has no {MANIFEST_NAME}", hint=_FORM)
    files = read_manifest(snapshot).files
    if pickled := [file for file in files if file.lower().endswith(PICKLE_SUFFIXES)]:
        raise UntrustedArtifact(f"'{name}' on the hub lists the pickle {pickled[0]!r}", hint="do not use it")
    with hub_errors(name):
        # The name of a snapshot is its commit.
        wanted = [MANIFEST_NAME, SIGNATURE_NAME, *map(glob.escape, files)]
        return Path(hub.snapshot_download(name, revision=snapshot.name, allow_patterns=wanted))


def import_hub() -> Any:
    """Import huggingface_hub; raises MissingDependency if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as e:
        raise MissingDependency(
            "bundles on the hub need huggingface_hub", hint="pip install 'cushion-deploy[hub]'"
        ) from e
    return huggingface_hub


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into those of this project; others pass unchanged.

    Raises:
        UsageError: the name is not allowed; the repository does not exist, is private, or refuses the request; or the
            cache is full.
        MissingDependency: the hub cannot be reached.
    """
    from huggingface_hub import errors

    try:
        yield
    except CushionError:
        raise
    except errors.HFValidationError as e:
        reason = str(e).splitlines()[0][:200]
        raise UsageError(f"'{name}' is not a name that the hub allows: {reason}", hint=_FORM) from e
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as e:
        raise UsageError(
            f"there is no '{name}' on this machine, and on the hub it does not exist or is not open to you",
            hint=f"{_FORM}; for a private or gated one log in with `hf auth login`",
        ) from e
    except errors.RevisionNotFoundError as e:
        raise UsageError(f"'{name}' on the hub has no such revision", hint="give a branch, a tag or a commit") from e
    except errors.HfHubHTTPError as e:
        raise _refused(name, e) from e
    except OSError as e:
        if e.filename is not None:
            raise UsageError(
                f"cannot use {os.fsdecode(e.filename)}: {e.strerror}",
                hint="free some space or change its permissions, or choose another cache with HF_HOME",
            ) from e
        raise _unreachable(name, e) from e
    except Exception as e:
        # The classes of a lost connection depend on the version's HTTP library: requests, httpx or httpx2.
        if type(e).__module__.partition(".")[0].rstrip("2") in ("httpx", "requests"):
            raise _unreachable(name, e) from e
        raise


def _unreachable(name: str, error: Exception) -> MissingDependency:
    return MissingDependency(
        f"there is no '{name}' on this machine, and the hub cannot be reached ({type(error).__name__})",
        hint="check the network, or fetch it elsewhere and give its folder",
    )


def _refused(name: str, error: Any) -> CushionError:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return UsageError(
            f"the hub refuses access to '{name}' ({status})",
            hint="log in with `hf auth login`, with a token that may write there if you push",
        )
    reason = str(error).splitlines()[0][:200]
    return MissingDependency(f"the hub failed for '{name}': {reason}", hint="try again later")
