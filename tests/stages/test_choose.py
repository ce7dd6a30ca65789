"""What ships is what is closer to the original on held-out text, each candidate with remedies of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from one_run import OneRun

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.modeling.teacher import Fidelity, Teacher
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.choose import HELD_OUT, Judged, choose
from cushion_deploy.stages.windows import calibration_windows, held_out_windows

SETTINGS: dict[str, object] = {
    "engines": ["onnxruntime"],
    "search.text_tokens": 64,
    "search.random_candidates": 4,
    "search.screen_candidates": 4,
    "search.gradient_candidates": 0,
    "search.audit_tokens": 0,
    "calibration.windows": 4,
    "calibration.window": 64,
    "evaluation.window": 64,
    "evaluation.max_tokens": 64,
    "parity.tokens": 32,
    "parity.decode_tokens": 2,
}
MakeRun = Callable[..., OneRun]


@pytest.fixture
def one_run(planted_folder: Path, tmp_path: Path) -> MakeRun:
    """Return a function that makes a run of the model with a planted sink."""
    (tmp_path / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 40)
    (tmp_path / "eval.txt").write_text("When nothing else is worth attending to, a head attends to the first. " * 6)
    data = {"calibration.data": str(tmp_path / "calib.txt"), "evaluation.data": str(tmp_path / "eval.txt")}

    def make(**more: object) -> OneRun:
        changes = {name.replace("__", "."): value for name, value in more.items()}
        recipe = Recipe().merged({"model": str(planted_folder), **data, **SETTINGS, **changes})
        return OneRun.of(recipe, tmp_path / "work")

    return make


def scores(later: float, first: float = 0.0, loss: float = 3.0, noise: float = 0.0) -> Fidelity:
    """Return scores of 4 windows of 40 predictions with a divergence before and from position 16 on."""
    divergences = np.full((4, 40), later, np.float32)
    divergences[:, :16] = first
    divergences[:, 16:] += noise * np.tile([-1, 1], 48).reshape(4, 24)
    return Fidelity(np.full((4, 40), loss, np.float32), divergences)


@pytest.mark.parametrize(
    ("bare", "prefix", "shipped", "reason"),
    [
        (scores(0.02), scores(0.01), "with prefix", "divergence"),
        (scores(0.01), scores(0.02), "without prefix", "divergence"),
        # The first 16 positions, where the original has its sink, decide nothing.
        (scores(0.02, first=0.0), scores(0.01, first=5.0), "with prefix", "divergence"),
        # Closer than the standard error of the difference: 1 / sqrt(96).
        (scores(0.02), scores(0.01, noise=1.0, loss=2.9), "with prefix", "perplexity"),
        (scores(0.02), scores(0.01, noise=1.0, loss=3.1), "without prefix", "perplexity"),
        (scores(0.02), scores(0.02), "without prefix", "perplexity"),
        (scores(0.02), scores(np.nan, loss=np.nan), "without prefix", "perplexity"),
        (scores(np.nan, loss=np.nan), scores(0.02), "with prefix", "perplexity"),
    ],
)
def test_the_divergence_from_position_16_on_decides_and_then_the_perplexity(
    bare: Fidelity, prefix: Fidelity, shipped: str, reason: str
) -> None:
    found = choose({"without prefix": Judged(bare), "with prefix": Judged(prefix)})
    assert (found.shipped, found.reason, found.tokens) == (shipped, reason, 4 * 24)
    assert [each.name for each in found.candidates] == ["without prefix", "with prefix"]


def test_with_three_the_reason_is_that_of_the_winner() -> None:
    names = ("without prefix", "with the untuned prefix", "with prefix")
    three = (scores(0.02), scores(0.01), scores(0.005, noise=1.0, loss=3.1))
    found = choose(dict(zip(names, map(Judged, three), strict=True)))
    assert (found.shipped, found.reason) == ("with the untuned prefix", "divergence")
    found = choose(dict(zip(names, map(Judged, (scores(0.02), scores(0.01), scores(0.005))), strict=True)))
    assert (found.shipped, found.reason) == ("with prefix", "divergence")


@pytest.mark.parametrize(
    ("text", "answers", "shipped", "reason"),
    [
        # Text and answers count the same, however many tokens each has: (0.01 - 0.03) / 2 < 0 < (0.03 - 0.01) / 2.
        (0.01, 0.03, "without prefix", "divergence"),
        (0.03, 0.01, "with prefix", "divergence"),
    ],
)
def test_text_and_answers_count_the_same(text: float, answers: float, shipped: str, reason: str) -> None:
    def chat(divergence: float) -> Fidelity:
        return Fidelity(np.full((2, 5), 3.0, np.float32), np.full((2, 5), divergence, np.float32))

    bare, prefix = Judged(scores(0.02 + text), chat(0.05)), Judged(scores(0.02), chat(0.05 + answers))
    found = choose({"without prefix": bare, "with prefix": prefix})
    assert (found.shipped, found.reason, found.answer_tokens) == (shipped, reason, 10)
    assert found.candidates[1].answer == pytest.approx(0.05 + answers)


def test_the_noise_of_answers_is_that_of_their_means() -> None:
    bare = Judged(scores(0.02), Fidelity(np.full((2, 8), 3.0, np.float32), np.full((2, 8), 0.05, np.float32)))
    answers = np.full((2, 8), 0.05, np.float32)
    # The means differ by 0.02 +- 0.03 (two of them, 0.06 apart), which also is what half of both differs by: noise.
    answers[0] += 0.05
    answers[1] -= 0.01
    prefix = Judged(scores(0.02, loss=2.9), Fidelity(bare.text.losses[:2, :8], answers))
    assert choose({"without prefix": bare, "with prefix": prefix}).reason == "perplexity"
    # Far more chats with the same noise tell the difference.
    many = Fidelity(np.full((40, 8), 3.0, np.float32), np.tile(answers, (20, 1)))
    bare = Judged(scores(0.02), Fidelity(many.losses, np.full((40, 8), 0.05, np.float32)))
    found = choose({"without prefix": bare, "with prefix": Judged(scores(0.02, loss=2.9), many)})
    assert (found.shipped, found.reason) == ("without prefix", "divergence")


def test_the_search_does_not_depend_on_what_ships(one_run: MakeRun) -> None:
    auto, always = (one_run(search__ship=ship).pipeline for ship in ("auto", "always"))
    assert auto.search == always.search
    assert (auto.choice is None, always.choice is None) == (False, True)


def test_windows_of_17_tokens_and_fewer_are_judged_by_perplexity() -> None:
    short = [Fidelity(np.full((2, 10), loss, np.float32), np.zeros((2, 10), np.float32)) for loss in (3.0, 2.0)]
    found = choose({"without prefix": Judged(short[0]), "with prefix": Judged(short[1])})
    assert (found.shipped, found.reason, found.candidates[0].kl_after_16) == ("with prefix", "perplexity", None)


def numbered(spec: Any) -> Any:
    """Return a model whose tokens are the numbers in a text."""
    return SimpleNamespace(spec=spec, encode=lambda text: np.array(text.split(), dtype=np.int64))


@pytest.mark.parametrize(("documents", "shared"), [(60, False), (5, True)])
def test_nothing_is_observed_on_held_out_text_unless_there_is_no_other(
    tiny_model: Any, documents: int, shared: bool
) -> None:
    text = Corpus("numbers", tuple(" ".join(map(str, range(i * 1000, i * 1000 + 200))) for i in range(documents)))
    model = numbered(tiny_model.spec)
    ids, mask = calibration_windows(model, text, 20, 400)
    held_out = held_out_windows(model, text, 20, 400, HELD_OUT)
    # The tiny model has 256 positions, an eighth of which is left to a prefix: as few equal windows as these allow.
    assert held_out.shape == (min(8, documents), 200)
    longer = held_out_windows(numbered(replace(tiny_model.spec, max_positions=2048)), text, 20, 400, HELD_OUT)
    assert longer.shape == {60: (4, 400), 5: (2, 500)}[documents]
    assert bool(set(ids[mask > 0].tolist()) & set(held_out.ravel().tolist())) is shared


def test_a_build_ships_what_a_measurement_of_both_prefers(
    one_run: MakeRun, planted_folder: Path, tmp_path: Path
) -> None:
    chats = shutil.copytree(planted_folder, tmp_path / "chats")
    (chats / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}answer:")
    one = one_run(model=str(chats), search__ship="auto", search__seed_tokens=("a",), search__max_length=1)
    pipeline, run = one.pipeline, one.run
    report = one.build(tmp_path / "out")
    model = run.get(pipeline.model)
    windows = held_out_windows(
        model, run.get(pipeline.text), pipeline.recipe.calibration.windows, pipeline.recipe.calibration.window, HELD_OUT
    )
    teacher, kl = Teacher(model), {}
    teacher.remember(windows)
    for name, branch in (("without prefix", pipeline.bare), ("with prefix", pipeline.quantized)):
        q = run.get(branch.quantization)
        with simulated(model.folded(q.smoothing), q.scheme, q.scales):
            kl[name] = teacher.compare(model.folded(q.smoothing), q.prefix, windows).divergences[:, 16:].mean()
    assert report.choice is not None
    assert report.choice.reason == "divergence"
    answers = {each.name: each.answer for each in report.choice.candidates}
    both = {name: kl[name] + answer for name, answer in answers.items() if answer is not None}
    assert set(both) == set(kl)
    assert report.choice.shipped == min(both, key=lambda name: both[name])
    for each in report.choice.candidates:
        np.testing.assert_allclose(each.kl_after_16, kl[each.name], rtol=1e-5)
    length = 1 if report.choice.shipped == "with prefix" else 0
    assert json.loads((tmp_path / "out" / "export.json").read_text())["contract"]["prefix_length"] == length
    assert run.get(pipeline.shipped_quantization).prefix.length == length


@pytest.mark.parametrize("shipped", ["with prefix", "without prefix"])
def test_every_part_that_ships_belongs_to_the_chosen_one(
    one_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shipped: str
) -> None:
    def decided(found: dict[str, Judged]) -> Any:
        return replace(choose(found), shipped=shipped)

    monkeypatch.setattr("cushion_deploy.stages.choose.choose", decided)
    one = one_run(search__ship="auto", search__seed_tokens=("a",), search__max_length=1)
    report = one.build(tmp_path / "out")
    branch = one.pipeline.quantized if shipped == "with prefix" else one.pipeline.bare
    expected = one.run.get(branch.quantization)
    assert one.run.get(one.pipeline.shipped_quantization).digest == expected.digest
    scales = json.loads((tmp_path / "out" / "scales.json").read_text())
    assert scales["scales"] == dict(expected.static_scales.scales)
    assert report.calibration is not None
    amax = one.run.get(branch.calibration).amax
    assert {row.site: row.amax for row in report.calibration.sites} == amax
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    assert f"the quantized model ships {shipped}" in page
    assert all(row.passed for row in report.parity)
