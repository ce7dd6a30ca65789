"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import html
import re
from inspect import cleandoc

import click

from cushion_deploy.cli.help import Command, by_heading
from cushion_deploy.cli.main import VERBS, cli

_CODE = re.compile(r"(?::\w+:)?(`+)~?(.+?)\1")


def code(text: str) -> str:
    """Return a text as code, also within a table."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def cell(text: str) -> str:
    """Return a text for a cell of a table: code as code, and nothing else that Markdown or HTML would interpret."""
    pieces, end, text = [], 0, " ".join(text.split())
    for found in _CODE.finditer(text):
        pieces += [plain(text[end : found.start()]), code(found[2])]
        end = found.end()
    return "".join([*pieces, plain(text[end:])])


def plain(text: str) -> str:
    """Return a text with what Markdown or HTML would interpret escaped."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)


def prose(text: str) -> str:
    """Return a docstring as Markdown: its paragraphs, and preformatted ones as code."""
    paragraphs = []
    for paragraph in cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            paragraphs.append("```\n" + paragraph.lstrip("\b\n") + "\n```")
        else:
            paragraphs.append(cell(paragraph))
    return "\n\n".join(paragraphs)


def section(verb: str) -> str:
    """Return the section of one command: usage, help, examples, and a table of its options for each heading."""
    context = click.Context(cli, info_name="cushion-deploy")
    command = cli.get_command(context, verb)
    if command is None:
        raise ValueError(f"no command {verb}")
    own = click.Context(command, info_name=verb, parent=context)
    lines = [
        f"## {verb}",
        "",
        "```",
        command.get_usage(own).removeprefix("Usage: "),
        "```",
        "",
        prose(command.help or ""),
    ]
    if isinstance(command, Command) and command.examples:
        lines += ["", "```", *command.examples, "```"]
    lines += ["", '<div class="options" markdown>']
    for heading, records in by_heading(command, own).items():
        lines += ["", f"| {heading} | |", "| --- | --- |", *(f"| {code(n)} | {cell(h)} |" for n, h in records)]
    return "\n".join([*lines, "", "</div>"])


def page() -> str:
    """Return the sections of all commands."""
    return "\n\n".join(section(verb) for verb in VERBS)
