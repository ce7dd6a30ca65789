"""A whole study of a tiny model: its numbers against transformers and numpy, and going on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.schemes import parse_scheme
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix.trace import SearchTrace
from cushion_deploy.recipe import ROTATIONS, Search
from cushion_deploy.study.cells import Cells, Variant
from cushion_deploy.study.document import PARTS, Score, Study
from cushion_deploy.study.run import NO_PREFIX, choose_parts, run_study
from cushion_deploy.study.statements import introduction

WINDOW, WINDOWS = 48, 2
NO_TASKS = "no task was given"
# Classes of conftest.py, which tests cannot import.
Desk = Any
Whole = Any
Array = npt.NDArray[np.float64]


class Oracle:
    """The planted model straight from transformers; the prefix is simply put before the text."""

    def __init__(self, folder: Path, text: str) -> None:
        self.module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        ids = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), add_special_tokens=False)["input_ids"]
        self.windows = np.array(ids[: WINDOW * WINDOWS]).reshape(WINDOWS, WINDOW)

    def run(self, row: Any, prefix: tuple[int, ...]) -> Any:
        ids = torch.tensor([[*prefix, *row.tolist()]])
        with torch.no_grad():
            return self.module(ids, output_hidden_states=True, output_attentions=True)

    def log_probabilities(self, row: Any, prefix: tuple[int, ...]) -> Array:
        logits = self.run(row, prefix).logits[0, len(prefix) :].double().numpy()
        shifted = logits - logits.max(-1, keepdims=True)
        found: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return found[:-1]


@pytest.fixture(scope="module")
def oracle(desk: Desk) -> Oracle:
    """Return the oracle on the first text."""
    return Oracle(desk.model, desk.texts[0])


def test_every_part_is_there_and_what_is_missing_has_its_reason(whole: Whole) -> None:
    study = whole.study
    assert {part for part in PARTS if getattr(study, part) is None} == {"table2"}
    assert study.left_out == {"table2": NO_TASKS}
    assert study.prefix.token_ids
    assert [text.name for text in study.texts] == ["first.txt", "second.txt"]
    assert [(text.window, text.tokens) for text in study.texts] == [(WINDOW, WINDOWS * (WINDOW - 1))] * 2
    tokenizer = whole.cells.run.get(whole.cells.pipeline.model).tokenizer
    texts = [Path(str(text)).read_text() for text in whole.cells.texts]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert [text.text_tokens for text in study.texts] == lengths


def test_float_perplexity_and_divergence_are_those_of_transformers(whole: Whole, oracle: Oracle) -> None:
    prefix = whole.study.prefix.token_ids
    losses, apart = [], []
    for row in oracle.windows:
        teacher, student = oracle.log_probabilities(row, ()), oracle.log_probabilities(row, prefix)
        losses.append(-np.take_along_axis(student, row[1:, None], -1))
        apart.append((np.exp(teacher) * (teacher - student)).sum(-1))
    loss = np.concatenate(losses)
    found = whole.study.fp_prefix[0]
    assert found.perplexity == pytest.approx(np.exp(loss.mean()), rel=1e-4)
    assert found.divergence == pytest.approx(np.mean(apart), rel=1e-3)
    later = np.stack(apart)[:, 16:]
    assert found.kl_after_16 == pytest.approx(later.mean(), rel=1e-3)
    assert found.kl_after_16_stderr == pytest.approx(later.std(ddof=1) / np.sqrt(later.size), rel=1e-3)
    assert found.stderr == pytest.approx(np.exp(loss.mean()) * loss.std(ddof=1) / np.sqrt(loss.size), rel=1e-3)


def test_the_original_model_does_not_diverge_from_itself(whole: Whole) -> None:
    assert [score.divergence for score in whole.study.fp] == pytest.approx([0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("behind", [False, True])
def test_table_5_is_the_mean_of_order_statistics_over_windows(whole: Whole, oracle: Oracle, behind: bool) -> None:
    prefix = whole.study.prefix.token_ids if behind else ()
    rows = []
    for row in oracle.windows:
        entering = oracle.run(row, prefix).hidden_states[-2][0, len(prefix) :].abs().numpy()
        rows.append([entering.max(), np.percentile(entering, 90), np.percentile(entering, 50)])
    table = whole.study.table5
    assert table is not None
    assert table.with_prefix is not None
    found = table.with_prefix if behind else table.without
    assert [found.top1, found.top10, found.median] == pytest.approx(np.mean(rows, axis=0), rel=1e-4)
    assert (table.windows, table.length) == (WINDOWS, WINDOW)


@pytest.mark.parametrize("behind", [False, True])
def test_figure_3_is_attention_averaged_over_heads_and_askers(whole: Whole, oracle: Oracle, behind: bool) -> None:
    prefix = whole.study.prefix.token_ids if behind else ()
    p = len(prefix)
    figure = whole.study.figure3
    assert figure is not None
    found = figure.with_prefix if behind else figure.without
    attentions = oracle.run(oracle.windows[0], prefix).attentions
    assert len(found) == len(attentions)
    for layer, weights in zip(found, attentions, strict=True):
        mass = weights[0].numpy()[:, p + 1 :].mean(axis=(0, 1))
        expected = [mass[:p].sum(), mass[p], mass[p + 1 :].sum()]
        assert [layer.prefix, layer.first, layer.rest] == pytest.approx(expected, abs=1e-5)


def test_the_model_computes_attention_as_before(whole: Whole) -> None:
    assert whole.cells.run.get(whole.cells.pipeline.model).module.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("behind", [False, True])
def test_figure_2_is_the_largest_of_every_layer_on_the_first_window(whole: Whole, oracle: Oracle, behind: bool) -> None:
    prefix = whole.study.prefix.token_ids if behind else ()
    figure = whole.study.figure2
    assert figure is not None
    found = figure.with_prefix if behind else figure.without
    # transformers puts the final norm behind the last layer's output, so that layer is left out here.
    hidden = oracle.run(oracle.windows[0], prefix).hidden_states[1:-1]
    assert len(found) == len(hidden) + 1
    for layer, states in zip(found, hidden, strict=False):
        top = np.sort(states[0, len(prefix) :].abs().numpy(), axis=None)[::-1][:3]
        assert [layer.top1, layer.top2, layer.top3] == pytest.approx(top.tolist(), rel=1e-4)


def test_four_bits_are_further_from_the_original_than_six(whole: Whole) -> None:
    rows = {pair.scheme: pair for pair in whole.study.table4 or ()}
    apart = {name: [score.divergence or 0.0 for score in pair.without] for name, pair in rows.items()}
    names = [next(n for n in apart if str(n).startswith(bits) and "smooth" not in str(n)) for bits in ("w6", "w4")]
    assert all(six < four for six, four in zip(apart[names[0]], apart[names[1]], strict=True))


def test_rows_of_fewer_bits_are_behind_a_prefix_searched_with_their_bits(
    desk: Desk, oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FindsItsBits:
        """A search that finds the token whose id is the number of bits."""

        def __init__(self, model: TorchRunner, ids: Any, config: Search, *rest: Any) -> None:
            self.model, self.bits = model, config.bits

        def run(self) -> tuple[Prefix, SearchTrace]:
            trace = SearchTrace("screen", "error", (), (self.bits,), (f"<{self.bits}>",), bits=self.bits)
            return self.model.compute_prefix((self.bits,)), trace

    monkeypatch.setattr("cushion_deploy.prefix.search.PrefixSearch", FindsItsBits)
    cells = desk.cells(tmp_path, desk.texts[:1])
    study = run_study(cells, ("table1", "table4"), "")
    assert study.prefix.token_ids == (8,)
    assert all(pair.prefix is None and not pair.fp_prefix for pair in study.table1 or ())
    rows = {pair.label: pair for pair in study.table4 or ()}
    assert [pair.prefix.tokens for pair in rows.values() if pair.prefix] == [
        ("<6>",),
        ("<6>",),
        ("<4>",),
        ("<4>",),
        ("<6>",),
        ("<4>",),
    ]
    for label, bits in (("W6A6 per-token", 6), ("W4A4 per-token", 4)):
        losses = [-np.take_along_axis(oracle.log_probabilities(r, (bits,)), r[1:, None], -1) for r in oracle.windows]
        assert rows[label].fp_prefix[0].perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
        assert rows[label].prefix is not None
        assert rows[label].prefix.token_ids == (bits,)
    # The quantized rows too: at six bits, the numbers behind another token are other ones.
    scheme, reused = "naive-w6a6", cells.of_bits(parse_scheme("naive-w6a6"))
    assert rows["W6A6 per-token"].with_prefix == reused.scores("", reused.in_scheme(scheme, reused.prefix))
    assert rows["W6A6 per-token"].with_prefix != reused.scores("", cells.in_scheme(scheme, cells.prefix))


def test_an_averaged_position_is_a_step_of_its_own_behind_the_papers_search(desk: Desk, tmp_path: Path) -> None:
    cells = desk.cells(tmp_path, search__average_tokens=64, tuning__loss="ce")
    study = run_study(cells, ("table3",), "")
    assert study.prefix.averaged
    assert "the mean of many first tokens" in " ".join(introduction(study))
    rows = {step.label: step for step in study.table3 or ()}
    assert list(rows)[:3] == ["no prefix", "+ greedy search", "+ averaged first position"]
    model = cells.run.get(cells.pipeline.model)
    tokens = model.compute_prefix(study.prefix.token_ids)
    assert rows["+ greedy search"].fp == cells.scores("", Variant(tokens))
    assert rows["+ averaged first position"].fp == cells.scores("", Variant(cells.searched))
    assert cells.searched.digest != tokens.digest


def test_low_bits_are_also_measured_with_rotated_inputs(whole: Whole, desk: Desk) -> None:
    cells, rows = whole.cells, {pair.label: pair for pair in whole.study.table4 or ()}
    for bits in ("w6a6", "w4a4"):
        variant = cells.in_scheme(f"smoothquant-{bits}", cells.empty, rotated=True)
        assert variant.smoothing is not None
        assert variant.smoothing.rotations
        assert rows[f"the same {bits.upper()}, inputs rotated"].without == cells.scores("", variant)
    unrotated = desk.cells(whole.work, **{f"smoothing__{name}": 0 for name in ROTATIONS})
    assert len(run_study(unrotated, ("table4",), "").table4 or ()) == 4


def test_the_schemes_are_the_papers_and_the_last_is_deployable(whole: Whole) -> None:
    rows = whole.study.table1 or ()
    assert len(rows) == 7
    assert [row.deployable for row in rows] == [False] * 6 + [True]
    assert [row.smoothing_alpha for row in rows][:6] == [None, 0.8] * 3
    assert sum("static" in str(row.scheme) for row in rows) == 2


def test_steps_are_recipes_and_the_first_has_no_prefix(whole: Whole) -> None:
    steps = whole.study.table3 or ()
    assert [step.prefix for step in steps] == ["none", "searched", "tuned", "tuned"]
    assert steps[0].fp == whole.study.fp
    assert steps[1].fp == whole.study.fp_prefix
    assert steps[2].settings["tuning.error_weight"] == 0.0
    # Without the quantization error nothing would keep the sink in an invisible prefix.
    assert [step.settings["tuning.loss"] for step in steps[2:]] == ["distill", "distill"]
    assert steps[3].settings["tuning.error_weight"] == whole.cells.pipeline.recipe.tuning.error_weight
    for step in (*steps, *(whole.study.remedies or ())):
        whole.cells.pipeline.recipe.merged(step.settings)


def test_scales_are_a_remedy_only_of_a_loss_that_trains_them(desk: Desk, whole: Whole) -> None:
    def remedies(study: Study) -> list[str]:
        return [step.label for step in study.remedies or () if "tuned" in step.label]

    assert remedies(whole.study) == ["+ tuned prefix"]
    cells = desk.cells(whole.work, tuning__loss="distill")
    assert remedies(run_study(cells, ("remedies",), "")) == ["+ tuned prefix", "+ tuned scales"]


def test_only_the_deployed_scheme_and_remedies_from_the_rotation_on_are_rotated(desk: Desk, whole: Whole) -> None:
    cells = desk.cells(whole.work)
    assert cells.built(cells.searched).variant.smoothing.rotations
    assert not cells.in_scheme("smoothquant-o1", cells.searched).smoothing.rotations
    steps = {step.label: step.settings for step in whole.study.remedies}
    labels = list(steps)
    rotated = [label for label, chosen in steps.items() if chosen.get("smoothing.rotate_down") != 0]
    assert rotated == labels[labels.index("+ rotation") :]


def test_a_finished_study_is_repeated_without_measuring_anything(desk: Desk, whole: Whole) -> None:
    again = desk.cells(whole.work)
    study = run_study(again, choose_parts(()), NO_TASKS)
    assert all(cell.reused for cell in study.cells)
    assert not any(cell.reused for cell in whole.study.cells)
    assert {t.stage for t in again.run.times if not t.reused} <= {"load"}
    fields = {"created", "cells"}
    assert study.model_dump(exclude=fields) == whole.study.model_dump(exclude=fields)


def test_a_stopped_study_goes_on_at_the_next_cell(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Cells._scored
    made: list[str] = []

    def stop_at_the_third(self: Cells, label: str, *rest: Any) -> dict[str, Any]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(label)
        return measure(self, label, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Cells, "_scored", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run_study(desk.cells(tmp_path, search__enabled=False), ("table4",), "")
    study = run_study(desk.cells(tmp_path, search__enabled=False), ("table4",), "")
    assert [cell.reused for cell in study.cells] == [True] * 2 + [False] * (len(study.cells) - 2)


def test_other_texts_and_windows_are_other_cells(desk: Desk, whole: Whole) -> None:
    def fresh(**changes: object) -> set[bool]:
        cells = desk.cells(whole.work, **changes)
        run_study(cells, ("table5",), "")
        return {cell.reused for cell in cells.done.values()}

    assert fresh() == {True}
    assert fresh(tuning__learning_rate=0.5) == {True}
    assert fresh(evaluation__window=32) == {False}


def test_without_a_prefix_the_columns_with_it_are_empty_and_the_ablation_is_left_out(
    desk: Desk, tmp_path: Path
) -> None:
    cells = desk.cells(tmp_path, search__enabled=False)
    study = run_study(cells, ("table3", "remedies", "table5", "table6", "figure3"), "")
    assert study.left_out == {"table3": NO_PREFIX, "remedies": NO_PREFIX}
    assert study.table5 is not None
    assert study.table5.with_prefix is None
    assert study.table6 is not None
    assert study.table6.search_seconds is None
    assert study.figure3 is not None
    assert not study.figure3.with_prefix


def test_a_recipe_that_tunes_puts_the_tuned_prefix_into_every_column(desk: Desk, whole: Whole) -> None:
    cells = desk.cells(whole.work, tuning__enabled=True)
    assert cells.prefix.token_ids == cells.searched.token_ids
    found = cells.scores("FP", Variant(cells.prefix))
    assert found != whole.study.fp_prefix


def test_paths_of_this_machine_stay_out_of_the_document(desk: Desk, whole: Whole) -> None:
    text = whole.study.to_text()
    assert str(desk.model.parent) not in text
    assert str(Path(desk.texts[0]).parent) not in text
    assert whole.study.recipe["model"] == desk.model.name


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(UsageError, match="table9"):
        choose_parts(["table9"])
    assert choose_parts(["figure3", "table1"]) == ("table1", "figure3")


def test_a_text_shorter_than_a_window_is_refused(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("fox")
    cells = desk.cells(tmp_path / "work", [str(tmp_path / "short.txt")], search__enabled=False)
    with pytest.raises(UsageError, match="window"):
        run_study(cells, ("figure2",), "")


def test_scores_name_their_text(whole: Whole) -> None:
    rows: list[tuple[Score, ...]] = [step.scores for step in whole.study.remedies or ()]
    assert all([score.text for score in row] == ["first.txt", "second.txt"] for row in rows)
