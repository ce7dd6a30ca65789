"""Print what a model wrote or a file says, without the characters that control a terminal."""

from __future__ import annotations

import sys

import click

from cushion_deploy.core.session import DecoderSession, remarks
from cushion_deploy.printable import controls_visible


def echo_generated(text: str) -> None:
    """Print a piece of generated text without a newline.

    In a terminal, control characters are replaced by visible symbols: a model, which may come from the hub, must not
    move the cursor or change settings. Into a file or a pipe the text goes as it is.
    """
    click.echo(controls_visible(text) if sys.stdout.isatty() else text, nl=False)


def echo(text: str, *, err: bool = False) -> None:
    """Print a line in which something comes from a file that is not trusted: a bundle, or an error about one."""
    click.echo(controls_visible(text), err=err)


def echo_remarks(engine: str, session: DecoderSession) -> None:
    """Print on stderr what a user should know of how an engine computes; nothing for most engines."""
    for remark in remarks(session):
        click.echo(f"[{engine}: {remark}]", err=True)
