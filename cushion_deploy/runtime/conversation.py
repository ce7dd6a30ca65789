"""A conversation with a bundle: its messages, answers that are streamed into it, and a copy of it in a file."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cushion_deploy.core.session import context_limit
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.generate import TokenEvent, Usage
from cushion_deploy.runtime.sampling import SamplingParams
from cushion_deploy.runtime.text import TextGenerator
from cushion_deploy.store.files import disk_errors, replace_file


@dataclass
class Conversation:
    """Messages of a user and the answers of a model.

    What the last answer left in the cache of the session is kept as far as the next prompt begins with it.

    Attributes:
        generator: the bundle with its session.
        system: system message; None for the one that the chat template has, if any.
        params: sampling parameters; None for greedy decoding.
        max_new_tokens: most tokens of an answer; fewer where the model has no more positions.
        stop: texts that end an answer.
        draft: name of a draft, or None.
        turns: the messages, without the system message.
    """

    generator: TextGenerator
    system: str | None = None
    params: SamplingParams | None = None
    max_new_tokens: int = 512
    stop: Collection[str] = ()
    draft: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages, the system message first."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.turns]

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.turns.clear()

    def forget(self, messages: int) -> int:
        """Forget the oldest messages of the user with their answers; return how many, which may be fewer."""
        asked = [i for i, turn in enumerate(self.turns) if turn["role"] == "user"]
        count = min(max(messages, 0), len(asked))
        del self.turns[: asked[count] if count < len(asked) else len(self.turns)]
        return count

    def is_full(self, usage: Usage) -> bool:
        """Return whether an answer ended because the model has no more positions."""
        return usage.prompt_tokens + usage.new_tokens >= context_limit(self.generator.session.contract)

    def answer(self, text: str) -> Generator[TokenEvent, None, None]:
        """Yield the answer to a message as it is generated.

        Message and answer join the conversation when the answer has ended, or when the iterator is closed before: a
        part of an answer is what the user has read. If nothing was answered before, neither joins.

        Raises:
            UsageError: at the first event, if the model has no chat template or no positions for an answer.
        """
        asked = {"role": "user", "content": text}
        events = self._events([*self.messages, asked])
        said, ended = "", False
        try:
            for event in events:
                said, ended = said + event.text, event.finish_reason is not None
                yield event
        finally:
            if said or ended:
                self.turns += [asked, {"role": "assistant", "content": said}]

    def _events(self, messages: list[dict[str, Any]]) -> Iterator[TokenEvent]:
        limit, length = context_limit(self.generator.session.contract), len(self.generator.bundle.encode_chat(messages))
        if length >= limit:
            raise UsageError(
                f"the conversation has {length} tokens, and the model has positions for {limit} with an answer",
                hint="forget its oldest message with /forget or all of it with /reset, or send a shorter message",
            )
        return self.generator.stream_chat(
            messages,
            params=self.params,
            max_new_tokens=min(self.max_new_tokens, limit - length),
            stop=self.stop,
            draft=self.draft,
            reuse=True,
        )

    def save(self, path: Path) -> None:
        """Write the messages to a file, as one line that ``generate --input`` reads.

        Raises:
            UsageError: the file exists or cannot be written.
        """
        with disk_errors(path):
            if not path.absolute().parent.is_dir():
                raise UsageError(f"the folder of {path} does not exist", hint="create it first, or choose another file")
            if path.exists():
                raise UsageError(f"{path} exists", hint="choose another file, or remove it first")
            replace_file(path, json.dumps({"messages": self.messages}, ensure_ascii=False).encode() + b"\n")
