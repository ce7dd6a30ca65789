"""Rows and sentences follow the data: studies made by hand, with the expectation worked out beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cushion_deploy.study.document import PARTS, Study
from cushion_deploy.study.paper import paper_tables
from cushion_deploy.study.statements import headline, introduction, sentences
from cushion_deploy.study.tables import paper_table, tables

ByHand = Callable[..., Study]
value = st.floats(0.5, 1e5)
quiet = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def score(perplexity: float | None, divergence: float | None = 0.1, text: str = "wiki") -> dict[str, Any]:
    return {
        "text": text,
        "perplexity": perplexity,
        "stderr": 0.5,
        "divergence": divergence,
        "divergence_stderr": 0.01,
    }


def pair(label: str, without: float | None, behind: float | None, **more: Any) -> dict[str, Any]:
    return {"label": label, "scheme": label, "without": [score(without)], "with": [score(behind)], **more}


def step(label: str, perplexity: float, fp: float = 19.0, divergence: float = 0.1) -> dict[str, Any]:
    scores = [score(perplexity, divergence)]
    return {"label": label, "settings": {}, "prefix": "searched", "scores": scores, "fp": [score(fp)]}


def signed(ratio: float) -> float:
    return round(100 * ratio, 1)


def numbers(text: str) -> list[float]:
    found = re.findall(r"[−+]?[\d,]+(?:\.\d+)?", text)
    return [float(n.replace("−", "-").replace(",", "")) for n in found if re.search(r"\d", n)]


def test_a_row_of_table_1_is_perplexity_and_its_distance_from_both_references(by_hand: ByHand) -> None:
    study = by_hand(table1=[pair("static", 30.0, 22.0)])
    (table,) = tables(study, "table1")
    fp = ("20.00 ± 0.50", "", "0.0000"), ("19.00 ± 0.50", "", "−5.0 %", "0.1000")
    static = ("30.00 ± 0.50", "+50.0 %"), ("22.00 ± 0.50", "+15.8 %", "+10.0 %")
    assert table.rows[0] == ("FP", *fp[0], *fp[1])
    assert table.rows[1] == ("static", *static[0], "0.1000 ± 0.0100", *static[1], "0.1000 ± 0.0100")
    assert "position 16" not in " ".join(introduction(study))
    later = {"kl_after_16": 0.05, "kl_after_16_stderr": 0.002}
    study = by_hand(table1=[pair("static", 30.0, 22.0) | {"with": [score(22.0) | later]}])
    (table,) = tables(study, "table1")
    assert [i for i, name in enumerate(table.head) if name == "KL from position 16"] == [8]
    assert [row[8] for row in table.rows] == ["—", "0.0500 ± 0.0020"]


def test_the_divergence_from_position_16_on_decides_what_is_closest(by_hand: ByHand) -> None:
    later = {"ranges: mse": (0.1, 0.08), "+ smoothing": (0.09, 0.07), "+ tuned scales": (0.11, 0.02)}
    rows = [step(name, 22.0, divergence=whole) for name, (whole, _) in later.items()]
    for row, (_, value) in zip(rows, later.values(), strict=True):
        row["scores"][0] |= {"kl_after_16": value, "kl_after_16_stderr": 0.003}
    study = by_hand(remedies=rows)
    said = sentences(study, "remedies")[-1]
    assert "'+ tuned scales' is closest to the original model: 0.1100 ± 0.0100 nats per token, 0.0200 ± 0.0030" in said
    assert "The largest single step is '+ tuned scales', which lowers the divergence by 0.0500 nats" in said
    (table,) = tables(study, "remedies")
    assert table.head[-2:] == ("KL", "KL from position 16")
    assert table.rows[-1][-2:] == ("0.1100 ± 0.0100", "0.0200 ± 0.0030")


def test_a_row_with_its_own_prefix_is_compared_with_fp_behind_that_one(by_hand: ByHand) -> None:
    own = {"prefix": {"token_ids": [3], "tokens": [","], "tuned": False}, "fp_prefix": [score(16.0)]}
    study = by_hand(table4=[pair("W6A6", 30.0, 22.0), pair("W4A4", 40.0, 24.0, **own)])
    (table,) = tables(study, "table4")
    assert [row[5] for row in table.rows[1:]] == ["+15.8 %", "+50.0 %"], "22 of 19, 24 of 16"
    said = " ".join(sentences(study, "table4"))
    assert "The prefix of W4A4 was searched with its bits, and is not that of the other tables: `,`." in said
    assert "The prefix of W6A6" not in said


@quiet
@given(rows=st.lists(st.tuples(value, value), min_size=1, max_size=7))
def test_table_1_says_how_many_schemes_gain_and_which_is_worst(
    by_hand: ByHand, rows: list[tuple[float, float]]
) -> None:
    study = by_hand(table1=[pair(f"scheme{i}", a, b) for i, (a, b) in enumerate(rows)])
    said = " ".join(sentences(study, "table1"))
    gains = sum(b < a for a, b in rows)
    assert f"lowers perplexity in {gains} of {len(rows)} scheme" in said
    worst = max(a for a, _ in rows)
    assert re.search(rf"On wiki, scheme{[a for a, _ in rows].index(worst)} is worst: perplexity {worst:,.2f} ", said)


@quiet
@given(rows=st.lists(st.tuples(value, value), min_size=1, max_size=5))
def test_every_row_has_a_cell_for_every_heading(by_hand: ByHand, rows: list[tuple[float, float]]) -> None:
    pairs = [pair(f"scheme{i}", a, b) for i, (a, b) in enumerate(rows)]
    steps = [step(f"step{i}", a, b) for i, (a, b) in enumerate(rows)]
    study = by_hand(table1=pairs, table4=pairs, table3=steps, remedies=steps)
    for part in PARTS:
        for table in (*tables(study, part), *filter(None, [paper_table(part)])):
            assert {len(row) for row in table.rows} == {len(table.head)}
            assert table.strong <= set(range(len(table.rows)))


def test_what_is_not_finite_says_so_and_is_never_a_gain(by_hand: ByHand) -> None:
    study = by_hand(table1=[pair("broken", 30.0, None)])
    (table,) = tables(study, "table1")
    assert table.rows[1][4:7] == ("not finite", "—", "—")
    assert "lowers perplexity in 0 of 1 scheme" in " ".join(sentences(study, "table1"))


def test_a_prefix_that_makes_perplexity_finite_is_a_gain(by_hand: ByHand) -> None:
    study = by_hand(table1=[pair("broken", None, 21.0), pair("other", 25.0, 26.0)])
    assert "lowers perplexity in 1 of 2 schemes" in " ".join(sentences(study, "table1"))


def test_a_part_of_a_text_is_said_beside_every_result(by_hand: ByHand) -> None:
    part = {"name": "wiki", "window": 64, "tokens": 1260, "text_tokens": 5000}
    rows = {"table1": [pair("static", 40.0, 22.0, deployable=True)], "remedies": [step("ranges: max", 25.0)]}
    study = by_hand(texts=[part], **rows)
    # 20 windows of 64 tokens, 63 of each scored.
    words = "wiki (first 1,280 of 5,000 tokens)"
    captions = [table.caption for name in rows for table in tables(study, name)]
    for text in (headline(study), *captions, " ".join(introduction(study)), *sentences(study, "remedies")[1:]):
        assert words in text
    assert f"On {words}, static is worst" in " ".join(sentences(study, "table1"))
    whole = by_hand(texts=[part | {"text_tokens": 1300}], **rows)
    assert "first" not in headline(whole)
    assert "wiki (all 1,300 tokens) in windows of 64" in " ".join(introduction(whole))


def test_the_headline_is_the_deployable_row_against_fp(by_hand: ByHand) -> None:
    study = by_hand(table1=[pair("static", 99.0, 98.0), pair("ours", 40.0, 20.6, deployable=True)])
    assert headline(study).startswith("small in static W8A8 is +3.0 % over FP perplexity on wiki with the prefix")
    assert "+100 % over FP without it" in headline(study)
    assert "9 tables" in headline(by_hand())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((40.0, 22.0, 20.0), "the search alone brings 90 % of the gain"),
        ((40.0, 22.0, 23.0), "the search alone brings all of the gain"),
        ((40.0, 41.0, 20.0), "tuning alone brings all of the gain"),
        ((40.0, 41.0, 42.0), "the method brings no gain"),
    ],
)
def test_table_3_says_what_share_the_search_brings(
    by_hand: ByHand, values: tuple[float, float, float], words: str
) -> None:
    names = ("no prefix", "+ greedy search", "+ prefix tuning")
    study = by_hand(table3=[step(name, v) for name, v in zip(names, values, strict=True)])
    assert words in " ".join(sentences(study, "table3"))


def test_remedies_name_the_closest_to_the_original_and_the_largest_single_step(by_hand: ByHand) -> None:
    rows = [
        step("ranges: max", 25.0, divergence=0.5),
        step("ranges: mse", 24.0, divergence=0.1),
        step("+ smoothing", 23.0, divergence=0.09),
        step("+ tuned scales", 22.0, fp=20.0, divergence=0.02),
    ]
    said = sentences(by_hand(remedies=rows), "remedies")[-1]
    assert "'+ tuned scales' is closest" in said
    assert "at perplexity 22.00 ± 0.50, +10.0 % over FP and +10.0 % over FP with the same prefix" in said
    assert "The largest single step is '+ tuned scales', which lowers the divergence by 0.0700 nats" in said
    (table,) = tables(by_hand(remedies=rows), "remedies")
    assert table.strong == {4}


@quiet
@given(values=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=7))
def test_average_accuracy_is_the_mean_over_tasks(by_hand: ByHand, values: list[tuple[float, float]]) -> None:
    def results(column: int) -> list[dict[str, Any]]:
        return [
            {"task": f"task{i}", "metric": "acc", "n": 10, "value": row[column], "stderr": 0.1}
            for i, row in enumerate(values)
        ]

    row = {"label": "FP", "scheme": None, "without": results(0), "with": results(1)}
    average, every = tables(by_hand(table2=[row]), "table2")
    means = [100 * sum(v[column] for v in values) / len(values) for column in (0, 1)]
    assert [float(cell) for cell in average.rows[0][1:3]] == pytest.approx(means, abs=0.006)
    assert numbers(average.rows[0][3]) == pytest.approx([means[1] - means[0]], abs=0.006)
    assert len(every.head) == 1 + len(values)


def test_tasks_of_one_kind_are_named_once(by_hand: ByHand) -> None:
    def results(*names: str, n: int = 25) -> list[dict[str, Any]]:
        return [{"task": name, "metric": "acc", "n": n, "value": 0.5, "stderr": 0.03} for name in names]

    row = {"label": "FP", "scheme": None, "without": results("local_copa", "local_piqa_x"), "with": ()}
    study = by_hand(table2=[row])
    _, every = tables(study, "table2")
    assert every.head == ("scheme", "copa", "piqa_x")
    assert every.caption == "Every task, % (acc, 25 rows each)"
    # Of the mean of two independent values with 3 points each: 3 / sqrt(2).
    assert "The standard error of this average is 2.1 points." in sentences(study, "table2")[0]
    mixed = [*results("a_x"), *results("b_x", n=7)]
    _, every = tables(by_hand(table2=[{**row, "without": mixed}]), "table2")
    assert every.head == ("scheme", "a_x (acc, n=25)", "b_x (acc, n=7)")


def test_table_5_says_how_far_the_largest_lies_above_the_median(by_hand: ByHand) -> None:
    blocks = {"without": {"top1": 200.0, "top10": 2.0, "median": 1.0}, "with": {"top1": 8.0, "top10": 2.0, "median": 2}}
    (said,) = sentences(by_hand(table5={"windows": 3, "length": 64, **blocks}), "table5")
    assert "200.00, 200 times the median; with the prefix it is 8.00, 4 times the median" in said


def test_table_6_says_what_a_full_scan_would_take(by_hand: ByHand) -> None:
    effort = {
        "search_seconds": 90,
        "search_mode": "screen",
        "positions_scored": 100,
        "positions_full_scan": 4000,
        "candidates_scored": 12,
        "tuning_seconds": 30,
        "tuning_steps": 5,
        "tuning_loss": "distill",
    }
    study = by_hand(table6=effort)
    said = " ".join(sentences(study, "table6"))
    assert (
        "took 1 min 30 s and scored 12 candidates exactly; a scan of the whole vocabulary would need 40 times" in said
    )
    assert tables(study, "table6")[0].rows[-1][:2] == ("both", "2 min 0 s")
    assert sentences(by_hand(table6={}), "table6") == ["No search was run."]


def test_figure_3_is_averaged_over_layers(by_hand: ByHand) -> None:
    without = [{"layer": i, "prefix": 0, "first": f, "rest": 1 - f} for i, f in enumerate((0.2, 0.6))]
    behind = [{"layer": i, "prefix": 0.5, "first": 0.1, "rest": 0.4} for i in range(2)]
    said = " ".join(sentences(by_hand(figure3={"tokens": 9, "without": without, "with": behind}), "figure3"))
    assert "40 % of the attention is on the first token" in said
    assert "50 % is on the prefix, 10 % on the first token of the text and 40 % on all others" in said


def test_what_was_left_out_says_why(by_hand: ByHand) -> None:
    assert sentences(by_hand(left_out={"table2": "lm-eval is not installed"}), "table2") == [
        "Left out: lm-eval is not installed."
    ]


def test_the_introduction_shows_the_prefix_and_whether_it_is_tuned(by_hand: ByHand) -> None:
    assert "1 token long, `⏎`, as the search found it" in " ".join(introduction(by_hand()))
    tuned = by_hand(prefix={"token_ids": [1, 2], "tokens": ["a", "`"], "tuned": True})
    assert "2 tokens long, `a` and `‹U+0060›`, tuned after the search" in " ".join(introduction(tuned))
    assert "There is no prefix" in " ".join(introduction(by_hand(prefix={}, fp_prefix=[])))


def test_the_papers_numbers_are_those_it_printed() -> None:
    table = paper_tables()["table1"]
    static = table.row("per-tensor static")
    assert table.row("FP16").without == (5.47, 6.13, 5.25, 10.86, 11.37)
    assert static.without == (9250.33, 9759.46, 85.51, 11.45, 11.93)
    assert static.with_prefix == (5.98, 7.41, 5.84, 11.00, 11.50)
    assert paper_tables()["table5"].row("LLaMA3-8B").with_prefix == (4.94, 0.16, 0.06)
    assert set(paper_tables()) == {f"table{i}" for i in range(1, 7)}


def test_the_papers_own_sums_hold() -> None:
    for row in paper_tables()["table6"].rows:
        search, tuning, both = row.without
        assert both == pytest.approx(search + tuning)
    fp, bare, greedy, tuned, full = (row.without[0] for row in paper_tables()["table3"].rows)
    assert [greedy - bare, tuned - greedy, full - tuned] == pytest.approx([8.84, 0.35, 0.53])
    assert full < fp


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"fp": [score(float("nan"))], "table1": []},
        {"table1": [pair("x", 1.0, 1.0) | {"without": [score(1.0, text="other")]}]},
        {"left_out": {"table9": "why"}},
        {"prefix": {"token_ids": [1], "tokens": []}},
    ],
)
def test_a_document_that_contradicts_itself_is_refused(by_hand: ByHand, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        by_hand(**change)
