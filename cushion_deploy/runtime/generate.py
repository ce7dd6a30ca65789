"""Generate token by token: prefill, decode, streamed text of whole characters, and stop conditions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from tokenizers import Tokenizer

from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.core.session import DecoderSession, context_limit
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.decoding import Decoding
from cushion_deploy.runtime.draft import Draft
from cushion_deploy.runtime.prompt_cache import PromptCache
from cushion_deploy.runtime.sampling import Sampler, SamplingParams

FinishReason = Literal["eos", "stop", "length"]
REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6
_LONGEST_HOLD = 256


@dataclass(frozen=True)
class Usage:
    """Token counts of a generation, and the seconds of wall time in engine and sampler.

    Attributes:
        prompt_tokens: tokens of the prompt.
        new_tokens: generated tokens, including the one that ended the text.
        prefill_seconds: until the first token.
        decode_seconds: from there on.
        cached_tokens: tokens of the prompt that were in the cache and not computed again.
        drafted_tokens: tokens that a draft guessed.
        accepted_tokens: tokens that it guessed right.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class TokenEvent:
    """One generated token.

    Attributes:
        token_id: the token.
        text: the text that became final with it; empty while a character or a stop string may be incomplete.
        finish_reason: only on the last event: ``eos`` (a stop id), ``stop`` (a stop string) or ``length``.
        usage: only on the last event.
    """

    token_id: int
    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Detokenizer:
    """Decodes a stream of token ids; the pieces concatenated are the text of all tokens decoded at once.

    A character whose bytes span tokens is held back until it is complete. Decoding depends on neighbouring tokens (a
    leading space is dropped only at the start), so each piece is cut from the text of a small window of tokens.

    Args:
        tokenizer: the tokenizer.
        context: token ids before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """Start after ``context``."""
        self._tokenizer = tokenizer
        self._window = list(context[-_CONTEXT_TOKENS:])
        self._fresh = len(self._window)
        self._emitted = len(self._decode().rstrip(REPLACEMENT))

    def push(self, token_id: int) -> str:
        """Return the text that became final with this token."""
        self._window.append(token_id)
        text = self._decode()
        stable = text.rstrip(REPLACEMENT)
        held = len(self._window) - self._fresh
        if stable != text and held > _LONGEST_HOLD:
            stable = text  # no character has that many tokens: these bytes are invalid
        if len(stable) <= self._emitted:
            return ""
        piece = stable[self._emitted :]
        self._emitted = len(stable)
        if stable == text:
            # All text is emitted: these tokens become the context of the next window.
            self._window = self._window[self._fresh :]
            self._fresh = len(self._window)
            self._emitted = len(self._decode())
        return piece

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, skip_special_tokens=True))


class StopStrings:
    """Holds back text that may be the start of a stop string.

    Args:
        strings: texts that end the generation and are not part of its text.

    Raises:
        UsageError: an empty string, which would match everywhere.
    """

    def __init__(self, strings: Collection[str]) -> None:
        """Start with no text held back."""
        if "" in strings:
            raise UsageError("a stop string is empty", hint="omit it to stop only at the end of the text")
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that became final, up to a stop string, and whether one was found."""
        self._held += text
        found = [at for s in self._strings if (at := self._held.find(s)) >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((self._overlap(s) for s in self._strings), default=0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain, False

    def flush(self) -> str:
        """Return the text held back."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, string: str) -> int:
        longest = min(len(string) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)


class TextStream:
    """The text of an answer, token by token, and the reason why it ends.

    Args:
        tokenizer, prompt_ids: what the text continues.
        stop_ids, stop_strings, max_new_tokens: see :func:`generate`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop_ids: Collection[int],
        stop_strings: Collection[str],
        max_new_tokens: int,
    ) -> None:
        """Start behind the prompt; raises UsageError if a stop string is empty."""
        self._detokenizer, self._stops = Detokenizer(tokenizer, prompt_ids), StopStrings(stop_strings)
        self._stop_ids, self._left = frozenset(stop_ids), max_new_tokens

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """Return the text that became final with a token, and why the answer ends with it, if it does."""
        self._left -= 1
        ended = token in self._stop_ids
        text, stopped = ("", False) if ended else self._stops.push(self._detokenizer.push(token))
        if stopped:
            return text, "stop"
        if ended or not self._left:
            return text + self._stops.flush(), "eos" if ended else "length"
        return text, None

    def flush(self) -> str:
        """Return the text that was held back, for an answer that ends for a reason of the caller."""
        return self._stops.flush()


def generate(
    session: DecoderSession,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    params: SamplingParams | None = None,
    max_new_tokens: int = 128,
    *,
    stop_ids: Collection[int] = (),
    stop_strings: Collection[str] = (),
    cache: PromptCache | None = None,
    draft: Draft | None = None,
) -> Iterator[TokenEvent]:
    """Yield one event per generated token; the last carries the finish reason and the usage.

    Without ``cache`` the session is reset first. Invalid arguments raise at the call, not at the first event. A
    character that the last token left incomplete is dropped.

    Args:
        session: decoder session.
        tokenizer: tokenizer of the model.
        prompt_ids: token ids of the prompt, at least one.
        params: sampling parameters; None for greedy decoding.
        max_new_tokens: most tokens to generate, at least 1.
        stop_ids: tokens that end the generation; their text is not emitted.
        stop_strings: texts that end the generation; neither they nor what follows is emitted.
        cache: the session with the tokens in its cache; those that the prompt begins with are not computed again.
        draft: guesses tokens that are then fed together; a new one for each generation.

    Raises:
        UsageError: an empty prompt, or a context longer than the model has positions for.
        CheckFailed: while iterating, if a logit is NaN or infinite.
    """
    check_request(session.contract, prompt_ids, max_new_tokens)
    sampler = Sampler(params or SamplingParams())
    stream = TextStream(tokenizer, prompt_ids, stop_ids, stop_strings, max_new_tokens)
    # An inner generator, so that the checks above run at the call and not at the first event.
    return _events(
        lambda: Decoding(cache or PromptCache(session), sampler, prompt_ids, draft),
        stream,
        len(prompt_ids),
        max_new_tokens,
    )


def check_request(contract: GraphContract, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    """Check that a prompt and its answer fit a model; raises UsageError if not, or if either is empty."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}", hint="ask for at least one token")
    if not prompt_ids:
        raise UsageError("the prompt has no token", hint="give a prompt that is not empty")
    limit = context_limit(contract)
    if len(prompt_ids) + max_new_tokens > limit:
        raise UsageError(
            f"{len(prompt_ids)} prompt tokens and {max_new_tokens} new ones are more than the {limit} that the model "
            "has positions for",
            hint=f"shorten the prompt, or ask for at most {max(limit - len(prompt_ids), 0)} new tokens",
        )


def _events(
    start: Callable[[], Decoding], stream: TextStream, prompt_tokens: int, max_new_tokens: int
) -> Iterator[TokenEvent]:
    decoding = start()
    began = perf_counter()
    token = decoding.first()
    prefill_seconds, decode_seconds = perf_counter() - began, 0.0
    for count in range(1, max_new_tokens + 1):
        text, reason = stream.push(token)
        if reason is not None:
            drafts = decoding.cached, decoding.drafted, decoding.accepted
            usage = Usage(prompt_tokens, count, prefill_seconds, decode_seconds, *drafts)
            yield TokenEvent(token, text, reason, usage)
            return
        yield TokenEvent(token, text)
        began = perf_counter()
        token = decoding.next(max_new_tokens - count)
        decode_seconds += perf_counter() - began
