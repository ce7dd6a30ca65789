"""`sign`: sign a bundle with a private key."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from cushion_deploy.cli.help import FILE, json_option, option, verb
from cushion_deploy.errors import UsageError
from cushion_deploy.verbs.sign import sign_bundle

PASSWORD_VARIABLE = "CUSHION_KEY_PASSWORD"


@verb(
    "sign",
    "sign OUT --key private.pem",
    "verify OUT --signature --public-key public.pem",
)
@click.argument("bundle", type=FILE)
@option(
    "--key",
    heading="Signature",
    type=FILE,
    metavar="FILE",
    required=True,
    help="Private key in PEM format, of the curve P-256, P-384 or P-521.",
)
@option(
    "--key-password-file",
    heading="Signature",
    type=FILE,
    metavar="FILE",
    fallback=f"the variable {PASSWORD_VARIABLE}",
    help="File with the password of an encrypted key.",
)
@option(
    *("--output", "-o"),
    heading="Output",
    type=FILE,
    metavar="FILE",
    fallback="model.sig in the bundle",
    help="Signature file to write.",
)
@json_option()
def command(bundle: Path, key: Path, key_password_file: Path | None, output: Path | None, as_json: bool) -> None:
    """Sign the files and the manifest of BUNDLE with a private key, without a network.

    BUNDLE is verified first. Documents that no run reads, such as README.md, are not signed, so that they can be
    edited. `push` uploads the signature together with the bundle. To make a pair of keys:

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
