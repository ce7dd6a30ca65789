"""Generate for several prompts at once: left-padded rows in one batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.session import DecoderSession
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.generate import FinishReason, TextStream, check_request
from cushion_deploy.runtime.sampling import Sampler, SamplingParams


@dataclass
class Row:
    """One prompt of a batch, and its answer as far as it is generated.

    Attributes:
        history: token ids of the prompt and the answer.
        sampler: chooses tokens; its random numbers are those of the prompt alone.
        stream: turns tokens into text and ends the answer.
        text: the answer.
        new_tokens: tokens of the answer, including the one that ended it.
        finish_reason: None while it goes on.
    """

    history: list[int]
    sampler: Sampler
    stream: TextStream
    text: str = ""
    new_tokens: int = 0
    finish_reason: FinishReason | None = field(default=None)

    def take(self, logits: FloatArray) -> None:
        """Choose a token from logits, float32 ``[vocab]``; without effect on an answer that has ended."""
        if self.finish_reason is None:
            token = self.sampler.next(logits, self.history)
            self.history.append(token)
            self.new_tokens += 1
            text, self.finish_reason = self.stream.push(token)
            self.text += text


def generate_batch(
    session: DecoderSession,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    max_new_tokens: int = 128,
    *,
    stop_ids: Collection[int] = (),
    stop_strings: Collection[str] = (),
) -> list[Row]:
    """Return the answers to prompts, in their order.

    Prompts are padded on the left; padding is masked and takes no position. A row that has ended is fed on without
    effect until all have. The tokens are those of each prompt alone wherever logits do not depend on the other rows
    and on the padding.

    Args:
        session: decoder session; it is reset first.
        tokenizer: tokenizer of the model.
        prompts: token ids of each prompt, at least one.
        params: sampling parameters; None for greedy decoding. Every row begins with the same seed.
        max_new_tokens: most tokens to generate for each prompt, at least 1.
        stop_ids, stop_strings: see :func:`~cushion_deploy.runtime.generate`.

    Raises:
        UsageError: no prompt, an empty one, or one that is too long for the model.
        CheckFailed: a logit is NaN or infinite.
    """
    if not prompts:
        raise UsageError("the batch has no prompt", hint="give at least one")
    for prompt in prompts:
        check_request(session.contract, prompt, max_new_tokens)
    rows = [
        Row(
            list(prompt),
            Sampler(params or SamplingParams()),
            TextStream(tokenizer, prompt, stop_ids, stop_strings, max_new_tokens),
        )
        for prompt in prompts
    ]
    ids, mask = padded(prompts)
    session.reset()
    while True:
        logits = session.run(ids, mask, need_logits="last")
        if logits is None:
            raise TypeError("the session returned no logits for need_logits='last'")
        for row, last in zip(rows, logits[:, -1], strict=True):
            row.take(last)
        if all(row.finish_reason for row in rows):
            return rows
        ids = np.asarray([row.history[-1:] for row in rows], dtype=np.int64)
        mask = np.concatenate([mask, np.ones((len(rows), 1), dtype=np.int64)], axis=1)


def padded(prompts: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """Return prompts padded on the left to equal length, and their mask; both int64 ``[B, S]``."""
    width = max(map(len, prompts))
    # Any token will do for padding, because it is masked; 0 is in every vocabulary.
    ids, mask = np.zeros((len(prompts), width), dtype=np.int64), np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return ids, mask
