"""Encoding of text for a model, with or without the tokenizer's beginning-of-sequence token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.bundle import Bundle
from cushion_deploy.runtime.chat import ChatTemplate, encode_prompt


@dataclass(frozen=True)
class Encoding:
    """How text is converted to token ids.

    Attributes:
        tokenizer: the model's tokenizer, with padding and truncation off.
        bos_token_id: None if the model has none.
        eos_token_ids: tokens that end a generation.
        keep_bos: False with a prefix, which replaces the beginning-of-sequence token.
        chat_template: None if the model has none.
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

    @classmethod
    def of_tokenizer(
        cls,
        tokenizer: Tokenizer,
        bos_token_id: int | None,
        spec: ModelSpec,
        *,
        keep_bos: bool = True,
        chat_template: ChatTemplate | None = None,
    ) -> Encoding:
        """Return the encoding of a model's own tokenizer, which may pad or truncate; ``tokenizer`` is not changed."""
        copy = Tokenizer.from_str(tokenizer.to_str())
        copy.no_padding()
        copy.no_truncation()
        return cls(copy, bos_token_id, spec.eos_token_ids, keep_bos, chat_template)

    @property
    def first_token_id(self) -> int:
        """Token used as context for a text without one: the beginning-of-sequence token, or else the end of sequence.

        Raises:
            UsageError: the model has neither.
        """
        if self.bos_token_id is not None:
            return self.bos_token_id
        if self.eos_token_ids:
            return self.eos_token_ids[0]
        raise UsageError(
            "the model has neither a beginning- nor an end-of-sequence token to use as an empty context",
            hint="score tasks whose contexts are not empty",
        )

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text at the start of a sequence."""
        return encode_prompt(self.tokenizer, text, self.bos_token_id, keep_bos=self.keep_bos)

    def plain(self, text: str) -> IntArray:
        """Return the ids of a text without special tokens, int64 ``[n]``."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
