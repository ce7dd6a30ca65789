"""`bench/load.py` against a server of a tiny bundle: nothing is lost or mixed up, and a wrong answer is found."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import bundle_path, hf_folder, tiny, tokenizer

from cushion_deploy.serve.api.token_text import TokenText

__all__ = ["bundle_path", "hf_folder", "tiny", "tokenizer"]
pytestmark = pytest.mark.parametrize("tiny", ["baked"], indirect=True)
BENCH = Path(__file__).parents[2] / "bench"
SAMPLE = (
    "--requests",
    "200",
    "--clients",
    "6",
    "--prompts",
    "24",
    "--longest",
    "90",
    "--leaving",
    "0.1",
    "--flat",
    "1",
)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("load")


def test_every_answer_is_that_of_its_prompt_while_clients_come_and_leave(load: Any, bundle_path: Path) -> None:
    result, problems = load.measure(load.arguments().parse_args([str(bundle_path), *SAMPLE]))
    assert not problems
    assert sum(result["answers"].values()) == 200
    assert set(result["answers"]) <= {"same", "rounding", "left"}
    assert result["answers"]["left"] > 5


def test_answers_of_other_prompts_and_shortened_ones_are_found(load: Any, bundle_path: Path) -> None:
    reference = load.Reference(bundle_path, 1, 90)
    cases = [case for case in reference.cases(24, 1) if case.path == "completions" and len(case.ids) > 3]
    texts = TokenText(reference.bundle.tokenizer)

    def answer(case: Any, count: int | None = None) -> Any:
        ids, scores = case.ids[:count], list(case.logprobs[:count])
        usage = {"prompt_tokens": len(case.prompt_ids), "completion_tokens": len(ids)}
        return load.Answer(case.text, case.finish, [texts.text_of(i) for i in ids], scores, usage)

    verdicts = [reference.judge(case, answer(case), 0.01) for case in cases]
    assert verdicts == ["same"] * len(cases)
    for case, other in pairwise(cases):
        mixed = answer(other)
        mixed.usage["prompt_tokens"] = len(case.prompt_ids)
        assert reference.judge(case, mixed, 0.01) not in ("same", "rounding")
        if case.finish == "length" and "stop" not in case.body:
            shortened = answer(case, -1)
            shortened.text = case.text[:-1]
            shortened.finish = "stop"
            assert "ends with" in reference.judge(case, shortened, 0.01)
