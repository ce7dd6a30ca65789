"""The lm-eval adapter against lm-eval's own Hugging Face model, on the same model and the same tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from cushion_deploy.core.prefix import Prefix
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate.encoding import Encoding
from cushion_deploy.evaluate.scorer import Scorer
from cushion_deploy.evaluate.zeroshot import TaskSuite, run_tasks
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.session import TorchSession
from cushion_deploy.runtime.chat import ChatTemplate

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def ours(tiny_model: TorchRunner) -> Any:
    """Return our adapter over the torch model without a prefix."""
    from cushion_deploy.evaluate.lm_harness import ScorerLM

    tokenizer = Tokenizer.from_str(tiny_model.tokenizer.backend_tokenizer.to_str())
    encoding = Encoding(tokenizer, bos_token_id=1, eos_token_ids=(2,), keep_bos=True)
    return ScorerLM(Scorer(TorchSession(tiny_model, Prefix.empty(tiny_model.spec))), encoding)


@pytest.fixture
def theirs(tiny_model: TorchRunner) -> Any:
    """Return lm-eval's adapter over the same model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=tiny_model.module, tokenizer=tiny_model.tokenizer, batch_size=1, device="cpu")


def run(lm: Any, suite: TaskSuite, limit: int | None = None, chat: bool = False) -> Any:
    from lm_eval.evaluator import evaluate

    options = {"bootstrap_iters": 100, "log_samples": True, "apply_chat_template": chat}
    return evaluate(lm=lm, task_dict=suite.load(), limit=limit, **options)


def compare(ours: Any, theirs: Any, suite: TaskSuite, limit: int | None = None, chat: bool = False) -> None:
    """Check log likelihoods, greediness and every metric of every row."""
    found, wanted = run(ours, suite, limit, chat), run(theirs, suite, limit, chat)
    assert list(found["samples"]) == list(wanted["samples"])
    for name, rows in wanted["samples"].items():
        rows_found = found["samples"][name]
        assert len(rows_found) == len(rows)
        assert rows
        for a, b in zip(rows_found, rows, strict=True):
            assert a["doc_id"] == b["doc_id"]
            for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
                assert x[0] == pytest.approx(y[0], abs=1e-3)
                assert x[1] == y[1]
            assert [a[m] for m in a["metrics"]] == [pytest.approx(b[m], abs=1e-3) for m in b["metrics"]]
        assert found["results"][name]["acc,none"] == wanted["results"][name]["acc,none"]


def test_rows_score_as_under_lm_evals_own_model(ours: Any, theirs: Any, tiny_tasks: tuple[Path, Path]) -> None:
    compare(ours, theirs, TaskSuite([str(tiny_tasks[0])], tiny_tasks[1]))


def test_chats_score_as_under_lm_evals_own_model(ours: Any, theirs: Any, tiny_tasks: tuple[Path, Path]) -> None:
    tokenizer = theirs.tokenizer
    ours.encoding = replace(
        ours.encoding, chat_template=ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens_map)
    )
    suite = TaskSuite([str(tiny_tasks[0])], tiny_tasks[1])
    compare(ours, theirs, suite, chat=True)
    plain, chat = (run_tasks(ours, suite, chat=asked)[1].metrics["perplexity"].value for asked in (False, True))
    assert plain != pytest.approx(chat, rel=1e-3)


def test_a_model_without_a_template_cannot_chat(ours: Any, tiny_tasks: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        run_tasks(ours, TaskSuite([str(tiny_tasks[0])], tiny_tasks[1]), chat=True)


def test_the_seven_tasks_score_as_under_lm_evals_own_model(
    ours: Any, theirs: Any, seven_tasks: tuple[Path, Path]
) -> None:
    suite = TaskSuite([str(seven_tasks[0])], seven_tasks[1])
    compare(ours, theirs, suite, limit=2)
    scores = run_tasks(ours, suite, limit=2)
    assert len(scores) == 7
    assert {s.n for s in scores} == {2}


def test_standard_errors_are_lm_evals(ours: Any, tiny_tasks: tuple[Path, Path]) -> None:
    suite = TaskSuite([str(tiny_tasks[0])], tiny_tasks[1])
    wanted = run(ours, suite)["results"]
    for score in run_tasks(ours, suite):
        theirs = wanted[score.task]
        assert score.metric == "acc"
        assert score.n == 6
        assert score.value == theirs["acc,none"]
        # float32 here, float64 there.
        assert score.stderr == pytest.approx(theirs["acc_stderr,none"], rel=1e-5)
    perplexity = score.metrics["perplexity"]
    assert perplexity.value == pytest.approx(wanted["tiny_last_word"]["perplexity,none"])
    # Theirs is a bootstrap; here the derivative of exp times the error of the mean log likelihood.
    rows = np.array([row["perplexity"] for row in run(ours, suite)["samples"]["tiny_last_word"]])
    assert perplexity.stderr == pytest.approx(np.exp(-rows.mean()) * rows.std(ddof=1) / np.sqrt(6), rel=1e-4)


@pytest.mark.parametrize("length", [3, 700])
def test_whole_texts_are_cut_into_the_same_windows(ours: Any, theirs: Any, length: int) -> None:
    from lm_eval.api.instance import Instance

    text = " ".join(["the quick brown fox jumps over the lazy dog"] * 80)[:length]
    request = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    (wanted,) = theirs.loglikelihood_rolling(request, disable_tqdm=True)
    assert ours.loglikelihood_rolling(request) == [pytest.approx(wanted, rel=1e-5, abs=1e-3)]


def test_an_empty_context_is_the_beginning_of_sequence(ours: Any, theirs: Any) -> None:
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, ("", " the fox"), 0), Instance("loglikelihood", {}, ("  ", "dog"), 1)]
    for (found, _), (wanted, _) in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("until", [[], ["e"], " "])
def test_generation_is_that_of_lm_evals_own_model(ours: Any, theirs: Any, until: Any) -> None:
    from lm_eval.api.instance import Instance

    requests = [
        Instance("generate_until", {}, (text, {"until": until, "max_gen_toks": 12, "do_sample": False}), i)
        for i, text in enumerate(["the quick", "A head attends"])
    ]
    # Half a character that the length cuts off is not shown by ours.
    wanted = [text.rstrip("\ufffd") for text in theirs.generate_until(requests, disable_tqdm=True)]
    assert ours.generate_until(requests) == wanted
    # The cache that a generation leaves must not serve the next score.
    found = ours.loglikelihood([Instance("loglikelihood", {}, ("the quick", " fox"), 0)])[0][0]
    assert found == pytest.approx(
        theirs.loglikelihood([Instance("loglikelihood", {}, ("the quick", " fox"), 0)])[0][0], abs=1e-3
    )


def test_behind_a_prefix_no_beginning_of_sequence_is_fed(ours: Any) -> None:
    encoding = ours.encoding
    behind = Encoding(encoding.tokenizer, 1, (2,), keep_bos=False)
    assert ours.tok_encode("the fox") == [1, *behind.prompt("the fox")]
    assert ours.tok_encode("<s>the fox") == ours.tok_encode("the fox")
    assert ours.tok_encode("the fox", add_special_tokens=False) == behind.plain("the fox").tolist()


def test_lm_eval_knows_the_model_beside_its_own(ours: Any) -> None:
    from lm_eval.api.registry import get_model

    from cushion_deploy.evaluate.lm_harness import CushionLM

    assert get_model("cushion") is CushionLM
    assert get_model("dummy").__module__ == "lm_eval.models.dummy"
