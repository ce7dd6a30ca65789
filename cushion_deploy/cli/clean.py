"""`clean`: remove the finished stages and partial results of a work folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cushion_deploy.cli.options import WORK_DIR
from cushion_deploy.store.clean import Removed, clean
from cushion_deploy.store.files import human_bytes


@click.command("clean")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default=WORK_DIR,
    show_default=True,
    help="Work folder to empty.",
)
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Remove only stages that were written at least DAYS days ago.",
)
@click.option("--dry-run", is_flag=True, help="Remove nothing; show what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(work_dir: Path, older_than: float | None, dry_run: bool, as_json: bool) -> None:
    """Remove the finished stages, partial results and leftovers of a work folder, and show how much space that freed.

    Bundles are not touched. A later build runs the removed stages again.
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
