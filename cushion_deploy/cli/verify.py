"""`verify`: verify every byte of a bundle against its manifest, and the signature against a public key."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cushion_deploy.cli.help import FILE, json_option, option, verb
from cushion_deploy.cli.terminal import echo
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.hub import local_bundle
from cushion_deploy.store import BundleManifest, changed_documents, verify_bundle
from cushion_deploy.store.snapshot import SIGNATURE_NAME

IN_BUNDLE = ""
"""Value of ``--signature`` without a file."""


@verb("verify", "verify OUT", "verify org/name --signature --public-key public.pem")
@click.argument("bundle", type=FILE)
@option(
    "--signature",
    heading="Signature",
    metavar="[FILE]",
    is_flag=False,
    flag_value=IN_BUNDLE,
    help=f"Verify a signature as well: FILE, or {SIGNATURE_NAME} in the bundle. Requires --public-key.",
)
@option(
    "--public-key",
    heading="Signature",
    type=FILE,
    metavar="FILE",
    help=f"Public key (PEM) to verify the signature with; without --signature that of {SIGNATURE_NAME}.",
)
@json_option("Print the manifest as JSON instead of text.")
def command(bundle: Path, signature: str | None, public_key: Path | None, as_json: bool) -> None:
    """Verify that BUNDLE has exactly the files of its manifest, byte for byte.

    BUNDLE is a folder, or org/name (or org/name@revision) of a bundle on the hub. Documents that no run reads (README,
    licence, files of git and the hub) are not compared; they are named if they changed. With --public-key, the
    signature of the bundle is verified too.

    The exit code is 4 if a file is missing, added or changed, or if the signature does not hold.
    """
    if signature is not None and public_key is None:
        raise UsageError("--signature without a key proves nothing", hint="give --public-key public.pem too")
    bundle = local_bundle(bundle)
    manifest = verify_bundle(bundle)
    signed = None if public_key is None else _verify_signature(bundle, manifest, signature, public_key)
    if as_json:
        click.echo(json.dumps(manifest.to_json()))
        return
    size = sum(entry.size for entry in manifest.files.values())
    click.echo(f"{bundle}: {len(manifest.files)} files, {size / 1e6:.1f} MB, all unchanged since publication")
    click.echo(f"manifest {manifest.digest}")
    if signed:
        click.echo(signed)
    if changed := changed_documents(bundle, manifest):
        words = ", ".join(f"{name} ({what})" for name, what in changed.items())
        echo(f"not compared, because no run reads them: {words}")


def _verify_signature(bundle: Path, manifest: BundleManifest, signature: str | None, public_key: Path) -> str:
    """Verify the signature of a verified bundle, and state what it covers."""
    # Imported here: most calls of `verify` need no key.
    from cushion_deploy.verbs.sign import verify_signature

    done = verify_signature(bundle, manifest, public_key, Path(signature) if signature else None)
    return f"signed with the private key of {public_key}: {len(done.files)} files (documents are not signed)"
