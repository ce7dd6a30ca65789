"""Print what a model wrote: in a terminal without the characters that control it."""

from __future__ import annotations

import sys

import click

# Everything of the categories C0 and C1 but tab and newline, and characters that change the direction of text.
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {0x09, 0x0A}
_VISIBLE = dict.fromkeys(_CONTROLS, "\ufffd")


def echo_generated(text: str) -> None:
    """Print a piece of generated text without a newline.

    In a terminal, control characters are replaced by U+FFFD: a model, which may come from the hub, must not move the
    cursor or change settings. Into a file or a pipe the text goes as it is.
    """
    click.echo(text.translate(_VISIBLE) if sys.stdout.isatty() else text, nl=False)
