"""Options of the commands that compile for an engine, or choose several engines to run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from cushion_deploy.cli.help import option
from cushion_deploy.cli.options import DTYPES, default_of

F = TypeVar("F", bound=Callable[..., Any])

target_option = option(
    *("--target", "--targets", "targets"),
    heading="Engine",
    multiple=True,
    metavar="TARGETS",
    help="GPU architectures to compile TensorRT plans for, such as sm86, comma-separated. Repeatable.",
)

float_linears_option = option(
    "--allow-float-linears",
    heading="Engine",
    type=click.IntRange(min=0),
    default=0,
    help="Number of linears that an engine may leave in floating point.",
)


def split_targets(given: Sequence[str]) -> tuple[str, ...]:
    """Return the values of :data:`target_option` as single targets."""
    return tuple(target.strip() for text in given for target in text.split(",") if target.strip())


def dtype_option(
    flag: str, name: str, heading: str, help_text: str, *, default: str | None = None, fallback: str = ""
) -> Callable[[F], F]:
    """Return an option for the type of a graph, whose value is a type's long name, or ``auto`` with a fallback."""
    more = ["auto"] if fallback else []
    return option(
        *(flag, name),
        heading=heading,
        type=click.Choice([*more, *DTYPES, *DTYPES.values()]),
        metavar="|".join((*more, "fp16", "bf16", "fp32")),
        default=default,
        fallback=fallback,
        callback=lambda _, __, value: DTYPES.get(value, value),
        help=help_text,
    )


def engines_option(what: str, fallback: str) -> Callable[[F], F]:
    """Return an option for several engines, see :func:`names`."""
    return option(
        *("--engine", "engines"),
        heading="Engine",
        multiple=True,
        metavar="NAMES",
        fallback=fallback,
        help=f"{what}, comma-separated. Repeatable.",
    )


def plan_options(function: F) -> F:
    """Add the options of TensorRT plans, which default to the settings of the recipe: type, optimization profiles."""
    recipe = "from the recipe"
    for each in (
        option(
            "--max-prefill",
            heading="Engine",
            type=int,
            fallback=f"{recipe}, else {default_of('tensorrt.max_prefill')}",
            help="Largest number of prompt tokens per call of a TensorRT plan.",
        ),
        option(
            "--max-context",
            heading="Engine",
            type=int,
            fallback=f"{recipe}, else {default_of('tensorrt.max_context')}",
            help="Longest context of a TensorRT plan, in tokens without the prefix.",
        ),
        option(
            "--max-batch",
            heading="Engine",
            type=int,
            fallback=f"{recipe}, else {default_of('tensorrt.max_batch')}",
            help="Largest batch of a TensorRT plan.",
        ),
        dtype_option(
            *("--plan-dtype", "plan_dtype", "Engine"),
            "Floating-point type of TensorRT plans. auto is fp16 where the values measured on the calibration text "
            "fit, otherwise bf16.",
            fallback=f"{recipe}, else auto",
        ),
    ):
        function = each(function)
    return function
