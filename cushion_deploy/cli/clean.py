"""`clean`: remove the finished stages and partial results of a work folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cushion_deploy.cli.help import json_option, option, verb
from cushion_deploy.cli.options import work_dir_option
from cushion_deploy.store.clean import Removed, clean
from cushion_deploy.store.files import human_bytes


@verb("clean", "clean --dry-run", "clean --older-than 7")
@work_dir_option("Work folder to empty.")
@option(
    "--older-than",
    heading="Computation",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    fallback="all",
    help="Remove only stages that finished at least this many days ago.",
)
@option("--dry-run", heading="Output", is_flag=True, help="Remove nothing; show what would be removed.")
@json_option()
def command(work_dir: Path, older_than: float | None, dry_run: bool, as_json: bool) -> None:
    """Remove finished stages, partial results and leftovers from a work folder.

    Shows how much space is freed. Bundles are not touched; a later build runs the removed stages again.
    """
    removed = clean(work_dir, older_than=older_than, dry_run=dry_run)
    total = sum(row.bytes for row in removed)
    if as_json:
        rows = [row.to_json() for row in removed]
        click.echo(json.dumps({"work_dir": str(work_dir), "dry_run": dry_run, "bytes": total, "removed": rows}))
        return
    click.echo(f"{work_dir}: {'would free' if dry_run else 'freed'} {human_bytes(total)}")
    width = max((len(_name(row)) for row in removed), default=0)
    for row in removed:
        click.echo(f"  {_name(row):<{width}}  {row.folders:>4}  {human_bytes(row.bytes):>9}")


def _name(row: Removed) -> str:
    if row.kind == "leftover":
        return "leftovers of killed runs"
    return row.stage if row.kind == "finished" else f"{row.stage} (partial)"
