"""`verify`: verify every byte of a bundle against its manifest, and the signature against a public key."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cushion_deploy.cli.bundle_options import RequiredSignature, bundle_argument, signature_options
from cushion_deploy.cli.help import json_option, verb
from cushion_deploy.cli.terminal import echo
from cushion_deploy.runtime.hub import local_bundle
from cushion_deploy.store import changed_documents, verify_bundle


@verb("verify", "verify OUT", "verify org/name --signature --public-key public.pem")
@bundle_argument
@signature_options
@json_option("Print the manifest as JSON instead of text.")
def command(bundle: Path, as_json: bool, required: RequiredSignature | None) -> None:
    """Verify that BUNDLE has exactly the files of its manifest, byte for byte.

    BUNDLE is a folder, or org/name (or org/name@revision) of a bundle on the hub. Documents that no run reads (README,
    licence, files of git and the hub) are not compared; they are named if they changed. With --public-key, the
    signature of the bundle is verified too.

    The exit code is 4 if a file is missing, added or changed, or if the signature does not hold.
    """
    bundle = local_bundle(bundle)
    manifest = verify_bundle(bundle)
    signed = required and required.verify(bundle, manifest)
    if as_json:
        click.echo(json.dumps(manifest.to_json()))
        return
    size = sum(entry.size for entry in manifest.files.values())
    click.echo(f"{bundle}: {len(manifest.files)} files, {size / 1e6:.1f} MB, all unchanged since publication")
    click.echo(f"manifest {manifest.digest}")
    if required and signed:
        files = f"{len(signed.files)} files (documents are not signed)"
        click.echo(f"signed with the private key of {required.public_key}: {files}")
    if changed := changed_documents(bundle, manifest):
        words = ", ".join(f"{name} ({what})" for name, what in changed.items())
        echo(f"not compared, because no run reads them: {words}")
