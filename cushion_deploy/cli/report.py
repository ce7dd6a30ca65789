"""`report`: print the report of a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from cushion_deploy.cli.bundle_options import bundle_argument
from cushion_deploy.cli.help import json_option, verb
from cushion_deploy.report import read_report, summary
from cushion_deploy.runtime.hub import local_bundle
from cushion_deploy.store import verify_bundle


@verb("report", "report OUT", "report OUT --json > report.json")
@bundle_argument
@json_option("Print report.json instead of the summary.")
def command(bundle: Path, as_json: bool) -> None:
    """Show what the build of BUNDLE measured.

    BUNDLE is a folder, or org/name (or org/name@revision) of a bundle on the hub. The full report, with figures, is the
    page report/report.html in it.
    """
    bundle = local_bundle(bundle)
    verify_bundle(bundle)
    report = read_report(bundle / "report" / "report.json")
    if as_json:
        click.echo(report.to_text())
        return
    from rich.console import Console

    Console().print(summary(report))
    click.echo(f"\npage: {bundle / 'report' / 'report.html'}")
