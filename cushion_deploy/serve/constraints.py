"""Grammars that an answer must match, through llguidance: JSON objects, JSON schemas and calls of tools."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.errors import CheckFailed, UsageError

TOOL_BEGIN, TOOL_END = "<tool_call>", "</tool_call>"
if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_ANY_OBJECT = {"type": "object"}
# A small model that may write any amount of white space can do so until its tokens are used up.
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[ \n]{0,4}"}


class GrammarConstraint:
    """The state of a grammar (implements ``Constraint``).

    Args:
        tokenizer: the vocabulary.
        grammar: a valid grammar of llguidance.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        """Start before the first token."""
        self._matcher = LLMatcher(tokenizer, grammar)

    def forbid(self, logits: FloatArray) -> FloatArray:
        """Return the logits with minus infinity for every token that the grammar does not allow.

        Raises:
            CheckFailed: the grammar is too complex for llguidance.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise self._failure()
        allowed = np.unpackbits(bits, bitorder="little", count=logits.size).astype(bool)
        masked: FloatArray = np.where(allowed, logits, np.float32(-np.inf))
        return masked

    def accept(self, token_id: int) -> bool:
        """Advance by an allowed token; return whether the text is complete and nothing may follow.

        Raises:
            CheckFailed: the grammar is too complex for llguidance.
        """
        if not self._matcher.consume_token(token_id) or self._matcher.is_error():
            raise self._failure()
        return bool(self._matcher.is_stopped())

    def _failure(self) -> CheckFailed:
        return CheckFailed(
            f"the grammar of the answer failed: {self._matcher.get_error().partition(chr(10))[0]:.200}",
            hint="simplify the schema",
        )


class Grammars:
    """Makes constraints for one vocabulary.

    Args:
        tokenizer: tokenizer of the model.
        vocab_size: size of the logits.
        end_ids: tokens that may end a complete text, at least one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        """Prepare; the vocabulary is read when the first grammar is checked, which takes about a second."""
        self._source, self._vocab_size, self._end_ids = tokenizer, vocab_size, list(end_ids)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def json_object(self) -> str:
        """Return the grammar of any JSON object."""
        return _json_grammar(_ANY_OBJECT)

    def json_schema(self, schema: Mapping[str, Any]) -> str:
        """Return the grammar of the values of a JSON schema."""
        return _json_grammar(schema)

    def tools(self, tools: Mapping[str, Mapping[str, Any]], *, required: bool, parallel: bool) -> str:
        """Return the grammar of an answer with calls of tools.

        Args:
            tools: JSON schema of the arguments of each tool, by name.
            required: the answer is one call or more, without other text.
            parallel: there may be several calls.
        """
        call = {"anyOf": [_call_schema(name, schema) for name, schema in tools.items()], "x-guidance": _JSON_OPTIONS}
        value = f"%json {json.dumps(call)}"
        begin, end = json.dumps(f"{TOOL_BEGIN}\n"), json.dumps(f"\n{TOOL_END}")
        if required:
            more = '("\\n" call)*' if parallel else ""
            return f"%llguidance {{}}\nstart: call {more}\ncall: {begin} {value} {end}\n"
        start = "tool* text" if parallel else "tool | text"
        return (
            f"%llguidance {{}}\nstart: {start}\ntext: TEXT\nTEXT: /(.|\\n)*/\n"
            f'opening[lazy]: TEXT "{TOOL_BEGIN}"\ntool: opening "\\n" {value} {end}\n'
        )

    def start(self, grammar: str, count: int = 1) -> list[GrammarConstraint]:
        """Check a grammar, and return so many constraints that begin with it.

        Raises:
            UsageError: the grammar or the schema in it is invalid or not supported, or the model names no end token.
        """
        if not self._end_ids:
            raise UsageError(
                "this model names no token that ends a text, so no grammar can end it",
                hint="add eos_token_id to its generation_config.json and build again",
            )
        tokenizer = self._read()
        problem = LLMatcher.validate_grammar(grammar, tokenizer)
        if problem and not problem.startswith("WARNING"):
            raise _bad_schema(problem)
        first = LLMatcher(tokenizer, grammar)
        first.compute_bitmask()
        if first.is_error():
            raise _bad_schema(f"nothing satisfies it ({first.get_error().partition(chr(10))[0]})")
        return [GrammarConstraint(tokenizer, grammar) for _ in range(count)]

    def _read(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(self._source.to_str(), n_vocab=self._vocab_size, eos_token=self._end_ids)
            return self._tokenizer


def _json_grammar(schema: Mapping[str, Any]) -> str:
    try:
        return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS))
    except (ValueError, RecursionError) as e:
        raise _bad_schema(str(e)) from e


def _bad_schema(problem: str) -> UsageError:
    return UsageError(f"the schema cannot be used: {problem:.300}", hint="simplify or correct it")


def _call_schema(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
