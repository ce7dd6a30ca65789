"""How help is laid out: examples behind the description, options under headings, and every default shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

HEADINGS = (
    "Model",
    "Recipe",
    "Prefix",
    "Calibration",
    "Evaluation",
    "Tasks",
    "Checks",
    "Workload",
    "Generation",
    "Files of prompts",
    "Signature",
    "Network",
    "Security",
    "Limits",
    "Graph",
    "Engine",
    "Computation",
    "Output",
)
"""Headings of options, in the order in which help lists them."""
WIDTH = 100
"""Widest line of help, in a terminal that is at least as wide."""

FILE: Any = click.Path(path_type=Path)
"""Type of an option whose value is the path of a file or folder; what is there is examined by the command."""


class Option(click.Option):
    """An option under a heading, which shows its default.

    Args:
        heading: one of :data:`HEADINGS`.
        fallback: what holds where the option is not given, for an option whose value is then None; empty if nothing
            does.
    """

    def __init__(self, declarations: Sequence[str], *, heading: str, fallback: str = "", **attributes: Any) -> None:
        if heading not in HEADINGS:
            raise ValueError(f"unknown heading '{heading}'")
        plain_flag = bool(attributes.get("is_flag"))
        attributes.setdefault("show_default", fallback or (not plain_flag and attributes.get("default") is not None))
        super().__init__(declarations, **attributes)
        self.heading, self.fallback = heading, fallback
        if self.metavar is None and isinstance(self.type, click.types.IntParamType):
            self.metavar = "N"
        elif self.metavar is None and isinstance(self.type, click.types.FloatParamType):
            self.metavar = "VALUE"

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return names and help of the option; defaults and ranges as words."""
        record = super().get_help_record(ctx)
        if record is None:
            return None
        names, text = record
        # click puts a default that is a sentence into parentheses, and writes a range as a formula.
        if self.fallback:
            text = text.replace(f"[default: ({self.fallback})", f"[default: {self.fallback}")
        text = re.sub(r"; x>=\S+\]$|  \[x>=\S+\]$", lambda found: "]" if found[0].startswith(";") else "", text)
        text = re.sub(r"(\d+)<=x<=(\d+)\]$", r"\1 to \2]", text)
        return names, text


def option(*declarations: str, heading: str, fallback: str = "", **attributes: Any) -> Callable[[F], F]:
    """Return a decorator that adds an :class:`Option`; the other arguments are those of ``click.option``."""
    return click.option(*declarations, cls=Option, heading=heading, fallback=fallback, **attributes)


def output_option(metavar: str, what: str, *, default: Path | None = None) -> Callable[[F], F]:
    """Return a decorator that adds ``--output``, which is required if it has no default."""
    attributes: dict[str, Any] = {"required": True} if default is None else {"default": default}
    return option("--output", "-o", heading="Output", type=FILE, metavar=metavar, help=what, **attributes)


def json_option(what: str = "Print the result as JSON instead of text.") -> Callable[[F], F]:
    """Return a decorator that adds ``--json``."""
    return option("--json", "as_json", heading="Output", is_flag=True, help=what)


def by_heading(command: click.Command, ctx: click.Context) -> Mapping[str, list[tuple[str, str]]]:
    """Return names and help of the options of a command under their headings, in order; empty headings are left out."""
    found: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
        if record is not None:
            found[parameter.heading if isinstance(parameter, Option) else "Output"].append(record)
    found["Output"].sort(key=lambda record: "--output" not in record[0])
    return {heading: records for heading, records in found.items() if records}


class Command(click.Command):
    """A command whose help has examples, and its options under headings.

    Args:
        examples: command lines without the name of the program.
    """

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.examples = [f"cushion-deploy {line}" for line in examples]

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description, and the examples behind it."""
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        for heading, records in by_heading(self, ctx).items():
            with formatter.section(heading):
                formatter.write_dl(records)


def verb(name: str, *examples: str) -> Callable[[Callable[..., Any]], Command]:
    """Return a decorator that makes a :class:`Command` of a function.

    Args:
        examples: command lines without the name of the program.
    """
    return click.command(name, cls=Command, examples=examples)
