"""Batches against each prompt alone, and padding against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from cushion_deploy.errors import UsageError
from cushion_deploy.runtime import SamplingParams, generate
from cushion_deploy.runtime.batch import generate_batch, padded

LENGTHS = (1, 17, 5, 40)


@pytest.fixture
def prompts(ids: Any) -> list[list[int]]:
    return [ids[0, 40 - n :].tolist() for n in LENGTHS]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 40, "seed": 7}, {"repetition_penalty": 1.2}])
def test_each_row_is_the_answer_to_its_prompt_alone(
    tiny: Any, tokenizer: Any, prompts: list[list[int]], options: dict[str, Any]
) -> None:
    params = SamplingParams(**options)
    rows = generate_batch(tiny.session(chunk=16), tokenizer, prompts, params, 20, stop_ids=[2], stop_strings=["an"])
    for row, prompt in zip(rows, prompts, strict=True):
        alone = list(generate(tiny.session(), tokenizer, prompt, params, 20, stop_ids=[2], stop_strings=["an"]))
        assert row.history == [*prompt, *(e.token_id for e in alone)]
        assert row.text == "".join(e.text for e in alone)
        assert (row.finish_reason, row.new_tokens) == (alone[-1].finish_reason, len(alone))


def test_a_row_that_has_ended_ends_no_other(tiny: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    alone = [[e.token_id for e in generate(tiny.session(), tokenizer, p, max_new_tokens=12)] for p in prompts]
    stop = alone[1][2]
    rows = generate_batch(tiny.session(), tokenizer, prompts, max_new_tokens=12, stop_ids=[stop])
    expected = [new[: new.index(stop) + 1] if stop in new else new for new in alone]
    assert [row.history[len(p) :] for row, p in zip(rows, prompts, strict=True)] == expected
    assert len(set(map(len, expected))) > 1


def test_padding_is_that_of_transformers(tokenizer: Any, prompts: list[list[int]]) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<unk>", padding_side="left")
    expected = reference.pad({"input_ids": prompts}, return_tensors="np")
    ids, mask = padded(prompts)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert ids.dtype == mask.dtype == np.int64


@pytest.mark.parametrize(
    ("prompts", "match"), [([], "has no prompt"), ([[5], []], "no token"), ([[5], [5] * 93], "93")]
)
def test_prompts_that_cannot_be_run_are_refused(tiny: Any, tokenizer: Any, prompts: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        generate_batch(tiny.session(), tokenizer, prompts, max_new_tokens=4)
