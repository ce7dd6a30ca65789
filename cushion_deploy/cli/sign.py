"""`sign`: sign a bundle with a private key."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from cushion_deploy.errors import UsageError
from cushion_deploy.verbs.sign import sign_bundle

PASSWORD_VARIABLE = "CUSHION_KEY_PASSWORD"


@click.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), required=True, help="Private key: PEM, P-256, P-384 or P-521.")
@click.option(
    "--key-password-file",
    type=click.Path(path_type=Path),
    help=f"File with the password of an encrypted key. Default: the variable {PASSWORD_VARIABLE}.",
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Signature file; default: model.sig in the bundle."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was signed as JSON.")
def command(bundle: Path, key: Path, key_password_file: Path | None, output: Path | None, as_json: bool) -> None:
    """Verify BUNDLE and sign its files and its manifest with a private key, without any network.

    `verify BUNDLE --public-key public.pem` checks the signature. README.md and the other documents that no run reads
    are not signed, so that they can be edited. `push` puts the signature on the hub with the bundle.

    \b
    openssl ecparam -name prime256v1 -genkey -noout -out private.pem
    openssl ec -in private.pem -pubout -out public.pem
    """  # noqa: D301 - click reads \b as: do not wrap this paragraph
    done = sign_bundle(bundle, key, password=_password(key_password_file), output=output)
    if as_json:
        click.echo(json.dumps({"signature": str(done.signature), "manifest": done.digest, "files": list(done.files)}))
        return
    click.echo(f"{done.signature}: signature of {len(done.files)} files\nmanifest {done.digest}")


def _password(file: Path | None) -> bytes | None:
    if file is None:
        found = os.environ.get(PASSWORD_VARIABLE)
        return os.fsencode(found) if found else None
    try:
        return file.read_bytes().rstrip(b"\r\n")
    except OSError as e:
        raise UsageError(f"cannot read the password file {file}: {e.strerror}", hint="give a file with one line") from e
