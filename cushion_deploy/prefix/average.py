"""The averaged sink: a first position that stands for any first token, instead of one found token.

Whatever its first token is, the original model turns it into its attention sink: what later tokens read there hardly
depends on the text. The keys and values of one found token still say which token it is, and a text behind them is
continued as if it had been written. Their mean over many first tokens says nothing but 'here the text begins'.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.modeling.past_key_values import KeysValues, keys_values
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.teacher import Teacher
from cushion_deploy.prefix.objective import Objective, score_prefix
from cushion_deploy.prefix.trace import Averaging, SinkState
from cushion_deploy.recipe import Search

logger = logging.getLogger(__name__)

WINDOWS, WINDOW = 4, 512
"""Windows of the calibration text, and tokens in each, on which both prefixes are compared with no prefix."""
ROWS = 1024
"""First tokens that run at once."""
SLACK = 1.25
"""The objective with the average, at most, in multiples of that with the token found. What is least visible takes no
attention, and leaves the sink to the text."""


def first_tokens(model: TorchRunner, corpus: IntArray, config: Search, seed: int) -> IntArray:
    """Return the tokens to average over, int64 ``[n]``: drawn from a text without replacement, and begins of chats.

    Where every chat begins with the beginning-of-sequence token, whose place the prefix takes, the mean has to stand
    for that token as well: it is the share ``search.average_chats`` of them.
    """
    count, begin = min(config.average_tokens, len(corpus)), chat_begin(model)
    chats = 0 if begin is None else round(config.average_chats * count)
    text = np.random.default_rng([seed, 0, 5]).choice(corpus, count - chats, replace=False)
    return np.concatenate([text, np.full(chats, begin or 0, dtype=np.int64)])


def chat_begin(model: TorchRunner) -> int | None:
    """Return the beginning-of-sequence token if the model's chat template begins with it; else None."""
    tokenizer = model.tokenizer
    if tokenizer.bos_token_id is None or not tokenizer.bos_token or not getattr(tokenizer, "chat_template", None):
        return None
    try:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except Exception as error:  # a template can raise anything, and jinja2 may be missing
        logger.debug("the chat template cannot be rendered: %s", error)
        return None
    return int(tokenizer.bos_token_id) if str(chat).startswith(str(tokenizer.bos_token)) else None


def average_first_position(
    model: TorchRunner,
    found: Prefix,
    corpus: IntArray,
    tokens: IntArray,
    *,
    objective: Objective = "error",
    bits: int = 8,
    progress: Progress = silent,
) -> tuple[Prefix, Averaging]:
    """Return a prefix with the averaged sink at its first position if that changes the model less, or the given one.

    It has to take the sink from the text as the found token does, by the objective of the search, and the unquantized
    model behind it has to be closer to the model without a prefix, by the divergence from position 16 on.

    Args:
        model: the model.
        found: the prefix, at least one token that the search chose itself.
        corpus: token ids int64 ``[n]`` that both are compared on.
        tokens: the first tokens to average over, int64 ``[count]``.
        objective, bits: what the search minimizes; see :func:`~cushion_deploy.prefix.objective.score_prefix`.
        progress: where to report progress.
    """
    averaged = averaged_sink(model, found, tokens, progress)
    windows = _windows(model, found, corpus)
    teacher = Teacher(model)
    teacher.remember(windows, progress)

    def state(prefix: Prefix, name: str) -> SinkState:
        later = teacher.compare(model, prefix, windows, progress, f"comparing with the original: {name}").later
        errors = [score_prefix(model, model.past(prefix), window, objective, bits=bits) for window in windows]
        return SinkState.of(later.divergence, max(errors) if objective == "max" else sum(errors))

    chats = int((tokens == chat_begin(model)).sum())
    trace = Averaging(len(tokens), chats, state(found, "found token"), state(averaged, "averaged"), SLACK)
    return (averaged if trace.kept else found), trace


@torch.inference_mode()
def averaged_sink(model: TorchRunner, found: Prefix, tokens: IntArray, progress: Progress = silent) -> Prefix:
    """Return a prefix whose first position has the mean keys and values of ``tokens`` as first tokens.

    The other tokens of the prefix are computed behind it. It keeps the token ids of ``found`` as its names.
    """
    totals: list[list[torch.Tensor]] = []
    for start in range(0, len(tokens), ROWS):
        rows = model.tensor(tokens[start : start + ROWS, None])
        cache = model.run(rows, KeysValues(), head=False, keep_cache=True).past_key_values
        layers = keys_values(cache).layers
        sums = [[part.sum(dim=0, keepdim=True, dtype=model.wide) for part in layer] for layer in layers]
        if totals:
            sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(totals, sums, strict=True)]
        totals = sums
        progress("averaging first tokens", min(start + ROWS, len(tokens)), len(tokens))
    first = [[(part / len(tokens)).to(model.dtype) for part in layer] for layer in totals]
    past = KeysValues([(keys, values) for keys, values in first], kept=1)
    if found.length > 1:
        rest = model.tensor([found.token_ids[1:]])
        past = keys_values(model.run(rest, past, head=False, keep_cache=True).past_key_values)
    keys, values = (_joined(model, part) for part in zip(*past.layers, strict=True))
    return Prefix(found.token_ids, keys, values, found.model_digest)


def positions_averaged(model: TorchRunner, found: Prefix, corpus: IntArray, tokens: IntArray) -> int:
    """Return the positions that :func:`average_first_position` runs: the mean, and five passes over the windows."""
    windows = _windows(model, found, corpus)
    return len(tokens) + 5 * int(windows.size)


def _windows(model: TorchRunner, found: Prefix, corpus: IntArray) -> IntArray:
    return _spread(corpus, min(WINDOW, model.spec.max_positions - found.length, len(corpus)))


def _joined(model: TorchRunner, layers: tuple[torch.Tensor, ...]) -> FloatArray:
    joined: FloatArray = model.array(torch.cat(layers).float())
    return joined


def _spread(corpus: IntArray, length: int) -> IntArray:
    """Return up to :data:`WINDOWS` windows, int64 ``[count, length]``, spread evenly over a text."""
    starts = np.unique(np.linspace(0, len(corpus) - length, WINDOWS).astype(int))
    return np.stack([corpus[start : start + length] for start in starts])
