"""Options of the commands that generate text, without the libraries that `options.py` needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.runtime.draft import DRAFTS
from cushion_deploy.runtime.sampling import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])


def generation_options(max_new_tokens: int) -> Callable[[F], F]:
    """Return the options for sampling, stop texts, drafts and the engine.

    Args:
        max_new_tokens: default of ``--max-new-tokens``.
    """
    options = [
        click.option(
            "--max-new-tokens",
            type=int,
            default=max_new_tokens,
            show_default=True,
            help="Maximum number of tokens to generate.",
        ),
        click.option(
            "--temperature",
            type=float,
            default=0.0,
            show_default=True,
            help="Sampling temperature; 0 for greedy decoding.",
        ),
        click.option(
            "--top-k", type=int, default=0, show_default=True, help="Sample from the k most probable tokens; 0 for all."
        ),
        click.option(
            "--top-p",
            type=float,
            default=1.0,
            show_default=True,
            help="Sample from the most probable tokens whose probabilities sum to this value.",
        ),
        click.option(
            "--min-p",
            type=float,
            default=0.0,
            show_default=True,
            help="Drop tokens below this fraction of the highest probability.",
        ),
        click.option(
            "--repetition-penalty",
            type=float,
            default=1.0,
            show_default=True,
            help="Values above 1 make tokens that have already occurred less probable.",
        ),
        click.option("--seed", type=int, help="Random seed."),
        click.option("--stop", multiple=True, help="Text that ends the generation; repeatable."),
        click.option(
            "--draft",
            metavar="NAME",
            help=f"Guess tokens ahead and check them in one call; the text stays the same: {', '.join(DRAFTS)}.",
        ),
        click.option(
            "--engine", default="onnxruntime", show_default=True, help=f"Engine to run on: {', '.join(ENGINES)}."
        ),
        click.option("--threads", type=int, help="Threads of an engine on the CPU. Default: one per physical core."),
    ]

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def make_params(values: dict[str, Any]) -> SamplingParams:
    """Return the sampling parameters of :func:`generation_options`; raises UsageError for a value out of range."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return SamplingParams(**{name: values[name] for name in names})
