"""`push`: put a bundle on the Hugging Face hub."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from cushion_deploy.cli.help import FILE, json_option, option, verb
from cushion_deploy.cli.terminal import echo
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.hub import is_hub_name
from cushion_deploy.store import read_manifest
from cushion_deploy.verbs.push import push_bundle


@verb("push", "push OUT org/name", "push OUT org/name --private")
@click.argument("bundle", type=FILE)
@click.argument("name")
@option("--private", heading="Network", is_flag=True, help="Make the repository private if it is created.")
@json_option()
def command(bundle: Path, name: str, private: bool, as_json: bool) -> None:
    """Upload BUNDLE to the Hugging Face hub as NAME (org/name), in one commit.

    BUNDLE is verified first. Log in with `hf auth login`, or set HF_TOKEN. `generate`, `chat`, `serve`, `verify`,
    `inspect`, `report`, `bench` and `parity` take NAME afterwards. Files that only an earlier bundle had are removed; a
    repository with other files and no bundle is refused.
    """
    if not is_hub_name(name):
        raise UsageError(f"'{name}' is not the name of a repository", hint="give org/name")
    model = str(read_manifest(bundle).recipe.get("model")) if bundle.is_dir() else ""
    if Path(model).is_absolute():
        echo(f"note: the recipe in the bundle names the path {model}, and others will read it", err=True)
    done = push_bundle(bundle, name, private=private)
    if as_json:
        click.echo(json.dumps(asdict(done)))
        return
    removed = f", {len(done.removed)} of an earlier bundle removed" if done.removed else ""
    click.echo(f"{name}: {len(done.uploaded)} files{removed}\n{done.url}")
