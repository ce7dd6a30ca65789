"""Options of the commands that open an engine: which one, and on how many threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from cushion_deploy.cli.help import option
from cushion_deploy.engines.registry import ENGINES

F = TypeVar("F", bound=Callable[..., Any])


def engine_option(function: F) -> F:
    """Add ``--engine``, which defaults to ONNX Runtime on the CPU."""
    return option(
        "--engine",
        heading="Engine",
        metavar="NAME",
        default="onnxruntime",
        help=f"Engine to run on: {', '.join(ENGINES)}.",
    )(function)


def threads_option(function: F) -> F:
    """Add ``--threads``; more than the machine has CPUs is answered with a warning."""
    return option(
        "--threads",
        heading="Engine",
        type=click.IntRange(1),
        callback=_warned,
        fallback="one per physical core",
        help="CPU threads of an engine.",
    )(function)


def _warned(context: click.Context, parameter: click.Parameter, threads: int | None) -> int | None:
    """Return the number of threads, with a warning on stderr if there are more than CPUs."""
    cpus = os.cpu_count()
    if threads and cpus and threads > cpus:
        click.echo(f"warning: {threads} threads on {cpus} CPUs slow each other down; omit --threads", err=True)
    return threads
