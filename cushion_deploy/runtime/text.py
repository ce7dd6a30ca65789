"""Text in, text out: a bundle with a session of one of its engines."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cushion_deploy.core.session import DecoderSession
from cushion_deploy.errors import CheckFailed
from cushion_deploy.runtime.bundle import Bundle, open_bundle
from cushion_deploy.runtime.chat import Message, begin_as_text, encode_chat, encode_prompt
from cushion_deploy.runtime.engine import open_engine
from cushion_deploy.runtime.generate import FinishReason, TokenEvent, Usage, generate
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
    ) -> Iterator[TokenEvent]:
        """Continue a plain text and yield events; see :func:`~cushion_deploy.runtime.generate`."""
        return self._run(prompt_ids(self.bundle, prompt), params, max_new_tokens, stop)

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        params: SamplingParams | None = None,
        max_new_tokens: int = 128,
        stop: Collection[str] = (),
    ) -> Iterator[TokenEvent]:
        """Answer a conversation and yield events; raises UsageError if the model has no chat template."""
        return self._run(chat_ids(self.bundle, messages), params, max_new_tokens, stop)

    def generate(
        self,
        prompt: str,
        *,
        params: SamplingParams | None = None,
        max_new_tokens: int = 128,
        stop: Collection[str] = (),
    ) -> Generation:
        """Continue a plain text and return the whole generation."""
        return _collect(self.stream(prompt, params=params, max_new_tokens=max_new_tokens, stop=stop))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        params: SamplingParams | None = None,
        max_new_tokens: int = 128,
        stop: Collection[str] = (),
    ) -> Generation:
        """Answer a conversation and return the whole generation."""
        return _collect(self.stream_chat(messages, params=params, max_new_tokens=max_new_tokens, stop=stop))

    def _run(
        self, ids: Sequence[int], params: SamplingParams | None, max_new_tokens: int, stop: Collection[str]
    ) -> Iterator[TokenEvent]:
        return generate(
            self.session,
            self.bundle.tokenizer,
            ids,
            params,
            max_new_tokens,
            stop_ids=self.bundle.eos_token_ids,
            stop_strings=stop,
        )


def prompt_ids(bundle: Bundle, prompt: str) -> list[int]:
    """Return the token ids of a plain text as the bundle was calibrated for."""
    return encode_prompt(bundle.tokenizer, prompt, bundle.bos_token_id, keep_bos=bundle.keep_bos)


def chat_ids(bundle: Bundle, messages: Sequence[Message], **variables: Any) -> list[int]:
    """Return the token ids of a conversation in the model's chat template, up to where the answer begins.

    Args:
        bundle: the bundle.
        messages: the conversation.
        variables: further variables of the template, such as ``tools``.

    Raises:
        UsageError: the model has no chat template, or the template rejects the messages.
        MissingDependency: jinja2 is not installed.
    """
    rendered = bundle.require_chat_template().render(messages, **variables)
    ids = encode_chat(bundle.tokenizer, rendered, bundle.bos_token_id, keep_bos=bundle.keep_bos)
    return begin_as_text(bundle.tokenizer, ids, bundle.bos_token_id) if bundle.keep_bos else ids


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
