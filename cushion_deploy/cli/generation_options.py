"""Options of the commands that generate text, without the libraries that `options.py` needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from cushion_deploy.cli.help import option
from cushion_deploy.cli.session_options import engine_option, threads_option
from cushion_deploy.runtime.draft import DRAFTS
from cushion_deploy.runtime.sampling import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])


def generation_options(max_new_tokens: int) -> Callable[[F], F]:
    """Return the options for sampling, stop texts, drafts and the engine.

    Args:
        max_new_tokens: default of ``--max-new-tokens``.
    """
    options = [
        option(
            "--max-new-tokens",
            heading="Generation",
            type=int,
            default=max_new_tokens,
            help="Maximum number of tokens to generate.",
        ),
        option(
            "--temperature",
            heading="Generation",
            type=float,
            default=0.0,
            help="Sampling temperature; 0 always takes the most probable token.",
        ),
        option(
            "--top-k",
            heading="Generation",
            type=int,
            default=0,
            help="Sample from the K most probable tokens; 0 is all of them.",
            metavar="K",
        ),
        option(
            "--top-p",
            heading="Generation",
            type=float,
            default=1.0,
            help="Sample from the most probable tokens whose probabilities add up to this.",
        ),
        option(
            "--min-p",
            heading="Generation",
            type=float,
            default=0.0,
            help="Leave out tokens below this fraction of the highest probability.",
        ),
        option(
            "--repetition-penalty",
            heading="Generation",
            type=float,
            default=1.0,
            help="Above 1, tokens that occurred before are less probable.",
        ),
        option(
            "--seed",
            heading="Generation",
            type=int,
            fallback="a new one in every run",
            help="Seed of the sampling.",
        ),
        option(
            "--stop",
            heading="Generation",
            multiple=True,
            metavar="TEXT",
            help="Text that ends the generation. Repeatable.",
        ),
        option(
            "--draft",
            heading="Generation",
            metavar="|".join(DRAFTS),
            help="Guess several tokens and check them in one call. Faster where the answer repeats the prompt; the "
            "text is the same.",
        ),
        engine_option,
        threads_option,
    ]

    def decorate(function: F) -> F:
        for each in reversed(options):
            function = each(function)
        return function

    return decorate


def make_params(values: dict[str, Any]) -> SamplingParams:
    """Return the sampling parameters of :func:`generation_options`; raises UsageError for a value out of range."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return SamplingParams(**{name: values[name] for name in names})
