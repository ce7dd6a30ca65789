"""Text to token ids the way a model is fed: with or without the tokenizer's own beginning-of-sequence token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.bundle import Bundle
from cushion_deploy.runtime.chat import ChatTemplate, encode_prompt


@dataclass(frozen=True)
class Encoding:
    """How text becomes ids.

    Attributes:
        tokenizer: of the model; padding and truncation off.
        bos_token_id: None where the model has none.
        eos_token_ids: tokens that end a generation.
        keep_bos: False behind a prefix, which has taken the place of the beginning-of-sequence token.
        chat_template: None for a model that was not trained to chat.
    """

    tokenizer: Tokenizer
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    keep_bos: bool
    chat_template: ChatTemplate | None = None

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Encoding:
        """Return the encoding that the runtime uses for a bundle."""
        return cls(bundle.tokenizer, bundle.bos_token_id, bundle.eos_token_ids, bundle.keep_bos, bundle.chat_template)

    @property
    def first_token_id(self) -> int:
        """The context of a text that has none: beginning, or else end of sequence; the first token needs something.

        Raises:
            UsageError: the model has neither.
        """
        if self.bos_token_id is not None:
            return self.bos_token_id
        if self.eos_token_ids:
            return self.eos_token_ids[0]
        raise UsageError(
            "the model has neither a beginning- nor an end-of-sequence token to put before an empty context",
            hint="score tasks whose contexts hold text",
        )

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text that begins a row."""
        return encode_prompt(self.tokenizer, text, self.bos_token_id, keep_bos=self.keep_bos)

    def plain(self, text: str) -> IntArray:
        """Return the ids of a text alone, int64 ``[n]``: no special token is added."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
