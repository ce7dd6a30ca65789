"""A family that is never run without its <bos> has it in everything that is measured without a prefix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.progress import silent
from cushion_deploy.evaluate.chat import ChatPrompts
from cushion_deploy.modeling import sample
from cushion_deploy.modeling.teacher import Teacher
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.chat import ChatWindows
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore

BOS = 1
IDS = np.random.default_rng(4).integers(3, 320, (2, 20))


def expected(module: Any, before: tuple[int, ...], windows: IntArray = IDS) -> torch.Tensor:
    """Return transformers' own log probabilities of two windows behind some tokens."""
    ids = torch.cat([torch.tensor([before] * 2, dtype=torch.int64), torch.from_numpy(windows)], dim=1)
    with torch.inference_mode():
        return torch.log_softmax(module(input_ids=ids, use_cache=False).logits[:, len(before) : -1], -1)


@pytest.mark.parametrize(("variant", "before"), [("gemma2", (BOS,)), ("gemma3", (BOS,)), ("llama", ())])
def test_the_original_model_is_asked_behind_its_bos(
    variant: str, before: tuple[int, ...], load_variant: Any, oracle: Any
) -> None:
    model = load_variant(variant)
    assert model.bare_tokens == before
    teacher = Teacher(model)
    teacher.remember(IDS)
    torch.testing.assert_close(teacher.log_probabilities(IDS), expected(oracle(variant), before), atol=1e-4, rtol=1e-4)


def test_at_the_begin_of_a_chat_it_is_there_once(load_variant: Any, oracle: Any) -> None:
    model = load_variant("gemma2")
    chat = ChatWindows.of(Teacher(model), ChatPrompts(IDS, (BOS,)), silent)
    assert chat is not None
    p, q = expected(oracle("gemma2"), (BOS,), chat.ids), expected(oracle("gemma2"), (BOS, 7), chat.ids)
    # transformers lets sliding windows move past any token.
    prefix = replace(model.compute_prefix((BOS, 7)), slides=True)
    found = chat.compare(model, prefix, silent, "")
    divergences = np.concatenate([found.prompt.divergences, found.answer.divergences], axis=1)
    np.testing.assert_allclose(divergences, (p.exp() * (p - q)).sum(-1).numpy(), rtol=5e-3, atol=1e-5)


def test_text_is_drawn_behind_it(load_variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_variant("gemma2")
    monkeypatch.setattr(sample, "SAMPLES", 3)
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 4)
    seen: list[torch.Tensor] = []
    handle = model.decoder.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    sample.sample_text(model, 0)
    handle.remove()
    assert seen[0].shape == (3, 2)
    assert (seen[0][:, 0] == BOS).all()


@pytest.fixture
def pipeline(variant_folder: Any, tmp_path: Path) -> Pipeline:
    (tmp_path / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 12)
    (tmp_path / "eval.txt").write_text("When nothing else is worth attending to, a head attends to the first. " * 8)
    settings: dict[str, object] = {
        "model": str(variant_folder("gemma2")),
        "calibration.data": str(tmp_path / "calib.txt"),
        "evaluation.data": str(tmp_path / "eval.txt"),
        "calibration.windows": 2,
        "calibration.window": 48,
        "search.text_tokens": 48,
        "search.random_candidates": 2,
        "search.screen_candidates": 2,
        "search.gradient_candidates": 0,
        "search.max_length": 2,
        "evaluation.window": 48,
        "evaluation.max_tokens": 96,
    }
    return Pipeline.of(Recipe().merged(settings))


def test_a_search_begins_with_it_and_the_first_column_has_it(pipeline: Pipeline, oracle: Any, tmp_path: Path) -> None:
    run = Run(StageStore(tmp_path / "work"))
    assert pipeline.search is not None
    searched = run.get(pipeline.search)
    assert searched.prefix.token_ids[0] == BOS
    assert searched.trace.seed_tokens == (BOS,)
    found = run.get(pipeline.evaluation)["perplexity"]
    text = run.get(pipeline.model).encode(run.get(pipeline.evaluation_text).text)
    windows = torch.from_numpy(text[:96].reshape(2, 48))
    ids = torch.cat([torch.full((2, 1), BOS), windows], dim=1)
    with torch.inference_mode():
        scores = torch.log_softmax(oracle("gemma2")(input_ids=ids, use_cache=False).logits[:, 1:-1], -1)
    loss = -scores.gather(-1, windows[:, 1:, None]).mean()
    assert found["fp"] == pytest.approx(float(loss.exp()), rel=1e-3)
    assert found["divergence"]["fp"] == pytest.approx(0.0, abs=1e-6)
