"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import re
from inspect import cleandoc

import click

from cushion_deploy.cli.main import VERBS, cli


def cell(text: str) -> str:
    """Return a text for a cell of a table, without anything that Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(text.split()))


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
    """Return the section of one command: usage, help, and a table of its options."""
    context = click.Context(cli, info_name="cushion-deploy")
    command = cli.get_command(context, verb)
    if command is None:
        raise ValueError(f"no command {verb}")
    own = click.Context(command, info_name=verb, parent=context)
    lines = [f"## {verb}", "", "```", command.get_usage(own).removeprefix("Usage: "), "```", "", prose(command.help or "")]
    records = [r for p in command.get_params(own) if isinstance(p, click.Option) and (r := p.get_help_record(own))]
    lines += ["", "| option | |", "| --- | --- |", *(f"| `{n.replace('|', '&#124;')}` | {cell(h)} |" for n, h in records)]
    return "\n".join(lines).replace("&#124;", "\\|")


def page() -> str:
    """Return the sections of all commands."""
    return "\n\n".join(section(verb) for verb in VERBS)
