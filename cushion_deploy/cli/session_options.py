"""Options of the commands that open an engine: which one, and on how many threads."""

from __future__ import annotations

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
    """Add ``--threads``."""
    return option(
        "--threads",
        heading="Engine",
        type=click.IntRange(1),
        fallback="one per physical core",
        help="CPU threads of an engine.",
    )(function)
