"""Text of the model itself: documents drawn for calibration without any data, and answers to prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection

import torch
from torch import Tensor

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.modeling.past_key_values import keys_values, reserved_cache
from cushion_deploy.modeling.runner import TorchRunner

STEPS_TIMED = 5
SAMPLES, SAMPLE_TOKENS = 32, 256
"""Documents, and tokens in each. A decode step takes little longer for many rows than for few."""


@torch.inference_mode()
def sample_text(model: TorchRunner, seed: int, progress: Progress = silent) -> tuple[str, ...]:
    """Return documents drawn from the model at temperature 1, the same ones for the same seed.

    The first token of each is drawn uniformly from the vocabulary, so that the documents differ in topic; rows of the
    embedding that no text is encoded to are never drawn. Random
    numbers come from a CPU generator on every device, so that a seed means the same numbers everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(SAMPLE_TOKENS, model.spec.max_positions - len(model.bare_tokens))
    drawn = torch.randint(len(model.vocabulary), (SAMPLES, 1), generator=generator)
    ids, padding = model.tensor(model.vocabulary)[model.tensor(drawn)], model.tensor(model.padding_tokens)
    new = torch.cat([ids.new_tensor([model.bare_tokens]).expand(SAMPLES, -1), ids], dim=1)
    cache = reserved_cache(model.spec.num_layers, len(model.bare_tokens) + length)
    for step in range(1, length):
        logits = model.module(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1]
        logits = logits.index_fill(-1, padding, -torch.inf)
        new = model.tensor(draw(model.host(logits), generator))
        ids = torch.cat([ids, new], dim=1)
        progress("sampling text", step + 1, length)
    return tuple(model.tokenizer.batch_decode(ids, skip_special_tokens=True))


@torch.inference_mode()
def answer_greedily(model: TorchRunner, ids: IntArray, count: int, barred: Collection[int] = ()) -> IntArray:
    """Return the most probable continuation of each row behind what precedes a text without a prefix.

    Args:
        model: the model, not quantized.
        ids: int64 ``[rows, length]``, at least one token each.
        count: number of tokens.
        barred: tokens that are never chosen, such as those that end an answer; nor are rows that are padding.

    Returns:
        int64 ``[rows, count]``.
    """
    past, new = model.past(model.no_prefix()), model.tensor(ids)
    found, never = [], model.tensor(sorted({*barred, *model.padding_tokens.tolist()})).long()
    for _ in range(count):
        output = model.run(new, past, head=False, keep_cache=True)
        past = keys_values(output.past_key_values, past.kept)
        logits = model.head_logits(output.last_hidden_state[:, -1])
        new = logits.index_fill(-1, never, -torch.inf).argmax(-1, keepdim=True)
        found.append(new)
    answers: IntArray = model.array(torch.cat(found, dim=1))
    return answers


@torch.inference_mode()
def step_seconds(model: TorchRunner, past: int) -> float:
    """Return the seconds of one decode step of :func:`sample_text` with about ``past`` positions in the cache."""
    spec = model.spec
    past = max(1, min(past, spec.max_positions - STEPS_TIMED))
    cache = reserved_cache(spec.num_layers, past + STEPS_TIMED)
    states = model.zeros(SAMPLES, spec.num_kv_heads, past, spec.head_dim)
    for layer in range(spec.num_layers):
        cache.update(states, states, layer)
    new, generator = model.zeros(SAMPLES, 1, dtype=torch.int64), torch.Generator()
    times = []
    for _ in range(STEPS_TIMED):
        begin = time.perf_counter()
        logits = model.module(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1]
        new = model.tensor(draw(model.host(logits), generator))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return one token of each row, int64 ``[rows, 1]``, from softmax(logits), ``[rows, vocab]`` on the CPU."""
    return torch.multinomial(torch.softmax(logits.float(), dim=-1), 1, generator=generator)
