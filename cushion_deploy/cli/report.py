"""`report`: print the report of a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from cushion_deploy.cli.bundle_options import bundle_argument
from cushion_deploy.report import read_report, summary
from cushion_deploy.runtime.hub import local_bundle
from cushion_deploy.store import verify_bundle


@click.command("report")
@bundle_argument
@click.option("--json", "as_json", is_flag=True, help="Print report.json.")
def command(bundle: Path, as_json: bool) -> None:
    """Print the measurements of the build of BUNDLE. The full report is BUNDLE/report/report.html.

    BUNDLE is a folder, or org/name (or org/name@revision) of a bundle on the hub, which is fetched into its cache.
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
