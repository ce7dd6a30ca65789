"""Text in, text out: a bundle with a session of one of its engines."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cushion_deploy.core.session import DecoderSession
from cushion_deploy.errors import CheckFailed
from cushion_deploy.runtime.bundle import Bundle, open_bundle
from cushion_deploy.runtime.chat import Message
from cushion_deploy.runtime.draft import make_draft
from cushion_deploy.runtime.engine import open_engine
from cushion_deploy.runtime.generate import FinishReason, TokenEvent, Usage, generate
from cushion_deploy.runtime.prompt_cache import PromptCache
from cushion_deploy.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class Generation:
    """A finished generation: text, token ids (including the one that ended it), finish reason and usage."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True)
class TextGenerator:
    """A bundle with an open session; one generation at a time."""

    bundle: Bundle
    session: DecoderSession

    @cached_property
    def cache(self) -> PromptCache:
        """The tokens in the cache of the session."""
        return PromptCache(self.session)

    def close(self) -> None:
        """Free the memory of the engine; the generator cannot be used afterwards."""
        self.session.close()

    def stream(
        self,
        prompt: str,
        *,
        params: SamplingParams | None = None,
        max_new_tokens: int = 128,
        stop: Collection[str] = (),
        draft: str | None = None,
    ) -> Iterator[TokenEvent]:
        """Continue a plain text and yield events; see :func:`~cushion_deploy.runtime.generate`."""
        return self._run(self.bundle.encode_prompt(prompt), params, max_new_tokens, stop, draft)

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        params: SamplingParams | None = None,
        max_new_tokens: int = 128,
        stop: Collection[str] = (),
        draft: str | None = None,
        reuse: bool = False,
    ) -> Iterator[TokenEvent]:
        """Answer a conversation and yield events; raises UsageError if the model has no chat template.

        With ``reuse``, what the conversation and the cache of the last call have in common is not computed again.
        """
        return self._run(self.bundle.encode_chat(messages), params, max_new_tokens, stop, draft, reuse=reuse)

    def generate(
        self,
        prompt: str,
        *,
        params: SamplingParams | None = None,
        max_new_tokens: int = 128,
        stop: Collection[str] = (),
        draft: str | None = None,
    ) -> Generation:
        """Continue a plain text and return the whole generation."""
        return _collect(self.stream(prompt, params=params, max_new_tokens=max_new_tokens, stop=stop, draft=draft))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        params: SamplingParams | None = None,
        max_new_tokens: int = 128,
        stop: Collection[str] = (),
        draft: str | None = None,
    ) -> Generation:
        """Answer a conversation and return the whole generation."""
        return _collect(
            self.stream_chat(messages, params=params, max_new_tokens=max_new_tokens, stop=stop, draft=draft)
        )

    def _run(
        self,
        ids: Sequence[int],
        params: SamplingParams | None,
        max_new_tokens: int,
        stop: Collection[str],
        draft: str | None,
        *,
        reuse: bool = False,
    ) -> Iterator[TokenEvent]:
        if not reuse:
            self.cache.clear()
        return generate(
            self.session,
            self.bundle.tokenizer,
            ids,
            params,
            max_new_tokens,
            stop_ids=self.bundle.eos_token_ids,
            stop_strings=stop,
            cache=self.cache,
            draft=make_draft(draft),
        )


def load(path: Path | str, engine: str = "onnxruntime", threads: int | None = None) -> TextGenerator:
    """Verify a bundle, then open a session on one of its engines.

    Args:
        path: folder of the bundle.
        engine: a name in :data:`~cushion_deploy.engines.registry.ENGINES`.
        threads: threads of an engine on the CPU; None for one per physical core.

    Raises:
        UsageError: the path is not a folder, or the engine is unknown or not in the bundle.
        UntrustedArtifact: the bundle is damaged; no engine has read a byte of it then.
        MissingDependency: the library of the engine, or its GPU, is missing.
        CheckFailed: the plan was compiled for another library version or GPU.
    """
    bundle = open_bundle(path)
    return TextGenerator(bundle, open_engine(bundle, engine, threads))


def _collect(events: Iterator[TokenEvent]) -> Generation:
    seen = list(events)
    last = seen[-1]
    if last.finish_reason is None or last.usage is None:
        raise CheckFailed("the generation ended without a finish reason", hint="run it again")
    text, ids = "".join(e.text for e in seen), tuple(e.token_id for e in seen)
    return Generation(text, ids, last.finish_reason, last.usage)
