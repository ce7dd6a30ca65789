"""One sequence while it is generated: chooses each token from logits, and cuts the text at characters and stops."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.runtime.generate import TextStream
from cushion_deploy.runtime.sampling import Sampler
from cushion_deploy.serve.request import Delivery, EndReason, SequenceRequest, SequenceUsage, TokenLogprob


class Sequence:
    """The state of a sequence that does not depend on how its logits are computed.

    Args:
        request: what to generate.
        tokenizer: tokenizer of the model.
        stop_ids: tokens that end a sequence; their text is not part of it.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, request: SequenceRequest, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        """Start before the first token."""
        self.request = request
        self.cached_tokens = 0
        self.new_ids: list[int] = []
        self._history = list(request.prompt_ids)
        self._biased = np.array(list(request.logit_bias), dtype=np.int64)
        self._bias = np.array(list(request.logit_bias.values()), dtype=np.float32)
        self._sampler = Sampler(request.sampling)
        self._stream = TextStream(tokenizer, request.prompt_ids, stop_ids, request.stop, request.max_new_tokens)

    @property
    def usage(self) -> SequenceUsage:
        """Token counts so far."""
        return SequenceUsage(len(self.request.prompt_ids), self.cached_tokens, len(self.new_ids))

    def advance(self, logits: FloatArray) -> Delivery:
        """Choose the next token.

        Args:
            logits: float32 ``[vocab]``.

        Raises:
            CheckFailed: a logit is NaN or infinite, or no token is allowed.
        """
        token = self._sampler.next(self._adjusted(logits), self._history)
        chosen = self._logprob(logits, token)
        self.new_ids.append(token)
        self._history.append(token)
        text, reason = self._stream.push(token)
        end: EndReason | None = reason
        constraint = self.request.constraint
        if reason in (None, "length") and constraint is not None and constraint.accept(token):
            text, end = text + self._stream.flush(), "eos"
        return Delivery(text, chosen, end, None if end is None else self.usage)

    def cut_off(self, end: EndReason) -> Delivery:
        """Return the last delivery of a sequence that ends between two tokens, with the text that was held back."""
        return Delivery(self._stream.flush(), None, end, self.usage)

    def _adjusted(self, logits: FloatArray) -> FloatArray:
        r = self.request
        penalized = (r.frequency_penalty or r.presence_penalty) and self.new_ids
        if penalized or r.logit_bias or r.constraint is not None:
            logits = logits.copy()
        if penalized:
            ids, counts = np.unique(np.array(self.new_ids), return_counts=True)
            logits[ids] -= (r.frequency_penalty * counts + r.presence_penalty).astype(logits.dtype)
        if r.logit_bias:
            logits[self._biased] += self._bias
        return r.constraint.forbid(logits) if r.constraint is not None else logits

    def _logprob(self, logits: FloatArray, token: int) -> TokenLogprob:
        wanted = self.request.top_logprobs
        if wanted is None:
            return TokenLogprob(token, 0.0)
        scores = logits.astype(np.float64)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        order = np.argsort(-scores, kind="stable")[:wanted]
        return TokenLogprob(token, float(scores[token]), tuple((int(i), float(scores[i])) for i in order))
