"""`verify`: verify every byte of a bundle against its manifest, and the signature against a public key."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cushion_deploy.cli.terminal import echo
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.hub import local_bundle
from cushion_deploy.store import BundleManifest, changed_documents, verify_bundle
from cushion_deploy.store.snapshot import SIGNATURE_NAME

IN_BUNDLE = ""
"""Value of ``--signature`` without a file."""


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--signature",
    metavar="[FILE]",
    is_flag=False,
    flag_value=IN_BUNDLE,
    help=f"Verify a signature too; without FILE, {SIGNATURE_NAME} in the bundle. Needs --public-key.",
)
@click.option("--public-key", type=click.Path(path_type=Path), help="Public key that the bundle must be signed with.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(bundle: Path, signature: str | None, public_key: Path | None, as_json: bool) -> None:
    """Verify that BUNDLE contains exactly the files in its manifest, byte for byte. Exit code 4 if it does not.

    BUNDLE is a folder, or org/name (or org/name@revision) of a bundle on the hub, which is fetched into its cache. A
    README, a licence and the files of git and the hub are named, and not compared.

    With --public-key, the signature that `sign` has written must be made with the private key that belongs to it, and
    be of exactly these files.
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
