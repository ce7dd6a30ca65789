"""Generation against transformers' own, and text piece by piece against text decoded at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cushion_deploy.errors import CheckFailed, UsageError
from cushion_deploy.modeling.past_key_values import new_cache
from cushion_deploy.runtime import SamplingParams, generate
from cushion_deploy.runtime.generate import Detokenizer, StopStrings

# U+FFFD is what unfinished bytes decode to; a text that ends in it is the one that is not told apart.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40)


class Script:
    """A session that wants these tokens next, whatever it is fed."""

    def __init__(self, contract: Any, tokens: list[int]) -> None:
        self.contract, self._tokens = contract, iter(tokens)
        self.fed: list[int] = []

    @property
    def length(self) -> int:
        return len(self.fed)

    def reset(self) -> None:
        self.fed = []

    def truncate(self, length: int) -> None:
        self.fed = self.fed[:length]

    def run(self, ids: Any, mask: Any = None, positions: Any = None, *, need_logits: str = "last") -> Any:
        self.fed += ids[0].tolist()
        logits = np.zeros((1, 1, self.contract.vocab_size), dtype=np.float32)
        logits[0, 0, next(self._tokens)] = 1
        return logits


@given(text=texts)
def test_pieces_joined_are_the_whole_text_and_never_half_a_character(any_tokenizer: Any, text: str) -> None:
    tokenizer = any_tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@given(before=texts, text=texts)
def test_pieces_continue_the_prompt(any_tokenizer: Any, before: str, text: str) -> None:
    tokenizer = any_tokenizer
    prompt = tokenizer.encode("x" + before + "x", add_special_tokens=False).ids
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer, prompt)
    whole = tokenizer.decode(prompt + ids)
    assert tokenizer.decode(prompt) + "".join(detokenizer.push(i) for i in ids) == whole


def test_each_piece_comes_as_soon_as_its_character_is_whole(fallback_tokenizer: Any) -> None:
    tokenizer = fallback_tokenizer
    ids = tokenizer.encode("a中b", add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(i) for i in ids][-5:] == ["a", "", "", "中", "b"]


def test_bytes_that_are_no_character_come_out_as_replacement_once_that_is_certain(fallback_tokenizer: Any) -> None:
    tokenizer = fallback_tokenizer
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x").ids)
    stray = tokenizer.token_to_id("<0xE4>")
    assert [detokenizer.push(i) for i in [stray, tokenizer.token_to_id("a")]] == ["", "\ufffda"]
    endless = [detokenizer.push(stray) for _ in range(600)]
    assert sum(map(len, endless)) > 300


@given(
    text=st.text("abc", max_size=30), stops=st.sets(st.text("abc", min_size=1, max_size=4), max_size=3), data=st.data()
)
def test_stop_string_ends_the_text_wherever_the_pieces_are_cut(text: str, stops: set[str], data: Any) -> None:
    matcher, shown, stopped, rest = StopStrings(stops), "", False, text
    while rest and not stopped:
        size = data.draw(st.integers(1, len(rest)))
        piece, stopped = matcher.push(rest[:size])
        shown, rest = shown + piece, rest[size:]
    if not stopped:
        shown += matcher.flush()
    # The stop string that is complete first decides, and among those the one that begins first.
    ends = [at + len(s) for s in stops if (at := text.find(s)) >= 0]
    assert stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert not any(s in shown for s in stops)
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(s) for s in stops)


@pytest.mark.parametrize("length", [1, 17, 40])
def test_greedy_tokens_equal_transformers_behind_the_prefix(tiny: Any, tokenizer: Any, ids: Any, length: int) -> None:
    prompt = ids[:, :length]
    module = tiny.loaded.module
    full = torch.from_numpy(np.concatenate([np.array([tiny.prefix.token_ids]), prompt], axis=1))
    expected = module.generate(
        full,
        attention_mask=torch.ones_like(full),
        past_key_values=new_cache(tiny.loaded.past(tiny.prefix), 1, keep=True),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )[0, full.shape[1] :]
    events = list(generate(tiny.session(chunk=16), tokenizer, prompt[0].tolist(), max_new_tokens=30))
    assert [e.token_id for e in events] == expected.tolist()
    assert len(set(expected.tolist())) > 5
    assert [e.finish_reason for e in events] == [None] * 29 + ["length"]
    usage = events[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.new_tokens) == (length, 30)
    assert usage.prefill_seconds > 0
    assert usage.decode_seconds > 0


def test_same_seed_same_tokens(session: Any, tokenizer: Any) -> None:
    def tokens(seed: int) -> list[int]:
        params = SamplingParams(temperature=2.0, top_k=50, seed=seed)
        return [e.token_id for e in generate(session, tokenizer, [5, 6, 7], params, 12)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_every_token_is_fed_once(tiny: Any, tokenizer: Any) -> None:
    script = Script(tiny.graph.contract, [11, 12, 13, 14])
    list(generate(script, tokenizer, [5, 6], max_new_tokens=4))
    assert script.fed == [5, 6, 11, 12, 13]


def test_stop_id_ends_without_its_text_and_flushes_what_was_held(tiny: Any, tokenizer: Any) -> None:
    words = tokenizer.encode("foxes", add_special_tokens=False).ids
    events = list(
        generate(
            Script(tiny.graph.contract, [*words, 2, 9]),
            tokenizer,
            [5],
            stop_ids=[2],
            stop_strings=["xes!"],
            max_new_tokens=20,
        )
    )
    assert "".join(e.text for e in events) == "foxes"
    assert [e.token_id for e in events] == [*words, 2]
    assert events[-1].finish_reason == "eos"


def test_stop_string_across_tokens_is_cut_out(tiny: Any, tokenizer: Any) -> None:
    words = tokenizer.encode("one two; three", add_special_tokens=False).ids
    events = list(
        generate(Script(tiny.graph.contract, words), tokenizer, [5], stop_strings=["wo; t", "zzz"], max_new_tokens=50)
    )
    assert "".join(e.text for e in events) == "one t"
    assert events[-1].finish_reason == "stop"
    assert len(events) < len(words)


def test_character_cut_off_by_the_length_is_dropped(tiny: Any, tokenizer: Any) -> None:
    words = tokenizer.encode("ab🦊", add_special_tokens=False).ids
    events = list(generate(Script(tiny.graph.contract, words), tokenizer, [5], max_new_tokens=len(words) - 1))
    assert "".join(e.text for e in events) == "ab"


def test_nan_logits_end_in_an_error(tiny: Any, tokenizer: Any) -> None:
    script = Script(tiny.graph.contract, [5])
    script.run = lambda *a, **k: np.full((1, 1, 384), np.nan, dtype=np.float32)  # type: ignore[method-assign]
    with pytest.raises(CheckFailed, match="NaN"):
        list(generate(script, tokenizer, [5], max_new_tokens=5))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "has no token"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([5] * 90, {"max_new_tokens": 4}, "90 prompt tokens and 4 new ones are more than the 93"),
        ([5], {"max_new_tokens": 5, "stop_strings": ["a", ""]}, "stop string is empty"),
    ],
)
def test_request_that_cannot_be_met_is_refused_at_the_call(
    tiny: Any, tokenizer: Any, prompt: list[int], options: dict[str, Any], message: str
) -> None:
    script = Script(tiny.graph.contract, [])
    with pytest.raises(UsageError, match=message):
        generate(script, tokenizer, prompt, **options)
    assert script.fed == []


def test_the_tokenizers_cut_characters(any_tokenizer: Any) -> None:
    assert any("\ufffd" in any_tokenizer.decode([i]) for i in any_tokenizer.encode("👩‍🚀").ids)
