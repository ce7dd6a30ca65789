"""Text through stdin and stdout: read as UTF-8, and printed without the characters that control a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

import click

from cushion_deploy.core.session import DecoderSession, remarks
from cushion_deploy.printable import controls_visible
from cushion_deploy.store.text_files import decode_utf8


def require_utf8(arguments: Sequence[str]) -> None:
    """Check that the arguments of the process are text.

    Raises:
        UsageError: one has bytes that are not UTF-8, which Python represents by halves of surrogate pairs.
    """
    for number, argument in enumerate(arguments, 1):
        _require_text(argument, f"argument {number}")


def read_stdin() -> str:
    """Return all of stdin; raises UsageError if it is not UTF-8."""
    return decode_utf8(sys.stdin.buffer.read(), "stdin").replace("\r\n", "\n")


def typed_line(prompt: str) -> str:
    """Return a line that is typed in the terminal.

    Raises:
        UsageError: it is not UTF-8.
        EOFError: Ctrl-D.
    """
    try:
        if not sys.stdout.isatty():  # what goes to a file or a pipe is the answers
            click.echo(prompt, nl=False, err=True)
            prompt = ""
        line = input(prompt)
    except UnicodeDecodeError as e:
        decode_utf8(e.object, "the line")
        raise
    _require_text(line, "the line")
    return line


def stdin_lines() -> Iterator[str]:
    """Yield the lines of stdin without their ends; raises UsageError at the first that is not UTF-8."""
    offset = 0
    for line in sys.stdin.buffer:
        yield decode_utf8(line, "stdin", offset=offset).rstrip("\r\n")
        offset += len(line)


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


def _require_text(text: str, name: str) -> None:
    """Refuse bytes that Python could not decode and kept as halves of surrogate pairs."""
    if any("\udc80" <= char <= "\udcff" for char in text):
        decode_utf8(os.fsencode(text), name)
