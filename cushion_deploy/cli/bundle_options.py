"""The argument BUNDLE of the commands that open one, and the options for the key that it must be signed with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cushion_deploy.cli.help import FILE, option
from cushion_deploy.core.progress import Progress, elapsed, silent
from cushion_deploy.errors import UsageError
from cushion_deploy.store import MANIFEST_NAME, file_states
from cushion_deploy.store.files import human_bytes
from cushion_deploy.store.snapshot import SIGNATURE_NAME

if TYPE_CHECKING:
    from cushion_deploy.runtime.bundle import Bundle
    from cushion_deploy.store import BundleManifest
    from cushion_deploy.verbs.sign import Signed

F = TypeVar("F", bound=Callable[..., Any])
IN_BUNDLE = ""
"""Value of ``--signature`` without a file."""

bundle_argument = click.argument("bundle", type=FILE)


@dataclass(frozen=True)
class RequiredSignature:
    """The signature that a bundle must have.

    Attributes:
        public_key: PEM file that belongs to the private key of the signature.
        file: the signature; None for the one in the bundle.

    Raises:
        UsageError: the public key cannot be used.
        MissingDependency: model-signing is not installed.
    """

    public_key: Path
    file: Path | None = None

    def __post_init__(self) -> None:
        # Imported here, because most calls need no key.
        from cushion_deploy.verbs.signing_keys import check_public_key, require_model_signing

        require_model_signing()
        check_public_key(self.public_key)

    def verify(self, folder: Path, manifest: BundleManifest) -> Signed:
        """Verify the signature of a verified bundle; raises UntrustedArtifact if it does not hold."""
        from cushion_deploy.verbs.sign import verify_signature

        return verify_signature(folder, manifest, self.public_key, self.file)


def signature_options(function: F) -> F:
    """Add ``--public-key`` and ``--signature``, which the command gets as ``required: RequiredSignature | None``."""

    @wraps(function)
    def command(*arguments: Any, signature: str | None, public_key: Path | None, **more: Any) -> Any:
        if signature is not None and public_key is None:
            raise UsageError("--signature without a key proves nothing", hint="give --public-key public.pem too")
        required = None if public_key is None else RequiredSignature(public_key, Path(signature) if signature else None)
        return function(*arguments, required=required, **more)

    for add in (
        option(
            "--signature",
            heading="Signature",
            metavar="[FILE]",
            is_flag=False,
            flag_value=IN_BUNDLE,
            help=f"Signature to verify: FILE, or {SIGNATURE_NAME} in the bundle. Requires --public-key.",
        ),
        option(
            "--public-key",
            heading="Signature",
            type=FILE,
            metavar="FILE",
            help="Public key (PEM) that the bundle must be signed with; any other bundle is refused.",
        ),
    ):
        command = add(command)
    return command  # type: ignore[return-value]


def open_named(
    bundle: Path, required: RequiredSignature | None = None, progress: Progress = silent, *, local: bool = False
) -> Bundle:
    """Open a bundle, a folder or ``org/name`` of the hub; its signature is verified before anything else is read.

    Args:
        bundle: the folder, or the name on the hub.
        required: the signature that it must have.
        progress: told what takes long: to fetch the bundle, and to verify every file.
        local: whether it is a folder in any case.

    Raises:
        UsageError, MissingDependency, UntrustedArtifact: see :func:`~cushion_deploy.runtime.hub.local_bundle`,
            :func:`~cushion_deploy.runtime.bundle.open_bundle` and :meth:`RequiredSignature.verify`.
    """
    from cushion_deploy.runtime.bundle import open_bundle
    from cushion_deploy.runtime.hub import is_on_hub, local_bundle

    folder = bundle
    if not local and is_on_hub(bundle):
        with elapsed(progress, f"fetching {bundle}"):
            folder = local_bundle(bundle)
    # Only the folder of a bundle is searched: another could be large.
    states = file_states(folder) if (folder / MANIFEST_NAME).is_file() else {}
    size = human_bytes(sum(state.size for state in states.values()))
    with elapsed(progress, f"verifying {bundle}, {size}") if states else nullcontext():
        return open_bundle(folder, accept=partial(required.verify, folder) if required else None)
